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
        shares = [reply.share for reply in replies]
        arrays = [published, start, *(reply.arrays for reply in replies)]
        # The start cancels in the residual, since the shares sum to one.
        lost, change = _squared_norms(layer, arrays, ([1.0, 0.0, *(-p for p in shares)], [0.0, -1.0, *shares]))
        residual, mean = residual + lost, mean + change
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
    coefficients, arrays = zip(*terms, strict=True)
    return _squared_norms(layer, arrays, (coefficients,))[0]


def _squared_norms(layer: Layer, arrays: Sequence[Arrays], combinations: Sequence[Sequence[float]]) -> list[float]:
    """||Σ c_j s·B_j C_j A_j||² for each combination of coefficients; the factors are decomposed once for all."""
    if set(layer.trained) == {"C"}:
        # Linear in the core: combine the small matrices first.
        assert layer.A is not None and layer.B is not None
        norms = []
        for coefficients in combinations:
            terms = zip(coefficients, arrays, strict=True)
            core = layer.core(sum((c * each[layer.trained["C"]] for c, each in terms if c), np.zeros(())))
            norms.append(_norm(layer, np.linalg.qr(layer.B @ core).R, np.linalg.qr(layer.A.T).R))
        return norms
    lefts, rights = [], []
    for each in arrays:
        b = layer.B if layer.B is not None else each[layer.trained["B"]]
        lefts.append(b @ layer.core(each[layer.trained["C"]]) if "C" in layer.trained else b)
        rights.append(layer.A if layer.A is not None else each[layer.trained["A"]])
    upper_left, upper_right = np.linalg.qr(np.hstack(lefts)).R, np.linalg.qr(np.vstack(rights).T).R
    widths = [left.shape[1] for left in lefts]
    return [_norm(layer, upper_left * np.repeat(coefficients, widths), upper_right) for coefficients in combinations]


def _norm(layer: Layer, left: Matrix, right: Matrix) -> float:
    """||s L Rᵀ||² of small factors."""
    return float(np.square(layer.scale * (left @ right.T)).sum())
