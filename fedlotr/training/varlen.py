"""Sequences end to end, without padding: what a model is shown of them.

Everything but attention works on one token at a time, so a linear layer sees real tokens alone; `varlen_attention`
keeps sequences apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fedlotr.training.examples import IGNORED, Examples
from fedlotr.training.packing import Rows
from fedlotr.training.varlen_attention import Attendance, Branching

SAME_SHAPE = 16
"""Tokens of a pass are filled up to a multiple of this, so that passes often have the same shape: a CPU's products are
compiled for each new one, which takes as long as computing a few per cent of a pass."""


ReadOut = Literal["first", "last", "last that is no padding", "mean"]
"""Of which of a sequence's tokens a classification head reads the vector."""


@dataclass(frozen=True)
class Reading:
    """How a model numbers the positions of a sequence, and which of its tokens are read out.

    first: the position of the first token. Where that is not 0, as in RoBERTa, positions count the tokens that are not
    `first - 1`, the id of padding, which all have that for their position. read_out: None of a language model. pad_id:
    the id that "last that is no padding" passes over. branches: whether sequences may share their beginning.
    """

    first: int = 0
    read_out: ReadOut | None = None
    pad_id: int = 0
    branches: bool = False


@dataclass(frozen=True)
class Ragged:
    """Sequences end to end, ready for a model.

    input_ids, position_ids, token_type_ids (or None): (1, tokens), at the end some that belong to no sequence.
    labels: (rows,) class indices or numbers, or (1, tokens) next-token targets already shifted, `IGNORED` elsewhere.
    owners: (tokens,) the row of each token, the first row of those that share it; those that belong to none have the
    last. lengths: (rows,) tokens.
    read: what a head reads; (rows,) the place of a token of each sequence, or (rows, tokens), whose product with token
    vectors is the mean of each sequence's; None of a language model.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    labels: torch.Tensor
    owners: torch.Tensor
    read: torch.Tensor | None
    attendance: Attendance
    lengths: Rows
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
            None if self.read is None else self.read.to(device),
            self.attendance,
            self.lengths,
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

    def vectors(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, tokens, d) -> (rows, d) what a head reads of each sequence; float32 where that is a mean."""
        assert self.read is not None
        return hidden[0].index_select(0, self.read) if self.read.dim() == 1 else self.read @ hidden[0].float()

    def counts(self, owner: Rows | None) -> list[int]:
        """How many tokens in a row meet each copy of what is trained; of one copy, what fills them up too.

        owner: (rows,) the copy of each sequence, in order, all of them; None: one copy meets all.
        """
        if owner is None:
            return [self.tokens]
        counts = np.bincount(owner, self.lengths).astype(np.int64)
        counts[-1] += self.filler  # which has no gradient, whoever it meets
        found: list[int] = counts.tolist()
        return found

    @classmethod
    def of(cls, examples: Examples, rows: Rows, reading: Reading, families: Sequence[int] | None = None) -> "Ragged":
        """The given examples, in the given order, for a model that reads so.

        families: how many of them in a row have the same prompt, of which one copy is shown; its last token, whose
        prediction is each example's own, is shown to each. None: all are shown as they are.
        """
        lengths = examples.lengths[rows]
        parts = _whole(lengths) if families is None else _branches(lengths, examples.labels[rows], families)
        counts = parts.end - parts.begin
        total = int(counts.sum())
        filler = -total % SAME_SHAPE
        place = np.arange(total) - np.repeat(np.cumsum(counts) - counts - parts.begin, counts)
        owners = np.repeat(parts.row, counts)
        source = examples.offsets[rows][owners] + place

        def filled(values: npt.NDArray[Any], nothing: int = 0) -> torch.Tensor:
            padded = np.pad(values.astype(np.int64), (0, filler), constant_values=nothing)
            return torch.from_numpy(padded).unsqueeze(0)

        tokens = examples.tokens[source]
        labels = filled(_targets(examples, rows, owners, place, source), IGNORED) if examples.causal else None
        together = lengths if families is None else np.bincount(parts.family, counts).astype(np.int64)
        branching = (
            None
            if families is None
            else Branching(*(np.pad(x, (0, filler)) for x in (place, np.repeat(parts.branch, counts))))
        )
        return cls(
            filled(tokens),
            filled(_positions(tokens, lengths, place, reading), reading.first),
            None if examples.segments is None else filled(examples.segments[source]),
            torch.from_numpy(examples.labels[rows]) if labels is None else labels,
            filled(owners, len(rows) - 1)[0],
            _read(tokens, lengths, filler, reading),
            Attendance(np.append(together, filler) if filler else together, branching),
            lengths,
            filler,
        )


def _positions(tokens: npt.NDArray[np.int32], lengths: Rows, place: Rows, reading: Reading) -> Rows:
    """(total,) the position of each token. place: which of its sequence it is, from 0 on."""
    if not reading.first:
        return place
    counted = tokens != reading.first - 1
    passed_over = np.cumsum(~counted)
    before = np.concatenate([[0], passed_over])[np.cumsum(lengths) - lengths]  # in the sequences before its own
    return np.where(counted, reading.first + place - (passed_over - np.repeat(before, lengths)), reading.first - 1)


def _read(tokens: npt.NDArray[np.int32], lengths: Rows, filler: int, reading: Reading) -> torch.Tensor | None:
    """`Ragged.read`."""
    rows, ends = len(lengths), np.cumsum(lengths)
    match reading.read_out:
        case None:
            return None
        case "mean":
            owners = np.repeat(np.arange(rows), lengths)
            averages = torch.zeros(rows, len(tokens) + filler)
            averages[owners, np.arange(len(tokens))] = torch.from_numpy(np.repeat(1 / lengths, lengths)).float()
            return averages
        case "first":
            return torch.from_numpy(ends - lengths)
        case "last":
            return torch.from_numpy(ends - 1)
    shown = np.where(tokens != reading.pad_id, np.arange(len(tokens)), 0)
    return torch.from_numpy(np.maximum(np.maximum.reduceat(shown, ends - lengths), ends - lengths))


@dataclass(frozen=True)
class _Parts:
    """Stretches of rows in the order in which they are shown: of row `row` the tokens from `begin` to `end`.

    family: which rows share a beginning. branch: 0 of what is shared or of a row by itself, else from 1 on.
    """

    row: Rows
    begin: Rows
    end: Rows
    family: Rows
    branch: Rows


def _whole(lengths: Rows) -> _Parts:
    rows, nothing = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    return _Parts(rows, nothing, lengths, rows, nothing)


def _branches(lengths: Rows, firsts: npt.NDArray[Any], families: Sequence[int]) -> _Parts:
    """firsts: the first target of each row."""
    found: list[tuple[int, int, int, int, int]] = []
    row = 0
    for family, size in enumerate(families):
        shared = int(firsts[row]) - 1 if size > 1 else 0
        found += [(row, 0, shared, family, 0)] if shared else []
        found += [(row + at, shared, int(lengths[row + at]), family, at + 1 if size > 1 else 0) for at in range(size)]
        row += size
    return _Parts(*np.array(found, np.int64).T)


def _targets(examples: Examples, rows: Rows, owners: Rows, place: Rows, source: Rows) -> Rows:
    """(total,) the next token of each, where it is a target: what `Examples.batch` has in its labels."""
    following = np.minimum(source + 1, len(examples.tokens) - 1)
    wanted = place + 1 < examples.lengths[rows][owners]
    wanted &= place + 1 >= examples.labels[rows][owners]
    if examples.targets is not None:
        wanted &= examples.targets[following]
    return np.where(wanted, examples.tokens[following], IGNORED).astype(np.int64)
