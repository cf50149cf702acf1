"""Bases that move: what has been learnt between the present ones is folded into the carried term, and new ones come.

    y = W x + s·B_t C A_t x + U V x    ->    y = W x + s·B_t+1 0 A_t+1 x + (U V + s·B_t C A_t) x

The function stays as it was, the core goes on from zero in another subspace, and the sum of many small cores is an
update of any rank. Server and clients do it by one function, from one coded core, so that they have equal bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedlotr.adapters.bases import Factors, Request, lora_basis, one_thread, stacked
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.gradient_bases import GRADIENT_MEMORY, initialize_basis, within
from fedlotr.adapters.layer import FactoredLayer, weight_of
from fedlotr.adapters.moves import Rebase
from fedlotr.adapters.tuner import CoreConfig, bases_of, factored_layers
from fedlotr.said import say
from fedlotr.training.examples import Batch, Examples
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.packing import Rows
from fedlotr.training.varlen import Ragged
from fedlotr.training.varlen_pass import Passes

Members = Mapping[str, list[tuple[str, FactoredLayer]]]
"""The layers of each tie, by the name of the first of them."""


def gradient_bases(bare: TrainableModel, core: CoreConfig, examples: Examples, rows: Rows) -> CoreConfig:
    """A configuration with the first bases, of the gradient on public rows at a model without an adapter.

    Raises ValueError where there is none.
    """

    def loss(_: nn.Module, batch: Batch | Ragged) -> torch.Tensor:
        return bare.losses(batch).sum()

    return initialize_basis(bare.module, Passes(bare, examples, rows), loss, core)


def begin(model: TrainableModel) -> None:
    """Let a model's carried term know the bases that it begins with, so that it can come back to them."""
    bases = {name: Factors(pair.A.clone(), pair.B.clone()) for name, pair in bases_of(model.module).items()}
    model.carry(replace(model.carried, bases=bases))


def folded_names(model: TrainableModel) -> list[str]:
    """The trained tensors that are folded, and zero afterwards: all but the head's."""
    return [name for name in model.published if name not in model.head_names]


def zeroed_names(model: TrainableModel, rebase: Rebase) -> frozenset[str]:
    """The trained tensors that are zero after every move, on both sides: of a core, or a B, between other bases."""
    both = model.core is not None and model.core.row.both
    return frozenset(folded_names(model)) if rebase.move.makes_bases and not both else frozenset()


def head_of(model: TrainableModel) -> dict[str, torch.Tensor]:
    """What is trained and not folded, as it is: the gradient of the next bases is taken beside it."""
    return {name: value for name, value in model.values().items() if name in model.head_names}


def fold(model: TrainableModel, tensors: Mapping[str, torch.Tensor], first: Tensors | None = None) -> None:
    """Let a model carry what these tensors, all of `folded_names`, are between the present bases; they become zero.

    Or, of factors that are both trained and do not begin at zero, what they are beyond the first, which they become.
    """
    layers = factored_layers(model.module)
    pairs: dict[str, Factors] = {}
    with one_thread(), torch.no_grad():
        for name, parts in model.as_copies(tensors).items():
            layer = layers[name]
            a, b = (parts.get(side, layer.factor(side, "default")) for side in "AB")
            assert a is not None and b is not None
            u = b.double()
            if "C" in parts:
                basis = layer.basis("default")
                mixed = None if basis is None or basis.P is None else basis.P.double()
                u = u @ layer.core["default"].expand({"C": parts["C"].double()}, mixed)
            pairs[name] = Factors(a.detach().clone(), (layer.scaling["default"] * u).float())
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        model.assign({**model.values(), **(first or zeros)})
        if first and model.core is not None and model.core.row.residual:
            pairs = {name: stacked(pair, layers[name].taken_off("default")) for name, pair in pairs.items()}
    model.carry(model.carried.grown(pairs))


def turn(model: TrainableModel, tensors: Mapping[str, torch.Tensor], make: Callable[..., Factors]) -> None:
    """Let a model's B A, of these trained B, be what it is of other factors, made of (A, B)."""
    layers, bases, values = factored_layers(model.module), dict[str, Factors](), model.values()
    with one_thread(), torch.no_grad():
        for name, value in tensors.items():
            (layer,) = model.shared[name]
            a = layers[layer].factor("A", "default")
            assert a is not None
            pair = make(a, value)
            bases[layer], values[name] = Factors(pair.A, pair.B[:, :0]), pair.B
    model.carry(Carry(model.carried.terms, model.carried.version + 1, bases))
    model.assign(values)


def next_bases(
    model: TrainableModel, rebase: Rebase, version: int, public: tuple[Examples, Rows] | None = None
) -> dict[str, Factors]:
    """The pairs of a version, from 1, at the present model; of a method that trains B, A alone (B has no columns).

    public: the rows of which a gradient is taken. A tie whose gradient is zero, or not finite, goes on between the next
    singular vectors of its weights, and that is said.
    """
    assert model.core is not None
    core, move, ties = model.core, rebase.move, _members(model)
    one_sided = "B" in core.row.train
    make = lora_basis if one_sided and move.made_of == "seed" else move.make
    gradients: Iterator[torch.Tensor] = iter(())
    if public is not None and move.made_of == "gradient":
        gradients = _gradients(model, ties, *public)
    found: dict[str, Factors] = {}
    flat: list[str] = []
    with one_thread(), torch.no_grad():
        for first, members in ties.items():
            layer = members[0][1]
            d_in, d_out, r = layer.in_features, layer.out_features, layer.r["default"]
            matrices, in_turn = [], move.in_turn
            if move.made_of == "gradient":
                slopes = [next(gradients) for _ in members]
                sizes = [float(slope.norm()) for slope in slopes]
                # Each member of a tie counts alike.
                matrices = [slope / size for slope, size in zip(slopes, sizes, strict=True) if 0 < size < math.inf]
                if not matrices:
                    flat.append(first)
            if not matrices:
                in_turn = in_turn or move.made_of == "gradient"
                matrices = [_weight(member, move.made_of) for _, member in members]
            skipped = version * r % (min(d_in, d_out) - r + 1) if in_turn else 0
            tag = f"{core.tag(first, layer)}@{version}"
            pair = make(Request(tag, d_in, d_out, r, core.seed, partial(iter, matrices), skipped))
            found[first] = Factors(pair.A, pair.B[:, :0] if one_sided else pair.B)
    if flat:
        more = f" and of {len(flat) - 1} more" if len(flat) > 1 else ""
        say(
            f"the gradient of {flat[0]}{more} on the public rows has no directions (it is zero, or not finite): bases "
            "move there to the next singular vectors of the weights"
        )
    return found


def _members(model: TrainableModel) -> Members:
    ties: dict[int, list[tuple[str, FactoredLayer]]] = {}
    for name, layer in factored_layers(model.module).items():
        held = layer.basis("default")
        ties.setdefault(id(layer.core_A["default"] if held is None else held), []).append((name, layer))
    return {members[0][0]: members for members in ties.values()}


def _weight(layer: FactoredLayer, made_of: str) -> torch.Tensor:
    """W (d_out, d_in), with what it carries where that is asked for."""
    if made_of == "seed":
        return torch.zeros(())
    weight = weight_of(layer).cpu().double()
    carry = layer.carry("default")
    return weight + carry.matrix().cpu() if made_of == "present" and carry is not None else weight


def _gradients(model: TrainableModel, ties: Members, examples: Examples, rows: Rows) -> Iterator[torch.Tensor]:
    """Of the loss of public rows by each layer's whole matrix (d_out, d_in), float32, in the order of the ties.

    As many at once as there is memory for; the model's cores are zero.
    """
    layers = [layer for members in ties.values() for _, layer in members]
    for some in within(GRADIENT_MEMORY, layers, lambda layer: 4 * layer.in_features * layer.out_features):
        yield from (gradient.cpu() for gradient in _summed(model, some, examples, rows))


def _summed(
    model: TrainableModel, layers: Sequence[FactoredLayer], examples: Examples, rows: Rows
) -> list[torch.Tensor]:
    """dL/dy xᵀ of each layer, added up over all batches; L is the sum of the rows' losses."""
    sums = [torch.zeros(layer.out_features, layer.in_features, device=model.device) for layer in layers]
    trained, batches = [model.parameter(name) for name in folded_names(model)], Passes(model, examples, rows)
    with ExitStack() as stack:
        for total, layer in zip(sums, layers, strict=True):
            stack.callback(layer.register_forward_hook(_adding_to(total)).remove)
        for parameter in trained:  # so that the output of every layer has a gradient
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        stack.enter_context(torch.enable_grad())
        passes = iter(batches)
        stack.callback(getattr(passes, "close", lambda: None))
        for batch in passes:
            torch.autograd.grad(model.losses(batch).sum(), trained, allow_unused=True)
    return sums


def _adding_to(total: torch.Tensor) -> Any:
    def hook(_: Any, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)

        def add(gradient: torch.Tensor) -> None:
            total.add_((gradient.flatten(0, -2).to(x.dtype).T @ x).float())

        y.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
