"""Training K clients in one forward and one backward over the shared frozen base.

Every trained tensor is stacked K times; each row of a pass meets its own client's copy, so the gradient of the sum of
all clients' losses holds every client's own gradient. At each step the rows of all active clients are cut into passes,
packed without padding where the model takes that (`varlen_pass`), else sorted by length; passes add up, so their cut
changes nothing but rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from fedlotr.training.backward import backward, example_gradients
from fedlotr.training.examples import Examples
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.optimizers import OPTIMIZERS, State, clip_by_norm
from fedlotr.training.packing import Rows

GradientTransform = Callable[[dict[str, torch.Tensor], Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""(gradients, current values), both by name and (active, ...) -> gradients: what a strategy or a privacy mechanism
puts between backward and optimizer, after `clip_norm`. Row j is client `training_order(...)[j]`'s; clients stop from
the last row on, so whatever a transform keeps by client is cut as `kept[: len(gradient)]`."""


class Mechanism(Protocol):
    """What hides single examples in the gradients of a cohort's clients, who are numbered as in the cohort."""

    def batches(self, client: int, rows: Rows, training: "LocalTraining") -> list[Rows]:
        """The rows of each of a client's optimizer steps; a batch may be empty."""

    def bound(self, each: Tensors) -> Tensors:
        """The gradients of single examples, (n, ...) by name, none of them too long."""

    def release(self, client: int, total: Tensors, expected: float) -> Tensors:
        """From the sum of a step's bounded gradients, float64, the gradient that the client's optimizer gets.

        expected: examples in a batch, on average.
        """


COHORT_TOKENS = 2048
"""Tokens a step of one cohort (`cut_cohorts`): a pass over a small encoder costs about 20 ms besides its products, a
tenth of those over 1,024 tokens. Rounds of few clients are cut finer, for several workers."""

SHARED_TOKENS = 384
"""Tokens a step of a round from which on there are two cohorts. One worker takes up to a sixth longer then, for passes
that cost 20 ms besides their products; two take little more than half as long, where one of them would be idle."""

EVEN = 4
"""Where there are more than two cohorts, their number is a multiple of this: one, two and four workers share them
evenly."""


@dataclass(frozen=True)
class LocalTraining:
    """What every client does in a round.

    epochs: passes over its examples, or steps: a number of optimizer steps instead. lr, head_lr: learning rates of
    the factors and of the head (already scaled for the round). momentum: SGD's. eps: AdamW's.
    clip_norm: joint norm of a client's gradient, or None.
    optimizer_state: what an optimizer starts a round with: nothing, what the client's own had at the end of its last
    one, or (mean-v) AdamW's second moments alone, in each tensor the mean over all clients and entries.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    head_lr: float = 1e-3
    momentum: float = 0.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    optimizer_state: Literal["reset", "keep", "mean-v"] = "reset"

    def steps_of(self, held: int) -> int:
        """Optimizer steps in a round of a client that holds so many examples."""
        return self.steps if self.steps is not None else self.epochs * -(-held // self.batch_size)

    def examples_of(self, held: int) -> int:
        """Examples that it works through in a round."""
        if self.steps is None:
            return held * self.epochs
        epochs, rest = divmod(self.steps, -(-held // self.batch_size))
        return epochs * held + min(rest * self.batch_size, held)


@dataclass(frozen=True)
class ClientWork:
    """One client's examples (row numbers), the generator that shuffles them, and what its optimizer goes on from."""

    rows: Rows
    shuffle: np.random.Generator
    optimizer: State = field(default_factory=dict)


@dataclass(frozen=True)
class ClientResult:
    """What one client has after its local training; loss is the mean over the examples it saw, when it saw them.

    Where examples are hidden the loss is None: it would tell of them.

    personal: the tensors that stay with the client, by name. optimizer: what its optimizer holds, unless that is not
    wanted again (`optimizer_state`).
    """

    tensors: Tensors
    examples: int
    steps: int
    loss: float | None
    personal: Tensors = field(default_factory=dict)
    optimizer: State = field(default_factory=dict)


def client_batches(work: ClientWork, training: LocalTraining) -> list[Rows]:
    """The rows of each optimizer step: a fresh shuffle an epoch, cut into batches, the last one as it falls."""
    batches: list[Rows] = []
    epochs = 0
    while len(batches) < training.steps if training.steps is not None else epochs < training.epochs:
        order = work.shuffle.permutation(work.rows)
        batches += [order[at : at + training.batch_size] for at in range(0, len(order), training.batch_size)]
        epochs += 1
    return batches[: training.steps]


def training_order(cohort: Sequence[ClientWork], training: LocalTraining) -> list[int]:
    """Whose each row of what is stacked is, as positions in the cohort: those with the most steps first.

    The clients still active at any step are then a prefix, and stopping is slicing.
    """
    return sorted(range(len(cohort)), key=lambda k: -training.steps_of(len(cohort[k].rows)))


def train_cohort(
    model: TrainableModel,
    start: Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]],
    examples: Examples,
    cohort: Sequence[ClientWork],
    training: LocalTraining,
    transform: GradientTransform | None = None,
    server_round: int = 1,
    mechanism: Mechanism | None = None,
) -> list[ClientResult]:
    """Train every client of the cohort from the same start, or each from its own; results in the cohort's order.

    start: the published tensors by name; or such of each client, equal in those that do not move. server_round: for
    methods whose factors move in turn. The results hold what is published of the tensors that moved. Equal to training
    the clients one after another, up to rounding. mechanism: what hides single examples in the gradients; without it
    none is hidden.
    """
    plans = [
        client_batches(work, training) if mechanism is None else mechanism.batches(k, work.rows, training)
        for k, work in enumerate(cohort)
    ]
    order = training_order(cohort, training)
    starts = [start] if isinstance(start, Mapping) else [start[k] for k in order]
    model.assign(starts[0])  # what does not move is not copied
    stacks = _stacked(model, starts, len(cohort), server_round)
    optimizer = OPTIMIZERS[training.optimizer](training)
    if any(work.optimizer for work in cohort):
        optimizer.load([cohort[k].optimizer for k in order], stacks)
    rates = {name: training.head_lr if name in model.head_names else training.lr for name in stacks}
    if model.prefix is not None:
        all_seen = mechanism is None and training.steps is None
        model.prefix.begin(examples, [work.rows for work in cohort] if all_seen else [])
    losses = np.zeros(len(cohort))
    for step in range(len(plans[order[0]])):
        active = [k for k in order if len(plans[k]) > step]
        batches = [plans[k][step] for k in active]
        if mechanism is None:
            losses[active] += backward(model, stacks, examples, batches)
            gradients = {name: _gradient(stack)[: len(active)] for name, stack in stacks.items()}
        else:
            expected = [min(training.batch_size, len(cohort[k].rows)) for k in active]
            gradients = _released(mechanism, model, stacks, examples, active, batches, expected)
        with torch.no_grad():
            if training.clip_norm is not None:
                gradients = clip_by_norm(gradients, training.clip_norm)
            if transform is not None:
                gradients = transform(gradients, {name: stack[: len(active)] for name, stack in stacks.items()})
            optimizer.step(stacks, gradients, rates, len(active))
        for stack in stacks.values():
            stack.grad = None
    seen = [sum(len(batch) for batch in plan) for plan in plans]
    results: list[ClientResult | None] = [None] * len(cohort)
    for position, k in enumerate(order):
        trained = {name: stack.detach()[position].clone().cpu() for name, stack in stacks.items()}
        held = optimizer.save(position) if training.optimizer_state != "reset" else {}
        loss = float(losses[k]) / max(seen[k], 1) * model.spec.step**2 if mechanism is None else None
        results[k] = ClientResult(
            model.publish(trained), len(cohort[k].rows), len(plans[k]), loss, model.keep(trained), held
        )
    return [result for result in results if result is not None]


def _stacked(
    model: TrainableModel, starts: Sequence[Mapping[str, torch.Tensor]], clients: int, server_round: int
) -> dict[str, torch.Tensor]:
    """A copy for each client of what moves in the round, one above another."""
    begun, moving = [model.start(values) for values in starts], model.moving(server_round)
    return {
        name: torch.stack([values[name].detach().to(model.device).float() for values in begun])
        .expand(clients, *begun[0][name].shape)
        .clone()
        .requires_grad_()
        for name in begun[0]
        if name in moving
    }


def _released(
    mechanism: Mechanism,
    model: TrainableModel,
    stacks: Mapping[str, torch.Tensor],
    examples: Examples,
    active: Sequence[int],
    batches: Sequence[Rows],
    expected: Sequence[float],
) -> Tensors:
    """The gradient of each active client, from what `mechanism` lets out of the gradients of its examples."""
    totals = {name: torch.zeros_like(stack[: len(active)], dtype=torch.float64) for name, stack in stacks.items()}
    for owners, each in example_gradients(model, stacks, examples, batches):
        for name, rows in mechanism.bound(each).items():
            totals[name].index_add_(0, owners, rows.double())
    released = [
        mechanism.release(client, {name: total[row] for name, total in totals.items()}, expected[row])
        for row, client in enumerate(active)
    ]
    return {name: torch.stack([one[name] for one in released]).to(stack) for name, stack in stacks.items()}


def _gradient(stack: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(stack) if stack.grad is None else stack.grad


def cut_cohorts(step_tokens: Sequence[int], size: int | None = None, budget: int = COHORT_TOKENS) -> list[slice]:
    """Cut a round's clients, in their order, into cohorts: `size` clients each, or about `budget` tokens a step.

    step_tokens: tokens of one optimizer step of each client. A rule of data and configuration alone, never of the
    number of workers, so that results have the same bits on any number. The cohorts are evenly filled.
    """
    n = len(step_tokens)
    if size is not None:
        return [slice(at, min(at + size, n)) for at in range(0, n, size)]
    if not n:
        return []
    ends = np.cumsum(step_tokens)
    count = round(2 * float(ends[-1]) / budget)  # as many as two workers need to have something to do
    if count > 2:  # three cohorts would leave one of two workers idle for half of the time
        count = EVEN * max(1, round(count / 2 / EVEN))
    count = min(n, max(count, 2 if ends[-1] >= SHARED_TOKENS else 1))
    # A client belongs to the cohort in whose share of all tokens its middle falls.
    middles = ends - np.asarray(step_tokens) / 2
    group = np.minimum((middles * count / ends[-1]).astype(np.int64), count - 1)
    starts = np.flatnonzero(np.diff(group, prepend=-1)).tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]
