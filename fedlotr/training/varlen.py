"""Sequences end to end, without padding: what a model is shown of them.

Everything but attention works on one token at a time, so a linear layer sees real tokens alone; `varlen_attention`
keeps sequences apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedlotr.training.examples import IGNORED, Examples
from fedlotr.training.packing import Rows, runs
from fedlotr.training.varlen_attention import Attendance

SAME_SHAPE = 16
"""Tokens of a pass are filled up to a multiple of this, so that passes often have the same shape: a CPU's products are
compiled for each new one, which takes as long as computing a few per cent of a pass."""


@dataclass(frozen=True)
class Ragged:
    """Sequences end to end, ready for a model.

    input_ids, position_ids, token_type_ids (or None): (1, tokens), at the end some that belong to no sequence.
    labels: (rows,) class indices or numbers, or (1, tokens) next-token targets already shifted, `IGNORED` elsewhere.
    owners: (tokens,) the row of each token; those that belong to none have the last.
    averages: (rows, tokens), whose product with token vectors is the mean of each sequence's; not of a language model.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    labels: torch.Tensor
    owners: torch.Tensor
    averages: torch.Tensor | None
    attendance: Attendance
    filler: int
    """How many tokens belong to no sequence."""

    def to(self, device: torch.device) -> "Ragged":
        """The same sequences on a device."""
        self.attendance.device = device
        return Ragged(
            self.input_ids.to(device),
            self.position_ids.to(device),
            None if self.token_type_ids is None else self.token_type_ids.to(device),
            self.labels.to(device),
            self.owners.to(device),
            None if self.averages is None else self.averages.to(device),
            self.attendance,
            self.filler,
        )

    @property
    def tokens(self) -> int:
        """Of all sequences, and what fills them up."""
        return self.input_ids.shape[1]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """(1, tokens) -> (rows,) the sum over each sequence; of what belongs to none, values are zero."""
        rows = values.new_zeros(int(self.owners[-1]) + 1, dtype=values[:0].sum().dtype)
        return rows.index_add_(0, self.owners, values[0].to(rows.dtype))

    @classmethod
    def of(cls, examples: Examples, rows: Rows) -> "Ragged":
        """The given examples, in the given order."""
        lengths = examples.lengths[rows]
        total = int(lengths.sum())
        filler = -total % SAME_SHAPE
        place = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source = np.repeat(examples.offsets[rows], lengths) + place

        def filled(values: npt.NDArray[Any], nothing: int = 0) -> torch.Tensor:
            padded = np.pad(values.astype(np.int64), (0, filler), constant_values=nothing)
            return torch.from_numpy(padded).unsqueeze(0)

        owners = np.repeat(np.arange(len(rows)), lengths)
        averages = None if examples.causal else torch.zeros(len(rows), total + filler)
        if averages is not None:
            averages[owners, np.arange(total)] = torch.from_numpy(np.repeat(1 / lengths, lengths)).float()
        labels = filled(_targets(examples, rows, place, source), IGNORED) if examples.causal else None
        return cls(
            filled(examples.tokens[source]),
            filled(place),
            None if examples.segments is None else filled(examples.segments[source]),
            torch.from_numpy(examples.labels[rows]) if labels is None else labels,
            filled(owners, len(rows) - 1)[0],
            averages,
            Attendance(np.append(lengths, filler) if filler else lengths),
            filler,
        )


def _targets(examples: Examples, rows: Rows, place: Rows, source: Rows) -> Rows:
    """(total,) the next token of each, where it is a target: what `Examples.batch` has in its labels."""
    lengths = examples.lengths[rows]
    following = np.minimum(source + 1, len(examples.tokens) - 1)
    wanted = place + 1 < np.repeat(lengths, lengths)
    wanted &= place + 1 >= np.repeat(examples.labels[rows], lengths)
    if examples.targets is not None:
        wanted &= examples.targets[following]
    return np.where(wanted, examples.tokens[following], IGNORED).astype(np.int64)


def ragged_batches(examples: Examples, rows: Rows, tokens: int) -> Iterator[tuple[Rows, Ragged]]:
    """The given examples, those of similar length together, in batches of at most so many tokens (or one row).

    Each with the places of its examples among `rows`.
    """
    order = np.argsort(-examples.lengths[rows], kind="stable")
    for run in runs(examples.lengths[rows[order]], tokens):
        yield order[run], Ragged.of(examples, rows[order[run]])
