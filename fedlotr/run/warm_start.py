"""What `--init-adapter` means for one run: the adapter's layers and head, held against the model and its targets."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.export import PREFIX
from fedlotr.adapters.layer import widths
from fedlotr.adapters.start import Lora, read_lora
from fedlotr.errors import InputError
from fedlotr.models.loading import MeanPooledClassifier, head_layers, refused
from fedlotr.run.export import ENCODER


@dataclass(frozen=True)
class WarmStart:
    """What a run starts from.

    layers: the pairs by the name of the layer in our model. head: all trained tensors of the head by their names, or
    empty where the head is fitted. other_labels: how many labels the adapter's head is for where that is why.
    """

    layers: dict[str, Factors]
    head: dict[str, torch.Tensor]
    other_labels: int | None
    sha256: str

    def in_words(self, *, has_head: bool) -> str:
        """For the log."""
        head = "the head is the adapter's"
        if self.other_labels is not None:
            head = f"its head for {self.other_labels} labels is left, the head is fitted on the public examples"
        elif not self.head:
            head = "it has no head, which is fitted on the public examples"
        words = f"starts from an adapter of {len(self.layers)} layers (SHA-256 {self.sha256[:12]}…)"
        return f"{words}; {head}" if has_head else words


def warm_start(
    given: str, skeleton: nn.Module, targets: Collection[str], method: str, names: Sequence[str] = ()
) -> WarmStart:
    """Read an adapter for a model on the meta device. Raises InputError with everything about it that does not fit.

    targets: the layers that the run adapts; none with the method `head`. names: of the run's classes: where the adapter
    knows its own, its head's rows are brought into their order.
    """
    try:
        lora = read_lora(Path(given).expanduser())
        layers = _layers(lora, skeleton, targets, method)
        head, other = _head(lora, skeleton, names)
    except InputError as error:
        raise InputError([f"--init-adapter {given}: {problem}" for problem in error.problems]) from error
    return WarmStart(layers, head, other, lora.sha256)


def _layers(lora: Lora, skeleton: nn.Module, targets: Collection[str], method: str) -> dict[str, Factors]:
    modules = dict(skeleton.named_modules())
    inside = ENCODER if isinstance(skeleton, MeanPooledClassifier) else ""
    lacking, shaped, left_out = [], [], []
    found: dict[str, Factors] = {}
    for inner, pair in lora.layers.items():
        name = inside + inner
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | Conv1D):
            lacking.append(inner)
        elif widths(layer) != (pair.A.shape[1], pair.B.shape[0]):
            shaped.append(f"{inner} is {pair.A.shape[1]} in, {pair.B.shape[0]} out and the model's {widths(layer)}")
        elif not (pair.A.any() and pair.B.any()):
            continue  # adds nothing: a LoRA at its start, or the placeholder beside a head
        elif name not in targets:
            left_out.append(inner)
        else:
            found[name] = pair
    problems = []
    if lacking:
        problems.append(f"the model has no layer {_some(lacking)}; take the model that the adapter was trained on")
    if shaped:
        problems.append(f"layers of another size: {_some(shaped)}; take the model that the adapter was trained on")
    if left_out and not targets:
        problems.append(f"it adapts {_some(left_out)}, --method {method} adapts no layer; take a method that does")
    elif never := [name for name in left_out if inside + name in refused(skeleton)]:
        reason = refused(skeleton)[inside + never[0]]
        problems.append(f"it adapts {_some(never)}: {reason}; merge it and give the result by --model")
    elif left_out:
        problems.append(f"it adapts {_some(left_out)}, which this run does not; widen --targets")
    if problems:
        raise InputError(problems)
    return found


def _head(lora: Lora, skeleton: nn.Module, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], int | None]:
    """The head's tensors as the model names them; none, and for how many labels, where it is for other ones."""
    shapes = {
        f"{name}.{part}": tuple(tensor.shape)
        for name, layer in head_layers(skeleton).items()
        for part, tensor in layer.named_parameters(recurse=False)
    }
    given = dict(lora.others)
    if isinstance(skeleton, MeanPooledClassifier):
        given |= {f"classifier.{part}": tensor for part, tensor in lora.head.items()}
    unknown = sorted(given.keys() - shapes.keys())
    if unknown:
        raise InputError(f"{_some(unknown)}: neither a LoRA of a linear layer nor the model's head, so not understood")
    if not given:
        return {}, None
    missing = sorted(shapes.keys() - given.keys())
    if missing:
        raise InputError(f"its head lacks {_some(missing)}; take one with the whole head (modules_to_save), or without")
    last, layer = list(head_layers(skeleton).items())[-1]
    theirs = int(given[f"{last}.weight"].shape[0])
    if theirs != layer.out_features or (lora.labels and sorted(lora.labels) != sorted(names)):
        return {}, theirs
    differing = [name for name, tensor in given.items() if tuple(tensor.shape) != shapes[name]]
    if differing:
        raise InputError(f"its {_some(differing)} has another shape than the model's")
    if lora.labels:
        rows = [lora.labels.index(name) for name in names]
        given |= {name: given[name][rows] for name in given if name.rpartition(".")[0] == last}
    return {f"{PREFIX}{name}": tensor.float().contiguous() for name, tensor in given.items()}, None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
