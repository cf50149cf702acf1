"""Frozen linear layers whose weight is stored in 4 or 8 bits by bitsandbytes, and multiplied as what it stands for.

4bit: NF4 with quantised constants (Dettmers et al. 2023, QLoRA, arXiv:2305.14314). 8bit: a scale for each row
(LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339), of the weight alone.

Of bitsandbytes only the numbers are used, and not its products. On a CPU its 4-bit layer, once it is called without
gradient, repacks its weight for bfloat16 and passes no gradient from then on; its 8-bit layer on a GPU rounds the input
too, and finds outlying columns over the whole batch, so that what comes of an example would depend on those beside it.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn
from transformers.pytorch_utils import Conv1D

QUANTISED = ("4bit", "8bit")


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer's weight is one that bitsandbytes stores, by this module or by whoever saved the model."""
    return isinstance(layer, nn.Linear) and type(layer.weight).__name__ in ("Params4bit", "Int8Params")


def dequantised(layer: nn.Module) -> torch.Tensor:
    """What a quantised layer's weight stands for, (d_out, d_in)."""
    import bitsandbytes.functional as stored

    weight = cast(Any, layer.weight)
    if hasattr(weight, "quant_state"):
        found: torch.Tensor = stored.dequantize_4bit(weight.data, weight.quant_state)
    else:
        found = stored.int8_vectorwise_dequant(weight.data, weight.SCB)
    return found


class _Product(torch.autograd.Function):
    """`W x + b`, both frozen; W is dequantised for each product, in backward once more, and dropped after it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        ctx.layer = layer
        bias = cast(torch.Tensor | None, layer.bias)
        return F.linear(x, dequantised(layer).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,) = gradients
        return dy @ dequantised(ctx.layer).to(dy.dtype), None


def _forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return y


def multiply_plainly(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let a layer of bitsandbytes multiply by what its weight stands for, in a dtype; the same layer."""
    weight = cast(Any, layer.weight)
    if hasattr(weight, "quant_state"):
        weight.quant_state.dtype = dtype
    vars(layer)["forward"] = partial(_forward, layer)
    return layer


def quantise(layer: nn.Module, form: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A frozen `nn.Linear` or `Conv1D`, on the CPU, with its weight in few bits on a device, as an `nn.Linear`.

    form: of `QUANTISED`. dtype: to compute in, that of its bias too.
    """
    import bitsandbytes.nn

    stored: Any = bitsandbytes.nn
    weight = cast(torch.Tensor, layer.weight).detach()
    weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    d_out, d_in = weight.shape
    made: Any
    if form == "4bit":
        made = stored.Linear4bit(d_in, d_out, bias=False, quant_type="nf4", device="meta")
        made.weight = stored.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = stored.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False, device="meta")
        made.weight = stored.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    bias = cast(torch.Tensor | None, layer.bias)
    made.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return multiply_plainly(made.to(device), dtype)  # moving is what quantises


def check_quantiser(form: str, device: str = "cpu") -> None:
    """Raises ValueError where bitsandbytes is missing, or cannot store and multiply a small layer here."""
    try:
        layer = quantise(nn.Linear(64, 64), form, torch.float32, device)
        with torch.no_grad():
            layer(torch.ones(1, 64, device=device))
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {error.name} is not installed") from error
    except Exception as error:  # its library for this machine is missing, or is not for this machine
        raise ValueError(f"bitsandbytes does not work here ({type(error).__name__}: {error})") from error
