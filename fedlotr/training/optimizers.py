"""Optimizers for stacked copies: every copy along the first axis behaves as its own torch optimizer would."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Stacks = Mapping[str, torch.Tensor]
"""Trained tensors by name, each (K, ...): one slice a client."""


class BatchedOptimizer(Protocol):
    """Takes steps for the first `active` copies; the others stay still."""

    def step(self, stacks: Stacks, gradients: Stacks, rates: Mapping[str, float], active: int) -> None:
        """Update stacks[:active] in place from gradients of the same shape."""


@dataclass
class AdamW:
    """Loshchilov & Hutter 2019 (arXiv:1711.05101), as `torch.optim.AdamW`: decoupled decay, bias correction."""

    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self._moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._steps = 0

    def step(self, stacks: Stacks, gradients: Stacks, rates: Mapping[str, float], active: int) -> None:
        """All active copies have taken the same number of steps, since copies only ever stop."""
        self._steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self._steps, 1 - beta2**self._steps
        for name, stack in stacks.items():
            if name not in self._moments:
                self._moments[name] = torch.zeros_like(stack), torch.zeros_like(stack)
            mean, square = (moment[:active] for moment in self._moments[name])
            values, gradient, rate = stack[:active], gradients[name][:active], rates[name]
            values.mul_(1 - rate * self.weight_decay)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            values.addcdiv_(mean, (square.sqrt() / correction2**0.5).add_(self.eps), value=-rate / correction1)


@dataclass
class SGD:
    """As `torch.optim.SGD` with momentum (not Nesterov's) and weight decay added to the gradient."""

    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        self._velocities: dict[str, torch.Tensor] = {}

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
