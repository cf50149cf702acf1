"""What a sequence of noised sums has spent: sampled Gaussian mechanisms, Poisson sampling, add or remove one.

The figure that is reported is dp-accounting's, by privacy loss distributions (PLD: Koskela et al. 2020, Doroshenko et
al. 2022); Opacus' PRV and the RDP bound stand beside it. None is computed by code of ours.
"""

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dp_accounting import DpEvent

COARSE, GOOD, FINE = (2**9, 1e-2), (2**11, 1e-4), (2**12, 2e-5)
"""Points of the first grid over epsilon's rough size, and the error, as a share of epsilon, that is good enough."""
MOST_POINTS = 2**21
"""Of a grid: some hundred megabytes, and seconds."""
LEAST_NOISE, MOST_NOISE = 0.01, 1e7
"""Noise multipliers among which one is looked for: epsilons of thousands at a single step, and of 1e-3 at any."""
PRECISION = 5e-4
"""Of the logarithm of a noise multiplier that is reckoned."""

# The accountants are imported where they are asked: a run without privacy does not wait for them.


@dataclass(frozen=True)
class Releases:
    """steps releases, each of a sum over a Poisson sample of rate `rate`, with noise of `sigma` times the bound."""

    sigma: float
    rate: float
    steps: int


def _event(part: Releases) -> "DpEvent":
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(part.sigma)
    one = gaussian if part.rate >= 1.0 else dp_accounting.PoissonSampledDpEvent(part.rate, gaussian)
    return dp_accounting.SelfComposedDpEvent(one, part.steps)


@lru_cache(maxsize=65536)
def epsilon(spent: Releases, delta: float) -> float:
    """By PLD: pessimistic by construction, and within 2e-5 of what it tends to. In closed form where all are sampled.

    By RDP, where that is less, for what would need more than `MOST_POINTS`: an epsilon in the thousands, whichever way.
    """
    if not spent.steps:
        return 0.0
    if spent.rate >= 1.0:
        return _gaussian(spent, delta)
    best = _refined(spent, delta, FINE)
    return best.epsilon if best.settled else min(best.epsilon, epsilon_by_rdp(spent, delta))


def within(spent: Releases, delta: float, limit: float) -> bool:
    """Whether epsilon is at most a limit: mostly told by a coarser grid than its value."""
    if not spent.steps:
        return True
    if spent.rate < 1.0 and _refined(spent, delta, COARSE, limit).epsilon <= limit:
        return True
    return epsilon(spent, delta) <= limit


def dearest(accounts: Iterable[Releases], delta: float) -> tuple[Releases, float]:
    """Of at least one account of equal noise, the one with the largest epsilon, and that."""
    left = _undominated(accounts)
    at = max(left, key=lambda spent: rough(spent, delta))
    most = epsilon(at, delta)
    while (other := _beyond(left, delta, most)) is not None:
        at, most = other, epsilon(other, delta)
    return at, most


def rough(spent: Releases, delta: float) -> float:
    """Epsilon's size, for nothing: the lesser of the bound without sampling and of the central limit's (no bound).

    The second: Bu et al. 2020 (arXiv:1911.11607), mu = rate · sqrt(steps · (exp(1/sigma²) - 1)).
    """
    far = math.sqrt(2 * math.log(1 / delta))
    sampled = spent.rate * math.sqrt(spent.steps * math.expm1(min(spent.sigma**-2, 500.0)))
    mu = min(math.sqrt(spent.steps) / spent.sigma, sampled)
    return mu * mu / 2 + mu * far


@dataclass(frozen=True)
class _Bound:
    """Of epsilon, from above; settled: a finer grid would not tell."""

    epsilon: float
    settled: bool


def _refined(spent: Releases, delta: float, wanted: tuple[int, float], enough: float = -1.0) -> _Bound:
    """The bounds of finer and finer grids, until they settle, or one is `enough`.

    Each has a quarter of the interval of the one before and so, as the error goes with its square, a sixteenth of the
    error. wanted: such as `FINE`.
    """
    points, error = wanted
    size = rough(spent, delta)
    interval, best = size / points, math.inf
    # One release loses at most about this; the grids of one and of all must both be of bearable size.
    whole = 1 / (2 * spent.sigma**2) + 10 / spent.sigma
    one = whole + math.log(spent.rate) if whole > 500 else math.log1p(spent.rate * math.expm1(whole))
    while (max(one, 0.0) + 4 * size) / interval <= MOST_POINTS:
        try:
            found = _by_pld(spent, delta, interval)
        except (ValueError, OverflowError, MemoryError):
            break
        if found <= enough or best * (1 - 15 * error) <= found < math.inf:
            return _Bound(min(found, best), True)
        best, interval = found, interval / 4
    return _Bound(best, False)


@lru_cache(maxsize=65536)
def _by_pld(spent: Releases, delta: float, interval: float) -> float:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    with warnings.catch_warnings(action="ignore"):  # numpy's, on losses whose exponential is too large
        return float(accountant.compose(_event(spent)).get_epsilon(delta))


def _gaussian(spent: Releases, delta: float) -> float:
    """Without sampling all steps are one release: its exact delta (Balle and Wang 2018, arXiv:1805.06530), inverted."""
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
    from scipy.optimize import brentq

    one = GaussianPrivacyLoss(spent.sigma / math.sqrt(spent.steps))

    def over(value: float) -> float:
        return float(one.get_delta_for_epsilon(value)) - delta

    if over(0.0) <= 0:
        return 0.0
    found = float(brentq(over, 0.0, rough(spent, delta), xtol=1e-12))
    while over(found) > 0:
        found *= 1 + 1e-12
    return found


@lru_cache(maxsize=4096)
def epsilon_by_rdp(spent: Releases, delta: float) -> float:
    """An upper bound of another kind, and a quick one."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    if not spent.steps:
        return 0.0
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    absl = logging.getLogger("absl")
    before, absl.level = absl.level, logging.ERROR  # it leaves out orders whose series do not converge, and says each
    try:
        return float(accountant.compose(_event(spent)).get_epsilon(delta))
    finally:
        absl.level = before


def epsilon_by_prv(spent: Releases, delta: float) -> float | None:
    """Opacus' upper end: its estimate and 0.01. None where it cannot tell, or not on a grid of bearable size."""
    from opacus.accountants import PRVAccountant

    # Its interval is set by the error that it allows over all steps (Gopi et al. 2021, arXiv:2106.02848).
    interval = 0.01 / math.sqrt(spent.steps * math.log(24e3 / delta) / 2) if spent.steps else 1.0
    if 2 * (3 + rough(spent, delta) if spent.steps else 0) / interval > MOST_POINTS:
        return None
    accountant = PRVAccountant()
    accountant.history = [(spent.sigma, spent.rate, spent.steps)] if spent.steps else []
    with warnings.catch_warnings(action="ignore"):  # numpy's, on logarithms of zero at a rate of one
        try:
            return float(accountant.get_epsilon(delta=delta)) if accountant.history else 0.0
        except (RuntimeError, ValueError, MemoryError):  # for so little noise
            return None


def calibrate(target: float, delta: float, planned: Sequence[tuple[float, int]]) -> float:
    """The smallest noise multiplier, to three digits and rounded up, that keeps every plan within epsilon `target`.

    planned: (sampling rate, steps) of each client. By PLD. Raises ValueError where none up to `MOST_NOISE` does.
    """
    sigma = 0.0
    left = _undominated(Releases(1.0, *plan) for plan in planned if plan[1])
    # The dearest by the rough reckoning first: mostly its noise is enough for all.
    over = max(left, key=lambda plan: _roughly_calibrated(target, delta, plan), default=None)
    while over is not None:
        sigma = max(sigma, _calibrated(target, delta, over))
        over = _beyond([replace(plan, sigma=sigma) for plan in left], delta, target)
    return sigma


def _undominated(spent: Iterable[Releases]) -> list[Releases]:
    """Those that no other has at least the rate and the steps of; rates fall and steps rise."""
    kept: list[Releases] = []
    for one in sorted(set(spent), key=lambda one: (one.rate, one.steps), reverse=True):
        if not kept or one.steps > kept[-1].steps:
            kept.append(one)
    return kept


def _beyond(sorted_by_rate: Sequence[Releases], delta: float, limit: float) -> Releases | None:
    """One of those, as `_undominated` gives them, whose epsilon is over a limit; None where none is.

    Many are told at once, where what has the largest rate and the most steps of all of them is not over it.
    """
    if not sorted_by_rate:
        return None
    first, last = sorted_by_rate[0], sorted_by_rate[-1]
    if len(sorted_by_rate) == 1:
        return None if within(first, delta, limit) else first
    if _refined(replace(first, steps=last.steps), delta, COARSE, limit).epsilon <= limit:
        return None
    middle = len(sorted_by_rate) // 2
    found = _beyond(sorted_by_rate[:middle], delta, limit)
    return found if found is not None else _beyond(sorted_by_rate[middle:], delta, limit)


def _roughly_calibrated(target: float, delta: float, plan: Releases) -> float:
    """The noise multiplier by the rough reckoning; no bound."""
    from scipy.optimize import brentq

    def over(log_sigma: float) -> float:
        return math.log(rough(replace(plan, sigma=math.exp(log_sigma)), delta) / target)

    least, most = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    return math.exp(least if over(least) <= 0 else most if over(most) >= 0 else float(brentq(over, least, most)))


def _calibrated(target: float, delta: float, plan: Releases) -> float:
    from scipy.optimize import brentq

    def over(log_sigma: float, wanted: tuple[int, float] = COARSE) -> float:
        spent = replace(plan, sigma=math.exp(log_sigma))
        found = _gaussian(spent, delta) if spent.rate >= 1.0 else _refined(spent, delta, wanted).epsilon
        return math.log(max(found, target / 1e3) / target)

    least, most = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    low = high = math.log(_roughly_calibrated(target, delta, plan))
    while over(high) > 0:
        if high >= most:
            raise ValueError(
                f"no noise multiplier up to {MOST_NOISE:g} keeps {plan.steps} steps at rate {plan.rate:g} within it"
            )
        low, high = high, min(high + 0.25, most)
    while over(low) <= 0 and low > least:
        low, high = max(low - 0.25, least), low
    found = float(brentq(over, low, high, xtol=PRECISION)) if over(low) > 0 else low
    # A coarse grid's answer is enough; what it gives away is won back by the slope, then in steps.
    slope = (over(found - 0.02) - over(found + 0.02)) / 0.04
    if slope > 0:
        found = max(least, found + PRECISION * math.ceil(over(found, GOOD) / slope / PRECISION))
    while over(found, GOOD) > 0:
        found += PRECISION
    while found > least and over(found - PRECISION, GOOD) <= 0:
        found -= PRECISION
    return math.exp(found)
