"""Forward and backward of packed tokens: clients next to each other, each meeting its own copy of what is trained."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedlotr.adapters.layer import copies
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel
from fedlotr.training.packing import Rows, runs
from fedlotr.training.varlen import Ragged

RAGGED_TOKENS = 3072
"""Tokens in one pass: half as many again as in an average step of a cohort, so that most steps are one pass."""


def ragged_backward(
    model: TrainableModel, stacks: Mapping[str, torch.Tensor], examples: Examples, batches: Sequence[Rows]
) -> npt.NDArray[np.float64]:
    """Put the gradient of each client's mean loss into its slice of `stacks`; the sum of each client's losses."""
    owners = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    weights = np.repeat([1 / len(batch) for batch in batches], [len(batch) for batch in batches])
    rows = np.concatenate(batches)
    lengths = examples.lengths[rows]
    totals = np.zeros(len(batches))
    for stack in stacks.values():
        stack.grad = torch.zeros_like(stack)
    for run in runs(lengths, model.pass_tokens(RAGGED_TOKENS)):
        owner = owners[run]
        first, last = int(owner[0]), int(owner[-1]) + 1
        batch = Ragged.of(examples, rows[run]).to(model.device)
        counts = np.bincount(owner - first, lengths[run]).astype(np.int64)
        counts[-1] += batch.tokens - counts.sum()  # what fills the pass up has no gradient, whoever it meets
        leaves = {name: stack.detach()[first:last].requires_grad_() for name, stack in stacks.items()}
        by_row = torch.from_numpy(owner - first).to(model.device)
        copied = {
            name: leaf.index_select(0, by_row) if name in model.head_names else leaf for name, leaf in leaves.items()
        }
        with copies(model.module, model.as_copies(copied)), model.taking(batch, counts.tolist()):
            hidden = None if model.prefix is None else model.prefix.states(examples, rows[run], batch.filler)
            losses = model.losses(batch, hidden)
            total = torch.dot(losses, torch.from_numpy(weights[run]).to(losses))
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for stack, gradient in zip(stacks.values(), gradients, strict=True):
            if gradient is not None:
                assert stack.grad is not None
                stack.grad[first:last] += gradient
        np.add.at(totals, owner, losses.detach().double().cpu().numpy())
    return totals
