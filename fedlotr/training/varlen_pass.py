"""Forward and backward of packed tokens: clients next to each other, each meeting its own copy of what is trained."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedlotr.adapters.layer import copies
from fedlotr.training.examples import Batch, Examples
from fedlotr.training.model import TrainableModel
from fedlotr.training.packing import PASS_TOKENS, Rows, pack, runs
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
    passes = list(runs(lengths, model.pass_tokens(RAGGED_TOKENS)))
    for run in passes:
        owner = owners[run]
        first, last = int(owner[0]), int(owner[-1]) + 1
        batch = model.ragged(examples, rows[run])
        leaves = {name: stack.detach()[first:last].requires_grad_() for name, stack in stacks.items()}
        by_row = torch.from_numpy(owner - first).to(model.device)
        copied = {
            name: leaf.index_select(0, by_row) if name in model.head_names else leaf for name, leaf in leaves.items()
        }
        with copies(model.module, model.as_copies(copied)), model.taking(batch, owner - first):
            hidden = None if model.prefix is None else model.prefix.states(examples, rows[run], batch.filler)
            losses = model.losses(batch, hidden)
            total = torch.dot(losses, torch.from_numpy(weights[run]).to(losses))
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for stack, gradient in zip(stacks.values(), gradients, strict=True):
            if gradient is None:
                continue
            if len(passes) == 1 and len(gradient) == len(stack):  # as in most steps: nothing to add up
                stack.grad = gradient
                continue
            if stack.grad is None:
                stack.grad = torch.zeros_like(stack)
            stack.grad[first:last] += gradient
        np.add.at(totals, owner, losses.detach().double().cpu().numpy())
    return totals


def ragged_batches(model: TrainableModel, examples: Examples, rows: Rows, tokens: int) -> Iterator[tuple[Rows, Ragged]]:
    """The given examples, those of similar length together, packed, in batches of at most so many tokens (or one row).

    Each with the places of its examples among `rows`.
    """
    order = np.argsort(-examples.lengths[rows], kind="stable")
    for run in runs(examples.lengths[rows[order]], tokens):
        yield order[run], model.ragged(examples, rows[order[run]])


def branched_batches(
    model: TrainableModel, examples: Examples, rows: Rows, tokens: int
) -> Iterator[tuple[Rows, Ragged]]:
    """As `ragged_batches`, of a language model; of neighbours with the same prompt this is computed once."""
    families = [*_families(examples, rows, tokens if model.branches else 0)]
    lengths, firsts = examples.lengths[rows], examples.labels[rows]
    sizes = np.array(
        [lengths[family].sum() - (firsts[family[0]] - 1) * (len(family) - 1) for family in families], np.int64
    )
    order = np.argsort(-sizes, kind="stable")
    for run in runs(sizes[order], tokens):
        together = [families[at] for at in order[run]]
        chosen = np.concatenate(together)
        several = len(chosen) > len(together)
        yield chosen, model.ragged(examples, rows[chosen], [*map(len, together)] if several else None)


def _families(examples: Examples, rows: Rows, tokens: int) -> Iterator[Rows]:
    """The places of neighbours that have the same prompt, and at most so many tokens together; others by themselves."""
    begin, size, before = 0, 0, None
    for at, row in enumerate(rows):
        start, first = int(examples.offsets[row]), int(examples.labels[row])
        own = int(examples.lengths[row]) - first + 1
        prompt = examples.tokens[start : start + first]
        alike = before is not None and first > 1 and size + own <= tokens and np.array_equal(prompt, before)
        if not alike:
            if at:
                yield np.arange(begin, at)
            begin, size = at, first - 1
        before, size = prompt, size + own
    yield np.arange(begin, len(rows))


class Passes:
    """The given examples in batches that a model takes forward and backward, each as long as it is at hand.

    Packed where the model takes that; to be gone through as often as one likes. To be made where the model may still be
    tried, which no hook on its layers should see.
    """

    def __init__(self, model: TrainableModel, examples: Examples, rows: Rows) -> None:
        self._model, self._examples, self._rows, self._packs = model, examples, rows, model.takes_ragged

    def __iter__(self) -> Iterator[Batch | Ragged]:
        model, examples, rows = self._model, self._examples, self._rows
        most = model.pass_tokens(PASS_TOKENS)
        if self._packs:
            for _, batch in ragged_batches(model, examples, rows, most):
                with model.taking(batch):
                    yield batch
            return
        for chosen in pack(examples.lengths[rows], most):
            yield examples.batch(rows[chosen], model.spec.pad_id).to(model.device)
