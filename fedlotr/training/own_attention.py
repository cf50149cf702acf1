"""Attention of architectures that compute it without transformers' interface, taught to take packed sequences.

Whether they then keep them apart is tried as with any other model. On padded rows nothing of theirs changes.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from fedlotr.training.varlen_attention import attention, current_attendance


def teach(model: nn.Module) -> None:
    """Let the parts of a model that are known here give packed sequences to `attention`, in place."""
    for module in model.modules():
        for name, method in TAUGHT.get(f"{type(module).__module__}.{type(module).__qualname__}", {}).items():
            setattr(
                module, name, MethodType(method, module)
            )  # a bound one, which copies of the model have their own of


def _mpnet(self: Any, hidden_states: torch.Tensor, *given: Any, **more: Any) -> Any:
    """MPNet's attention; given: (mask, bias)."""
    if current_attendance() is None:
        return type(self).forward(self, hidden_states, *given, **more)
    shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
    q, k, v = (layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
    mixed, _ = attention(self, q, k, v, given[0], is_causal=False, position_bias=given[1])
    return (self.o(mixed.flatten(2)),)


def _mpnet_bias(self: Any, states: torch.Tensor, *given: Any, **more: Any) -> Any:
    """(1, heads, places, places) of relative positions: of as many places as the longest sequence has."""
    attendance = current_attendance()
    if attendance is not None:
        states = states[:, : attendance.widest]
    return type(self).compute_position_bias(self, states, *given, **more)


def _gpt_j(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """(1, heads, tokens, size) each, and of the result."""
    if current_attendance() is None:
        return type(self)._attn(self, q, k, v, mask)
    q, k = q.to(v.dtype), k.to(v.dtype)
    mixed, _ = attention(self, q, k, v, mask, is_causal=True)
    return mixed.transpose(1, 2), None


_HERE = "transformers.models"
TAUGHT: dict[str, dict[str, Callable[..., Any]]] = {
    f"{_HERE}.mpnet.modeling_mpnet.MPNetSelfAttention": {"forward": _mpnet},
    f"{_HERE}.mpnet.modeling_mpnet.MPNetEncoder": {"compute_position_bias": _mpnet_bias},
    f"{_HERE}.gptj.modeling_gptj.GPTJAttention": {"_attn": _gpt_j},
    f"{_HERE}.codegen.modeling_codegen.CodeGenAttention": {"_attn": _gpt_j},
}
"""By class the methods that are taught, each of which does as before on padded rows."""
