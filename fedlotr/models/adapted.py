"""What is adapted of a model, and what is left out and why, as a run's header says it."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import nn

from fedlotr.models.loading import head_layers, linear_layers, unbatched_layers, why_left
from fedlotr.models.mixtures import expert_tensors
from fedlotr.models.targets import ALL

TYPES_SHOWN = 8
"""Types of layers named one by one."""


@dataclass(frozen=True)
class Adapted:
    """types: of the layers that are adapted, the name without the number of the block -> how many there are.

    left_out: why layers are not adapted -> their types.
    """

    types: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many are adapted."""
        return sum(self.types.values())

    def in_words(self) -> str:
        """One line."""
        kinds = f"{self.layers:,} layers: {_some(self.types)}" if self.types else "none"
        left = [f"{_some(types)} ({why})" for why, types in self.left_out.items()]
        return f"{kinds}; left out: {', '.join(left)}" if left else kinds


def what_is_adapted(model: nn.Module, chosen: Collection[str], targets: str) -> Adapted:
    """Of a model, on whatever device. chosen: the names of the layers that are adapted. targets: what was asked for."""
    left: dict[str, list[str]] = {}
    chosen = set(chosen)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = head_layers(model)
    unbatched = unbatched_layers(model, ALL)
    for name in linear_layers(model):
        if name not in chosen:
            reason = why_left(model, name)
            if name in unbatched:
                reason = "they also meet an input without a batch axis"
            left.setdefault(reason or f"not in --targets {targets}", []).append(name)
    if output is not None:
        names = [name for name, module in model.named_modules() if module is output and name not in heads]
        left.setdefault("the output layer", []).extend(names)
    if experts := expert_tensors(model):
        left["experts that cannot be taken apart"] = experts
    if heads:
        left["the head, trained whole"] = list(heads)
    return Adapted(
        _types([name for name in linear_layers(model) if name in chosen]),
        {why: _types(names) for why, names in left.items() if names},
    )


def _types(names: Sequence[str]) -> dict[str, int]:
    """By what follows the number of a block, or the whole name where there is none; experts of a block are one type."""
    return dict(Counter(re.split(r"\.\d+\.", re.sub(r"(?<=experts)\.\d+", "", name))[-1] for name in names))


def _some(types: dict[str, int]) -> str:
    shown = ", ".join(f"{count:,} {name}" for name, count in list(types.items())[:TYPES_SHOWN])
    return shown + (f" and {len(types) - TYPES_SHOWN} more types" if len(types) > TYPES_SHOWN else "")
