"""Rows become examples before a run starts: conversations by their template, cut where they are long, and counted."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedlotr import SimulationConfig
from fedlotr.commands import doctor
from fedlotr.run.checking import check
from fedlotr.simulate import main
from tests.support import read_run

Rows = list[dict[str, Any]]
GIVEN = (
    "--clients 2 --sample 2 --rounds 1 --partition iid --method lora --rank 2 --engine local --threads 1 --samples 0"
)


def chat(*said: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(said)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def folder(path: Path, rows: Rows, test: Rows | None = None) -> Path:
    path.mkdir(exist_ok=True)
    for split, held in (("train", rows), ("test", rows[:4] if test is None else test)):
        (path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in held), encoding="utf-8")
    return path


def words(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    given = f"--model {model} --data {data} {GIVEN} --engine local --threads 1 --dtype float32"
    given += f" --public-examples 2 --out {out}"
    return [*given.split(), *more]


def configured(model: Path, data: Path, **options: Any) -> SimulationConfig:
    return SimulationConfig(
        **{
            **{"model": str(model), "data": str(data), "clients": 2, "sample": 2, "partition": "iid", "method": "lora"},
            **{"rank": 2, "engine": "local", "threads": 1, "dtype": "float32", "public_examples": 2, "samples": 0},
            **options,
        }
    )


def all_frame() -> dict[str, Any]:
    """A conversation of which nothing can be cut and most of which is not learnt."""
    turns = chat(*["x", ""] * 30, "y", "z")["messages"]
    return {"messages": [{**turn, "weight": 0} if turn["content"] == "" else turn for turn in turns]}


CHATS = [chat(f"What is {n}?", f"It is {n}.", f"And {n} more?", f"{n} more.", system="Be brief.") for n in range(12)]


def test_the_examples_that_are_trained_on_are_shown_with_what_is_learnt_marked(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "rows", CHATS)
    assert main(words(stories, data, tmp_path / "run", "--show-examples", "2")) == 0
    shown = capsys.readouterr().err
    assert shown.count("of them learnt, between ⟦ and ⟧") == 2 and shown.count("⟦") == 2 + 4 == shown.count("⟧")
    assert "Be brief." in shown and "⟦Be" not in shown
    assert "show_examples" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert doctor.main(words(stories, data, tmp_path / "other", "--show-examples", "1")) == 0
    first = next(line for line in shown.splitlines() if line.startswith("example 1 of client 0"))
    assert first in capsys.readouterr().out, "doctor shows the same without a run"
    assert doctor.main(words(stories, data, tmp_path / "other", "--show-examples", "1", "--max-length", "40")) == 0
    cut = re.search(r"example 1 of client 0 .*: 40 tokens, .*; ([\d,]+) of the row's are cut", capsys.readouterr().out)
    whole = re.search(r": (\d+) tokens", first)
    assert cut and whole and int(cut[1]) == int(whole[1]) - 40


def test_auto_takes_what_covers_the_data_and_a_run_goes_on_with_that(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("Go on", " ".join(["and"] * 40 * (number == 5) + ["so"])) for number in range(12)]
    out = tmp_path / "run"
    given = words(stories, folder(tmp_path / "rows", rows), out, "--max-length", "auto")
    assert main(given) == 0
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert config["max_length"] > 40
    assert read_run(out)[0]["texts"]["train"]["rows_cut"] == 0 == read_run(out)[0]["texts"]["test"]["rows_cut"]
    assert main([*given, "--rounds", "2", "--resume"]) == 0, capsys.readouterr().err
    assert len(read_run(out)[1]) == 2


def test_auto_stops_at_the_models_positions(tiny_gpt2: Path, tmp_path: Path) -> None:
    positions = json.loads((tiny_gpt2 / "config.json").read_text(encoding="utf-8"))["n_positions"]
    rows = [{"prompt": "So", "answer": "and " * 3 * positions} for _ in range(8)]
    checked = check(configured(tiny_gpt2, folder(tmp_path / "rows", rows), max_length="auto"))
    assert checked.config.max_length == positions == checked.examples.train.examples.lengths.max()


def test_what_is_cut_and_left_out_is_counted_and_said(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 20 rows one answer is too long, and one conversation's framing leaves no room at all."""
    rows = [chat("What?", "This.") for _ in range(20)]
    rows[3] = chat("What?", "word " * 60)
    rows[7] = all_frame()
    data = folder(tmp_path / "rows", rows, rows)
    assert main(words(stories, data, tmp_path / "run", "--max-length", "24", "--public-examples", "0")) == 0
    shown = " ".join(capsys.readouterr().err.split())
    summary = read_run(tmp_path / "run")[0]
    texts = summary["texts"]
    assert texts["left_out"] == {"train": 1, "test": 1} and summary["clients"] == 2
    assert texts["test"]["answers_cut"] == pytest.approx(1 / 19)
    assert "--max-length 24 cuts 5.3% (of train)" in shown and "5.3% (of test) lose the end of what is learnt" in shown
    assert "rows left out, since --max-length 24 has no room for prompt and answer: 1 of train and 1 of test" in shown


def test_a_client_that_has_nothing_left_is_named_before_the_run(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**all_frame(), "client": "long"} for _ in range(4)]
    rows += [{**chat("What?", "This."), "client": "short"} for _ in range(8)]
    given = words(stories, folder(tmp_path / "rows", rows, rows[-2:]), tmp_path / "run", "--max-length", "24")
    assert main([*given, "--partition", "natural", "--public-examples", "0"]) == 2
    assert "1 of 2 clients (1) have no example left: their prompts and answers have no room" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template that drops what was thought in earlier turns: a conversation's beginning is no text's beginning."""


@pytest.fixture
def thinking(stories: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = THINKS
    tokenizer.save_pretrained(tmp_path / "thinking")
    AutoModelForCausalLM.from_pretrained(stories).save_pretrained(tmp_path / "thinking")
    return tmp_path / "thinking"


def test_where_each_answer_is_an_example_of_its_own_rows_and_clients_are_counted_so(
    thinking: Path, tmp_path: Path
) -> None:
    rows = [{**chat("a?", f"hm</think>{n}.", "b?", f"ah</think>{n}!"), "client": n % 3} for n in range(12)]
    data = folder(tmp_path / "rows", rows)
    config = configured(thinking, data, clients=3, partition="natural", public_examples=3, client_eval=0.25)
    checked = check(config)
    examples = checked.examples.train
    assert all(len(part) % 2 == 0 for part in checked.parts) and len(examples.examples) == 24 == len(examples.owner)
    used = [*np.concatenate(checked.parts), *np.concatenate(checked.held_back), *checked.public]
    assert sorted(used) == list(range(24)), "every example is somebody's, once"
    for part, held in zip(checked.parts, checked.held_back, strict=True):
        clients = {checked.source.train["client"][int(row)] for row in [*part, *held]}
        assert len(clients) == 1
        trained, kept = ({int(examples.owner[row]) for row in rows} for rows in (part, held))
        assert not trained & kept, "no conversation is both trained on and scored"
    decoded = [
        checked.tokenizer.decode(examples.examples.tokens[a:b])
        for a, b in zip(examples.examples.offsets, examples.examples.offsets[1:], strict=False)
    ]
    assert sum("hm" in str(text) for text in decoded) == 12, "a thought stands where it is learnt, and nowhere else"


def test_with_privacy_a_conversation_is_one_example(thinking: Path, tmp_path: Path) -> None:
    """Noise hides one example: a conversation that were two would be hidden half as well as is said."""
    rows = [chat(f"{n} a?", f"hm</think>{n}.", "b?", f"ah</think>{n}!") for n in range(12)]
    test = [chat(f"{n} else?", f"no</think>{n}.", "so?", f"oh</think>{n}!") for n in range(4)]
    private = {"privacy": "example", "noise_multiplier": 1.0, "public_eval": True, "public_examples": 0}
    checked = check(configured(thinking, folder(tmp_path / "rows", rows, test), **private))
    assert sum(map(len, checked.parts)) == 12 == len(checked.examples.train.examples)
    assert len(set(checked.examples.train.owner.tolist())) == 12


def test_a_template_that_fails_tells_nothing_of_hidden_rows(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template is a program of others: it may repeat what a row says in the words with which it refuses it."""
    monkeypatch.chdir(tmp_path)
    Path("form.py").write_text("def form(messages):\n    raise ValueError(messages[0]['content'])\n", encoding="utf-8")
    data = folder(tmp_path / "rows", [chat(f"secret {n}", "x") for n in range(12)], CHATS[:2])
    refusing = tmp_path / "refusing"
    shutil.copytree(stories, refusing)
    (refusing / "chat_template.jinja").write_text("{{ raise_exception(messages[0].content) }}", encoding="utf-8")
    private = ["--privacy", "example", "--noise-multiplier", "1", "--public-eval", "--public-examples", "0"]
    for model, given, named in ((stories, ["--template", "form.py:form"], "form.py:form"), (refusing, [], "auto")):
        words_given = [*words(model, data, tmp_path / "run"), *given, *private]
        assert main(words_given) == 2
        said = capsys.readouterr().err
        assert f"--template {named} cannot write it out" in said and "secret" not in said
        assert "more rows" not in said, "how many rows are so is private too"
    assert main([*words(stories, data, tmp_path / "run"), "--template", "gone.py:form", *private]) == 2
    assert "there is no file gone.py" in capsys.readouterr().err, "that is of no row"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--template", "chat"], "the tokenizer has no chat template"),
        (["--template", "plian"], "--template plian: not a template, did you mean 'plain'?"),
        (["--template", "gone.py:form"], "there is no file gone.py"),
        (["--template-date", "01.02.2026"], "expected a date as YYYY-MM-DD"),
        (["--max-length", "1"], "expected 'auto' or a number of tokens from 2"),
        (["--max-length", "long"], "expected 'auto' or a number of tokens from 2"),
        (["--privacy", "example", "--noise-multiplier", "1", "--show-examples", "1"], "it would print rows that are"),
        (["--privacy", "example", "--noise-multiplier", "1", "--max-length", "auto"], "the longest of the hidden rows"),
    ],
)
def test_what_cannot_be_shown_so_is_refused_in_a_line(
    options: list[str], said: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(stories, folder(tmp_path / "rows", CHATS), tmp_path / "run", *options)
    assert main(given) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_classifier_has_no_template(
    tiny_bert: Path, animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(tiny_bert), "--data", str(animals), "--out", str(tmp_path / "run")]
    for option in (["--template", "none"], ["--train-on", "all"], ["--eos"], ["--template-date", "2026-02-01"]):
        assert main([*given, *option]) == 2
        assert f"{option[0]}: it is about what a language model is shown" in capsys.readouterr().err


def test_everything_is_learnt_where_that_is_asked_for_and_texts_end_in_eos(stories: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "rows", CHATS)
    some, every = (check(configured(stories, data, train_on=of)).examples.train.examples for of in ("assistant", "all"))
    count = [int((e.batch(range(len(e))).labels >= 0).sum()) for e in (some, every)]
    assert some.targets is not None and every.targets is None and count[1] == every.lengths.sum() - len(every)
    assert count[0] < count[1]
    texts = folder(tmp_path / "texts", [{"text": f"It is {n}."} for n in range(12)])
    without, ended = (check(configured(stories, texts, eos=eos)).examples.train.examples for eos in (False, True))
    assert (ended.lengths == without.lengths + 1).all()
