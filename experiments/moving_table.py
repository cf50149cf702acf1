"""Bases that move beside those that stay and beside LoRA: nats by round, and the bytes until LoRA's end, as one table.

    python experiments/moving_table.py runs/moving --out experiments/moving.md

reads the finished runs of `moving.yaml`; its first row is what the others are held against.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedlotr.errors import InputError, script
from fedlotr.grid.file import read_grid
from fedlotr.reporting.console import readable_bytes

SHOWN = (2, 4, 8, 16)


def runs_of(grid: Path, row: str) -> list[list[dict[str, Any]]]:
    """The rows of metrics.jsonl of each finished run of a row, by seed."""
    folders = sorted(path.parent for path in grid.glob(f"{row}/seed-*/summary.json"))
    lines = [(folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for folder in folders]
    return [[json.loads(line) for line in one] for one in lines]


def losses(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[int, list[float]]:
    """Round -> the loss of each run, of the rounds in which all were evaluated."""
    each = [{row["round"]: row["loss"] for row in run if row["loss"] is not None} for run in runs]
    return {number: [one[number] for one in each] for number in sorted(set.intersection(*map(set, each)))}


def sent(runs: Sequence[Sequence[dict[str, Any]]], until: int) -> float:
    """Bytes on the wire, both ways, all clients, up to a round: the mean over runs."""
    return fmean(sum(row["bytes_up"] + row["bytes_down"] for row in run if 0 < row["round"] <= until) for run in runs)


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("grid", type=Path, help="the folder of that grid")
    options.add_argument("--out", type=Path, required=True, help="the table, as Markdown")
    given = options.parse_args()
    rows = [row.name for row in read_grid(Path(__file__).with_name("moving.yaml"), given.grid).rows]
    found = {row: runs for row in rows if (runs := runs_of(given.grid, row))}
    if rows[0] not in found:
        raise InputError(
            f"{given.grid}: no finished run of {rows[0]}; fedlotr grid experiments/moving.yaml --in-process --out "
            f"{given.grid} makes them"
        )
    curves = {row: losses(runs) for row, runs in found.items()}
    last = max(curves[rows[0]])
    goal, whole = fmean(curves[rows[0]][last]), sent(found[rows[0]], last)
    head = [
        "",
        "seeds",
        *(f"nats after {number}" for number in SHOWN),
        "all bytes",
        f"bytes until {goal:.3f}",
        "times fewer",
    ]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for row, curve in curves.items():
        cells = []
        for number in SHOWN:
            of = curve.get(number, [])
            cells.append(f"{fmean(of):.3f}" + (f" ± {stdev(of):.3f}" if len(of) > 1 else "") if of else "-")
        there = next((number for number, of in curve.items() if fmean(of) <= goal), None)
        until = None if there is None else sent(found[row], there)
        reached = (
            ["never", "-"] if until is None else [f"{readable_bytes(until)} (round {there})", f"{whole / until:.1f}"]
        )
        lines.append([row, str(len(found[row])), *cells, readable_bytes(sent(found[row], max(curve))), *reached])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    script(main)
