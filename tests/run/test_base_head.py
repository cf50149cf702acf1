"""A base that is a classifier already: its head is gone on with by its labels' names, or said to be dropped."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from fedlotr.commands import doctor
from fedlotr.models.loading import ModelSpec, load_base
from fedlotr.run.base_head import with_saved_head
from fedlotr.simulate import main
from tests import forks
from tests.support import read_run

SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 16, "max_position_embeddings": 130, "pad_token_id": 0}
KINDS: dict[str, Any] = {
    "roberta": lambda **labels: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL, **labels)),
    "llama": lambda **labels: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, **labels)),
    "bert": lambda **labels: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **labels)),
}


def classifier(at: Path, tokenizer: Path, kind: str, names: Sequence[str] | None, count: int = 0, **more: Any) -> Path:
    """A random classifier with a head that is far from zero, in a folder."""
    labels: dict[str, Any] = {"num_labels": count} if names is None else {"id2label": dict(enumerate(names))}
    if names is not None:
        labels["label2id"] = {name: row for row, name in enumerate(names)}
    model = KINDS[kind](**labels, **more)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.split(".")[0] in ("classifier", "score"):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    model.save_pretrained(at)
    hf.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(at)
    return at


def spec_of(folder: Path, labels: int) -> ModelSpec:
    return ModelSpec(str(folder), "classification", labels, False, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("sad", "glad", "mad"), ("glad", "mad", "sad")),
        (("YES", "No"), ("no", "yes")),
        (("x", "y", "z"), ("z", "x")),
        (None, ("0", "1", "2")),
    ],
)
def test_the_logits_of_a_class_are_those_of_its_name(
    kind: str, theirs: tuple[str, ...] | None, ours: tuple[str, ...], stories: Path, tmp_path: Path
) -> None:
    folder = classifier(tmp_path, stories, kind, theirs, count=3)
    spec, said = with_saved_head(spec_of(folder, len(ours)), ours)
    ids = torch.tensor([[3, 9, 41, 7]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted, found = whole(**given).logits[0], load_base(spec)(**given).logits[0]
    rows = [int(name) if theirs is None else [t.lower() for t in theirs].index(name) for name in ours]
    assert torch.equal(found, wanted[rows]) and found.abs().max() > 0.1
    assert (said is not None) == (theirs == ("x", "y", "z")) and "data lack: y" in (said or "data lack: y")
    meta = load_base(spec, meta=True)
    assert [t.shape for t in meta.parameters()] == [t.shape for t in load_base(spec).parameters()]


@pytest.mark.parametrize(
    ("theirs", "more", "ours", "message"),
    [
        (("joy", "rage"), {}, ("cold", "flu"), "a classifier of joy, rage; its head is dropped, as .* are cold, flu"),
        (("joy", "rage"), {}, ("joy", "rage", "awe"), "its head is dropped"),
        (None, {}, ("cold", "flu", "pox"), "a classifier of LABEL_0, LABEL_1, LABEL_2; its head is dropped"),
        (("a", "b"), {"problem_type": "multi_label_classification"}, ("a", "b"), "multi label classification of 2"),
        (("score",), {"problem_type": "regression"}, ("a", "b"), "it is a model of one score; its head is dropped"),
    ],
)
def test_a_head_for_others_is_dropped_and_that_is_said(
    theirs: tuple[str, ...] | None, more: Any, ours: tuple[str, ...], message: str, stories: Path, tmp_path: Path
) -> None:
    folder = classifier(tmp_path, stories, "bert", theirs, count=3, **more)
    given = spec_of(folder, len(ours))
    spec, said = with_saved_head(given, ours)
    assert spec == given and re.search(message, str(said))
    assert load_base(spec).classifier.weight.abs().max() == 0  # type: ignore[union-attr,operator]


def test_a_head_for_tokens_is_none_for_texts(stories: Path, tmp_path: Path) -> None:
    hf.ElectraForTokenClassification(hf.ElectraConfig(**SMALL, num_labels=2)).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path)
    spec, said = with_saved_head(spec_of(tmp_path, 2), ("0", "1"))
    assert not spec.head_rows and "a ElectraForTokenClassification of 2 labels; its head is dropped" in str(said)


def test_nothing_is_said_of_a_base_without_a_head(tiny_bert: Path, stories: Path) -> None:
    for folder in (tiny_bert, stories):
        assert with_saved_head(spec_of(folder, 2), ("a", "b")) == (spec_of(folder, 2), None)


def words(model: Path, data: Path, out: Path) -> list[str]:
    given = f"--model {model} --data {data} --clients 2 --sample 2 --rounds 1 --partition iid --method lora --rank 2"
    return [*given.split(), *f"--engine local --threads 1 --dtype float32 --public-examples 8 --out {out}".split()]


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        rows = [{"text": f"{split} {n}", "label": ("glad", "sad")[n % 2]} for n in range(24)]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_a_run_goes_on_with_the_head_and_its_adapter_names_what_it_gives(
    moods: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = classifier(tmp_path / "base", stories, "llama", ("sad", "glad"))
    assert main([*words(base, moods, tmp_path / "run"), "--lr", "1e-9", "--head-lr", "1e-9"]) == 0
    assert not any("head" in line for line in read_run(tmp_path / "run")[0]["warnings"])
    adapter = tmp_path / "run" / "adapter"
    saved = next(t for name, t in load_file(adapter / "adapter_model.safetensors").items() if "score" in name)
    theirs = load_file(base / "model.safetensors")["score.weight"]
    torch.testing.assert_close(saved, theirs[[1, 0]], atol=1e-6, rtol=0)
    assert json.loads((adapter / "labels.json").read_text())["label2id"] == {"glad": 0, "sad": 1}
    lines = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert lines is not None
    whole = "whole = AutoModelForSequenceClassification.from_pretrained(base)(**batch).logits.argmax(-1).tolist()"
    checks = "assert model.config.id2label == {0: 'glad', 1: 'sad'} and model.config.label2id == {'glad': 0, 'sad': 1}"
    checks += (
        f"\n{whole}\nassert [('sad', 'glad')[i] for i in whole] == [id2label[i] for i in logits.argmax(-1).tolist()]"
    )
    done = forks.server(*forks.PLAIN).run(f"import os; os.chdir({str(adapter)!r})\n{lines[1]}\n{checks}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Started from with the classes in another order, the adapter's head is brought into it.
    more = ["--init-adapter", str(adapter), "--label-names", "sad,glad", "--lr", "1e-9", "--head-lr", "1e-9"]
    assert main([*words(base, moods, tmp_path / "more"), *more, "--quiet"]) == 0
    again = load_file(tmp_path / "more" / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(next(t for n, t in again.items() if "score" in n), saved[[1, 0]], atol=1e-6, rtol=0)


def test_a_run_and_doctor_say_that_a_head_is_dropped(
    moods: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = classifier(tmp_path / "base", stories, "roberta", ("spam", "ham"))
    assert main(words(base, moods, tmp_path / "run")) == 0
    said = "it is a classifier of spam, ham; its head is dropped, as the classes of the data are glad, sad"
    assert said in " ".join(capsys.readouterr().err.split())
    assert any(said in line for line in read_run(tmp_path / "run")[0]["warnings"])
    assert doctor.main([*words(base, moods, tmp_path / "other"), "--json"]) == 0
    assert said in capsys.readouterr().out
