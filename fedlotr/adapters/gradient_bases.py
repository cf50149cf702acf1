"""Bases of the gradient at the present model: the one kind that needs data, and so public rows."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters import bases as basis_makers
from fedlotr.adapters.bases import Request
from fedlotr.adapters.experts import slots
from fedlotr.adapters.layer import weight_of, widths
from fedlotr.adapters.quantised import is_quantised
from fedlotr.adapters.tuner import CoreConfig, basis_from, check_one_rank, check_one_shape, target_layers
from fedlotr.said import say

T = TypeVar("T")

GRADIENT_MEMORY = 2 * 1024**3
"""Bytes of full-size gradients that `initialize_basis` holds at once."""


def initialize_basis(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    config: CoreConfig | None = None,
    *,
    memory: int = GRADIENT_MEMORY,
) -> CoreConfig:
    """Make bases of gradients (`update`) and return the configuration that carries them, ready for `get_peft_model`.

    The first step of AdamW on the full weights is -η·sign(ḡ), ḡ the gradient averaged over all batches; its leading
    singular vectors are the bases (Ponkshe et al. 2025, LoRA-SB; the size of the step does not matter). Several
    tied layers: the higher-order SVD of their steps stacked.

    batches: read once for every `memory` bytes of gradients, so a list, not an iterator. An iteration that holds
    something for the batch at hand holds it until that batch's gradient is there.
    loss(model, batch): the SUM of the batch's example losses, so that batches of any size average rightly.
    Raises ValueError where a gradient is zero or not finite: the subspace would be arbitrary. An expert that no batch
    reaches has its frozen weight in place of a step, as of the basis `svd`, and that is said.
    """
    config = copy(config or CoreConfig())
    ties: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, layer in target_layers(model, config).items():
        ties[config.tag(name, layer)].append((name, layer))
    layers, unreached = [member for members in ties.values() for member in members], list[str]()
    steps = _first_steps(model, layers, batches, loss, memory, unreached)
    for members in ties.values():
        check_one_shape(members)
        check_one_rank(config, [name for name, _ in members])
    config.bases = made = {}
    with basis_makers.one_thread():
        for tag, members in ties.items():
            d_in, d_out = widths(members[0][1])
            matrices = partial(islice, steps, len(members))
            request = Request(tag, d_in, d_out, config.rank_of(members[0][0]), config.seed, matrices)
            made[members[0][0]] = basis_from(config, request)
    if unreached and len(unreached) == len(layers):
        raise ValueError(_no_gradient(unreached[0], "zero"))
    if unreached:
        more = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
        say(
            f"no public row reaches the expert of {unreached[0]}{more} of {len(layers)} adapted layers: its basis is "
            "the leading singular vectors of its weight; more --public-examples may reach it"
        )
    return config


def _first_steps(
    model: nn.Module,
    layers: list[tuple[str, nn.Module]],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    memory: int,
    unreached: list[str],
) -> Iterator[torch.Tensor]:
    """-sign(ḡ) (d_out, d_in) of each layer in order, gradients of as many layers at once as `memory` holds.

    Of an expert that no batch reaches W, as long as a step; its name is put among the `unreached`.
    """
    experts = slots(model)
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for chunk in within(memory, layers, lambda member: _bytes(member[1])):
        gradients = _mean_gradients(model, chunk, batches, loss)
        for parameter, was in required.items():
            parameter.requires_grad_(was)
        for (name, layer), gradient in zip(chunk, gradients, strict=True):
            if name in experts and not gradient.any():
                unreached.append(name)
                weight = weight_of(layer)
                yield (weight * (weight.numel() ** 0.5 / weight.norm())).cpu()
                continue
            if not torch.isfinite(gradient).all() or not gradient.any():
                raise ValueError(_no_gradient(name, "zero" if torch.isfinite(gradient).all() else "not finite"))
            step = -torch.sign(gradient)
            yield (step.T if isinstance(layer, Conv1D) else step).cpu()


def within(memory: int, things: Sequence[T], size: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """Things in order, as many at once as have so many bytes together; a larger one alone."""
    at = 0
    while at < len(things):
        stop, held = at + 1, size(things[at])
        while stop < len(things) and (held := held + size(things[stop])) <= memory:
            stop += 1
        yield things[at:stop]
        at = stop


def _no_gradient(name: str, what: str) -> str:
    return (
        f"the gradient of {name} is {what}: fit the head first (a head of zeros passes no gradient on), or take "
        "another basis"
    )


def _mean_gradients(
    model: nn.Module,
    layers: Iterable[tuple[str, nn.Module]],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    model.requires_grad_(False)
    total: tuple[torch.Tensor, ...] | None = None
    with torch.enable_grad(), ExitStack() as stack:
        weights = [stack.enter_context(_differentiable(layer)) for _, layer in layers]
        passes = iter(batches)
        stack.callback(getattr(passes, "close", lambda: None))  # of what a generator holds, whatever goes wrong
        for batch in passes:
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
