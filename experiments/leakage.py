"""What an update without privacy tells: how many of a step's tokens the span test names, over tokens and rank.

    python experiments/leakage.py --model ../shared/models/stories260k --data ../shared/data/shakespeare --out OUT

One client, one speech of it, cut; one step of SGD or an epoch of them. Writes leakage.md and leakage.svg into OUT.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from attack import named_tokens
from transformers import AutoTokenizer

from fedlotr.adapters import CoreConfig
from fedlotr.data import load_source
from fedlotr.errors import InputError, script
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise
from fedlotr.privacy.noise import NoiseStream
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import Tensors, TrainableModel

matplotlib.use("svg")
LENGTHS = (4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64)
RANKS = (8, 16, 32)


@dataclass(frozen=True)
class Setting:
    """One line of the plot: `later` is after some rounds, so that LoRA's B is no longer zero."""

    name: str
    method: str
    optimizer: Literal["sgd", "adamw"] = "sgd"
    steps: int = 1
    later: bool = False
    sigma: float | None = None


SETTINGS = (
    Setting("core, one step", "lora-xs"),
    Setting("LoRA, one step, first round", "lora"),
    Setting("LoRA, one step, later round", "lora", later=True),
    Setting("core, an epoch of four steps", "lora-xs", steps=4),
    Setting("LoRA, an epoch of four steps, later round", "lora", steps=4, later=True),
    Setting("core, one step of AdamW", "lora-xs", optimizer="adamw"),
    Setting("core, one step, DP-SGD", "lora-xs", sigma=1.0),
    Setting("LoRA, one step, later round, DP-SGD", "lora", later=True, sigma=1.0),
)


def build(folder: str, method: str, rank: int) -> TrainableModel:
    """A language model with an adapter in every linear layer."""
    spec = ModelSpec(folder, "causal-lm", 0, False, 0)
    base = load_base(spec)
    targets = adaptable_layers(base, "all-linear")
    return TrainableModel(base, spec, CoreConfig(method=method, r=rank, target_modules=targets))


def begun(model: TrainableModel, later: bool) -> Tensors:
    """What a client is sent in the first round, or in a later one: a B that has moved."""
    start = model.values()
    noise = torch.Generator().manual_seed(0)
    if later:
        start |= {n: 0.02 * torch.randn(v.shape, generator=noise) for n, v in start.items() if n.endswith("core_B")}
    return start


def attacked(model: TrainableModel, setting: Setting, texts: Sequence[list[int]], length: int) -> Iterator[np.ndarray]:
    """(tokens of a client's round, named among them, named wrongly) for each text, cut to so many tokens."""
    start = begun(model, setting.later)
    for number, ids in enumerate(texts):
        pieces = np.array_split(np.asarray(ids[: length + setting.steps], np.int32), setting.steps)
        offsets = np.cumsum([0, *map(len, pieces)])
        examples = Examples(np.concatenate(pieces), offsets, np.ones(len(pieces), np.int64), causal=True)
        work = ClientWork(np.arange(len(pieces)), np.random.default_rng(number))
        training = LocalTraining(
            optimizer=setting.optimizer, lr=0.3 if setting.optimizer == "sgd" else 1e-3, batch_size=1
        )
        hidden = None
        if setting.sigma is not None:
            hidden = DPSGD(ExampleNoise(setting.sigma, 0.1), [NoiseStream()])
        result = train_cohort(model, start, examples, [work], training, mechanism=hidden)[0]
        model.assign(start)
        update = {name: start[name] - value for name, value in result.tensors.items()}
        found = {token for token, _ in named_tokens(model, update, [0])}
        # The last token of a piece is only predicted: no layer meets it with a gradient.
        there = {int(token) for piece in pieces for token in piece[:-1]}
        yield np.array([len(there), len(found & there), len(found - there)])


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a folder with a language model without learnt positions")
    options.add_argument("--data", required=True, help="a folder with texts")
    options.add_argument("--texts", type=int, default=20)
    options.add_argument("--out", type=Path, default=Path())
    chosen = options.parse_args()
    if not (Path(chosen.model) / "config.json").is_file():
        raise InputError(
            f"--model {chosen.model}: no config.json there; give a language model's folder (without learnt positions)"
        )
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    rows = load_source(chosen.data, seed=0).train["text"]
    most = max(LENGTHS) + max(setting.steps for setting in SETTINGS)
    long = (
        tokenizer(text, truncation=True, max_length=most)["input_ids"] for text in rows if len(text) > 4 * max(LENGTHS)
    )
    texts = [ids for ids, _ in zip(long, range(chosen.texts), strict=False)]
    lines = ["| | rank | tokens a round | named | wrongly named |", "|---|---|---|---|---|"]
    shares: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for setting in SETTINGS:
        for rank in RANKS:
            model = build(chosen.model, setting.method, rank)
            for length in LENGTHS:
                there, named, wrong = np.stack(list(attacked(model, setting, texts, length))).sum(0)
                shares.setdefault((setting.name, rank), []).append((there / len(texts), named / there))
                if named or wrong or length == LENGTHS[0]:
                    lines.append(
                        f"| {setting.name} | {rank} | {there / len(texts):.1f} | {named / there:.0%} | {wrong} |"
                    )
            print(setting.name, rank, *(f"{x:.0f}:{share:.2f}" for x, share in shares[setting.name, rank]), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "leakage.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(shares, chosen.out / "leakage.svg")


def draw(shares: dict[tuple[str, int], list[tuple[float, float]]], path: Path) -> None:
    """A panel a setting, a line a rank."""
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fedlotr"
    figure, panels = pyplot.subplots(2, 4, figsize=(14, 6), sharex=True, sharey=True, layout="constrained")
    for panel, setting in zip(panels.flat, SETTINGS, strict=True):
        for rank in RANKS:
            panel.plot(*zip(*shares[setting.name, rank], strict=True), marker="o", markersize=3, label=f"rank {rank}")
        panel.set_title(setting.name, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("different tokens that a client's round has seen", fontsize=9)
    figure.supylabel("share of them that the server names", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    script(main)
