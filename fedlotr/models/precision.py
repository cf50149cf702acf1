"""Which number format the frozen base should have on this machine, by measurement; and equal bits from a GPU."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open

WORTHWHILE = 1.5
"""bfloat16 has to be this many times faster: it costs the base digits, so a small gain is not worth it."""
SIZE = 512
GPU_SIZE = 4096  # of a smaller product a GPU's time is that of its launch
REPEATS = 8
HOPELESS = 3
"""Products after which one is given up whose best takes twice the time that would do: without instructions for
bfloat16 a product takes a tenth of a second and more."""
FINE = 1e-5
"""Seconds that a thread's clock must tell apart to be taken; Windows' tells 15 ms."""


@cache
def measured_dtype(device: str = "cpu") -> str:
    """`bfloat16` where products in it are `WORTHWHILE` times as fast as in float32, on one thread, else `float32`.

    Measured once in a process: its runs have the same bits then, however close it is.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        worthwhile = _seconds(torch.float32, device) / WORTHWHILE
        return "bfloat16" if _seconds(torch.bfloat16, device, worthwhile) <= worthwhile else "float32"
    finally:
        torch.set_num_threads(threads)


FORMATS = {"F32": "float32", "BF16": "bfloat16"}
"""What safetensors calls the formats that a base can be run in."""


def saved_dtype(folder: Path) -> str:
    """The format that most of a model's numbers are saved in. Raises ValueError where a base cannot be run in it."""
    numbers: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (a file, not a dict)
                part = file.get_slice(name)
                numbers[part.get_dtype()] += math.prod(part.get_shape())
    found = max(numbers, key=numbers.__getitem__, default="nothing")
    if found not in FORMATS:
        raise ValueError(f"its weights are saved as {found}; a base is run in float32 or bfloat16: choose one")
    return FORMATS[found]


def _seconds(dtype: torch.dtype, device: str, wanted: float = math.inf) -> float:
    """The shortest of several products: the others were interrupted, or warmed up. wanted: what would be worthwhile.

    Of this thread on the CPU, which waits while workers start.
    """
    size, clock = SIZE if device == "cpu" else GPU_SIZE, time.perf_counter
    if device == "cpu" and time.get_clock_info("thread_time").resolution < FINE:
        clock = time.thread_time
    left = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(REPEATS):
        began = clock()
        torch.mm(left, left)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - began)
        if len(times) >= HOPELESS and min(times) > 2 * wanted:
            break
    return min(times)


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """On a GPU let torch take the algorithms that give the same bits each time, as far as it has them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        put_back_algorithms(*before)


def put_back_algorithms(deterministic: bool, warn_only: bool) -> None:
    """Let torch choose them as it did; where it still does so nothing is called, since that would load its compiler."""
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if now != (deterministic, warn_only):
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
