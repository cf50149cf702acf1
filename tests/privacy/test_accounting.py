"""Epsilon and the noise for it: known answers, bounds that hold, and how much is reckoned for them."""

import math
from collections.abc import Iterator

import pytest

from fedlotr.privacy import accounting
from fedlotr.privacy.accounting import Releases, calibrate, dearest, epsilon, epsilon_by_prv, epsilon_by_rdp, within

POINTS = 2**21
"""Of the largest grid that may be made: tens of megabytes."""


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """How many points each grid has, about, of those that are made from here on."""
    made: list[float] = []
    plain = accounting._by_pld.__wrapped__

    def counted(spent: Releases, delta: float, interval: float) -> float:
        found = float(plain(spent, delta, interval))
        made.append(found / interval if math.isfinite(found) else 0.0)
        return found

    monkeypatch.setattr(accounting, "_by_pld", counted)
    accounting.epsilon.cache_clear()
    yield made
    accounting.epsilon.cache_clear()


# By dp-accounting's PLD at its interval of 1e-4, or 1e-5, on its own.
KNOWN = [
    (Releases(1.0, 0.01, 1000), 1e-5, 1.82824),
    (Releases(1.5, 0.04, 2250), 1e-5, 6.7688),
    (Releases(0.6, 0.001, 10000), 1e-6, 3.1522),
    (Releases(2.0, 0.1, 100), 1e-3, 1.5439),
    (Releases(0.8, 1 / 64, 640), 1e-5, 4.0597),
    (Releases(1.0, 1.0, 1), 1e-5, 4.3772),
    (Releases(5.0, 1.0, 10), 1e-5, 2.5944),
    (Releases(0.3, 0.5, 20), 1e-3, 96.514),
    (Releases(0.5, 1.0, 400), 1e-3, 922.646),  # exact; the grid of 1e-4 (50 s, 5 GB) says 923.609
    (Releases(0.1, 0.5, 4), 1e-3, 239.166),
]


@pytest.mark.parametrize(("spent", "delta", "known"), KNOWN)
def test_epsilon_is_the_known_answer(spent: Releases, delta: float, known: float, grids: list[float]) -> None:
    assert epsilon(spent, delta) == pytest.approx(known, rel=4e-5)
    assert epsilon(spent, delta) <= epsilon_by_rdp(spent, delta)
    assert len(grids) <= 5 and max(grids, default=0) < POINTS


PLANS = {
    1e-3: [(0.5, 6)],
    0.01: [(0.01, 1000)],
    40.0: [(0.9, 40), (0.3, 90), (0.01, 2000)],
    500.0: [(0.01, 1000)],
    1000.0: [(1.0, 100)],
}


@pytest.mark.parametrize(("target", "planned"), PLANS.items())
def test_any_epsilon_is_calibrated_with_little_reckoning(
    target: float, planned: list[tuple[float, int]], grids: list[float]
) -> None:
    sigma = calibrate(target, 1e-4, planned)
    assert len(grids) < 150 and max(grids, default=0) < POINTS and sum(grids) < 4 * POINTS
    # An upper bound keeps to it, and 0.5 % less noise does not.
    assert max(epsilon(Releases(sigma, *plan), 1e-4) for plan in planned) <= target
    assert max(epsilon(Releases(0.995 * sigma, *plan), 1e-4) for plan in planned) > target


def test_hundreds_of_clients_of_different_sizes_cost_little_more_than_one(grids: list[float]) -> None:
    planned = [(32 / n, (i * 7 % 5 + 1) * math.ceil(n / 32) * 3) for i, n in enumerate(range(40, 1040, 5))]
    sigma = calibrate(3.0, 1e-3, planned)
    assert len(grids) < 300 and max(grids) < POINTS
    grids.clear()
    at, most = dearest([Releases(sigma, *plan) for plan in planned], 1e-3)
    assert len(grids) < 300 and 2.98 < most <= 3.0
    # The oracle: each by itself, of the hundred that come nearest.
    near = sorted((Releases(sigma, *plan) for plan in planned), key=lambda one: -one.rate * math.sqrt(one.steps))
    assert most == max(epsilon(one, 1e-3) for one in near[:8]) == epsilon(at, 1e-3)
    assert all(within(one, 1e-3, 3.0) for one in near)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(0.1, 0.5, 1_000_000), (0.1, 1e-5, 1), (0.1, 0.999, 1), (1.0, 1.0, 1_000_000), (1e4, 0.5, 1), (1e4, 1e-3, 3)],
)
def test_what_any_noise_has_spent_is_told_on_grids_of_bearable_size(
    sigma: float, rate: float, steps: int, grids: list[float]
) -> None:
    found = epsilon(Releases(sigma, rate, steps), 1e-5)
    assert 0 <= found <= epsilon_by_rdp(Releases(sigma, rate, steps), 1e-5) * (1 + 1e-9)
    assert len(grids) <= 8 and max(grids, default=0) < POINTS


def test_opacus_is_not_asked_for_grids_of_gigabytes() -> None:
    assert epsilon_by_prv(Releases(1.0, 0.5, 10_000), 1e-5) is None
