"""In bfloat16, packed: after three rounds the loss lies within the spread of seeds of padded float32."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedlotr.adapters import CoreConfig
from fedlotr.evaluation.scores import evaluate
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel

CLIENTS, HELD, ASKED, LONGEST = 4, 16, 64, 48
SEEDS = range(3)


def examples(stories: Path, data: Path, kind: str) -> Examples:
    """Of the tiny Llama's tokenizer: its own kind of stories, or what people say of films, and whether they like it."""
    name = ("tinystories", "sst2")[kind != "causal-lm"]
    with gzip.open(data / name / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(CLIENTS * HELD + ASKED), strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokens = [tokenizer(row["text"], truncation=True, max_length=LONGEST)["input_ids"] for row in rows]
    offsets = np.cumsum([0, *map(len, tokens)])
    flat = np.concatenate([np.array(each, np.int32) for each in tokens])
    if kind == "causal-lm":
        return Examples(flat, offsets, np.ones(len(rows), np.int64), causal=True)
    return Examples(flat, offsets, np.array([int(row["label"]) for row in rows]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal-lm", "classification"])
def test_the_loss_is_within_the_spread_of_seeds(
    kind: str, stories: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = examples(stories, shared / "data", kind)
    asked = np.arange(CLIENTS * HELD, len(rows))

    def after(dtype: str, packed: bool, seed: int) -> float:
        spec = ModelSpec(str(stories), kind, 2 * (kind != "causal-lm"), False, 0, dtype)  # type: ignore[arg-type]
        base = load_base(spec)
        model = TrainableModel(
            base, spec, CoreConfig(method="lora", target_modules=adaptable_layers(base, "all-linear"))
        )
        assert model.takes_ragged
        monkeypatch.setitem(model.__dict__, "takes_ragged", packed)
        values, training = model.values(), LocalTraining(lr=5e-3, head_lr=5e-3)
        for server_round in range(3):
            cohort = [
                ClientWork(np.arange(k * HELD, (k + 1) * HELD), np.random.default_rng((seed, server_round, k)))
                for k in range(CLIENTS)
            ]
            results = train_cohort(model, values, rows, cohort, training)
            values |= {n: torch.stack([one.tensors[n] for one in results]).mean(0) for n in results[0].tensors}
        model.assign(values)
        return evaluate(model, rows, asked).mean_loss

    wanted = [after("float32", False, seed) for seed in SEEDS]
    found = [after("bfloat16", True, seed) for seed in SEEDS]
    spread = max(wanted) - min(wanted)
    print(f"{kind}: float32, padded {wanted}; bfloat16, packed {found}")
    assert min(wanted) <= float(np.mean(found)) <= max(wanted)
    assert max(abs(one - other) for one, other in zip(found, wanted, strict=True)) <= spread
