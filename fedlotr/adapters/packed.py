"""The update `y += s·B C A x` on packed tokens, where each copy of the trained factors meets its own span of them.

Packed tokens are sequences end to end, without padding, the tokens of one client next to each other. The frozen factors
meet all tokens in one product, in the base's dtype; a core meets its own span in its own dtype (float32), and so does
its gradient. What is trained and wide (LoRA's A and B) is multiplied in the base's dtype. Short spans share a product.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedlotr.adapters.prepared import prepared, times, times_back

LONG = 192
"""Tokens of a span from which on a product of its own is no slower than copying it into one for several."""
BLOCK = 2048
"""Tokens, with padding, of neighbouring spans that are multiplied in one batched product."""
WASTE = 64
"""Padding that a batched product may always hold: less than another product costs. Of more, as much as of tokens."""
SAME_WIDTH = 16
"""Spans are padded to a multiple of this, so that products often have the same shape: bfloat16 products are compiled
for each new one on a CPU, which takes half a millisecond."""


@dataclass(frozen=True)
class _Block:
    """Neighbouring spans: one as it is, or several, padded to each other for one batched product.

    copies, tokens: how many. gather: (copies · width) the token at each place, counted from the block's first; padding
    holds a token of the same span, so that what one client makes of its numbers stays its own. back: (tokens) the place
    of each. padding: the places that hold none.
    """

    copies: int
    tokens: int
    gather: torch.Tensor | None = None
    back: torch.Tensor | None = None
    padding: torch.Tensor | None = None

    @classmethod
    def of(cls, counts: npt.NDArray[np.int64], device: torch.device) -> "_Block":
        """For spans of so many tokens."""
        copies, tokens = len(counts), int(counts.sum())
        if copies == 1:
            return cls(copies, tokens)
        place = np.arange(_width(counts))
        held = place < counts[:, None]
        gather = np.minimum(place, np.maximum(counts[:, None] - 1, 0)) + (np.cumsum(counts) - counts)[:, None]
        indices = (np.minimum(gather, tokens - 1).ravel(), np.flatnonzero(held), np.flatnonzero(~held))
        return cls(copies, tokens, *(torch.from_numpy(index).to(device) for index in indices))

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, d) -> (copies, width, d)."""
        assert self.gather is not None
        return x.index_select(0, self.gather).view(self.copies, -1, x.shape[1])

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """The same with zeros for padding."""
        assert self.gather is not None and self.padding is not None
        return x.index_select(0, self.gather).index_fill_(0, self.padding, 0).view(self.copies, -1, x.shape[1])


def _width(counts: npt.NDArray[np.int64]) -> int:
    return max(1, -(-int(counts.max()) // SAME_WIDTH)) * SAME_WIDTH


def _cut(counts: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Spans by block: a power of two of them each, for the sake of equal shapes, as many as BLOCK and WASTE allow."""
    blocks, at = [], 0
    while at < len(counts):
        size = 1
        while at + 2 * size <= len(counts):
            more = counts[at : at + 2 * size]
            places, tokens = len(more) * _width(more), int(more.sum())
            if more.max() > LONG or places > BLOCK or places - tokens > max(WASTE, tokens):
                break
            size *= 2
        blocks.append(counts[at : at + size])
        at += size
    return blocks


class Spans:
    """How many consecutive tokens each copy meets; one copy meets all where there is a single span.

    The products of a step are as many as its tokens ask for, however many clients they are of.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.tokens = sum(self.counts)
        self._blocks: list[_Block] | None = None
        self._met = [copy for copy, count in enumerate(self.counts) if count]

    def of(self, tokens: torch.Tensor) -> "Spans":
        """Of some of the tokens alone. tokens: their places, in ascending order."""
        ends = torch.from_numpy(np.cumsum(self.counts))
        return Spans(np.diff(torch.searchsorted(tokens.cpu(), ends).numpy(), prepend=0).tolist())

    def _parts(self, weight: torch.Tensor, *tokens: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """Of each block: itself, its part of the weight, and of what has a row for each token.

        weight: of the copies that meet a token. A product with another's would have padding of a neighbour's tokens.
        """
        if self._blocks is None:
            counts = np.asarray([self.counts[copy] for copy in self._met], np.int64)
            self._blocks = [_Block.of(part, weight.device) for part in _cut(counts)]
        weights = weight.split_with_sizes([block.copies for block in self._blocks])
        sizes = [block.tokens for block in self._blocks]
        return zip(self._blocks, weights, *(x.split_with_sizes(sizes) for x in tokens), strict=True)

    def times(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x Wᵀ` by span, in x's dtype. x: (tokens, d_in), weight: (d_out, d_in), or (copies, d_out, d_in)."""
        weight = weight.to(x.dtype)
        if weight.dim() == 2:
            return x @ weight.T
        if len(weight) == 1:
            return x @ weight[0].T
        y = x.new_empty(len(x), weight.shape[1])
        for block, each, rows, out in self._parts(self._those_met(weight), x, y):
            if block.copies == 1:
                torch.mm(rows, each[0].T, out=out)
            else:
                found = torch.bmm(block.padded(rows), each.transpose(1, 2))
                torch.index_select(found.flatten(0, 1), 0, block.back, out=out)
        return y

    def add_times(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """`y += x Wᵀ` by span, in place, in y's dtype."""
        x, weight = x.to(y.dtype), weight.to(y.dtype)
        if weight.dim() == 2 or len(weight) == 1:
            y.addmm_(x, weight.view(weight.shape[-2:]).T)
            return
        for block, each, rows, out in self._parts(self._those_met(weight), x, y):
            if block.copies == 1:
                out.addmm_(rows, each[0].T)
            else:
                found = torch.bmm(block.padded(rows), each.transpose(1, 2))
                out.add_(found.flatten(0, 1).index_select(0, block.back))

    def gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The gradient of a weight of `times`: `dyᵀ x`, by span where it has copies."""
        x = x.to(dy.dtype)
        if dy.shape[1] > x.shape[1]:  # a wide result and its narrow transpose differ by a third in time on a CPU
            return self.gradient(x, dy, weight.transpose(-1, -2)).transpose(-1, -2).contiguous()
        if weight.dim() == 2 or len(weight) == 1:
            return (dy.T @ x).to(weight.dtype).view(weight.shape)
        found = dy.new_empty(len(self._met), *weight.shape[1:])
        for block, each, left, right in self._parts(found, dy, x):
            if block.copies == 1:
                torch.mm(left.T, right, out=each[0])
            else:
                torch.bmm(block.alone(left).transpose(1, 2), block.padded(right), out=each)
        if len(self._met) < len(self.counts):
            found = found.new_zeros(weight.shape).index_copy_(0, self._index(found), found)
        return found.to(weight.dtype)

    def _those_met(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if len(self._met) == len(self.counts) else weight.index_select(0, self._index(weight))

    def _index(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self._met, device=like.device)


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
            g = spans.times(h, c)
        g = (g if scale == 1 else g * scale).to(x.dtype)
        ready = None if weight is None else prepared(weight)
        if weight is not None:
            y = times(x, weight, base, ready)
        else:
            assert base is not None
            y = base
            ctx.mark_dirty(base)
        spans.add_times(y, g, b)
        _, _, _, needs_a, _, needs_b, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, h, g if needs_b else None, weight, a, c, b)
        ctx.scale, ctx.spans, ctx.ready = scale, spans, ready
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
        if c is not None:
            dc = spans.gradient(u, h, c) if needs_c else None
            u = spans.times(u, c.transpose(-1, -2)) if needs_x or needs_a else u
        u = u.to(dy.dtype)
        if needs_a:
            da = spans.gradient(u, x, a)
        if needs_x and weight is None:
            dx = spans.times(u, a.transpose(-1, -2))
        elif needs_x:
            dx = times_back(dy, weight, ctx.ready)
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
