"""Frozen bfloat16 weights, laid out once as oneDNN's products read them, for both directions.

Each product would lay its weight out anew. The products are the same to the bit, so which of both ways is taken changes
no result; a rule of the processor's kind and of the weights' size decides, never a measured time.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

ROOM, ROOM_WITH_TILES = 2**28, 2**31
"""Bytes of weights that one process may hold laid out: two copies of each. More where a processor multiplies tiles
(AMX): laying out takes a fifth of such a product, and a twentieth of others."""


class Prepared(NamedTuple):
    """A weight (d_out, d_in) for `x Wᵀ`, its transpose for `dy W`, and the version of the numbers that they are of."""

    forth: torch.Tensor
    back: torch.Tensor
    version: int


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_held = 0
"""Bytes in it, of weights that may be gone by now: a rule that depends on nothing but what was asked for."""


@cache
def room() -> int:
    """Bytes that this kind of processor prepares at most; 0 where oneDNN multiplies no bfloat16 on it."""
    if not torch._C._has_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    return ROOM_WITH_TILES if torch.cpu._is_amx_tile_supported() else ROOM


def prepared(weight: torch.Tensor) -> Prepared | None:
    """The frozen weight (d_out, d_in) laid out; None where it is not to be."""
    global _held
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return None
    found = laid_out(weight)
    if found is not None and found.version == weight._version:
        return found
    size = 2 * weight.numel() * weight.element_size()
    if found is None:
        if _held + size > room():
            return None
        _held += size
    with torch.no_grad():
        plain = weight.detach()
        forth, back = (torch.ops.mkldnn._reorder_linear_weight(w) for w in (plain, plain.T.contiguous()))
    _prepared[weight] = found = Prepared(forth, back, weight._version)
    return found


def laid_out(weight: torch.Tensor) -> Prepared | None:
    """What `prepared` made of it, perhaps of older numbers, if it has made something."""
    found: Prepared | None = _prepared[weight] if weight in _prepared else None  # noqa: SIM401 (its get has no types)
    return found


def forget(weight: torch.Tensor) -> None:
    """It has other numbers now, and its version is the same, as where its `data` is replaced."""
    if weight in _prepared:
        del _prepared[weight]


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """What a layer makes of x (..., d_in), by its weight as it was laid out before; None where it was not.

    Of a few tokens, as in generation, laying out takes up to half of a product.
    """
    if torch.is_grad_enabled() or type(layer) is not nn.Linear or x.dtype != layer.weight.dtype:
        return None
    found = laid_out(layer.weight)
    if found is None or found.version != layer.weight._version:
        return None
    return times(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, found).view(*x.shape[:-1], -1)


def times(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ready: Prepared | None) -> torch.Tensor:
    """`x Wᵀ + b`. x: (tokens, d_in)."""
    if ready is None:
        return F.linear(x, weight, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, ready.forth, bias, "none", [], "")
    return y


def times_back(dy: torch.Tensor, weight: torch.Tensor, ready: Prepared | None) -> torch.Tensor:
    """`dy W`. dy: (tokens, d_out)."""
    if ready is None:
        return dy @ weight
    dx: torch.Tensor = torch.ops.mkldnn._linear_pointwise(dy, ready.back, None, "none", [], "")
    return dx
