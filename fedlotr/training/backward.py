"""Forward and backward over examples of several clients, each meeting its own client's copy of what is trained."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedlotr.adapters.layer import copies
from fedlotr.training.examples import Examples
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.packing import PASS_TOKENS, Rows, pack
from fedlotr.training.varlen_pass import ragged_backward

COPIED_NUMBERS = 2**24
"""Trained numbers, a copy for each example, that gradients are held of at once: 64 MB."""


def backward(
    model: TrainableModel, stacks: Mapping[str, torch.Tensor], examples: Examples, batches: Sequence[Rows]
) -> npt.NDArray[np.float64]:
    """Put the gradient of each client's mean loss into its slice of `stacks`; the sum of each client's losses."""
    if model.takes_ragged:
        return ragged_backward(model, stacks, examples, batches)
    owners = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    weights = np.repeat([1 / len(batch) for batch in batches], [len(batch) for batch in batches])
    rows = np.concatenate(batches)
    totals = np.zeros(len(batches))
    for chosen in pack(examples.lengths[rows], model.pass_tokens(PASS_TOKENS)):
        owner = torch.from_numpy(owners[chosen]).to(model.device)
        batch = examples.batch(rows[chosen], model.spec.pad_id).to(model.device)
        # A client alone meets its whole matrices as they are: a copy of one for each row would not fit the memory.
        alone = model.matrices if len(batches) == 1 else frozenset()
        copied = {name: stack[0] if name in alone else stack.index_select(0, owner) for name, stack in stacks.items()}
        with copies(model.module, model.as_copies(copied)):
            losses = model.losses(batch)
            torch.dot(losses, torch.from_numpy(weights[chosen]).to(losses)).backward()  # type: ignore[no-untyped-call]
        np.add.at(totals, owners[chosen], losses.detach().double().cpu().numpy())
    return totals


def example_gradients(
    model: TrainableModel, stacks: Mapping[str, torch.Tensor], examples: Examples, batches: Sequence[Rows]
) -> Iterator[tuple[torch.Tensor, Tensors]]:
    """The gradient of every example's own loss, each example with copies of its own: (owners, gradients) in parts.

    owners: (n,) the client of each, as a row of `stacks`. gradients: (n, ...) by name, float32. An example's does not
    depend on those beside it.
    """
    rows = np.concatenate([*batches, np.zeros(0, np.int64)]).astype(np.int64)
    owners = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    count = max(1, COPIED_NUMBERS // max(sum(stack[0].numel() for stack in stacks.values()), 1))
    for at in range(0, len(rows), count):
        own = torch.from_numpy(owners[at : at + count]).to(model.device)
        copied = {name: stack.detach().index_select(0, own).requires_grad_() for name, stack in stacks.items()}
        backward(model, copied, examples, [rows[i : i + 1] for i in range(at, min(at + count, len(rows)))])
        yield own, {name: torch.zeros_like(c) if c.grad is None else c.grad for name, c in copied.items()}
