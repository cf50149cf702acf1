"""Text that the model cannot see is said: what its tokenizer does not know, and what is cut."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from fedlotr import SimulationConfig
from fedlotr.commands import doctor
from fedlotr.data import Encoded, Shares, Task, encode_rows
from fedlotr.data.seen import Seen
from fedlotr.run.fitting_texts import seen_in_words, unseen, what_is_seen
from fedlotr.simulate import main
from fedlotr.training.examples import Examples
from tests.support import read_run


def words(*known: str, **special: str) -> hf.PreTrainedTokenizerBase:
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(("<unk>", *known))}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)  # type: ignore[no-untyped-call]


def seen(task: Task, columns: dict[str, Any], tokenizer: Any, max_length: int) -> Seen:
    return encode_rows(task, Dataset.from_dict(columns), tokenizer, max_length).seen


def test_tokens_are_counted_as_known_unknown_and_cut() -> None:
    tokenizer = words("a", "b", bos_token="<s>", eos_token="</s>")
    rows = {"text": ["a b a", "x a", "a b x b a", "", "x y"], "label": ["p", "q", "p", "q", "p"]}
    found = seen(Task("classification", ("text",), ("p", "q")), rows, tokenizer, 3)
    assert found.tokens.tolist() == [3, 2, 3, 0, 2] and found.unknown.tolist() == [0, 1, 1, 0, 2]
    assert found.cut.tolist() == [0, 0, 2, 0, 0]
    assert found.shares() == Shares(unknown=4 / 10, rows_cut=1 / 5, tokens_cut=2 / 12)
    assert found.shares(np.array([4])) == Shares(unknown=1, rows_cut=0, tokens_cut=0)


def test_pairs_and_language_models_are_counted_too() -> None:
    tokenizer = words("a", "b", bos_token="<s>", eos_token="</s>")
    pair = {"text_a": ["a b a b", "a"], "text_b": ["b b", "x"], "label": ["p", "q"]}
    found = seen(Task("classification", ("text_a", "text_b"), ("p", "q")), pair, tokenizer, 4)
    assert found.cut.tolist() == [2, 0] and found.unknown.tolist() == [0, 1]
    plain = seen(Task("causal-lm", ("text",), ()), {"text": ["a b a b", "a x"]}, tokenizer, 4)
    assert plain.cut.tolist() == [1, 0] and plain.tokens.tolist() == [3, 2] and plain.unknown.tolist() == [0, 1]
    asked = {"prompt": ["a b a b a b", "a "], "answer": ["b a", "x"]}
    chat = seen(Task("causal-lm", ("prompt", "answer"), ()), asked, tokenizer, 6)
    assert chat.cut.tolist() == [4, 0] and chat.unknown.tolist() == [0, 1]


def test_a_text_that_leaves_no_token_is_not_seen() -> None:
    made = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # which drops what it does not know
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made)  # type: ignore[no-untyped-call]
    found = seen(Task("causal-lm", ("text",), ()), {"text": ["ab", "\u0623\u0628", " "]}, tokenizer, 8)
    assert found.unknown.tolist() == [0] and found.tokens.tolist() == [2]


def test_where_one_token_frames_texts_and_is_unknown_nothing_is_called_unknown() -> None:
    made = Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, unk_token="<e>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<e>", "bos_token": "<e>", "eos_token": "<e>"}
    gpt = hf.PreTrainedTokenizerFast(tokenizer_object=made, **special)  # type: ignore[no-untyped-call]
    assert seen(Task("causal-lm", ("text",), ()), {"text": ["a a", "a"]}, gpt, 8).unknown.tolist() == [0, 0]


def counts(*rows: tuple[int, int, int]) -> Encoded:
    examples = Examples(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64))
    return Encoded(examples, Seen(*np.array(rows).T), np.arange(len(rows)), len(rows))


def test_a_tenth_of_all_or_of_one_client_is_warned_of() -> None:
    config = SimulationConfig(max_length=64)
    fine = counts(*[(100, 0, 0)] * 40)
    parts = [np.arange(20), np.arange(20, 39), np.array([39])]
    told = what_is_seen(config, fine, parts, fine)
    assert not unseen(told) and seen_in_words(told).startswith(
        "train: 0.0% of the tokens unknown, 0.0% cut (0.0% of the rows); worst client"
    )
    alone = counts(*[(100, 0, 0)] * 39, (100, 99, 0))
    (line,) = unseen(what_is_seen(config, alone, parts, fine))
    assert line.startswith("the tokenizer does not know 99.0% (of client 2, the worst) of the tokens")
    cut = counts(*[(64, 0, 30)] * 8, *[(30, 0, 0)] * 32)
    (line,) = unseen(what_is_seen(config, cut, parts, fine))
    assert line.startswith(
        "--max-length 64 cuts 20.0% (of train), 40.0% (of client 0, the worst), 0.0% (of test) of the"
    )
    short = counts(*[(30, 0, 0)] * 38, (64, 0, 1), (64, 0, 1))
    assert not unseen(what_is_seen(config, short, parts, fine)), "a token of a client's only row"
    hidden = config.model_copy(update={"privacy": "example"})
    assert what_is_seen(hidden, alone, parts, fine) == what_is_seen(hidden, fine, parts, fine)
    assert unseen(what_is_seen(hidden, fine, parts, alone)) == []
    assert "(of test)" in unseen(what_is_seen(hidden, fine, parts, counts((10, 5, 0))))[0]


def test_a_run_and_doctor_say_it(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    hf.BertModel.from_pretrained(tiny_bert).save_pretrained(base)
    words("one", "two", pad_token="<pad>").save_pretrained(base)
    for split in ("train", "test"):
        rows = [{"text": f"one {'two' if n % 2 else 'hundred and more words'}", "label": n % 2} for n in range(24)]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    given = f"--model {base} --data {tmp_path} --clients 2 --sample 2 --rounds 1 --partition shards:1 --method head"
    given += f" --engine local --threads 1 --dtype float32 --public-examples 4 --max-length 4 --out {tmp_path / 'run'}"
    assert main(given.split()) == 0
    shown = " ".join(capsys.readouterr().err.split())
    summary, _ = read_run(tmp_path / "run")
    assert summary["texts"]["train"]["unknown"] == pytest.approx(0.5, abs=0.05)
    assert summary["texts"]["worst_client"]["rows_cut"] == 0.9 and summary["texts"]["words"] in shown
    warned = [line for line in summary["warnings"] if "does not know" in line or "cuts" in line]
    assert len(warned) == 2 and all(f"warning: {line}" in shown for line in warned)
    assert doctor.main([*given.replace(str(tmp_path / "run"), str(tmp_path / "other")).split(), "--json"]) == 0
    found = [finding["text"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert {*warned, summary["texts"]["words"]} <= set(found)
