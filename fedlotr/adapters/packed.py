"""The update `y += s·B C A x` on packed tokens, where each copy of the trained factors meets its own span of them.

Packed tokens are sequences end to end, without padding, the tokens of one client next to each other. The frozen factors
meet all tokens in one product, in the base's dtype; a core meets its own span in its own dtype (float32), and so does
its gradient. What is trained and wide (LoRA's A and B) is multiplied in the base's dtype, span by span.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn

SPREAD = 256
"""Columns up to which one product over all copies' columns, most of them zero, beats a small product for each copy."""


class Spans:
    """How many consecutive tokens each copy meets; one copy meets all where there is a single span."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.edges = list(pairwise(accumulate(self.counts, initial=0)))
        self._places: torch.Tensor | None = None

    def places(self, like: torch.Tensor) -> torch.Tensor:
        """(tokens, copies, 1), one where a token is the copy's, else zero."""
        if self._places is None:
            owner = torch.repeat_interleave(torch.tensor(self.counts), output_size=self.edges[-1][1])
            self._places = torch.nn.functional.one_hot(owner, len(self.counts)).unsqueeze(2).to(like)
        return self._places

    def times(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x Wᵀ` by span, in x's dtype. x: (tokens, d_in), weight: (d_out, d_in), or (copies, d_out, d_in)."""
        weight = weight.to(x.dtype)
        if weight.dim() == 2:
            return x @ weight.T
        if len(weight) == 1:
            return x @ weight[0].T
        y = x.new_empty(len(x), weight.shape[1])
        for each, (start, stop) in zip(weight, self.edges, strict=True):
            torch.mm(x[start:stop], each.T, out=y[start:stop])
        return y

    def add_times(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """`y += x Wᵀ` by span, in place, in y's dtype."""
        x, weight = x.to(y.dtype), weight.to(y.dtype)
        if weight.dim() == 2:
            y.addmm_(x, weight.T)
            return
        for each, (start, stop) in zip(weight, self.edges, strict=True):
            y[start:stop].addmm_(x[start:stop], each.T)

    def gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The gradient of a weight of `times`: `dyᵀ x`, by span where it has copies."""
        x = x.to(dy.dtype)
        if dy.shape[1] > x.shape[1]:  # a wide result and its narrow transpose differ by a third in time on a CPU
            return self.gradient(x, dy, weight.transpose(-1, -2)).transpose(-1, -2).contiguous()
        if weight.dim() == 2:
            return (dy.T @ x).to(weight.dtype)
        return torch.stack([dy[start:stop].T @ x[start:stop] for start, stop in self.edges]).to(weight.dtype)

    def few(self, x: torch.Tensor) -> bool:
        """Whether the copies are so few and narrow that `spread` pays."""
        return len(self.counts) * x.shape[1] <= SPREAD

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, copies · r) with x (tokens, r) in the columns of each token's copy, else zero.

        With it, one product does for all copies what would be a small one for each: `spread(x) @ stacked`.
        """
        return (x.unsqueeze(1) * self.places(x)).view(len(x), -1)


_current: ContextVar[Spans | None] = ContextVar("spans", default=None)


@contextmanager
def packed(spans: Spans) -> Iterator[None]:
    """Let factored layers take their input for packed tokens, (1, tokens, d_in)."""
    token = _current.set(spans)
    try:
        yield
    finally:
        _current.reset(token)


def current_spans() -> Spans | None:
    """The spans of the packed tokens on their way through the model; None where rows are padded."""
    return _current.get()


class _FactoredLinear(torch.autograd.Function):
    """`W x + s·B C A x`; of the input only `A x`, r wide, is kept where A is frozen.

    base: W x, which is written over, its own gradient being the base layer's affair (weight None); or else the bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        a: torch.Tensor,
        c: torch.Tensor | None,
        b: torch.Tensor,
        scale: float,
        spans: Spans,
    ) -> torch.Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        h = spans.times(x, a)
        g = h
        if c is not None:
            h = h.to(c.dtype)
            few = c.dim() == 3 and spans.few(h)
            g = spans.spread(h) @ c.transpose(1, 2).reshape(-1, c.shape[1]) if few else spans.times(h, c)
        g = (g if scale == 1 else g * scale).to(x.dtype)
        if weight is not None:
            y = F.linear(x, weight, base)
        else:
            assert base is not None
            y = base
            ctx.mark_dirty(base)
        spans.add_times(y, g, b)
        _, _, _, needs_a, _, needs_b, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, h, g if needs_b else None, weight, a, c, b)
        ctx.scale, ctx.spans = scale, spans
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,) = gradients
        x, h, g, weight, a, c, b = ctx.saved_tensors
        spans: Spans = ctx.spans
        _, needs_x, _, needs_a, needs_c, needs_b, _, _ = ctx.needs_input_grad
        dx = da = dc = None
        db = spans.gradient(dy, g, b) if needs_b else None
        u = spans.times(dy, b.transpose(-1, -2))
        if c is not None:
            u = u.to(c.dtype)
        if ctx.scale != 1:
            u = u * ctx.scale
        if c is not None and c.dim() == 3 and not spans.few(u):
            dc = spans.gradient(u, h, c) if needs_c else None
            u = spans.times(u, c.transpose(1, 2)) if needs_x or needs_a else u
        elif c is not None:
            placed = u if c.dim() == 2 else spans.spread(u)
            dc = (placed.T @ h).view(c.shape) if needs_c else None
            u = placed @ c.reshape(-1, c.shape[-1]) if needs_x or needs_a else u
        u = u.to(dy.dtype)
        if needs_a:
            da = spans.gradient(u, x, a)
        if needs_x and weight is None:
            dx = spans.times(u, a.transpose(-1, -2))
        elif needs_x:
            dx = dy @ weight
            spans.add_times(dx, u, a.transpose(-1, -2))
        return None if weight is not None else dy, dx, None, da, dc, db, None, None


def factored_linear(
    base_layer: nn.Module,
    x: torch.Tensor,
    a: torch.Tensor,
    c: torch.Tensor | None,
    b: torch.Tensor,
    scale: float,
    spans: Spans,
) -> torch.Tensor:
    """The base layer's output plus `s·B C A x`. x: (tokens, d_in).

    a, c, b: the factors, or stacked copies of them, one for each span; c None: the identity. The weight of a plain,
    frozen `nn.Linear` goes into one node with the update, whose gradients then add up in place; others are called.
    """
    weight: torch.Tensor | None = None
    if type(base_layer) is nn.Linear and not base_layer.weight.requires_grad and base_layer.weight.dtype == x.dtype:
        base, weight = base_layer.bias, base_layer.weight
    else:
        base = base_layer(x)
    result: torch.Tensor = _FactoredLinear.apply(base, x, weight, a, c, b, scale, spans)  # type: ignore[no-untyped-call]
    return result


def add_update(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    c: torch.Tensor | None,
    b: torch.Tensor,
    scale: float,
    spans: Spans,
) -> torch.Tensor:
    """`y + s·B C A x`, written over y, which must be nobody else's; see `factored_linear`. y: (tokens, d_out)."""
    result: torch.Tensor = _FactoredLinear.apply(y, x, None, a, c, b, scale, spans)  # type: ignore[no-untyped-call]
    return result
