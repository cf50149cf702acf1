"""FlexLoRA's truncation, and clients of different ranks: blocks on the wire, two estimators, what they cost."""

from typing import Any

import numpy as np
import pytest

from fedlotr.flower import Update
from fedlotr.flower.certificate import Layer, Weighted, aggregation_error
from fedlotr.flower.plugins import load_strategy

A, B, C = (f"base_model.model.q.core_{factor}" for factor in "ABC")


def updates(clients: int, r: int) -> list[Update]:
    rng = np.random.default_rng(3)
    return [Update(k, {A: rng.normal(size=(r, 7)), B: rng.normal(size=(5, r))}, k + 1.0) for k in range(clients)]


@pytest.mark.parametrize(("clients", "r"), [(3, 2), (1, 2), (4, 1), (3, 5), (2, 3)])
def test_flexloras_error_is_the_discarded_singular_values(clients: int, r: int) -> None:
    sent = updates(clients, r)
    shares = [u.weight / sum(u.weight for u in sent) for u in sent]
    mean = sum(p * u.arrays[B] @ u.arrays[A] for p, u in zip(shares, sent, strict=True))
    strategy: Any = load_strategy("flexlora", {}, clients)
    found = strategy.combine(sent, 1)
    discarded = np.linalg.svd(mean)[1][r:]
    lost = float(np.linalg.norm(found[B] @ found[A] - mean))
    assert lost == pytest.approx(float(np.linalg.norm(discarded)), abs=1e-12)
    assert (lost < 1e-12) == (r == 5 or clients == 1), "exact where the rank is full"
    start = {A: np.zeros((r, 7)), B: np.zeros((5, r))}
    replies = [Weighted(u.arrays, p) for u, p in zip(sent, shares, strict=True)]
    certified = aggregation_error([Layer({"A": A, "B": B}, None, None, 2.0)], start, found, replies)
    assert certified == pytest.approx(lost / np.linalg.norm(mean), abs=1e-12)
    np.testing.assert_allclose(found[A] @ found[A].T, np.eye(r), atol=1e-12, err_msg="in order, so that ranks nest")
    assert np.all(np.diff(np.linalg.norm(found[B], axis=0)) <= 1e-12)
