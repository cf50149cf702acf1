"""An adapter that training starts from, taken over into the run's own factors where these can hold it.

What lies within frozen factors is their core's, `U V = s·B C A`; trained factors take U and V themselves. Then no term
is carried, and what is exported has the rank that it had. Of an adapter that a run stacked on what it carried, [V; A],
the last r rows are taken over; the first stay a carried term.
"""

from collections.abc import Mapping

import torch

from fedlotr.adapters.bases import Factors, one_thread
from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.methods import Method

CLOSE = 1e-5
"""How far, relative to its norm, a pair in float32 may be from the factors that it was rounded from."""


def take_over(layers: Mapping[str, FactoredLayer], row: Method, pairs: Mapping[str, Factors]) -> dict[str, Factors]:
    """Let the layers begin with what is theirs of these pairs, U V by layer; what is left of them is to be carried.

    row: the method, whose factors may be trained.
    """
    left: dict[str, Factors] = {}
    with one_thread(), torch.no_grad():
        for name, pair in pairs.items():
            layer = layers[name]
            r = layer.r["default"]
            parts: list[tuple[Factors, Factors | None]] = [(pair, None)]
            if len(pair.A) > r:
                parts.append((Factors(pair.A[-r:], pair.B[:, -r:]), Factors(pair.A[:-r], pair.B[:, :-r])))
            for own, rest in parts:
                if (found := _factors(layer, row, own)) is not None:
                    for part, value in found.items():
                        getattr(layer, f"core_{part}")["default"].copy_(value)
                    if rest is not None:
                        left[name] = Factors(rest.A.contiguous(), rest.B.contiguous())
                    break
            else:
                left[name] = pair
    return left


def coordinates(pair: Factors, basis: Factors) -> torch.Tensor | None:
    """M (r, r), float64, with `U V = B M A`; None where the pair does not lie within the basis."""
    x, y = _along(pair.A.double().T, basis.A.double().T), _along(pair.B.double(), basis.B.double())
    return None if x is None or y is None else y @ x.T


def holds(pair: Factors, basis: Factors) -> bool:
    """Whether a basis can hold a pair, or what a run stacked last in it."""
    r = len(basis.A)
    last = Factors(pair.A[-r:], pair.B[:, -r:])
    return coordinates(pair, basis) is not None or coordinates(last, basis) is not None


def _along(matrix: torch.Tensor, basis: torch.Tensor) -> torch.Tensor | None:
    """X with `basis X = matrix`, by its columns; None where there is none."""
    basis = basis.to(matrix.device)
    found = torch.linalg.lstsq(basis, matrix, driver="gelsd" if matrix.device.type == "cpu" else None).solution
    return found if (basis @ found - matrix).norm() <= CLOSE * matrix.norm() else None


def _factors(layer: FactoredLayer, row: Method, pair: Factors) -> dict[str, torch.Tensor] | None:
    """The trained tensors of a layer at which it computes `U V x`, by letter; None where there are none."""
    if row.personal or (row.turns == () and {"A", "B", "C"} <= set(row.train)):
        return None
    scale, trained = layer.scaling["default"], set(row.train)
    if trained == {"D"}:
        return {"D": pair.B.double() @ pair.A.double()}
    if trained == {"A", "B"}:
        return {"A": pair.A, "B": pair.B / scale} if len(pair.A) == layer.r["default"] else None
    a, b = layer.factor("A", "default"), layer.factor("B", "default")
    assert a is not None
    if trained == {"B"}:
        x = _along(pair.A.double().T, a.double().T)
        return None if x is None else {"B": pair.B.double().to(x.device) @ x.T / scale}
    if trained != {"C"} or b is None:
        return None
    within = coordinates(pair, Factors(a, b))
    core = layer.core["default"]
    if within is None or core.recover is None:
        return None
    basis = layer.basis("default")
    mixed = None if basis is None or basis.P is None else basis.P.double()
    wanted = within / scale
    theta = core.recover(wanted, mixed)
    made: torch.Tensor = core.expand({"C": theta}, mixed)
    return {"C": theta} if (made - wanted).norm() <= CLOSE * wanted.norm() else None
