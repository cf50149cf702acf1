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
    """Sequences that attention pads to each other. start: of their padded tokens among those of all groups."""

    start: int
    count: int
    width: int
    mask: torch.Tensor | None
    """(count, width) zero, and minus infinity where there is padding; None where there is none."""


class Attendance:
    """Which tokens may attend to which, and where each is put for that."""

    def __init__(self, lengths: Rows) -> None:
        starts = np.cumsum(lengths) - lengths
        self.tokens = int(lengths.sum())
        self.device = torch.device("cpu")
        """Where the model computes; set before its first layer asks."""
        self.groups: list[_Group] = []
        taken: list[Rows] = []  # by group: the token at each padded place, -1 for padding
        at = 0
        for chosen in pack(lengths, int(lengths.size * lengths.max()), GROUP_OVERHEAD):
            width = -(-int(lengths[chosen[0]]) // SAME_WIDTH) * SAME_WIDTH
            place = np.arange(width)
            padding = place >= lengths[chosen, None]
            taken.append(np.where(padding, -1, starts[chosen, None] + place))
            mask = torch.zeros(padding.shape).masked_fill_(torch.from_numpy(padding), -torch.inf)
            self.groups.append(_Group(at, len(chosen), width, mask if padding.any() else None))
            at += taken[-1].size
        self._taken = taken
        self._masks: dict[int, list[torch.Tensor | None]] = {}
        self._indices: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def indices(self, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(gather, padding, scatter) over rows of one head of one token.

        gather: the row of (tokens, heads) at each place of the groups' (count, heads, width), end to end. padding: the
        places that hold none. scatter: the place of each row.
        """
        if heads not in self._indices:
            head = np.arange(heads)[None, :, None]
            rows = np.concatenate(
                [np.where(t < 0, -1, t * heads + head).ravel() for t in (g[:, None] for g in self._taken)]
            )
            padding = np.flatnonzero(rows < 0)
            scatter = np.empty(self.tokens * heads, np.int64)
            real = np.flatnonzero(rows >= 0)
            scatter[rows[real]] = real
            rows[padding] = 0
            gather, nowhere, back = (torch.from_numpy(places).to(self.device) for places in (rows, padding, scatter))
            self._indices[heads] = gather, nowhere, back
        return self._indices[heads]

    def masks(self, heads: int) -> list[torch.Tensor | None]:
        """By group (count · heads, 1, width), or None."""
        if heads not in self._masks:
            self._masks[heads] = [
                None if g.mask is None else g.mask.to(self.device).repeat_interleave(heads, 0).unsqueeze(1)
                for g in self.groups
            ]
        return self._masks[heads]


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
    """softmax(scale · Q Kᵀ) V within sequences. Of the products' operands, the padded copies are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, attendance: Attendance
    ) -> torch.Tensor:
        heads, size = q.shape[1], q.shape[3]
        gather, _, scatter = attendance.indices(heads)
        q, k, v = (x.transpose(1, 2).reshape(-1, size).index_select(0, gather) for x in (q, k, v))
        out = torch.empty_like(q)
        kept = []
        for group, mask in zip(attendance.groups, attendance.masks(heads), strict=True):
            qs, ks, vs, outs = (_part(x, group, heads) for x in (q, k, v, out))
            # Products in the base's dtype, the rest in float32: on CPUs torch's softmax is slow in bfloat16.
            scores = torch.bmm(qs, ks.transpose(1, 2)).float().mul_(scale)
            if mask is not None:
                scores += mask
            kept.append(torch.softmax(scores, -1).to(q.dtype))
            torch.bmm(kept[-1], vs, out=outs)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.attendance, ctx.heads = scale, attendance, heads
        return out.index_select(0, scatter).view(1, -1, heads, size)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        heads, attendance = ctx.heads, ctx.attendance
        size = q.shape[-1]
        gather, padding, scatter = attendance.indices(heads)
        d_out = gradients[0].reshape(-1, size).index_select(0, gather).index_fill_(0, padding, 0)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for group, p in zip(attendance.groups, kept, strict=True):
            qs, ks, vs, d_outs, dqs, dks, dvs = (_part(x, group, heads) for x in (q, k, v, d_out, dq, dk, dv))
            torch.bmm(p.transpose(1, 2), d_outs, out=dvs)
            dp = torch.bmm(d_outs, vs.transpose(1, 2)).float()
            ds = torch._softmax_backward_data(dp, p.float(), -1, dp.dtype).mul_(ctx.scale).to(q.dtype)
            torch.bmm(ds, ks, out=dqs)
            torch.bmm(ds.transpose(1, 2), qs, out=dks)
        back = (x.index_select(0, scatter).view(1, -1, heads, size).transpose(1, 2) for x in (dq, dk, dv))
        return *back, None, None


def _part(x: torch.Tensor, group: _Group, heads: int) -> torch.Tensor:
    """A group's (count · heads, width, size) of all groups' padded rows."""
    rows = group.count * heads * group.width
    start = group.start * heads
    return x[start : start + rows].view(group.count * heads, group.width, -1)


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
