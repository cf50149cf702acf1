"""Cutting sequences into groups with little padding."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

PASS_TOKENS = 2048
"""Tokens in one forward and backward: bounds the activations held, and is large enough for full speed."""
PASS_OVERHEAD = 64
"""What one more pass costs, in tokens: launching its operations takes as long as computing about this many."""
EVALUATION_TOKENS = 4096
"""Padded tokens in one forward: no activations are kept, so passes may be larger than in training."""


def pack(lengths: Rows, tokens: int = PASS_TOKENS, overhead: int = PASS_OVERHEAD) -> list[Rows]:
    """Cut rows into passes: positions, longest rows first, with the least padded tokens plus `overhead` a pass.

    A pass holds at most `tokens` padded tokens (or one row). Exact, by dynamic programming over the sorted lengths.
    """
    order = np.argsort(-lengths, kind="stable")
    widths = lengths[order]
    n = len(order)
    best = np.zeros(n + 1)
    stop_at = np.zeros(n, np.int64)
    for start in range(n - 1, -1, -1):
        most = max(1, min(n - start, tokens // max(int(widths[start]), 1)))
        counts = np.arange(1, most + 1)
        costs = counts * widths[start] + overhead + best[start + 1 : start + 1 + most]
        choice = int(costs.argmin())
        best[start], stop_at[start] = costs[choice], start + 1 + choice
    passes, start = [], 0
    while start < n:
        passes.append(order[start : stop_at[start]])
        start = int(stop_at[start])
    return passes


def runs(lengths: Rows, tokens: int) -> Iterator[slice]:
    """Cut rows, in their order, into passes of about equally many tokens, at most `tokens` (or one row)."""
    ends = np.cumsum(lengths)
    count = -(-int(ends[-1]) // tokens)
    share = ends[-1] / count
    start = 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + min(share + lengths.max() / 2, tokens), side="right")))
        yield slice(start, stop)
        start = stop
