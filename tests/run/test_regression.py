"""Labels that are numbers on a scale: seen and said, learnt by squared error, scored and handed over in their unit."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedlotr import SimulationConfig
from fedlotr.commands import grid
from fedlotr.data import load_source, resolve_task
from fedlotr.errors import InputError
from fedlotr.evaluation.scores import evaluate
from fedlotr.models.loading import ModelSpec, load_base
from fedlotr.simulate import main
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.head import RIDGE, fit_head
from fedlotr.training.model import TrainableModel
from tests.support import plain_logits, read_run

WORDS = "red blue green cat dog house sun moon tree river stone bird".split()


def write(folder: Path, *, unit: float = 50.0, least: float = 100.0, rows: int = 120) -> Path:
    """Texts whose label is the share of colours among their words, on a scale far from 0 to 1; a column client."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("test", 30)):
        texts = [rng.choice(WORDS, int(rng.integers(2, 9))).tolist() for _ in range(count)]
        held = [
            {
                "text": " ".join(words),
                "label": round(least + unit * sum(word in WORDS[:3] for word in words) / len(words), 3),
                "client": f"farm {at % 3}",
            }
            for at, words in enumerate(texts)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def pooled_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pooled") / "bert"
    shutil.copytree(tiny_bert, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    listed = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    return folder


def words(model: Path, data: Path, out: Path, *more: object) -> list[str]:
    common = f"--model {model} --data {data} --clients 3 --sample 3 --rounds 2 --engine local --threads 1 --rank 4"
    common += f" --dtype float32 --public-examples 30 --batch-size 16 --local-epochs 1 --out {out}"
    return [*common.split(), *map(str, more)]


def squared(adapter: Path, base: Path, data: Path) -> tuple[float, float]:
    """(mean squared error, Pearson's correlation) of an exported adapter on the test split, by README's own lines."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    readme = adapter / "README.md"
    text = readme.read_text(encoding="utf-8")
    sample = "[['A first text.', 'And a second, somewhat longer text.']]"
    assert sample in text
    readme.write_text(text.replace(sample, repr([[row["text"] for row in rows]])), encoding="utf-8")
    found = plain_logits(adapter)[0].squeeze(-1).double().numpy()
    readme.write_text(text, encoding="utf-8")
    labels = np.array([row["label"] for row in rows])
    return float(np.square(found - labels).mean()), float(np.corrcoef(found, labels)[0, 1])


@pytest.mark.parametrize("kind", ["pooler", "mean", "decoder"])
@pytest.mark.parametrize("method", ["lora", "head"])
def test_what_is_exported_predicts_in_the_labels_unit_what_was_scored(
    kind: str, method: str, scores: Path, tiny_bert: Path, pooled_bert: Path, stories: Path, tmp_path: Path
) -> None:
    base = {"pooler": tiny_bert, "mean": pooled_bert, "decoder": stories}[kind]
    out = tmp_path / "run"
    assert main(words(base, scores, out, "--method", method, "--quiet")) == 0
    summary, rows = read_run(out)
    mse, pearson = squared(out / "adapter", base, scores)
    assert mse == pytest.approx(summary["final"]["loss"], rel=1e-3)
    assert pearson == pytest.approx(summary["final"]["pearson"], abs=1e-3)
    assert summary["final"]["rmse"] == pytest.approx(summary["final"]["loss"] ** 0.5, rel=1e-12)
    assert summary["metric"] == "rmse" and summary["best"]["rmse"] == min(row["rmse"] for row in rows)
    assert "accuracy" not in summary["final"] and not (out / "adapter" / "labels.json").exists()
