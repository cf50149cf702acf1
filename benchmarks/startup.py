"""Where the seconds go from `python -m fedlotr.simulate --clients 50 --rounds 1` to its first finished round.

The command is run in a process of its own, its steps timed from outside the code, by wrapping functions: seconds on the
clock and seconds that its process computed. At the end of the round, what each kind of process has computed by then: of
a machine that is busy with other work only these mean something. Before that, what importing takes: beyond a bare
interpreter, each line in a process of its own.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from side_by_side import HERE, machine, parser, write

from fedlotr.errors import script

STEPS = (
    ("reading and checking", "fedlotr.run.simulation", "check_all"),
    ("measuring dtypes", "fedlotr.run.simulation", "measured_dtype"),
    ("waiting for Ray", "fedlotr.engines.head_start", "HeadStart.hand_over"),
    ("tokens, a part of checking", "fedlotr.run.checking", "tokenised"),
    ("loading the base", "fedlotr.run.preparation", "load_base"),
    ("fitting the head", "fedlotr.run.preparation", "fit_head"),
    ("making the bases", "fedlotr.run.preparation", "gradient_bases"),
    ("adapter and workplace", "fedlotr.run.preparation", "TrainableModel"),
    ("evaluation", "fedlotr.run.rounds", "evaluate"),
    ("round", "fedlotr.run.rounds", "run_round"),
    ("checkpoint", "fedlotr.run.directory", "RunDirectory.write_checkpoint"),
    ("ending Ray", "fedlotr.engines.ray", "RayGrid.close"),
)
"""(what it is called, module, function). `evaluation` is that before the first round, with the workers' start, and
that after it."""

IMPORTS = (
    "import fedlotr",
    "from fedlotr import SimulationConfig",
    "from fedlotr import CoreConfig",
    "from fedlotr import run_simulation",
    "from fedlotr.cli import main",
)


def timed(report: Path, words: list[str]) -> None:
    """In the process of the run: time its steps."""
    import importlib

    began = time.perf_counter()
    found: list[tuple[str, float, float, float]] = []
    computed: dict[str, float] = {}

    @contextmanager
    def step(what: str) -> Iterator[None]:
        start, computing = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            found.append((what, start - began, time.perf_counter() - start, time.process_time() - computing))
            if what == "checkpoint":
                computed.update(computed_by_kind())

    def wrap(what: str, function: Any) -> Any:
        @functools.wraps(function)
        def timing(*given: Any, **named: Any) -> Any:
            with step(what):
                return function(*given, **named)

        return timing

    with step("imports of the door"):
        from fedlotr.commands import simulate
        from fedlotr.config.configuration import load
        from fedlotr.libraries import loading_for_good
    with step("imports of the engine"):  # as the door does, before what is timed is loaded and wrapped
        workers = simulate.early_workers(load(words))
    setattr(simulate, "early_workers", lambda _: workers)  # noqa: B010 (a function in place of a function)
    with step("imports"), loading_for_good():
        importlib.import_module("fedlotr.run.simulation")
    for what, module, name in STEPS:
        owner: Any = importlib.import_module(module)
        *outer, leaf = name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, leaf, wrap(what, getattr(owner, leaf)))
    simulate.main(words)
    told = {"steps": found, "total": time.perf_counter() - began, "computed": computed}
    report.write_text(json.dumps(told), encoding="utf-8")


def computed_by_kind() -> dict[str, float]:
    """Kind of process -> seconds that this process and those below it have computed."""
    here = psutil.Process()
    seconds = {"the server": sum(here.cpu_times()[:2])}
    for process in here.children(recursive=True):
        with suppress(psutil.Error):
            kind = "the workers" if process.name().startswith("ray::Worker") else "Ray"
            seconds[kind] = seconds.get(kind, 0.0) + sum(process.cpu_times()[:2])
    return seconds


def imports(repeats: int) -> dict[str, list[float]]:
    """Line -> seconds, and seconds computed, beyond those of a bare interpreter; they take turns."""
    seconds: dict[str, list[tuple[float, float]]] = {line: [] for line in ("pass", *IMPORTS)}
    for repeat in range(repeats + 1):
        for line, found in seconds.items():
            began, before = time.perf_counter(), _computed()
            subprocess.run([sys.executable, "-c", line], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            if repeat or not repeats:  # the first warms the files
                found.append((time.perf_counter() - began, _computed() - before))
    medians = {
        line: [statistics.median(column) for column in zip(*found, strict=True)] for line, found in seconds.items()
    }
    bare = medians.pop("pass")
    return {
        line: [took - of_none for took, of_none in zip(found, bare, strict=True)] for line, found in medians.items()
    }


def _computed() -> float:
    """Seconds that processes which have ended, of ours, have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3, help="after one that warms the files; 0: that one alone")
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--only", choices=("imports", "run"), help="one of the two")
    options.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="last: more words for fedlotr.simulate"
    )
    args = options.parse_args()
    found: dict[str, Any] = {}
    if args.only != "run":
        found["imports"] = imports(args.repeats)
        print(f"{'':34s} seconds, computed")
        for line, (took, computed) in found["imports"].items():
            print(f"{line:34s} {took:7.2f} {computed:9.2f}", flush=True)
    if args.only != "imports":
        found |= run(args)
    write(args.json, {"machine": machine(), **found})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The command, to the end of its first round."""
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
            one = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))
            one["command"] = time.perf_counter() - began
        ends = [start + took for what, start, took, _ in one["steps"] if what == "checkpoint"]
        one["first_round_finished"] = ends[0] + one["command"] - one["total"]
        print(f"  {repeat}/{args.repeats} first round finished after {one['first_round_finished']:.1f} s", flush=True)
        runs += [one] if repeat or not args.repeats else []
    names = list(dict.fromkeys(what for one in runs for what, *_ in one["steps"]))
    steps = {
        name: [
            statistics.median(sum(step[column] for step in one["steps"] if step[0] == name) for one in runs)
            for column in (2, 3)
        ]
        for name in names
    }
    kinds = {kind: statistics.median(one["computed"].get(kind, 0.0) for one in runs) for kind in runs[0]["computed"]}
    finished = statistics.median(one["first_round_finished"] for one in runs)
    print(f"{'':26s} seconds, computed")
    for name, (took, computed) in steps.items():
        print(f"{name:26s} {took:7.2f} {computed:9.2f}")
    print(f"{'first round finished':26s} {finished:7.2f} {sum(kinds.values()):9.2f} (goal: 10 seconds)")
    for kind, computed in kinds.items():
        print(f"{f'  by {kind}':26s} {'':7s} {computed:9.2f}")
    return {"steps": steps, "first_round_finished": finished, "computed": kinds, "runs": runs}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        timed(Path(sys.argv[2]), sys.argv[3:])
    else:
        script(main)
