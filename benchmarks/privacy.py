"""A private step against a plain one, and against Opacus' hooks and ghost clipping, on an encoder of MiniLM's shape.

All take turns: one client, one optimizer step on the same examples, every one of them in the batch. Random weights;
imports nothing but `fedlotr.adapters`, `fedlotr.training` and `fedlotr.privacy`.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from side_by_side import figures_path
from torch import nn
from transformers import BertConfig, BertModel

from fedlotr.adapters import CoreConfig
from fedlotr.errors import script
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise
from fedlotr.privacy.noise import NoiseStream
from fedlotr.privacy.opacus_engine import hooked, train_by_opacus
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.packing import Rows


def build(folder: Path, dtype: str, rank: int) -> TrainableModel:
    """A mean-pooled encoder with cores in all linear layers, and a head."""
    spec = ModelSpec(str(folder), "classification", 4, True, 0, dtype)
    base = load_base(spec)
    targets = adaptable_layers(base, "all-linear")
    return TrainableModel(base, spec, CoreConfig(method="fed-sb", basis="random", r=rank, target_modules=targets))


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--length", type=int, default=64, help="tokens of every example")
    options.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", type=figures_path)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1000, 30000, chosen.batch * chosen.length).astype(np.int32)
    offsets = np.arange(0, len(tokens) + 1, chosen.length)
    examples = Examples(tokens, offsets, rng.integers(0, 4, chosen.batch))
    work = [ClientWork(np.arange(chosen.batch), np.random.default_rng(0))]
    training, noise = LocalTraining(steps=1, batch_size=chosen.batch), ExampleNoise(1.0, 0.1)
    found = []
    with tempfile.TemporaryDirectory() as place:
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        BertModel(config).save_pretrained(place)
        for rank in chosen.ranks:
            model = build(Path(place), chosen.dtype, rank)
            found.append({"rank": rank, **compare(model, examples, work, training, noise, chosen.repeats)})
            line = found[-1]
            print(
                f"rank {rank}: plain {line['plain'] * 1e3:.0f} ms a step; private {line['private_ratio']:.2f} times as "
                f"much, Opacus' hooks {line['opacus_ratio']:.2f}, its ghost clipping {line['ghost_ratio']:.2f} "
                f"(medians of {chosen.repeats} ratios, process time)"
            )
    if chosen.json:
        chosen.json.write_text(json.dumps({"options": vars(chosen) | {"json": str(chosen.json)}, "ranks": found}))


def by_ghost_clipping(
    model: TrainableModel, start: Tensors, examples: Examples, rows: Rows, training: LocalTraining, noise: ExampleNoise
) -> None:
    """One step as Opacus' ghost clipping has it: a backward for the norms, and another for the clipped sum."""

    def wrap(module: nn.Module) -> GradSampleModuleFastGradientClipping:
        hooks = GradSampleModuleFastGradientClipping(
            module, max_grad_norm=noise.bound, use_ghost_clipping=True, loss_reduction="sum", strict=False
        )
        wrapped.append(hooks)
        return hooks

    wrapped: list[GradSampleModuleFastGradientClipping] = []
    model.assign(start)
    generator = torch.Generator().manual_seed(0)
    with hooked(model, sorted(model.trained), wrap) as parameters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # torch's, on token ids
        optimizer = torch.optim.AdamW(parameters.values(), lr=training.lr)
        losses = model.losses(examples.batch(rows, model.spec.pad_id))
        torch.autograd.backward(losses.sum(), retain_graph=True)
        factors = wrapped[0].get_clipping_coef()
        optimizer.zero_grad()
        wrapped[0].disable_hooks()
        torch.autograd.backward(torch.dot(factors, losses))
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad += noise.sigma * noise.bound * torch.randn(parameter.shape, generator=generator)
            parameter.grad /= len(rows)
        optimizer.step()


def compare(
    model: TrainableModel,
    examples: Examples,
    work: list[ClientWork],
    training: LocalTraining,
    noise: ExampleNoise,
    repeats: int,
) -> dict[str, float]:
    """Median seconds of a plain step, and the medians of the others' ratios to it, side by side in every turn."""
    start = model.values()
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: train_cohort(model, start, examples, work, training),
        "private": lambda: train_cohort(model, start, examples, work, training, None, 1, DPSGD(noise, [NoiseStream()])),
        "opacus": lambda: train_by_opacus(model, [start], examples, work, training, noise, [""]),
        "ghost": lambda: by_ghost_clipping(model, start, examples, work[0].rows, training, noise),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            began = time.process_time()
            side()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began)
    ratios = {
        f"{name}_ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        for name in ("private", "opacus", "ghost")
    }
    return {"plain": statistics.median(seconds["plain"]), **ratios}


if __name__ == "__main__":
    script(main)
