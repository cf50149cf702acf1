"""What modes of a round come to in virtual seconds: accuracy over time, and the seconds until one accuracy, by mode.

    python experiments/time_to_accuracy.py runs/time-to-accuracy --out experiments/time-to-accuracy

reads the finished runs of `time-to-accuracy.yaml` and writes OUT.md and OUT.svg. The accuracy is the lowest of what the
modes come to at best, in the mean of their seeds.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import pyplot

from fedlotr.errors import InputError, script
from fedlotr.reporting.console import readable_bytes

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "fedlotr"  # the same figures, the same file
COLUMNS = ("mode", "accuracy, last", "best", "seconds in all", "seconds until {goal:.3f}", "lost", "bytes", "in vain")

Run = Sequence[Mapping[str, Any]]


def read_runs(folder: Path) -> dict[str, list[Run]]:
    """By row, the rows of metrics.jsonl of its finished runs, of their seeds."""
    found: dict[str, list[Run]] = {}
    for summary in sorted(folder.glob("*/seed-*/summary.json")):
        lines = (summary.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found.setdefault(summary.parents[1].name, []).append([json.loads(line) for line in lines])
    return found


def mean(runs: Sequence[Run], key: str) -> list[float]:
    """Over seeds, round by round."""
    return [fmean(row[key] for row in rows) for rows in zip(*runs, strict=True)]


def scored(runs: Sequence[Run]) -> list[Run]:
    """The rounds that were evaluated."""
    return [[row for row in rows if row.get("accuracy") is not None] for rows in runs]


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    """The modes as Markdown."""
    goal = min(max(mean(scored(some), "accuracy")) for some in runs.values())
    titles = [column.format(goal=goal) for column in COLUMNS]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for name, some in runs.items():
        accuracy, seconds = mean(scored(some), "accuracy"), mean(scored(some), "virtual_seconds")
        until = next(second for value, second in zip(accuracy, seconds, strict=True) if value >= goal)
        sums = [sum(mean(some, key)) for key in ("failed", "bytes_up", "bytes_down", "bytes_in_vain")]
        cells = [f"{accuracy[-1]:.3f}", f"{max(accuracy):.3f}", f"{seconds[-1]:.0f}", f"{until:.0f}", f"{sums[0]:.1f}"]
        cells += [readable_bytes(sums[1] + sums[2]), readable_bytes(sums[3])]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def draw(runs: Mapping[str, Sequence[Run]], out: Path) -> None:
    """A line for each mode."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, some in runs.items():
        seen = scored(some)
        axes.plot(mean(seen, "virtual_seconds"), mean(seen, "accuracy"), marker=".", label=name)
    axes.set_xlabel("virtual seconds")
    axes.set_ylabel("accuracy")
    axes.legend(title="mode", fontsize=8)
    axes.grid(color="#d0d7de", linewidth=0.5)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("grid", type=Path, help="the folder that `fedlotr grid` was given as --out")
    options.add_argument("--out", type=Path, required=True, help="where to write, less .md and .svg")
    given = options.parse_args()
    runs = read_runs(given.grid)
    if not runs:
        raise InputError(
            f"{given.grid}: no finished run; fedlotr grid experiments/time-to-accuracy.yaml --in-process --out "
            f"{given.grid} makes them"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    written = table(runs)
    given.out.with_suffix(".md").write_text(written, encoding="utf-8")
    draw(runs, given.out.with_suffix(".svg"))
    print(written)


if __name__ == "__main__":
    script(main)
