"""How far the published update is from the weighted mean of the clients' updates, measured and not assumed.

Shares no code with the strategies. Every ΔW is kept as factors: a sum of products is the product of stacked factors,
and the norm of `L R` is that of the product of their triangular QR factors, so no dense ΔW is formed, and unlike
with Gram matrices nothing is squared, so differences far below the size of ΔW are still seen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedlotr.flower.records import Arrays

Matrix = npt.NDArray[np.float64]


class Layer(NamedTuple):
    """An adapted layer: the names of its trained tensors by factor, and its frozen factors (None where trained).

    A (r, d_in), B (d_out, r); no core among the trained factors means the core is the identity.
    core: what makes the r×r matrix of the published core; linear.
    """

    trained: Mapping[str, str]
    A: Matrix | None
    B: Matrix | None
    scale: float
    core: Callable[[Matrix], Matrix] = lambda published: published


class Weighted(NamedTuple):
    """One client's decoded tensors and its share p_i of the mean; the shares sum to one."""

    arrays: Arrays
    share: float


def aggregation_error(
    layers: Sequence[Layer], start: Arrays, published: Arrays, replies: Sequence[Weighted]
) -> float | None:
    """||published ΔW - Σ p_i ΔW_i|| / ||Σ p_i ΔW_i|| over all layers, ΔW the change since `start`; 0/0 is None.

    All in float64. The head is not part of it: its mean is exact for every strategy that averages.
    """
    residual = mean = 0.0
    for layer in layers:
        mixed = [(reply.share, reply.arrays) for reply in replies]
        # The start cancels in the residual, since the shares sum to one.
        residual += _squared_norm(layer, [(1.0, published), *((-share, arrays) for share, arrays in mixed)])
        mean += _squared_norm(layer, [*mixed, (-1.0, start)])
    return _ratio(residual, mean)


def transport_error(layers: Sequence[Layer], start: Arrays, published: Arrays, sent: Arrays) -> float | None:
    """||sent ΔW - published ΔW|| / ||published ΔW||: what the cast to the wire's numbers loses."""
    lost = sum(_squared_norm(layer, [(1.0, sent), (-1.0, published)]) for layer in layers)
    change = sum(_squared_norm(layer, [(1.0, published), (-1.0, start)]) for layer in layers)
    return _ratio(lost, change)


def _ratio(above: float, below: float) -> float | None:
    if below == 0:
        return None if above == 0 else math.inf
    return math.sqrt(above / below)


def _squared_norm(layer: Layer, terms: Sequence[tuple[float, Arrays]]) -> float:
    """||Σ c_j s·B_j C_j A_j||² of (coefficient, tensors) terms."""
    if set(layer.trained) == {"C"}:
        # Linear in the core: combine the small matrices first.
        assert layer.A is not None and layer.B is not None
        core = layer.core(sum((c * arrays[layer.trained["C"]] for c, arrays in terms), np.zeros(())))
        left, right = layer.B @ core, layer.A
    else:
        lefts, rights = [], []
        for coefficient, arrays in terms:
            a = layer.A if layer.A is not None else arrays[layer.trained["A"]]
            b = layer.B if layer.B is not None else arrays[layer.trained["B"]]
            lefts.append(coefficient * (b @ layer.core(arrays[layer.trained["C"]]) if "C" in layer.trained else b))
            rights.append(a)
        left, right = np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)
    upper_left, upper_right = np.linalg.qr(left).R, np.linalg.qr(right.T).R
    return float(np.square(layer.scale * (upper_left @ upper_right.T)).sum())
