"""What keeps clients from drifting apart while they train: gradient transforms, batched over a cohort.

Stacks are in the order of `cohort.training_order`; one of length 1 is the same for all clients.
"""

from collections.abc import Mapping, Sequence

import torch

from fedlotr.training.cohort import GradientTransform
from fedlotr.training.model import Tensors
from fedlotr.training.optimizers import Stacks


def chain(transforms: Sequence[GradientTransform]) -> GradientTransform | None:
    """One after the other; None where there is none."""
    if not transforms:
        return None

    def transform(gradients: Tensors, values: Mapping[str, torch.Tensor]) -> Tensors:
        for one in transforms:
            gradients = one(gradients, values)
        return gradients

    return transform


def proximal(mu: float, start: Stacks) -> GradientTransform:
    """g + μ (x - x₀), the gradient of the loss + μ/2 ||x - x₀||²: Li et al. 2020, FedProx (arXiv:1812.06127), eq. 2.

    start: x₀ by name, (K, ...) or (1, ...); what it does not name is free.
    """

    def transform(gradients: Tensors, values: Mapping[str, torch.Tensor]) -> Tensors:
        pulls = {
            name: mu * (values[name] - start[name][: len(g)].to(g)) for name, g in gradients.items() if name in start
        }
        return {name: g + pulls[name] if name in pulls else g for name, g in gradients.items()}

    return transform


class ControlVariates:
    """g - c_i + c: Karimireddy et al. 2020, SCAFFOLD (arXiv:1910.06378), algorithm 1, line 10.

    It also keeps the mean of every client's gradients g. For plain SGD that is option II of line 12,
    c_i - c + (x - y_i) / (K η), without the rounding of a difference; and unlike the distance travelled it is a
    gradient for any optimizer, so with AdamW or momentum the correction is to what the optimizer is given.
    """

    def __init__(self, server: Stacks, own: Stacks) -> None:
        """server: c by name, (1, ...). own: c_i, (K, ...). What they do not name is not corrected."""
        self._offsets = {name: server[name] - own[name] for name in own}
        self._sums: Tensors = {}
        self._steps: list[int] = []

    def __call__(self, gradients: Tensors, values: Mapping[str, torch.Tensor]) -> Tensors:
        """See the class."""
        active = len(next(iter(gradients.values())))
        if not self._sums:  # in the first step nobody has stopped
            self._sums = {name: torch.zeros_like(gradients[name]) for name in self._offsets}
            self._steps = [0] * active
        for name, total in self._sums.items():
            total[:active] += gradients[name]
        self._steps[:active] = [taken + 1 for taken in self._steps[:active]]
        return gradients | {name: gradients[name] + o[:active].to(gradients[name]) for name, o in self._offsets.items()}

    def means(self, row: int) -> Tensors:
        """The new c_i of one client: the mean of its gradients over its steps."""
        return {name: (total[row] / self._steps[row]).cpu() for name, total in self._sums.items()}
