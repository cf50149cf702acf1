"""Attention of packed sequences, which keeps them apart; the models of transformers call it as any other.

Sequences of similar length are padded to each other in small groups, and all padding is gone again behind it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import AttentionInterface

from fedlotr.training.packing import Rows, pack

NAME = "fedlotr-ragged"
"""Under which transformers knows the attention of this module."""
GROUP_OVERHEAD = 32
"""What one more group costs in attention, in padded tokens."""
SAME_WIDTH = 8
"""The width of a group is a multiple of this, so that groups often have the same shape: a CPU's products are compiled
for each new one."""
HARMLESS = ("position_ids", "cache_position")
"""Tensors that models hand on to any attention, and that change nothing in it."""


@dataclass(frozen=True)
class _Layout:
    """Where the rows of (tokens, heads), one head of one token each, lie in a group that is padded.

    start: of the group's rows among those of all groups. shape: (count · heads, width). gather: the row at each place
    of (count, heads, width). padding: the places that hold none.
    """

    start: int
    shape: tuple[int, int]
    gather: torch.Tensor
    padding: torch.Tensor

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Its part (count · heads, width, size) of all groups' padded rows."""
        return rows[self.start : self.start + len(self.gather)].view(*self.shape, -1)

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """The same of (tokens · heads, size); padding holds some row or other."""
        return rows.index_select(0, self.gather).view(*self.shape, -1)


@dataclass(frozen=True)
class Branching:
    """Of sequences that are several with one beginning: the position of each token, and which branch it is of.

    Branch 0 is the beginning, or a sequence without branches. A token sees its own branch and the beginning.
    """

    position: Rows
    branch: Rows


class Attendance:
    """Which tokens may attend to which, and where each is put for that."""

    def __init__(self, lengths: Rows, branching: Branching | None = None) -> None:
        self._lengths, self.branching = lengths, branching
        self.device = torch.device("cpu")
        """Where the model computes; set before its first layer asks."""
        self.asked = 0
        """How many layers have attended."""
        self._groups = pack(lengths, int(lengths.size * lengths.max()), GROUP_OVERHEAD)
        self._layouts: dict[int, tuple[list[_Layout], torch.Tensor]] = {}
        self._masks: dict[tuple[bool, int | None], list[torch.Tensor | None]] = {}

    def layouts(self, heads: int) -> tuple[list[_Layout], torch.Tensor]:
        """The groups, and the place of each row of (tokens, heads) among their padded rows, which lie end to end."""
        if heads not in self._layouts:
            lengths = self._lengths
            starts = np.cumsum(lengths) - lengths
            head = np.arange(heads)[:, None]
            groups: list[_Layout] = []
            scatter = np.empty(int(lengths.sum()) * heads, np.int64)
            at = 0
            for chosen in self._groups:
                place, empty = self._places(chosen)
                rows = ((starts[chosen, None] + place)[:, None] * heads + head).ravel()
                nowhere = np.broadcast_to(empty[:, None], (len(chosen), heads, len(place))).ravel()
                scatter[rows[~nowhere]] = at + np.flatnonzero(~nowhere)
                rows[nowhere] = 0
                gather, padding = (torch.from_numpy(x).to(self.device) for x in (rows, np.flatnonzero(nowhere)))
                groups.append(_Layout(at, (len(chosen) * heads, len(place)), gather, padding))
                at += rows.size
            self._layouts[heads] = groups, torch.from_numpy(scatter).to(self.device)
        return self._layouts[heads]

    def masks(self, *, causal: bool, window: int | None) -> list[torch.Tensor | None]:
        """Of each group what is added to its scores: zero, and minus infinity where a token does not attend.

        Causal (1, 1, width, width): padding lies behind all of a sequence's tokens; with branches (count, 1, width,
        width). Else (count, 1, 1, width), or None where nothing is padded; with a window that hides something (count,
        1, width, width). window: how many tokens one attends to, itself the last of them; or where it sees both sides,
        to each side, itself the first of both.
        """
        if (causal, window) not in self._masks:
            made: list[torch.Tensor | None] = []
            for chosen in self._groups:
                place, hidden = self._places(chosen)
                back, near = place[:, None] - place, window or len(place)
                if causal and self.branching is not None:
                    hidden = (back < 0) | self._beside(chosen, place, window)
                elif causal:
                    hidden = ((back < 0) | (back >= near))[None]
                elif near < len(place):  # padding sees itself, since what sees nothing has no softmax
                    hidden = (hidden[:, None] | (abs(back) >= near)) & (back != 0)
                else:
                    hidden = hidden[:, None]
                mask = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), -torch.inf).unsqueeze(1)
                made.append(mask.to(self.device) if hidden.any() else None)
            self._masks[causal, window] = made
        return self._masks[causal, window]

    def _beside(self, chosen: Rows, place: Rows, window: int | None) -> Any:
        """(count, width, width) which places are of other branches, or beyond the window."""
        assert self.branching is not None
        at = np.minimum((np.cumsum(self._lengths) - self._lengths)[chosen, None] + place, self._lengths.sum() - 1)
        branch, position = self.branching.branch[at], self.branching.position[at]
        beside = (branch[:, None] != branch[:, :, None]) & (branch[:, None] != 0)
        return beside if window is None else beside | (position[:, :, None] - position[:, None] >= window)

    def _places(self, chosen: Rows) -> tuple[Rows, Any]:
        """(width,) the places of a group, and (count, width) which of them are empty."""
        place = np.arange(-(-int(self._lengths[chosen[0]]) // SAME_WIDTH) * SAME_WIDTH)
        return place, place >= self._lengths[chosen, None]

    @property
    def widest(self) -> int:
        """Places of the group of the longest sequence."""
        return max(len(self._places(chosen)[0]) for chosen in self._groups)


_attendance: ContextVar[Attendance | None] = ContextVar("attendance", default=None)


def current_attendance() -> Attendance | None:
    """Of the packed sequences on their way through the model; None where rows are padded."""
    return _attendance.get()


@contextmanager
def attending(model: Any, attendance: Attendance) -> Iterator[None]:
    """Let a transformers model take packed sequences; its attention keeps them apart.

    Backward belongs inside the context too where blocks run again there.
    """
    # What `set_attn_implementation` sets in the end; it looks through all modules first, in a millisecond or two.
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    token = _attendance.set(attendance)
    try:
        yield
    finally:
        _attendance.reset(token)
        model.config._attn_implementation = before


@dataclass(frozen=True)
class _Form:
    """How weights are made of products: `scale · Q Kᵀ`, then `cap · tanh(scores / cap)`, bias, masks, and a softmax.

    bias: (1, heads, places, places) or None, the same for every sequence. sinks: (heads,) or None, the score of a place
    beside all others that has no value.
    """

    scale: float
    cap: float | None
    causal: bool
    window: int | None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    def scores(self, qs: torch.Tensor, ks: torch.Tensor) -> torch.Tensor:
        """(n, rows, width), before the bias, in float32 or wider: on CPUs torch's softmax is slow in bfloat16."""
        products = torch.bmm(qs, ks.transpose(1, 2))
        scores = products.to(torch.promote_types(products.dtype, torch.float32)).mul_(self.scale)
        return scores if self.cap is None else scores.div_(self.cap).tanh_().mul_(self.cap)

    def weights(self, qs: torch.Tensor, ks: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
        """(n, rows, width), what each place is weighed by; a sink takes its share and is not among them."""
        scores, width = self.scores(qs, ks), ks.shape[1]
        each = scores.view(-1, heads, width, width)
        if self.bias is not None:
            each.add_(self.bias[:, :, :width, :width])
        if mask is not None:
            each.add_(mask)
        if self.sinks is None:
            return torch.softmax(scores, -1)
        sinks = self.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(len(each), heads, width, 1)
        return torch.softmax(torch.cat([each, sinks], -1), -1)[..., :-1].reshape(scores.shape)


class _Attention(torch.autograd.Function):
    """softmax(scores) V within sequences; Q, K and V are padded group by group, so that a processor's cache still
    holds them when they are multiplied. Of the products' operands, the padded copies are kept for backward.

    Several heads of Q that share one of K and V lie below each other in its products.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: _Form, attendance: Attendance
    ) -> torch.Tensor:
        heads, shared, tokens = q.shape[1], k.shape[1], q.shape[2]
        groups, scatter = attendance.layouts(heads)
        keyed, _ = attendance.layouts(shared)
        q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[3]) for x in (q, k, v))
        out = q.new_empty(sum(len(group.gather) for group in groups), v.shape[1])
        kept: list[torch.Tensor] = []
        masks = attendance.masks(causal=form.causal, window=form.window)
        for group, below, mask in zip(groups, keyed, masks, strict=True):
            ks, vs = below.gathered(k), below.gathered(v)
            qs = group.gathered(q).view(len(ks), -1, q.shape[1])
            p = form.weights(qs, ks, heads, mask).to(q.dtype)
            torch.bmm(p, vs, out=group.of(out).view(len(ks), -1, v.shape[1]))
            kept += qs, ks, vs, p
        ctx.save_for_backward(*kept)
        ctx.form, ctx.attendance, ctx.heads, ctx.shared = form, attendance, heads, shared
        return out.index_select(0, scatter).view(1, tokens, heads, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        saved, form = (
            ctx.saved_tensors,
            cast(_Form, ctx.form),
        )  # asked for once: where blocks run again, that makes them
        kept = iter(saved)
        groups, scatter = ctx.attendance.layouts(ctx.heads)
        keyed, scattered = ctx.attendance.layouts(ctx.shared)
        d_out = gradients[0].reshape(-1, gradients[0].shape[-1])
        size = saved[0].shape[-1]
        many, few = (sum(len(group.gather) for group in layout) for layout in (groups, keyed))
        dq, dk, dv = d_out.new_empty(many, size), d_out.new_empty(few, size), d_out.new_empty(few, d_out.shape[1])
        for group, below, qs, ks, vs, p in zip(groups, keyed, kept, kept, kept, kept, strict=True):
            d_outs = group.gathered(d_out)
            d_outs.view(-1, d_out.shape[1]).index_fill_(0, group.padding, 0)
            d_outs = d_outs.view(len(ks), -1, d_out.shape[1])
            torch.bmm(p.transpose(1, 2), d_outs, out=below.of(dv))
            dp = torch.bmm(d_outs, vs.transpose(1, 2))
            dp = dp.to(torch.promote_types(dp.dtype, torch.float32))
            ds = torch._softmax_backward_data(dp, p.to(dp.dtype), -1, dp.dtype).mul_(form.scale)
            if form.cap is not None:  # the slope of the cap, of scores that are computed once more
                ds.mul_(1 - form.scores(qs, ks).div_(form.cap).square_())
            ds = ds.to(p.dtype)
            torch.bmm(ds, ks, out=group.of(dq).view(len(ks), -1, size))
            torch.bmm(ds.transpose(1, 2), qs, out=below.of(dk))
        places = ((dq, scatter), (dk, scattered), (dv, scattered))
        heads = (ctx.heads, ctx.shared, ctx.shared)
        back = (
            x.index_select(0, at).view(1, -1, count, x.shape[1]).transpose(1, 2)
            for (x, at), count in zip(places, heads, strict=True)
        )
        return *back, None, None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: (1, heads, tokens, size) each -> (1, tokens, heads, size).

    position_bias: (1, heads, places, places) added to the scores of every sequence, places from its first token on.
    s_aux: (heads,) sinks. Neither is given a gradient.
    Raises RuntimeError where it is asked for what it does not do: dropout, a mask of the model's own, a bias or sinks
    that are trained, any other tensor or number. Whether a model asks for that is tried before it is packed.
    """
    attendance = _attendance.get()
    if attendance is None or dropout:
        raise RuntimeError("this attention is for packed sequences, inside `attending`, without dropout")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    beside = [n for n, given in more.items() if isinstance(given, torch.Tensor | float) and n not in HARMLESS]
    beside += [
        n for n, given in (("bias", position_bias), ("sinks", s_aux)) if given is not None and given.requires_grad
    ]
    if attention_mask is not None or beside:
        raise RuntimeError(f"packed sequences are not kept apart with {', '.join(beside) or 'such masks'}")
    if attendance.branching is not None and (position_bias is not None or not causal):
        raise RuntimeError("branches are not kept apart with a bias by places, or where a token sees what follows it")
    attendance.asked += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = _Form(scale, softcap, causal, sliding_window, position_bias, s_aux)
    return cast(torch.Tensor, _Attention.apply(query, key, value, form, attendance)), None  # type: ignore[no-untyped-call]


AttentionInterface.register(NAME, attention)
