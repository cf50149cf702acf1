"""Where the seconds go from `python -m fedlotr.simulate --clients 50 --rounds 1` to its first finished round.

The command is run in a process of its own, its steps timed from outside the code, by wrapping functions.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import HERE, machine, parser, write

from fedlotr.errors import script

STEPS = (
    ("reading and checking", "fedlotr.run.simulation", "check_all"),
    ("measuring dtypes", "fedlotr.run.simulation", "measured_dtype"),
    ("waiting for Ray", "fedlotr.engines.head_start", "HeadStart.hand_over"),
    ("tokens, a part of checking", "fedlotr.run.checking", "tokenised"),
    ("loading the base", "fedlotr.run.preparation", "load_base"),
    ("fitting the head", "fedlotr.run.preparation", "fit_head"),
    ("making the bases", "fedlotr.run.preparation", "initialize_basis"),
    ("adapter and workplace", "fedlotr.run.preparation", "TrainableModel"),
    ("evaluation", "fedlotr.run.rounds", "evaluate"),
    ("round", "fedlotr.run.rounds", "run_round"),
    ("checkpoint", "fedlotr.run.directory", "RunDirectory.write_checkpoint"),
    ("ending Ray", "fedlotr.engines.ray", "RayGrid.close"),
)
"""(what it is called, module, function). `evaluation` is that before the first round, with the workers' start, and
that after it."""


def timed(report: Path, words: list[str]) -> None:
    """In the process of the run: time its steps."""
    import importlib

    began = time.perf_counter()
    found: list[tuple[str, float, float]] = []

    def wrap(what: str, function: Any) -> Any:
        @functools.wraps(function)
        def timing(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                found.append((what, start - began, time.perf_counter() - start))

        return timing

    from fedlotr.commands import simulate
    from fedlotr.config.configuration import load
    from fedlotr.machine import loading_for_good

    found.append(("imports of the door", 0.0, time.perf_counter() - began))
    start = time.perf_counter()
    workers = simulate.early_workers(load(words))  # as the door does, before what is timed is loaded and wrapped
    setattr(simulate, "early_workers", lambda _: workers)  # noqa: B010 (a function in place of a function)
    found.append(("imports of the engine", start - began, time.perf_counter() - start))
    start = time.perf_counter()
    with loading_for_good():
        importlib.import_module("fedlotr.run.simulation")
    found.append(("imports", start - began, time.perf_counter() - start))
    for what, module, name in STEPS:
        owner: Any = importlib.import_module(module)
        *outer, leaf = name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, leaf, wrap(what, getattr(owner, leaf)))
    simulate.main(words)
    report.write_text(json.dumps({"steps": found, "total": time.perf_counter() - began}), encoding="utf-8")


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3, help="after one that warms the files; 0: that one alone")
    options.add_argument("--clients", type=int, default=50)
    options.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="last: more words for fedlotr.simulate"
    )
    args = options.parse_args()
    runs: list[dict[str, Any]] = []
    for repeat in range(args.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            words = ["--clients", str(args.clients), "--rounds", "1", "--workers", str(args.workers)]
            words += ["--quiet", "--out", f"{folder}/run", *args.options]
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, str(HERE / "startup.py"), "--inside", f"{folder}/report.json", *words],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                cwd=folder,
            )
            if done.returncode:  # it has said why
                raise SystemExit(done.returncode)
            run = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))
            run["command"] = time.perf_counter() - began
        ends = [start + took for what, start, took in run["steps"] if what == "checkpoint"]
        run["first_round_finished"] = ends[0] + run["command"] - run["total"]
        print(f"  {repeat}/{args.repeats} first round finished after {run['first_round_finished']:.1f} s", flush=True)
        runs += [run] if repeat or not args.repeats else []
    names = list(dict.fromkeys(what for run in runs for what, _, _ in run["steps"]))
    steps = {
        name: statistics.median(sum(took for what, _, took in run["steps"] if what == name) for run in runs)
        for name in names
    }
    finished = statistics.median(run["first_round_finished"] for run in runs)
    for name, took in steps.items():
        print(f"{name:26s} {took:7.2f} s")
    print(f"{'first round finished':26s} {finished:7.2f} s (goal: 20)")
    write(args.json, {"machine": machine(), "steps": steps, "first_round_finished": finished, "runs": runs})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        timed(Path(sys.argv[2]), sys.argv[3:])
    else:
        script(main)
