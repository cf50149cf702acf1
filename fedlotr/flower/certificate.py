"""How far the published update is from the weighted mean of the clients' updates, measured and not assumed.

Shares no code with the strategies. Every ΔW is kept as factors: a sum of products is the product of stacked factors,
and the norm of `L R` is that of the product of their triangular QR factors, so no dense ΔW is formed, and unlike
with Gram matrices nothing is squared, so differences far below the size of ΔW are still seen. Where the stack would be
wider than ΔW itself, as with many clients, that is formed after all, from as many products at once as fit beside it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.tuner import factored_layers
from fedlotr.flower.records import Arrays
from fedlotr.training.model import TrainableModel

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

    arrays: Mapping[str, Matrix]
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
        shares = [reply.share for reply in replies]
        arrays = [published, start, *(reply.arrays for reply in replies)]
        # The start cancels in the residual, since the shares sum to one.
        added = [merged[layer.name]] if layer.name in merged else []
        lost, change = _squared_norms(
            layer, arrays, ([1.0, 0.0, *(-p for p in shares)], [0.0, -1.0, *shares]), (added, [])
        )
        residual, mean = residual + lost, mean + change
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


def codec_error(
    layers: Sequence[Layer], start: Arrays, replies: Sequence[Weighted], lost: Sequence[Arrays]
) -> float | None:
    """||Σ p_i ΔW_i decoded - Σ p_i ΔW_i|| / ||Σ p_i ΔW_i||: what the updates' codec loses of their mean.

    replies: as decoded. lost: by how much each client's own tensors are ahead of these. Of the adapted layers; where
    no ΔW is common to all clients, of the tensors themselves: a head's, or factors beside others that stay.
    """
    own = [
        {**reply.arrays, **{n: reply.arrays[n] + gone[n] for n in gone}}
        for reply, gone in zip(replies, lost, strict=True)
    ]
    arrays = [start, *(reply.arrays for reply in replies), *own]
    shares, none = [reply.share for reply in replies], [0.0] * len(replies)
    gone = mean = 0.0
    for layer in layers or [Layer({"D": name}, None, None, 1.0) for name in start]:
        difference, change = _squared_norms(
            layer, arrays, ([0.0, *shares, *(-p for p in shares)], [-1.0, *none, *shares]), ([], [])
        )
        gone, mean = gone + difference, mean + change
    return _ratio(gone, mean)


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
    coefficients, arrays = zip(*terms, strict=True)
    return _squared_norms(layer, arrays, (coefficients,), (products,), matrix)[0]


def _squared_norms(
    layer: Layer,
    arrays: Sequence[Mapping[str, Matrix]],
    combinations: Sequence[Sequence[float]],
    products: Sequence[Sequence[Product]],
    matrix: Matrix | None = None,
) -> list[float]:
    """||Σ c_j s·B_j C_j A_j + Σ L_j R_j + M||² for each combination of coefficients with its own products.

    What the terms have in common is decomposed once for all combinations.
    """
    sums = list(zip(combinations, products, strict=True))
    if "D" in layer.trained:
        norms = []
        for coefficients, added in sums:
            terms = zip(coefficients, arrays, strict=True)
            whole = sum((c * each[layer.trained["D"]] for c, each in terms if c), np.zeros(()))
            whole = sum((p.left @ p.right for p in added), whole + (0 if matrix is None else matrix))
            norms.append(float(np.square(whole).sum()))
        return norms
    if set(layer.trained) == {"C"}:
        # Linear in the core: combine the small matrices first.
        assert layer.A is not None and layer.B is not None
        norms = []
        for coefficients, added in sums:
            terms = zip(coefficients, arrays, strict=True)
            core = layer.core(sum((c * each[layer.trained["C"]] for c, each in terms if c), np.zeros(())))
            norms.append(_norm([layer.scale * (layer.B @ core)], [layer.A], added, matrix))
        return norms

    def product(each: Mapping[str, Matrix]) -> Product:
        b = layer.B if layer.B is not None else each[layer.trained["B"]]
        left = layer.scale * (b @ layer.core(each[layer.trained["C"]]) if "C" in layer.trained else b)
        return Product(left, layer.A if layer.A is not None else each[layer.trained["A"]])

    first = product(arrays[0])
    if len(arrays) * len(first.right) > min(len(first.left), first.right.shape[1]):
        return _norms_of_sums(map(product, arrays), combinations, products, matrix)
    lefts, rights = zip(*map(product, arrays), strict=True)
    widths = [left.shape[1] for left in lefts]
    left, right = np.hstack(lefts), np.vstack(rights)
    if matrix is None:
        every = [product for added in products for product in added]
        left = np.linalg.qr(np.hstack([left, *(product.left for product in every)])).R
        right = np.linalg.qr(np.vstack([right, *(product.right for product in every)]).T).R
        own = [product.left.shape[1] for product in every]
        norms = []
        for at, (coefficients, _) in enumerate(sums):
            ones = [float(k == at) for k, added in enumerate(products) for _ in added]
            columns = np.repeat([*coefficients, *ones], [*widths, *own])
            norms.append(float(np.square((left * columns) @ right.T).sum()))
        return norms
    return [_norm([left * np.repeat(coefficients, widths)], [right], added, matrix) for coefficients, added in sums]


def _norms_of_sums(
    terms: Iterable[Product],
    combinations: Sequence[Sequence[float]],
    products: Sequence[Sequence[Product]],
    matrix: Matrix | None,
) -> list[float]:
    """||Σ c_j L_j R_j + Σ L R + M||² for each combination of coefficients with its own products, as dense sums.

    So many terms at once that their stacked factors are about as large as the matrix.
    """
    sums: list[Matrix] = [np.zeros(()) if matrix is None else matrix.copy() for _ in combinations]
    each_term = zip(terms, *combinations, strict=True)
    for first in each_term:
        most = min(len(first[0].left), first[0].right.shape[1]) // len(first[0].right)
        taken = [first, *islice(each_term, max(most, 1) - 1)]
        stack, *coefficients = zip(*taken, strict=True)
        left, right = np.hstack([term.left for term in stack]), np.vstack([term.right for term in stack])
        widths = [len(term.right) for term in stack]
        for row, each in enumerate(coefficients):
            sums[row] = sums[row] + (left * np.repeat(each, widths)) @ right
    for row, added in enumerate(products):
        for term in added:
            sums[row] = sums[row] + term.left @ term.right
    return [float(np.square(each).sum()) for each in sums]


def _norm(
    lefts: Sequence[Matrix], rights: Sequence[Matrix], products: Sequence[Product], matrix: Matrix | None
) -> float:
    """||L R + Σ L_j R_j + M||², of stacked factors."""
    left = np.hstack([*lefts, *(product.left for product in products)])
    right = np.vstack([*rights, *(product.right for product in products)])
    if matrix is not None:
        return float(np.square(left @ right + matrix).sum())
    return float(np.square(np.linalg.qr(left).R @ np.linalg.qr(right.T).R.T).sum())


def layers_of(model: TrainableModel) -> list[Layer]:
    """The adapted layers as the certificate reads them; none where a part of each stays with the clients."""
    if model.personal:
        return []
    by_module: dict[str, dict[str, str]] = {}
    for (module, part), tensor in model.names.items():
        if module not in model.heads and part != "S":
            by_module.setdefault(module, {})[part] = tensor
    layers = factored_layers(model.module)

    def frozen(module: str, factor: str) -> Any:
        if factor in by_module[module]:
            return None
        tensor = layers[module].factor(factor, "default")
        return None if tensor is None else tensor.detach().numpy().astype(np.float64)

    def core(layer: FactoredLayer) -> Callable[[Any], Any]:
        basis = layer.basis("default")
        mixed = None if basis is None or basis.P is None else basis.P.double()
        return lambda theta: layer.core["default"].expand({"C": torch.tensor(theta)}, mixed).numpy()

    return [
        Layer(
            trained,
            frozen(module, "A"),
            frozen(module, "B"),
            layers[module].scaling["default"],
            core(layers[module]),
            module,
        )
        for module, trained in by_module.items()
    ]
