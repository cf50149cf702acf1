"""How small an update may be: what the rows of a grid reached, by the bytes of an update, held against its row `fedit`.

    python experiments/frontier.py runs/frontier --within 0.01 --out experiments/frontier

reads the finished runs of `frontier.yaml` (0.01: one point of accuracy) or of `frontier-shakespeare.yaml` (0.05 nats a
token) and writes OUT.md and OUT.svg; without --within, a standard error of FedIT's mean over its seeds. Bytes are those
of metrics.jsonl: whole messages as they crossed, both directions, the first transfer of a basis among them. Only the
size of an update is its payload, as `fedlotr cost` reckons it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

from fedlotr.errors import InputError, script
from fedlotr.reporting.console import readable_bytes

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "fedlotr"  # the same figures, the same file
REFERENCE = "fedit"
TILT: dict[bool, dict[str, Any]] = {False: {"rotation": 40}, True: {"rotation": -40, "verticalalignment": "top"}}
COLUMNS = ("row", "an update", "smaller by", "{metric}", "against FedIT", "until {goal:.3f}", "until {near:.3f}")


@dataclass(frozen=True)
class Row:
    """One row of the grid. update: bytes. curve, spent: means over seeds, of the metric and all bytes.

    They are told after each round that was evaluated. finals: the metric after the last one, by seed. codec: of the
    update.
    """

    name: str
    update: float
    finals: Mapping[int, float]
    curve: Sequence[float]
    spent: Sequence[float]
    codec: str

    def until(self, goal: float, higher: bool) -> float | None:
        """Bytes until the mean of the metric has reached the goal; None: it has not."""
        met = (
            bytes_
            for value, bytes_ in zip(self.curve, self.spent, strict=True)
            if value == goal or (value > goal) is higher
        )
        return next(met, None)


def read_row(folder: Path) -> Row:
    """The finished runs of one row."""
    runs: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for summary in sorted(folder.glob("seed-*/summary.json")):
        lines = (summary.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = json.loads(summary.read_text(encoding="utf-8"))
        runs[found["seed"]] = found, [json.loads(line) for line in lines]
    metric = metric_of(next(iter(runs.values()))[0])
    rounds = list(zip(*(rows for _, rows in runs.values()), strict=True))
    spent = accumulate(fmean(row["bytes_up"] + row["bytes_down"] for row in rows) for rows in rounds)
    evaluated = [(rows, bytes_) for rows, bytes_ in zip(rounds, spent, strict=True) if rows[0].get(metric) is not None]
    return Row(
        name=folder.name,
        update=fmean(s["communication"]["upload_payload_bytes_per_client_round"] for s, _ in runs.values()),
        finals={seed: rows[-1][metric] for seed, (_, rows) in runs.items()},
        curve=[fmean(row[metric] for row in rows) for rows, _ in evaluated],
        spent=[bytes_ for _, bytes_ in evaluated],
        codec=(next(iter(runs.values()))[0]["codec"] or {"update": "float32"})["update"],
    )


def metric_of(summary: Mapping[str, Any]) -> str:
    """Accuracy, or where there is none nats a token."""
    return "accuracy" if summary["metric"] == "accuracy" else "loss"


def standard_error(rows: Sequence[Row]) -> float:
    """Of FedIT's mean over its seeds. Raises InputError where it has one alone."""
    finals = next(row for row in rows if row.name == REFERENCE).finals.values()
    if len(finals) < 2:
        raise InputError(f"{REFERENCE} has one finished run, and no spread of seeds: say --within, or run more seeds")
    return float(stdev(finals) / len(finals) ** 0.5)


def table(rows: Sequence[Row], metric: str, within: float) -> str:
    """The rows as Markdown, the smallest update last; what stays within the margin is marked."""
    higher = metric == "accuracy"
    fedit = next(row for row in rows if row.name == REFERENCE)
    goal = fedit.curve[-1]
    near = goal - within if higher else goal + within
    titles = [column.format(metric=metric, goal=goal, near=near) for column in COLUMNS]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for row in sorted(rows, key=lambda row: -row.update):
        mean = row.curve[-1]
        spread = f" ± {stdev(row.finals.values()):.3f}" if len(row.finals) > 1 else ""
        inside = (mean >= near) if higher else (mean <= near)
        reached = [row.until(value, higher) for value in (goal, near)]
        cells = [
            row.name,
            readable_bytes(row.update),
            f"{fedit.update / row.update:,.0f}",
            f"{mean:.3f}{spread}",
            f"{'**' if inside else ''}{mean - goal:+.3f}{'**' if inside else ''}",
            *("-" if bytes_ is None else readable_bytes(bytes_) for bytes_ in reached),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], metric: str, within: float, out: Path) -> None:
    """The metric after the last round over the size of an update, a colour for each codec."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    fedit = next(row for row in rows if row.name == REFERENCE)
    goal = fedit.curve[-1]
    axes.axhspan(goal - within, goal + within, color="#eaeef2", zorder=0)
    for codec in sorted({row.codec for row in rows}):
        of = sorted((row for row in rows if row.codec == codec), key=lambda row: row.update)
        spreads = [stdev(row.finals.values()) if len(row.finals) > 1 else 0.0 for row in of]
        axes.errorbar([r.update for r in of], [r.curve[-1] for r in of], spreads, fmt="o", capsize=2, label=codec)
        for row, before in zip(of, [None, *of], strict=False):
            again = before is not None and before.update == row.update  # two on one place: one name up, one down
            name = row.name.partition("_codec-")[0].removesuffix(f"-{codec}").replace("_rank-", "-")
            at = (row.update, row.curve[-1])
            axes.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=7, **TILT[again])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable_bytes(value)))
    axes.set_xlabel("payload of an update")
    axes.set_ylabel("accuracy" if metric == "accuracy" else "nats a token")
    axes.legend(title="codec", fontsize=8)
    axes.grid(color="#d0d7de", linewidth=0.5)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("grid", type=Path, help="the folder that `fedlotr grid` was given as --out")
    options.add_argument("--within", type=float, help="of FedIT's metric (default: a standard error of its mean)")
    options.add_argument("--out", type=Path, required=True, help="where to write, less .md and .svg")
    given = options.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    folders = sorted({path.parents[1] for path in given.grid.glob("*/seed-*/summary.json")})
    rows = [read_row(folder) for folder in folders]
    if REFERENCE not in {row.name for row in rows}:
        raise InputError(
            f"{given.grid}: no finished run of a row named '{REFERENCE}', against which others are held; "
            f"fedlotr grid experiments/frontier.yaml --in-process --out {given.grid} makes them"
        )
    metric = metric_of(json.loads(next(folders[0].glob("seed-*/summary.json")).read_text(encoding="utf-8")))
    within = standard_error(rows) if given.within is None else given.within
    written = table(rows, metric, within)
    given.out.with_suffix(".md").write_text(written, encoding="utf-8")
    draw(rows, metric, within, given.out.with_suffix(".svg"))
    print(written)


if __name__ == "__main__":
    script(main)
