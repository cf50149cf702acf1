"""The garbage collector at rest, while much is made that stays: it would look through all of it, and find nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_collecting() -> Iterator[None]:
    """The collector rests in the block."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def loading_for_good() -> Iterator[None]:
    """The collector rests in the block, and leaves out for ever what was there at the end of the first one: libraries.

    For a process of our own. Half a million objects are made as torch, transformers and Flower load.
    """
    with not_collecting():
        yield
        if not gc.get_freeze_count():
            gc.freeze()
