"""Weights laid out for oneDNN: the same products to the bit, of the numbers that weights have now, within limits."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn

from fedlotr.adapters import packed, prepared
from fedlotr.adapters.packed import Spans, factored_linear

pytestmark = pytest.mark.skipif(not prepared.room(), reason="oneDNN multiplies no bfloat16 on this processor")
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
WIDTHS = [(64, 64), (384, 384), (384, 1536), (1536, 384), (576, 192), (100, 60)]


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(prepared, "_held", 0)
    yield


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    if torch.cpu._is_amx_tile_supported():  # a kind of processor on which this was not seen
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7 * float(other.abs().max()))
    else:
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [1, 7, 16, 333, 1040])
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_products_are_the_same_to_the_bit(tokens: int, d_in: int, d_out: int) -> None:
    weight, bias = drawn(d_out, d_in), drawn(d_out, seed=1)
    ready = prepared.prepared(weight)
    assert ready is not None
    x, dy = drawn(tokens, d_in, seed=2), drawn(tokens, d_out, seed=3)
    assert_same(prepared.times(x, weight, bias, ready), F.linear(x, weight, bias))
    assert_same(prepared.times(x, weight, None, ready), F.linear(x, weight))
    assert_same(prepared.times_back(dy, weight, ready), dy @ weight)
    one = drawn(1, d_out, seed=4).expand(tokens, d_out)  # as a sum hands its gradient down
    assert_same(prepared.times_back(one, weight, ready), one @ weight)


def layer_and_factors() -> tuple[nn.Linear, Factors]:
    layer = nn.Linear(64, 48).bfloat16().requires_grad_(False)
    return layer, (drawn(4, 64).float(), torch.eye(4).requires_grad_(), drawn(48, 4, seed=1).float())


def through(layer: nn.Linear, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    x = drawn(40, 64, seed=2).requires_grad_()
    y = factored_linear(layer, x, *factors, 1.0, Spans([40]))
    y.float().square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return y.detach(), x.grad


def test_a_layer_multiplies_so_and_gives_what_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, factors = layer_and_factors()
    seen: list[Any] = []

    def watched(weight: torch.Tensor) -> Any:
        seen.append(prepared.prepared(weight))
        return seen[-1]

    monkeypatch.setattr(packed, "prepared", watched)
    found = through(layer, factors)
    assert len(seen) == 1 and seen[0] is not None
    monkeypatch.setattr(packed, "prepared", lambda weight: None)
    for one, other in zip(found, through(layer, factors), strict=True):
        assert_same(one, other)


def test_a_weight_that_has_changed_is_laid_out_anew() -> None:
    layer, factors = layer_and_factors()
    before, _ = through(layer, factors)
    with torch.no_grad():
        layer.weight.mul_(2)
    after, _ = through(layer, factors)
    assert not torch.equal(before, after)
    assert prepared._held == 2 * layer.weight.numel() * 2, "it is held once"


def test_no_more_is_held_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "room", lambda: 5 * 64 * 64 * 2)
    weights = [drawn(64, 64, seed=seed) for seed in range(3)]
    assert [prepared.prepared(weight) is not None for weight in weights] == [True, True, False]
    assert prepared.prepared(weights[0]) is prepared.prepared(weights[0])


def test_what_is_gone_is_not_kept() -> None:
    held = len(prepared._prepared)
    weight = drawn(64, 64)
    assert prepared.prepared(weight) is not None and len(prepared._prepared) == held + 1
    del weight
    gc.collect()
    assert len(prepared._prepared) == held


def test_others_are_left_as_they_are() -> None:
    assert prepared.prepared(torch.zeros(4, 4)) is None
    assert prepared.prepared(torch.zeros(4, 4, dtype=torch.bfloat16, device="meta")) is None
