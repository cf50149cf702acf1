"""Freed memory stays with the process: giving it back after every pass costs more than holding it."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's `mallopt`."""
KEPT = 2**30
"""Blocks up to this size come from the heap, and so much free memory at its top is kept."""
PAD = 2**26


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what is freed; False where the allocator is another, which is left as it is.

    By default it asks the kernel for every activation anew, and each page comes with a fault.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(name, value) for name, value in ((_MMAP_THRESHOLD, KEPT), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, PAD))
    )
