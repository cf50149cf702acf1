"""Optimizers for stacked copies: every copy along the first axis behaves as its own torch optimizer would."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

Stacks = Mapping[str, torch.Tensor]
"""Trained tensors by name, each (K, ...): one slice a client."""


State = dict[str, dict[str, torch.Tensor]]
"""What the optimizer of one client holds: kind of moment -> trained tensor's name -> its values."""


class BatchedOptimizer(Protocol):
    """Takes steps for the first `active` copies; the others stay still."""

    def load(self, states: Sequence[State], stacks: Stacks) -> None:
        """Before the first step: what each copy goes on from; what is not in its state starts at zero."""

    def step(self, stacks: Stacks, gradients: Stacks, rates: Mapping[str, float], active: int) -> None:
        """Update stacks[:active] in place from gradients of the same shape."""

    def save(self, row: int) -> State:
        """What the optimizer of one copy now holds, on the CPU."""


def _stacked(states: Sequence[State], kind: str, name: str, stack: torch.Tensor) -> torch.Tensor:
    """One kind of moment of all copies, like the stack; zero for a copy that has none."""
    moment = torch.zeros_like(stack)
    for row, state in enumerate(states):
        if name in state.get(kind, {}):
            moment[row] = state[kind][name]
    return moment


@dataclass
class AdamW:
    """Loshchilov & Hutter 2019 (arXiv:1711.05101), as `torch.optim.AdamW`: decoupled decay, bias correction.

    A state holds `mean` (m), `square` (v), and `weight`: for each tensor the two sums of the weights that m and v are
    averages with, 1 - β₁^t and 1 - β₂^t after t steps, by which they are corrected. As weights they also correct a mean
    of moments over clients that took different numbers of steps, and a copy each by its own.
    """

    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self._moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._missing: dict[str, list[tuple[float, ...]]] = {}
        """1 - weight when loaded, of m and v of each copy, for the tensors that any copy has a state of."""
        self._taken = np.zeros(0, np.int64)

    def load(self, states: Sequence[State], stacks: Stacks) -> None:
        """See `BatchedOptimizer`."""
        for name, stack in stacks.items():
            self._begin(name, stack, states)
            weights = [state.get("weight", {}).get(name) for state in states]
            if any(weight is not None for weight in weights):
                self._missing[name] = [(1.0, 1.0) if w is None else tuple((1 - w.double()).tolist()) for w in weights]

    def _begin(self, name: str, stack: torch.Tensor, states: Sequence[State] = ()) -> None:
        stack = stack.detach()
        self._moments[name] = _stacked(states, "mean", name, stack), _stacked(states, "square", name, stack)

    def step(self, stacks: Stacks, gradients: Stacks, rates: Mapping[str, float], active: int) -> None:
        """All active copies have taken the same number of steps since they were loaded: copies only ever stop."""
        if not len(self._taken):
            self._taken = np.zeros(active, np.int64)
        self._taken[:active] += 1
        beta1, beta2 = self.betas
        for name, stack in stacks.items():
            if name not in self._moments:
                self._begin(name, stack)
            mean, square = (moment[:active] for moment in self._moments[name])
            values, gradient, rate = stack[:active], gradients[name][:active], rates[name]
            values.mul_(1 - rate * self.weight_decay)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            taken = int(self._taken[0])
            weights = [self._weights(name, row, taken) for row in (range(active) if name in self._missing else (0,))]
            if len(set(weights)) == 1:
                correction1, correction2 = weights[0]
                denominator = (square.sqrt() / correction2**0.5).add_(self.eps)
                values.addcdiv_(mean, denominator, value=-rate / correction1)
            else:
                corrections = torch.tensor(weights).to(stack).view(active, 2, *[1] * (stack.dim() - 1))
                denominator = (square.sqrt() / corrections[:, 1].sqrt()).add_(self.eps).mul_(corrections[:, 0])
                values.addcdiv_(mean, denominator, value=-rate)

    def _weights(self, name: str, row: int, taken: int) -> tuple[float, ...]:
        """Of m and of v of one copy, after so many steps since it was loaded."""
        missing = self._missing[name][row] if name in self._missing else (1.0, 1.0)
        return tuple(1 - beta**taken * rest for beta, rest in zip(self.betas, missing, strict=True))

    def save(self, row: int) -> State:
        """See `BatchedOptimizer`."""
        taken = int(self._taken[row])
        return {
            "mean": {name: mean[row].cpu().clone() for name, (mean, _) in self._moments.items()},
            "square": {name: square[row].cpu().clone() for name, (_, square) in self._moments.items()},
            "weight": {
                name: torch.tensor(self._weights(name, row, taken), dtype=torch.float64) for name in self._moments
            },
        }


@dataclass
class SGD:
    """As `torch.optim.SGD` with momentum (not Nesterov's) and weight decay added to the gradient.

    A state holds `velocity`, where there is momentum.
    """

    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        self._velocities: dict[str, torch.Tensor] = {}

    def load(self, states: Sequence[State], stacks: Stacks) -> None:
        """See `BatchedOptimizer`."""
        if self.momentum:
            self._velocities = {n: _stacked(states, "velocity", n, stack.detach()) for n, stack in stacks.items()}

    def step(self, stacks: Stacks, gradients: Stacks, rates: Mapping[str, float], active: int) -> None:
        """See `BatchedOptimizer`."""
        for name, stack in stacks.items():
            values = stack[:active]
            gradient = gradients[name][:active].add(values, alpha=self.weight_decay)
            if self.momentum:
                if name not in self._velocities:
                    self._velocities[name] = torch.zeros_like(stack)
                gradient = self._velocities[name][:active].mul_(self.momentum).add_(gradient)
            values.sub_(gradient, alpha=rates[name])

    def save(self, row: int) -> State:
        """See `BatchedOptimizer`."""
        return {"velocity": {name: velocity[row].cpu().clone() for name, velocity in self._velocities.items()}}


class Settings(Protocol):
    """What an optimizer is made from; see `cohort.LocalTraining`."""

    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def momentum(self) -> float: ...  # noqa: D102
    @property
    def eps(self) -> float: ...  # noqa: D102


OPTIMIZERS: dict[str, Callable[[Settings], BatchedOptimizer]] = {
    "adamw": lambda settings: AdamW(settings.weight_decay, eps=settings.eps),
    "sgd": lambda settings: SGD(settings.weight_decay, settings.momentum),
}


def clip_by_norm(gradients: dict[str, torch.Tensor], limit: float) -> dict[str, torch.Tensor]:
    """Scale each copy's gradients so that their joint Euclidean norm is at most `limit`."""
    squares = sum((g.flatten(1).square().sum(1) for g in gradients.values()), torch.zeros(()))
    factors = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # the 1e-6 is torch.nn.utils.clip_grad_norm_'s
    return {name: g * factors.view(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}
