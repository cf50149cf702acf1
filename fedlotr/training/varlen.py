"""Sequences end to end, without padding: what a model is shown of them, and the attention that keeps them apart.

Everything but attention works on one token at a time, so a linear layer sees real tokens alone. For attention,
sequences of similar length are padded to each other in small groups, and all padding is gone again behind it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface

from fedlotr.training.examples import Examples
from fedlotr.training.packing import pack, runs

Rows = npt.NDArray[np.int64]

NAME = "fedlotr-ragged"
"""Under which transformers knows the attention of this module."""
GROUP_OVERHEAD = 32
"""What one more group costs in attention, in padded tokens."""


SAME_SHAPE = 16
"""Tokens of a pass are filled up to a multiple of this, so that passes often have the same shape: a CPU's products are
compiled for each new one, which takes as long as computing a few per cent of a pass."""
SAME_WIDTH = 8
"""The same for the width of a group in attention."""


@dataclass(frozen=True)
class _Group:
    """Sequences that attention pads to each other, as rows of (tokens, heads): one head of one token each.

    start: of their padded rows among those of all groups. shape: (count · heads, width). gather: the row at each place
    of (count, heads, width). padding: the places that hold none. mask: (count · heads, 1, width) zero, and minus
    infinity where there is padding; None where there is none.
    """

    start: int
    shape: tuple[int, int]
    gather: torch.Tensor
    padding: torch.Tensor
    mask: torch.Tensor | None

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Its part (count · heads, width, size) of all groups' padded rows."""
        return rows[self.start : self.start + len(self.gather)].view(*self.shape, -1)

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """The same of (tokens · heads, size); padding holds some row or other."""
        return rows.index_select(0, self.gather).view(*self.shape, -1)


class Attendance:
    """Which tokens may attend to which, and where each is put for that."""

    def __init__(self, lengths: Rows) -> None:
        self._lengths = lengths
        self.device = torch.device("cpu")
        """Where the model computes; set before its first layer asks."""
        self._groups: dict[int, tuple[list[_Group], torch.Tensor]] = {}

    def groups(self, heads: int) -> tuple[list[_Group], torch.Tensor]:
        """The groups, and the place of each row of (tokens, heads) among their padded rows, which lie end to end."""
        if heads not in self._groups:
            lengths = self._lengths
            starts = np.cumsum(lengths) - lengths
            head = np.arange(heads)[:, None]
            groups: list[_Group] = []
            scatter = np.empty(int(lengths.sum()) * heads, np.int64)
            at = 0
            for chosen in pack(lengths, int(lengths.size * lengths.max()), GROUP_OVERHEAD):
                width = -(-int(lengths[chosen[0]]) // SAME_WIDTH) * SAME_WIDTH
                place = np.arange(width)
                empty = place >= lengths[chosen, None]
                rows = ((starts[chosen, None] + place)[:, None] * heads + head).ravel()
                nowhere = np.broadcast_to(empty[:, None], (len(chosen), heads, width)).ravel()
                scatter[rows[~nowhere]] = at + np.flatnonzero(~nowhere)
                rows[nowhere] = 0
                mask = torch.zeros(empty.shape).masked_fill_(torch.from_numpy(empty), -torch.inf).to(self.device)
                gather, padding = (torch.from_numpy(x).to(self.device) for x in (rows, np.flatnonzero(nowhere)))
                masked = mask.repeat_interleave(heads, 0).unsqueeze(1) if empty.any() else None
                groups.append(_Group(at, (len(chosen) * heads, width), gather, padding, masked))
                at += rows.size
            self._groups[heads] = groups, torch.from_numpy(scatter).to(self.device)
        return self._groups[heads]


@dataclass(frozen=True)
class Ragged:
    """Sequences end to end, ready for a model.

    input_ids, position_ids, token_type_ids (or None): (1, tokens), at the end some that belong to no sequence. labels:
    (rows,). averages: (rows, tokens), whose product with token vectors is the mean of each sequence's.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    labels: torch.Tensor
    averages: torch.Tensor
    attendance: Attendance
    filler: int
    """How many tokens belong to no sequence."""

    def to(self, device: torch.device) -> "Ragged":
        """The same sequences on a device."""
        types = None if self.token_type_ids is None else self.token_type_ids.to(device)
        self.attendance.device = device
        return Ragged(
            self.input_ids.to(device),
            self.position_ids.to(device),
            types,
            self.labels.to(device),
            self.averages.to(device),
            self.attendance,
            self.filler,
        )

    @property
    def tokens(self) -> int:
        """Of all sequences, and what fills them up."""
        return self.input_ids.shape[1]

    @classmethod
    def of(cls, examples: Examples, rows: Rows) -> "Ragged":
        """The given examples, in the given order."""
        lengths = examples.lengths[rows]
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        filler = -total % SAME_SHAPE
        place = np.arange(total) - np.repeat(ends - lengths, lengths)
        source = np.repeat(examples.offsets[rows], lengths) + place

        def filled(values: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.pad(values.astype(np.int64), (0, filler))).unsqueeze(0)

        averages = torch.zeros(len(rows), total + filler)
        shares = torch.from_numpy(np.repeat(1 / lengths, lengths)).float()
        averages[np.repeat(np.arange(len(rows)), lengths), np.arange(total)] = shares
        return cls(
            filled(examples.tokens[source]),
            filled(place),
            None if examples.segments is None else filled(examples.segments[source]),
            torch.from_numpy(examples.labels[rows]),
            averages,
            Attendance(np.append(lengths, filler) if filler else lengths),
            filler,
        )


def ragged_batches(examples: Examples, rows: Rows, tokens: int) -> Iterator[tuple[Rows, Ragged]]:
    """The given examples, those of similar length together, in batches of at most so many tokens (or one row).

    Each with the places of its examples among `rows`.
    """
    order = np.argsort(-examples.lengths[rows], kind="stable")
    for run in runs(examples.lengths[rows[order]], tokens):
        yield order[run], Ragged.of(examples, rows[order[run]])


_attendance: ContextVar[Attendance | None] = ContextVar("attendance", default=None)


@contextmanager
def attending(model: Any, attendance: Attendance) -> Iterator[None]:
    """Let a transformers model take packed sequences; its attention keeps them apart."""
    # What `set_attn_implementation` sets in the end; it looks through all modules first, in a millisecond or two.
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    token = _attendance.set(attendance)
    try:
        yield
    finally:
        _attendance.reset(token)
        model.config._attn_implementation = before


class _Attention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ) V within sequences; Q, K and V are padded group by group, so that a processor's cache still
    holds them when they are multiplied. Of the products' operands, the padded copies are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, attendance: Attendance
    ) -> torch.Tensor:
        heads, size = q.shape[1], q.shape[3]
        groups, scatter = attendance.groups(heads)
        q, k, v = (x.transpose(1, 2).reshape(-1, size) for x in (q, k, v))
        out = q.new_empty(sum(len(group.gather) for group in groups), size)
        kept: list[torch.Tensor] = []
        for group in groups:
            qs, ks, vs = (group.gathered(x) for x in (q, k, v))
            # Products in the base's dtype, the rest in float32: on CPUs torch's softmax is slow in bfloat16.
            scores = torch.bmm(qs, ks.transpose(1, 2)).float().mul_(scale)
            if group.mask is not None:
                scores += group.mask
            p = torch.softmax(scores, -1).to(q.dtype)
            torch.bmm(p, vs, out=group.of(out))
            kept += qs, ks, vs, p
        ctx.save_for_backward(*kept)
        ctx.scale, ctx.attendance, ctx.heads = scale, attendance, heads
        return out.index_select(0, scatter).view(1, -1, heads, size)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        kept = iter(ctx.saved_tensors)
        heads = ctx.heads
        groups, scatter = ctx.attendance.groups(heads)
        size = gradients[0].shape[-1]
        d_out = gradients[0].reshape(-1, size)
        padded = (sum(len(group.gather) for group in groups), size)
        dq, dk, dv = (d_out.new_empty(padded) for _ in range(3))
        for group, qs, ks, vs, p in zip(groups, kept, kept, kept, kept, strict=True):
            d_outs = group.gathered(d_out)
            if group.mask is not None:
                d_outs.view(-1, size).index_fill_(0, group.padding, 0)
            torch.bmm(p.transpose(1, 2), d_outs, out=group.of(dv))
            dp = torch.bmm(d_outs, vs.transpose(1, 2)).float()
            ds = torch._softmax_backward_data(dp, p.float(), -1, dp.dtype).mul_(ctx.scale).to(p.dtype)
            torch.bmm(ds, ks, out=group.of(dq))
            torch.bmm(ds.transpose(1, 2), qs, out=group.of(dk))
        back = (x.index_select(0, scatter).view(1, -1, heads, size).transpose(1, 2) for x in (dq, dk, dv))
        return *back, None, None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: (1, heads, tokens, size) each -> (1, tokens, heads, size)."""
    attendance = _attendance.get()
    if attendance is None or dropout:
        raise RuntimeError("this attention is for packed sequences, inside `attending`, without dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cast(torch.Tensor, _Attention.apply(query, key, value, scale, attendance)), None  # type: ignore[no-untyped-call]


AttentionInterface.register(NAME, attention)
