"""What a client's update tells where nothing is hidden: the very tokens of a step, by a span test.

The gradient of a core is G = s Σ_t (Bᵀ δ_t)(A x_t)ᵀ, a sum over the tokens of a step. While there are fewer of them
than the rank r, each row of G lies in the span of the A x_t, and no other token's A x does: whoever knows the model
tries all tokens. From r tokens on the span is the whole space, and the test is blind. LoRA's B gives away as much; its
A, once B is not zero, shows the x_t themselves, r of them a layer, and layers that meet the same input add up. What
embeddings alone decide (the inputs of the first layers) can be tried without knowing anything else of the text.

A test that is blind protects nobody: other attacks may see more. Privacy is what `fedlotr/privacy/dp_sgd.py` adds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fedlotr.adapters.layer import TRAINABLE, FactoredLayer
from fedlotr.adapters.tuner import factored_layers
from fedlotr.training.model import TrainableModel

RESIDUAL = 5e-6
"""Of its length, what may stick out of the span of a candidate that is said to lie in it."""

NOISE = 1e-6
"""Of the largest, a singular value that float32 may have made of nothing."""

ROUNDING = 2.0**-23
"""Of the values that a change is the difference of, what float32 may have made of nothing."""


def in_row_space(gradient: torch.Tensor, candidates: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """(n,) which candidates lie in the row space of a gradient; none where that is the whole space, or nothing.

    gradient: (m, k). candidates: (n, k). noise: of the gradient's singular values, what is not the gradient's.
    """
    _, values, rows = torch.linalg.svd(gradient.double(), full_matrices=False)
    rank = int((values > max(noise, NOISE * float(values[0]))).sum())
    if rank in (0, gradient.shape[1]):
        return torch.zeros(len(candidates), dtype=torch.bool)
    tried = candidates.double()
    out = tried - tried @ rows[:rank].T @ rows[:rank]
    lengths = tried.norm(dim=1)
    close: torch.Tensor = (out.norm(dim=1) <= RESIDUAL * lengths) & (lengths > 0)
    return close


def first_layers(model: TrainableModel) -> list[str]:
    """The adapted layers whose input at a position is decided by the token there alone, whatever came before it."""
    pairs = torch.tensor([[5, 7], [6, 7]], device=model.device)
    inputs = _inputs(model, list(factored_layers(model.module)), input_ids=pairs)
    return [name for name, x in inputs.items() if torch.equal(x[0, 1], x[1, 1])]


def named_tokens(
    model: TrainableModel, update: Mapping[str, torch.Tensor], positions: Sequence[int]
) -> set[tuple[int, int]]:
    """The (token, position) pairs that the span test finds in an update, trying the whole vocabulary at each position.

    update: a published tensor's name to its change, or gradient, in one step of plain SGD (AdamW's steps have no low
    rank), or in several where frozen factors meet the input. The model holds what the clients were sent. Where
    embeddings know no positions, one position stands for all.
    """
    layers = factored_layers(model.module)
    names = [name for name in first_layers(model) if any(f"{name}.core_" in tensor for tensor in update)]
    found: set[tuple[int, int]] = set()
    vocabulary = torch.arange(int(model.module.config.vocab_size), device=model.device)  # type: ignore[union-attr,arg-type]
    for position in positions:
        at = {"input_ids": vocabulary[:, None], "position_ids": torch.full_like(vocabulary[:, None], position)}
        inputs = {name: x[:, 0] for name, x in _inputs(model, names, **at).items()}
        for gradient, candidates, noise in _clues(layers, inputs, update):
            found |= {(int(token), position) for token in in_row_space(gradient, candidates, noise).nonzero()[:, 0]}
    return found


def _clues(
    layers: Mapping[str, FactoredLayer], inputs: Mapping[str, torch.Tensor], update: Mapping[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """(gradient, what its rows combine, for each token, noise): each layer's, and those of one input together."""
    shared: list[tuple[torch.Tensor, list[torch.Tensor], list[float]]] = []
    for name, x in inputs.items():
        layer, a = layers[name], layers[name].factor("A", "default")
        for part in TRAINABLE:
            gradient = update.get(f"base_model.model.{name}.core_{part}")
            if gradient is None or not gradient.any():
                continue
            sent = getattr(layer, f"core_{part}")["default"].detach()
            noise = ROUNDING * float(sent.abs().max()) * max(gradient.shape) ** 0.5
            if part in "CB":
                assert a is not None
                yield gradient, x.to(a.dtype) @ a.detach().T, noise
            elif part in "AD":
                if not any(torch.equal(x, other) for other, _, _ in shared):
                    shared.append((x, [], []))
                _, gradients, noises = next(one for one in shared if torch.equal(x, one[0]))
                gradients.append(gradient / gradient.norm())
                noises.append(noise / float(gradient.norm()))
    for x, gradients, noises in shared:
        yield torch.cat(gradients), x, max(noises)


@torch.no_grad()
def _inputs(model: TrainableModel, names: Sequence[str], **batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the layers of these names meet in a forward pass, (rows, length, d_in)."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, arguments: seen.update({name: arguments[0].float()})

    with ExitStack() as stack:
        for name in names:
            handle = model.module.get_submodule(name).register_forward_pre_hook(watch(name))
            stack.callback(handle.remove)
        trunk = getattr(model.module, "encoder", model.module)
        trunk(**batch)
    return seen
