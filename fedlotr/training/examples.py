"""Tokenised examples of different lengths, kept flat: what the trainer reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

Indices = Sequence[int] | npt.NDArray[np.int64]

IGNORED = -100
"""Label of a token without loss (the convention of `torch.nn.functional.cross_entropy`)."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, ready for a model.

    input_ids, attention_mask, token_type_ids (or None): (rows, length), int64.
    labels: (rows,) class indices or, float, numbers on a scale; or (rows, length) next-token targets already shifted,
    `IGNORED` where no loss.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same rows on a device."""
        types = None if self.token_type_ids is None else self.token_type_ids.to(device)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), types, self.labels.to(device))

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, length) -> (rows,) the sum over each sequence."""
        return values.sum(1)


@dataclass(frozen=True)
class Examples:
    """n token sequences stored end to end.

    tokens: (total,) int32. offsets: (n + 1,) int64; example i is tokens[offsets[i]:offsets[i + 1]].
    labels: (n,) int64: the class index; for a causal language model the position of the first token that is a target (1
    for plain text, the length of the prompt for prompt and answer); or float: the number that the model is to make.
    segments: (total,) int8 token type ids of sentence pairs, or None.
    causal: whether the labels mean the second.
    targets: (total,) bool, of a causal language model: which tokens are targets; None: all from the first one on.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | npt.NDArray[np.floating]
    segments: npt.NDArray[np.int8] | None = None
    causal: bool = False
    targets: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) tokens in each example."""
        return np.diff(self.offsets)

    def batch(self, rows: Indices, pad_id: int = 0) -> Batch:
        """The given examples, in the given order, right-padded to the longest of them."""
        lengths = self.lengths[np.asarray(rows)]
        width = int(lengths.max())
        ids = np.full((len(rows), width), pad_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        types = np.zeros((len(rows), width), np.int64) if self.segments is not None else None
        targets = np.full((len(rows), width), IGNORED, np.int64)
        for position, row in enumerate(rows):
            start, stop = self.offsets[row], self.offsets[row + 1]
            count = stop - start
            ids[position, :count] = self.tokens[start:stop]
            mask[position, :count] = 1
            if types is not None and self.segments is not None:
                types[position, :count] = self.segments[start:stop]
            if self.causal:
                first = max(int(self.labels[row]), 1)
                targets[position, first - 1 : count - 1] = ids[position, first:count]
                if self.targets is not None:
                    targets[position, : count - 1][~self.targets[start + 1 : stop]] = IGNORED
        labels = targets if self.causal else np.asarray(self.labels[np.asarray(rows)])
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            None if types is None else torch.from_numpy(types),
            torch.from_numpy(labels),
        )

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays().items()}
        save_file(arrays, path, metadata={"causal": str(self.causal)})

    @classmethod
    def load(cls, path: Path) -> "Examples":
        """Read what `save` wrote."""
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, not a dict)
            causal = (file.metadata() or {}).get("causal") == "True"
        beside = {"segments": arrays.get("segments"), "targets": arrays.get("targets")}
        return cls(arrays["tokens"], arrays["offsets"], arrays["labels"], causal=causal, **beside)

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {"tokens": self.tokens, "offsets": self.offsets, "labels": self.labels}
        beside = {"segments": self.segments, "targets": self.targets}
        return arrays | {name: array for name, array in beside.items() if array is not None}
