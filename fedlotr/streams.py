"""Random streams keyed by (seed, purpose, round, client): the same on every engine, in any order, after a resume."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def stream_key(seed: int, purpose: str, *keys: int | str) -> int:
    """A 63-bit integer that names one stream of random numbers; equal arguments give it in every process."""
    text = "/".join(str(part) for part in (seed, purpose, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """A fresh numpy generator for that stream."""
    return np.random.default_rng(stream_key(seed, purpose, *keys))


@contextmanager
def own_streams(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators are seeded in the block, and afterwards go on where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
