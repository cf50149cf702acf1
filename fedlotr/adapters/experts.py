"""Experts that transformers keeps in 3-D parameters, as linear layers that are views of them: one for each matrix.

So an expert's matrix is an adapted layer like any other, with its own A, B and C, and nothing is copied. The router is
none of it and stays as it is. Each expert sees the tokens that the router sends to it, in their order: the tokens of
one client stay next to each other, and are fewer (`Spans.of`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.packed import Spans, current_spans, packed

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
"""What transformers' experts interface calls the two parameters, in the order in which they meet a token: the first
with a gate or without."""


@dataclass(frozen=True)
class Slot:
    """Where a layer's matrix lies: in which parameter, by its name in the model, at which place of how many."""

    parameter: str
    place: int
    experts: int


class Experts(nn.ModuleList):
    """The layers of all experts of one block, in the place of the module that holds them as tensors.

    `whole`, that module, goes on to multiply as long as all layers are as they were made; it is no submodule, since
    its parameters are the layers'. `silent`: they make zeros of all tokens.
    """

    silent = False

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self._whole = (whole,)
        up, down = _names(whole)
        turned = bool(whole.is_transposed)
        for place in range(len(getattr(whole, up))):
            self.append(nn.ModuleDict({name: _view(whole, name, place, turned=turned) for name in (up, down)}))

    @property
    def whole(self) -> Any:
        """The module that holds the experts as tensors."""
        return self._whole[0]

    @property
    def names(self) -> tuple[str, str]:
        """Of its two parameters, and of the two layers of each expert."""
        return _names(self.whole)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """(tokens, d) -> (tokens, d): the sum of what a token's experts make of it, weighed.

        top_k_index, top_k_weights: (tokens, k) which they are, and their weights.
        """
        if self.silent or hidden_states.is_meta:  # where nothing says which tokens an expert would see
            return torch.zeros_like(hidden_states)
        if self._as_made():
            return self.whole(hidden_states, top_k_index, top_k_weights)
        up, down = self.names
        spans = self._spans(len(hidden_states))
        result = torch.zeros_like(hidden_states)
        for place, expert in enumerate(self):
            layers = cast(nn.ModuleDict, expert)
            token, choice = torch.where(top_k_index == place)
            if not len(token):
                continue
            with nullcontext() if spans is None else packed(spans.of(token)):
                inside = layers[up](hidden_states.index_select(0, token))
                inside = self.whole._apply_gate(inside) if self.whole.has_gate else self.whole.act_fn(inside)
                y = layers[down](inside)
            result.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(result.dtype))
        return result

    def _layers(self) -> Iterator[tuple[str, int, nn.Module]]:
        for place, expert in enumerate(self):
            for name, layer in cast(nn.ModuleDict, expert).items():
                yield name, place, layer

    def _as_made(self) -> bool:
        """Whether each layer is the plain product with its part of the tensor, and nobody asks for more."""
        lie = {name: getattr(self.whole, name).untyped_storage().data_ptr() for name in self.names}
        return all(
            type(layer) is nn.Linear
            and not layer.weight.requires_grad
            and not layer._forward_hooks
            and layer.weight.untyped_storage().data_ptr() == lie[name]
            for name, _, layer in self._layers()
        )

    def _spans(self, tokens: int) -> Spans | None:
        """Whose tokens they are: packed, or on padded rows equal groups, one for each copy; None without copies."""
        if (found := current_spans()) is not None:
            return found
        for _, _, layer in self._layers():
            if isinstance(layer, FactoredLayer) and layer.copies:
                return None if (count := layer.number_of_copies) == 1 else Spans([tokens // count] * count)
        return None


def _names(whole: nn.Module) -> tuple[str, str]:
    return UP[0] if whole.has_gate else UP[1], DOWN


def _view(whole: nn.Module, name: str, place: int, *, turned: bool) -> nn.Linear:
    """The layer of one expert's matrix. turned: whether the parameter has (d_in, d_out) of each."""
    matrix = getattr(whole, name).detach()[place]
    weight = matrix.T if turned else matrix
    d_out, d_in = weight.shape
    layer = nn.Linear(d_in, d_out, bias=bool(whole.has_bias), device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if whole.has_bias:
        layer.bias = nn.Parameter(getattr(whole, f"{name}_bias").detach()[place], requires_grad=False)
    return layer


def can_be_unfused(module: nn.Module) -> bool:
    """Whether a module holds experts as transformers' experts interface has them, which PEFT's `target_parameters`
    adapts too: two 3-D parameters, perhaps with biases, and no other."""
    if not hasattr(module, "_apply_gate") or not {"has_gate", "has_bias", "is_transposed"} <= vars(module).keys():
        return False
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return False
    held = {name: (parameter.dim(), parameter.is_floating_point()) for name, parameter in module.named_parameters()}
    names = _names(module)
    wanted = {name: (3, True) for name in names} | ({f"{n}_bias": (2, True) for n in names} if module.has_bias else {})
    # PEFT wraps parameters in the order of the module's: on that the names in an adapter's file depend.
    return held == wanted and [name for name in held if name in names] == list(names)


def unfuse(model: nn.Module) -> None:
    """Put `Experts` in the place of all modules that can be, in place."""
    for name, module in list(model.named_modules()):
        if name and can_be_unfused(module):
            model.set_submodule(name, Experts(module))


@contextmanager
def silence(model: nn.Module) -> Iterator[None]:
    """Let the experts of a model make zeros of all tokens: what is left has no choice in it that a rounding decides."""
    found = [module for module in model.modules() if isinstance(module, Experts)]
    try:
        for module in found:
            module.silent = True
        yield
    finally:
        for module in found:
            module.silent = False


def slots(model: nn.Module) -> dict[str, Slot]:
    """Of a model's expert layers, by name."""
    return {
        f"{name}.{place}.{part}": Slot(f"{name}.{part}", place, len(module))
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for part, place, _ in module._layers()
    }
