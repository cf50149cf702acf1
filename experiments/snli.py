"""Accuracy over epsilon of a grid of private runs, as a table and a plot, beside what Fed-SB published on BERT-base.

    python experiments/snli.py runs/snli --out experiments/snli

reads the finished runs of `snli.yaml` and writes OUT.md and OUT.svg.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
from matplotlib import pyplot

from fedlotr.errors import InputError, script
from fedlotr.reporting.console import readable_bytes

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "fedlotr"  # the same figures, the same file
PUBLISHED = {
    "Fed-SB r=64": {1: 0.738, 3: 0.749},
    "FFA-LoRA r=32": {1: 0.701, 3: 0.715},
    "FedEx-LoRA r=32": {1: 0.674, 3: 0.697},
}
"""Singhal et al. 2025 (Fed-SB), BERT-base on all of SNLI, three clients; read off the figure of its repository."""
SPENT = {1: 2.05, 3: 4.79}
"""What its noise gives at delta = 1/n of a client, where it took 1/batches; by the PLD accountant."""


def name_of(summary: dict[str, Any]) -> str:
    """The method, or the strategy where that is what makes the difference."""
    return str(summary["strategy"] if summary["method"] == "lora" else summary["method"])


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("grid", type=Path, help="the folder that `fedlotr grid` was given as --out")
    options.add_argument("--out", type=Path, required=True, help="where to write, less .md and .svg")
    given = options.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(given.grid.glob("*/seed-*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        found[name_of(summary)][summary["privacy"]["epsilon_budget"]].append(summary)
    if not found:
        raise InputError(
            f"{given.grid}: no finished runs of a grid; fedlotr grid experiments/snli.yaml --in-process "
            f"--out {given.grid} makes them"
        )
    epsilons = sorted({epsilon for runs in found.values() for epsilon in runs})

    lines = [
        f"| | trained | an update | {' | '.join(f'ε = {epsilon:g}' for epsilon in epsilons)} | noise |",
        f"| --- |{' ---: |' * (len(epsilons) + 3)}",
    ]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, runs in found.items():
        scores = {epsilon: [run["final"]["accuracy"] for run in of] for epsilon, of in sorted(runs.items())}
        means = {epsilon: fmean(of) for epsilon, of in scores.items()}
        spreads = {epsilon: stdev(of) if len(of) > 1 else 0.0 for epsilon, of in scores.items()}
        any_run = next(iter(runs.values()))[0]
        cells = [f"{means[epsilon]:.3f} ± {spreads[epsilon]:.3f}" if epsilon in means else "-" for epsilon in epsilons]
        noise = "/".join(f"{of[0]['privacy']['noise_multiplier']:.2f}" for _, of in sorted(runs.items()))
        update = readable_bytes(any_run["communication"]["upload_payload_bytes_per_client_round"])
        lines.append(f"| {name} | {any_run['trained_numbers']:,} | {update} | {' | '.join(cells)} | {noise} |")
        axes.errorbar(list(means), list(means.values()), list(spreads.values()), marker="o", capsize=3, label=name)
    everything = [run for runs in found.values() for of in runs.values() for run in of]
    start = fmean(run["initial"]["accuracy"] for run in everything)
    lines.append(f"| before the first round | | | {' | '.join(f'{start:.3f}' for _ in epsilons)} | |")
    axes.axhline(start, color="#57606a", linewidth=1, linestyle=":", label="before the first round")
    for (name, published), shade in zip(PUBLISHED.items(), ("#24292f", "#8c959f", "#c0c7ce"), strict=True):
        accuracies = list(published.values())
        axes.plot(list(published), accuracies, "x--", color=shade, linewidth=1, label=f"{name}, as published")
        spent = [SPENT[claimed] for claimed in published]
        axes.plot(spent, accuracies, "+", color=shade, label=f"{name}, by its δ at 1/n")
    axes.set_xlabel("ε of a client's example, whole run")
    axes.set_ylabel("accuracy")
    axes.set_xticks(epsilons)
    axes.grid(color="#d0d7de", linewidth=0.5)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(given.out.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    written = "\n".join(lines) + "\n"
    given.out.with_suffix(".md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    script(main)
