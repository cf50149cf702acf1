"""What the benchmarks share: contestants in processes of their own, taking turns; medians, ratios, JSON."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MARK = "@@ "
"""Begins a line of a contestant that is meant for us; all else on its stdout is dropped."""


class Contestant:
    """A program that gets ready, then does one round for each line on its stdin and answers with a JSON object."""

    def __init__(self, name: str, script: str, *words: object, log: Path) -> None:
        self.name = name
        self._log = log
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "FLWR_LOG_LEVEL": "ERROR",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w", encoding="utf-8"),  # noqa: SIM115 (the process holds it)
            text=True,
            env=environment,
        )
        self.ready = self._answer()

    def round(self) -> dict[str, Any]:
        """Let it do one round; what it says of it."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line[len(MARK) :])
                return found
        raise SystemExit(f"{self.name} ended; its last words are in {self._log}:\n{self._log.read_text()[-2000:]}")


def answer(**facts: Any) -> None:
    """In a contestant: say something to the benchmark."""
    print(f"{MARK}{json.dumps(facts)}", flush=True)


def turns() -> Iterator[int]:
    """In a contestant: the number of each round to do, as they are called."""
    for number, _ in enumerate(sys.stdin, 1):
        yield number


@contextmanager
def contestants() -> Iterator[list[Contestant]]:
    """A list to put contestants in; all end with the block."""
    found: list[Contestant] = []
    try:
        yield found
    finally:
        for each in found:
            each.close()


def interleave(field: Sequence[Contestant], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Each contestant in turn, `rounds` times: noise of the machine meets all of them alike."""
    seen: dict[str, list[dict[str, Any]]] = {each.name: [] for each in field}
    for number in range(rounds):
        for each in field:
            done = each.round()
            seen[each.name].append(done)
            print(f"  {number + 1}/{rounds} {each.name:24s} {done['seconds']:8.3f} s", flush=True)
    return seen


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def matmul_gflops(dtype: str, threads: int, size: int, repeats: int = 3) -> float:
    """The best rate of a size³ matrix product in this process, in GFLOP/s."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left = torch.ones(size, size, dtype=getattr(torch, dtype))
        best = float("inf")
        for _ in range(repeats + 1):
            began = time.perf_counter()
            torch.mm(left, left)
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best / 1e9


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    from importlib.metadata import version

    load = os.getloadavg() if hasattr(os, "getloadavg") else (float("nan"),) * 3
    names = ("torch", "transformers", "peft", "flwr", "ray")
    return {
        "cores": cores(),
        "processor": platform.processor() or platform.machine(),
        "load_before": round(load[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def figures_path(given: str) -> Path:
    """Where figures are to be written: a folder that is missing is said before an hour of measuring, not after it."""
    path = Path(given)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: expected a file in a folder that is there")
    return path.absolute()


def parser(what: str) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    made = argparse.ArgumentParser(description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--json", type=figures_path, help="write the figures here", default=None)
    made.add_argument("--workers", type=int, default=cores(), help="worker processes of one thread each")
    return made


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures as JSON where a path was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"figures in {path}")
