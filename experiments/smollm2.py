"""SmolLM2 before and after each federation of two grids, commonsense questions and GSM8K, as one table.

    python experiments/smollm2.py runs/smollm2-commonsense runs/smollm2-gsm8k --out experiments/smollm2.md

reads the finished runs of `smollm2-commonsense.yaml` and `smollm2-gsm8k.yaml`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedlotr.errors import InputError, script
from fedlotr.reporting.console import readable_bytes

Summary = dict[str, Any]
ROWS = ("fed-sb", "lora-xs", "lotr", "fedit", "ffa-lora", "pooled")
TASKS = ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge")


def finished(grid: Path) -> dict[str, list[Summary]]:
    """Row -> the summaries of its finished runs, in the order of their seeds."""
    found: dict[str, list[Summary]] = {}
    for path in sorted(grid.glob("*/seed-*/summary.json")):
        found.setdefault(path.parts[-3], []).append(json.loads(path.read_text(encoding="utf-8")))
    if not found:
        raise InputError(
            f"{grid}: no finished run; fedlotr grid experiments/{grid.name}.yaml --in-process --out {grid} makes them"
        )
    return found


def before(summary: Summary) -> Summary:
    """What a run scored before its first round."""
    found: Summary = summary["initial"]
    return found


def after(summary: Summary) -> Summary:
    """What it scored at its end, in the form of `before`."""
    return {**summary["final"], **{key: summary[key] for key in ("standard_errors", "score_by") if key in summary}}


def share(scores: Sequence[Summary], metric: str, draws: int = 1) -> str:
    """The mean over seeds and its standard error. draws: how many of the seeds have test rows of their own."""
    error = fmean(of["standard_errors"][metric] for of in scores) / draws**0.5
    return f"{fmean(of[metric] for of in scores):.3f} ± {error:.3f}"


def scores(commonsense: Sequence[Summary], gsm8k: Sequence[Summary]) -> list[str]:
    """The cells of a row: choice in all and by task, nats and exact match; a dash for what there is no run of."""
    cells = [share(commonsense, "choice") if commonsense else "-"]
    cells += [share([of["score_by"][task] for of in commonsense], "choice") if commonsense else "-" for task in TASKS]
    cells.append(f"{fmean(of['loss'] for of in gsm8k):.3f}" if gsm8k else "-")
    return [*cells, share(gsm8k, "exact_match", len(gsm8k)) if gsm8k else "-"]


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("commonsense", type=Path, help="the folder of that grid")
    options.add_argument("gsm8k", type=Path, help="the folder of that grid")
    options.add_argument("--out", type=Path, required=True, help="the table, as Markdown")
    given = options.parse_args()
    commonsense, gsm8k = finished(given.commonsense), finished(given.gsm8k)
    head = ["", "seeds", "an update", "one-off", "choice", *TASKS, "GSM8K nats", "exact match"]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    # Seeds have the same commonsense rows, and rows of GSM8K of their own; every row begins as the base.
    firsts = [max(of.values(), key=len) for of in (commonsense, gsm8k)]
    lines.append(["before", "", "", "", *scores(*([before(run) for run in runs] for runs in firsts))])
    for row in (row for row in ROWS if row in commonsense or row in gsm8k):
        of = [found.get(row, []) for found in (commonsense, gsm8k)]
        traffic = next(run for runs in of for run in runs)["communication"]
        keys = "upload_payload_bytes_per_client_round", "one_off_bytes_per_client"
        sent = ["-" if traffic.get(key) is None else readable_bytes(traffic[key]) for key in keys]
        seeds = "/".join(str(len(runs)) for runs in of)
        lines.append([row, seeds, *sent, *scores(*([after(run) for run in runs] for runs in of))])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    script(main)
