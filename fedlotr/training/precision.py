"""Which number format the frozen base should have on this machine, by measurement."""

import time

import torch

WORTHWHILE = 1.5
"""bfloat16 has to be this many times faster: it costs the base digits, so a small gain is not worth it."""
SIZE = 512
REPEATS = 8


def measured_dtype() -> str:
    """`bfloat16` where products in it are `WORTHWHILE` times as fast as in float32 on one thread, else `float32`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return "bfloat16" if _seconds(torch.float32) >= WORTHWHILE * _seconds(torch.bfloat16) else "float32"
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of several products: the others were interrupted, or warmed up."""
    left = torch.ones(SIZE, SIZE, dtype=dtype)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(left, left)
        times.append(time.perf_counter() - began)
    return min(times)
