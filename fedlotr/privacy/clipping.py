"""Clipping to a joint norm: what bounds one example's, or one client's, influence on a sum."""

from collections.abc import Mapping

import torch

from fedlotr.training.model import Tensors

MARGIN = 1 - 2.0**-20
"""Of the bound that is used: float32 products would otherwise pass it by their rounding."""


def clip_factors(each: Mapping[str, torch.Tensor], bound: float) -> torch.Tensor:
    """min(1, bound / norm) of each of N rows, whose norm is over all tensors together; 0 where it is not finite.

    each: (N, ...) by name. In float64: squares of float32 numbers neither overflow nor vanish there.
    """
    squares = [rows.flatten(1).double().square().sum(1) for rows in each.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = (bound * MARGIN / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clipped(each: Mapping[str, torch.Tensor], bound: float) -> Tensors:
    """The rows scaled by their factors, float64; a row that is not finite counts as zeros, whoever sent it."""
    factors = clip_factors(each, bound)
    kept = {}
    for name, rows in each.items():
        by_row = factors.reshape(-1, *[1] * (rows.dim() - 1))
        kept[name] = torch.where(by_row > 0, rows.double(), 0.0) * by_row
    return kept
