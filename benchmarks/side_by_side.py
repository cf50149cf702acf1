"""What the benchmarks share: contestants in processes of their own, taking turns; medians, ratios, JSON."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import processes

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
            "RAY_worker_niceness": "0",  # Ray's own default would have Flower's clients wait for everybody else
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

    def memory(self) -> dict[str, float]:
        """The most that its processes have held so far: the sum (a shared page counts in each), and the largest."""
        peaks = [processes.peak_bytes(folder) for folder in processes.descendants(self._process.pid)]
        return {"peak_megabytes": sum(peaks) / 2**20, "largest_megabytes": max(peaks, default=0) / 2**20}

    def close(self) -> None:
        """Let it end; one that is in the middle of a round is not waited for."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

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
def timed() -> Iterator[dict[str, float]]:
    """In a contestant: what the block took, and what all its processes computed meanwhile, told when it has ended."""
    taken: dict[str, float] = {}
    began, computed = time.perf_counter(), processes.cpu_seconds(os.getpid())
    yield taken
    taken["seconds"] = time.perf_counter() - began
    taken["cpu_seconds"] = processes.cpu_seconds(os.getpid()) - computed


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


def contest(sides: Mapping[str, Sequence[object]], folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """A first round of each side, then `rounds` in turns; of each what it said of them, and its processes' memory.

    sides: by name, a contestant's script and words. folder: for what they write on stderr.
    """
    with contestants() as field:
        for name, (script, *words) in sides.items():
            log = folder / f"{name.replace(' ', '-')}.log"
            field.append(Contestant(name, str(script), *words, log=log))
        found: dict[str, dict[str, Any]] = {}
        for each in field:
            found[each.name] = {"ready": each.ready, "first": each.round()}
            print(f"  first {each.name:24s} {found[each.name]['first']['seconds']:8.3f} s", flush=True)
        for name, done in interleave(field, rounds).items():
            found[name]["rounds"] = done
        for each in field:
            found[each.name] |= each.memory()
    return found


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def matmul_gflops(dtype: str, threads: int, size: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The best rate of a size³ matrix product in this process, in GFLOP/s: of four, by a clock that tells seconds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left = torch.ones(size, size, dtype=getattr(torch, dtype))
        best = float("inf")
        for _ in range(4):
            began = clock()
            torch.mm(left, left)
            best = min(best, clock() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best / 1e9


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Its name, family and model, since a name may say little, and what it multiplies bfloat16 with."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    formats = [flag for flag in told.get("flags", "").split() if flag in ("amx_bf16", "avx512_bf16")]
    kind = f"family {told.get('cpu family')}, model {told.get('model')}, {' '.join(formats) or 'no bfloat16 products'}"
    return f"{told.get('model name') or platform.machine()} ({kind})"


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    from importlib.metadata import version

    load = os.getloadavg() if hasattr(os, "getloadavg") else (float("nan"),) * 3
    names = ("torch", "transformers", "peft", "flwr", "ray")
    return {
        "cores": cores(),
        "processor": processor(),
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
