"""How far the published update is from the weighted mean of the clients' updates, measured and not assumed.

Shares no code with the strategies. Every ΔW is kept as factors: a sum of products is the product of stacked factors,
and the norm of `L R` is that of the product of their triangular QR factors, so no dense ΔW is formed, and unlike
with Gram matrices nothing is squared, so differences far below the size of ΔW are still seen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedlotr.flower.records import Arrays

Matrix = npt.NDArray[np.float64]


class Layer(NamedTuple):
    """An adapted layer: the names of its trained tensors by factor, and its frozen factors (None where trained).

    A (r, d_in), B (d_out, r); no core among the trained factors means the core is the identity. A matrix D
    (d_out, d_in) instead of factors is always trained.
    core: what makes the r×r matrix of the published core; linear. name: what a carried term calls the layer.
    """

    trained: Mapping[str, str]
    A: Matrix | None
    B: Matrix | None
    scale: float
    core: Callable[[Matrix], Matrix] = lambda published: published
    name: str = ""


class Product(NamedTuple):
    """The matrix `left @ right`, (d_out, k) and (k, d_in), kept as its factors."""

    left: Matrix
    right: Matrix


class Weighted(NamedTuple):
    """One client's decoded tensors and its share p_i of the mean; the shares sum to one."""

    arrays: Arrays
    share: float


def aggregation_error(
    layers: Sequence[Layer],
    start: Arrays,
    published: Arrays,
    replies: Sequence[Weighted],
    merged: Mapping[str, Product] = MappingProxyType({}),
) -> float | None:
    """||published ΔW - Σ p_i ΔW_i|| / ||Σ p_i ΔW_i|| over all layers, ΔW the change since `start`; 0/0 is None.

    merged: by layer what this round adds to the carried term, scale and all; it is published as well.
    All in float64. The head is not part of it: its mean is exact for every strategy that averages.
    """
    residual = mean = 0.0
    for layer in layers:
        mixed = [(reply.share, reply.arrays) for reply in replies]
        # The start cancels in the residual, since the shares sum to one.
        added = [merged[layer.name]] if layer.name in merged else []
        residual += _squared_norm(layer, [(1.0, published), *((-share, arrays) for share, arrays in mixed)], added)
        mean += _squared_norm(layer, [*mixed, (-1.0, start)])
    return _ratio(residual, mean)


def transport_error(
    layers: Sequence[Layer],
    start: Arrays,
    published: Arrays,
    sent: Arrays,
    merged: Mapping[str, Product] = MappingProxyType({}),
    lost: Callable[[str], Product | Matrix | None] = lambda layer: None,
) -> float | None:
    """||sent ΔW - published ΔW|| / ||published ΔW||: what the cast to the wire's numbers loses.

    lost: how far the carried term's change in a layer is from what `merged` has for it.
    """
    gone = change = 0.0
    for layer in layers:
        added = [merged[layer.name]] if layer.name in merged else []
        more = lost(layer.name)
        products, matrix = ([more], None) if isinstance(more, Product) else ([], more)
        gone += _squared_norm(layer, [(1.0, sent), (-1.0, published)], products, matrix)
        change += _squared_norm(layer, [(1.0, published), (-1.0, start)], added)
    return _ratio(gone, change)


def _ratio(above: float, below: float) -> float | None:
    if below == 0:
        return None if above == 0 else math.inf
    return math.sqrt(above / below)


def _squared_norm(
    layer: Layer,
    terms: Sequence[tuple[float, Arrays]],
    products: Sequence[Product] = (),
    matrix: Matrix | None = None,
) -> float:
    """||Σ c_j s·B_j C_j A_j + Σ L_j R_j + M||² of (coefficient, tensors) terms, products and perhaps a matrix."""
    if "D" in layer.trained:
        whole = sum((c * arrays[layer.trained["D"]] for c, arrays in terms), np.zeros(()))
        return float(
            np.square(sum((p.left @ p.right for p in products), whole + (0 if matrix is None else matrix))).sum()
        )
    if set(layer.trained) == {"C"}:
        # Linear in the core: combine the small matrices first.
        assert layer.A is not None and layer.B is not None
        core = layer.core(sum((c * arrays[layer.trained["C"]] for c, arrays in terms), np.zeros(())))
        lefts, rights = [layer.scale * (layer.B @ core)], [layer.A]
    else:
        lefts, rights = [], []
        for coefficient, arrays in terms:
            a = layer.A if layer.A is not None else arrays[layer.trained["A"]]
            b = layer.B if layer.B is not None else arrays[layer.trained["B"]]
            b = b @ layer.core(arrays[layer.trained["C"]]) if "C" in layer.trained else b
            lefts.append(coefficient * layer.scale * b)
            rights.append(a)
    left = np.concatenate([*lefts, *(product.left for product in products)], axis=1)
    right = np.concatenate([*rights, *(product.right for product in products)], axis=0)
    if matrix is not None:
        return float(np.square(left @ right + matrix).sum())
    upper_left, upper_right = np.linalg.qr(left).R, np.linalg.qr(right.T).R
    return float(np.square(upper_left @ upper_right.T).sum())
