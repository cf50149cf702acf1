"""What the noise of DP puts into a published update, at equal epsilon: cores, FFA-LoRA, FedIT, FedEx-LoRA, over rank.

    python experiments/noise.py --model ../shared/models/stories260k --data ../shared/data/shakespeare --out OUT

Clients train one round by DP-SGD, and once more without its noise, on the same batches with the same clipping: the
difference of the two published updates is what the noise did. Steps are plain SGD's, at a rate with which the update
without noise has the same size for every method and rank. Writes noise.md and noise.svg into OUT.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from amplification import expected_noise
from transformers import AutoTokenizer

from fedlotr.adapters import CoreConfig
from fedlotr.adapters.tuner import factored_layers
from fedlotr.data import load_source
from fedlotr.errors import InputError, script
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.privacy.accounting import calibrate
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise, sampling_rate
from fedlotr.privacy.noise import NoiseStream
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel

matplotlib.use("svg")
Matrices = list[torch.Tensor]


@dataclass(frozen=True)
class Method:
    """products: whether the mean is that of the clients' updates, or the update of their factors' means."""

    name: str
    method: str
    trained: frozenset[str]
    products: bool


METHODS = (
    Method("core (lora-xs)", "lora-xs", frozenset("C"), True),
    Method("core (lotr)", "lotr", frozenset("C"), True),
    Method("FFA-LoRA", "ffa-lora", frozenset("B"), True),
    Method("FedIT", "lora", frozenset("AB"), False),
    Method("FedEx-LoRA", "lora", frozenset("AB"), True),
)


@dataclass(frozen=True)
class Federation:
    """Clients and what each of them does in the round."""

    examples: Examples
    clients: int
    held: int
    batch: int
    steps: int

    def updates(self, model: TrainableModel, rate: float, sigma: float, seed: int) -> list[dict[str, torch.Tensor]]:
        """What each client publishes."""
        work = [
            ClientWork(np.arange(k * self.held, (k + 1) * self.held), np.random.default_rng(0))
            for k in range(self.clients)
        ]
        streams = [NoiseStream(f"{seed}/{k}") for k in range(self.clients)]  # equal batches with and without noise
        training = LocalTraining(steps=self.steps, batch_size=self.batch, optimizer="sgd", lr=rate)
        start = model.values()
        mechanism = DPSGD(ExampleNoise(sigma, 1.0, True), streams)
        results = train_cohort(model, start, self.examples, work, training, mechanism=mechanism)
        model.assign(start)
        return [result.tensors for result in results]


def published(model: TrainableModel, method: Method, updates: Sequence[dict[str, torch.Tensor]]) -> Matrices:
    """ΔW of every layer, as the server publishes it."""
    start = model.values()
    if not method.products:
        updates = [{name: torch.stack([update[name] for update in updates]).mean(0) for name in start}]
    total: Matrices = []
    for update in updates:
        model.assign(update)
        deltas = [layer.get_delta_weight("default").double() for layer in factored_layers(model.module).values()]
        total = [a + b for a, b in zip(total, deltas, strict=True)] if total else deltas
    model.assign(start)
    return [delta / len(updates) for delta in total]


def size(matrices: Matrices) -> float:
    """Frobenius, over all of them."""
    return math.sqrt(sum(float(matrix.square().sum()) for matrix in matrices))


def in_closed_form(
    model: TrainableModel, method: Method, mean: dict[str, torch.Tensor], tau: float, over: int
) -> float:
    """The expected size of the noise, were it added once to what is published without it."""
    start = model.values()
    model.assign(mean)
    total = 0.0
    for layer in factored_layers(model.module).values():
        factors = {name: layer.factor(name, "default").detach() for name in "AB"}  # type: ignore[union-attr]
        scaling = layer.scaling["default"]
        total += expected_noise(factors, method.trained, tau, scaling, over, exact=method.products)
    model.assign(start)
    return math.sqrt(total)


def row(*cells: str) -> str:
    """Of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a folder with a language model")
    options.add_argument("--data", required=True, help="a folder with texts")
    options.add_argument("--epsilon", type=float, default=8)
    options.add_argument("--clients", type=int, default=3)
    options.add_argument("--examples", type=int, default=200, help="of a client")
    options.add_argument("--tokens", type=int, default=32, help="of an example")
    options.add_argument("--batch", type=int, default=20)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--size", type=float, default=1.0, help="‖ΔW‖ of every update without noise")
    options.add_argument("--out", type=Path, default=Path())
    chosen = options.parse_args()
    if not (Path(chosen.model) / "config.json").is_file():
        raise InputError(f"--model {chosen.model}: no config.json there; give a folder with a language model")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    texts = load_source(chosen.data, seed=0).train["text"][: chosen.clients * chosen.examples]
    ids = [tokenizer(text, truncation=True, max_length=chosen.tokens)["input_ids"] for text in texts]
    offsets = np.cumsum([0, *map(len, ids)])
    examples = Examples(np.concatenate(ids).astype(np.int32), offsets, np.ones(len(ids), np.int64), causal=True)
    federation = Federation(examples, chosen.clients, chosen.examples, chosen.batch, chosen.steps)
    plan = (sampling_rate(chosen.batch, chosen.examples), chosen.steps)
    sigma = calibrate(chosen.epsilon, 0.1 / chosen.examples, [plan])
    print(f"epsilon {chosen.epsilon:g}, delta {0.1 / chosen.examples:g}: noise multiplier {sigma:.3f}")
    lines = [
        "| | rank | trained numbers | rate | noise over ΔW, each seed | mean | in closed form |",
        "|---|" + "---|" * 6,
    ]
    found: dict[str, list[tuple[int, float]]] = {}
    for method in METHODS:
        for rank in chosen.ranks:
            spec = ModelSpec(chosen.model, "causal-lm", 0, False, 0)
            base = load_base(spec)
            targets = adaptable_layers(base, "all-linear")
            model = TrainableModel(base, spec, CoreConfig(method=method.method, r=rank, target_modules=targets))
            rate = 0.1
            for _ in range(3):  # the size is not quite proportional to the rate
                rate *= (chosen.size / size(published(model, method, federation.updates(model, rate, 0.0, 0)))) ** 0.75
            shares, expected = [], []
            for seed in range(chosen.seeds):
                quiet = federation.updates(model, rate, 0.0, seed)
                twin = published(model, method, quiet)
                noisy = published(model, method, federation.updates(model, rate, sigma, seed))
                shares.append(size([a - b for a, b in zip(noisy, twin, strict=True)]) / size(twin))
                mean = {name: torch.stack([update[name] for update in quiet]).mean(0) for name in quiet[0]}
                tau = rate * sigma / chosen.batch * chosen.steps**0.5
                expected.append(in_closed_form(model, method, mean, tau, chosen.clients) / size(twin))
            total, closed = float(np.mean(shares)), float(np.mean(expected))
            found.setdefault(method.name, []).append((rank, total))
            numbers = sum(model.sizes().values())
            each = ", ".join(f"{share:.3g}" for share in shares)
            lines.append(
                f"| {method.name} | {rank} | {numbers:,} | {rate:.3g} | {each} | **{total:.3g}** | {closed:.3g} |"
            )
            print(lines[-1], f"size {size(twin):.3f}", flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "noise.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(found, chosen.epsilon, chosen.out / "noise.svg")


def draw(found: dict[str, list[tuple[int, float]]], epsilon: float, path: Path) -> None:
    """A line a method over the rank."""
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fedlotr"
    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in found.items():
        panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    panel.set_xscale("log", base=2)
    ranks = sorted({rank for points in found.values() for rank, _ in points})
    panel.set_xticks(ranks, labels=[str(rank) for rank in ranks])
    panel.set_yscale("log")
    panel.set_xlabel("rank")
    panel.set_ylabel(f"‖noise in ΔW‖ / ‖ΔW without noise‖, ε = {epsilon:g}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    script(main)
