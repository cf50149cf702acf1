"""Bases of the gradient at the present model: the one kind that needs data, and so public rows."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters import bases as basis_makers
from fedlotr.adapters.bases import Request
from fedlotr.adapters.layer import widths
from fedlotr.adapters.quantised import is_quantised
from fedlotr.adapters.tuner import CoreConfig, basis_from, check_one_shape, target_layers

GRADIENT_MEMORY = 2 * 1024**3
"""Bytes of full-size gradients that `initialize_basis` holds at once."""


def initialize_basis(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    config: CoreConfig | None = None,
    *,
    memory: int = GRADIENT_MEMORY,
) -> CoreConfig:
    """Make bases of gradients (`update`) and return the configuration that carries them, ready for `get_peft_model`.

    The first step of AdamW on the full weights is -η·sign(ḡ), ḡ the gradient averaged over all batches; its leading
    singular vectors are the bases (Ponkshe et al. 2025, LoRA-SB; the size of the step does not matter). Several
    tied layers: the higher-order SVD of their steps stacked.

    batches: read once for every `memory` bytes of gradients, so a list, not an iterator.
    loss(model, batch): the SUM of the batch's example losses, so that batches of any size average rightly.
    Raises ValueError where a gradient is zero or not finite: the subspace would be arbitrary.
    """
    config = copy(config or CoreConfig())
    ties: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, layer in target_layers(model, config).items():
        ties[config.tag(name, layer)].append((name, layer))
    steps = _first_steps(model, [member for members in ties.values() for member in members], batches, loss, memory)
    for members in ties.values():
        check_one_shape(members)
    config.bases = made = {}
    with basis_makers.one_thread():
        for tag, members in ties.items():
            d_in, d_out = widths(members[0][1])
            matrices = partial(islice, steps, len(members))
            request = Request(tag, d_in, d_out, config.r, config.seed, matrices)
            made[members[0][0]] = basis_from(config, request)
    return config


def _first_steps(
    model: nn.Module,
    layers: list[tuple[str, nn.Module]],
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    memory: int,
) -> Iterator[torch.Tensor]:
    """-sign(ḡ) (d_out, d_in) of each layer in order, gradients of as many layers at once as `memory` holds."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    position = 0
    while position < len(layers):
        chunk: list[tuple[str, nn.Module]] = []
        held = 0
        while position < len(layers) and (not chunk or held + _bytes(layers[position][1]) <= memory):
            chunk.append(layers[position])
            held += _bytes(layers[position][1])
            position += 1
        gradients = _mean_gradients(model, chunk, batches, loss)
        for parameter, was in required.items():
            parameter.requires_grad_(was)
        for (name, layer), gradient in zip(chunk, gradients, strict=True):
            if not torch.isfinite(gradient).all() or not gradient.any():
                raise ValueError(
                    f"the gradient of {name} is {'zero' if torch.isfinite(gradient).all() else 'not finite'}: "
                    "fit the head first (a head of zeros passes no gradient on), or take another basis"
                )
            step = -torch.sign(gradient)
            yield (step.T if isinstance(layer, Conv1D) else step).cpu()


def _mean_gradients(
    model: nn.Module,
    layers: Iterable[tuple[str, nn.Module]],
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    model.requires_grad_(False)
    total: tuple[torch.Tensor, ...] | None = None
    with torch.enable_grad(), ExitStack() as stack:
        weights = [stack.enter_context(_differentiable(layer)) for _, layer in layers]
        for batch in batches:
            # A layer that the loss does not depend on has a gradient of zero, which the caller refuses by name.
            part = torch.autograd.grad(loss(model, batch), weights, allow_unused=True, materialize_grads=True)
            total = (
                tuple(g.float() for g in part)
                if total is None
                else tuple(t + g for t, g in zip(total, part, strict=True))
            )
    if total is None:
        raise ValueError("no batches were given to take the gradient of")
    return total


@contextmanager
def _differentiable(layer: nn.Module) -> Iterator[torch.Tensor]:
    """A layer's weight, or where that is stored in few bits a matrix of zeros beside it, whose gradient is the same."""
    weight = cast(torch.Tensor, layer.weight)
    if not is_quantised(layer):
        yield weight.requires_grad_(True)
        return
    d_in, d_out = widths(layer)
    beside = torch.zeros(d_out, d_in, device=weight.device, requires_grad=True)
    hook = layer.register_forward_hook(
        lambda _, inputs, y: y + nn.functional.linear(inputs[0].to(beside.dtype), beside).to(y.dtype)
    )
    try:
        yield beside
    finally:
        hook.remove()


def _bytes(layer: nn.Module) -> int:
    d_in, d_out = widths(layer)
    return 4 * d_in * d_out * (2 if is_quantised(layer) else 1)
