"""What a sequence of noised sums has spent: sampled Gaussian mechanisms, Poisson sampling, add or remove one.

The figure that is reported is dp-accounting's, by privacy loss distributions (PLD: Koskela et al. 2020, Doroshenko et
al. 2022); Opacus' PRV and the RDP bound stand beside it. None is computed by code of ours.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
from dp_accounting import pld, rdp


@dataclass(frozen=True)
class Releases:
    """steps releases, each of a sum over a Poisson sample of rate `rate`, with noise of `sigma` times the bound."""

    sigma: float
    rate: float
    steps: int


def _event(part: Releases) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(part.sigma)
    one = gaussian if part.rate >= 1.0 else dp_accounting.PoissonSampledDpEvent(part.rate, gaussian)
    return dp_accounting.SelfComposedDpEvent(one, part.steps)


@lru_cache(maxsize=4096)
def epsilon(spent: Releases, delta: float) -> float:
    """By PLD, at its default interval of 1e-4: pessimistic by construction."""
    if not spent.steps:
        return 0.0
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(_event(spent)).get_epsilon(delta))


@lru_cache(maxsize=4096)
def epsilon_by_rdp(spent: Releases, delta: float) -> float:
    """An upper bound of another kind, and a quick one."""
    if not spent.steps:
        return 0.0
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    absl = logging.getLogger("absl")
    before, absl.level = absl.level, logging.ERROR  # it leaves out orders whose series do not converge, and says each
    try:
        return float(accountant.compose(_event(spent)).get_epsilon(delta))
    finally:
        absl.level = before


def epsilon_by_prv(spent: Releases, delta: float) -> float:
    """Opacus' upper end: its estimate and 0.01."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(spent.sigma, spent.rate, spent.steps)] if spent.steps else []
    with warnings.catch_warnings(action="ignore"):  # numpy's, on logarithms of zero at a rate of one
        return float(accountant.get_epsilon(delta=delta)) if accountant.history else 0.0


def calibrate(target: float, delta: float, planned: Sequence[tuple[float, int]]) -> float:
    """The smallest noise multiplier, to three digits and rounded up, that keeps every plan within epsilon `target`.

    planned: (sampling rate, steps) of each client. By PLD. Raises ValueError where none up to 10,000 does.
    """
    sigma = 0.0
    # The dearest first, by the quick bound: then the others are mostly fine with its noise.
    for plan in sorted(_dearest(planned), key=lambda plan: -epsilon_by_rdp(Releases(2.0, *plan), delta)):
        if not sigma or epsilon(Releases(sigma, *plan), delta) > target:
            sigma = _calibrated(target, delta, *plan)
    return sigma


def _dearest(planned: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Those that no other plan has at least the rate and the steps of."""
    kept: list[tuple[float, int]] = []
    for rate, steps in sorted({plan for plan in planned if plan[1]}, reverse=True):
        if not kept or steps > max(other for _, other in kept):
            kept.append((rate, steps))
    return kept


def _calibrated(target: float, delta: float, rate: float, steps: int) -> float:
    def search(spent: Callable[[Releases, float], float], low: float, high: float, digits: float) -> float:
        while high - low > digits * high:
            middle = (low + high) / 2
            low, high = (low, middle) if spent(Releases(middle, rate, steps), delta) <= target else (middle, high)
        return high

    most = 0.5
    while epsilon_by_rdp(Releases(most, rate, steps), delta) > target:
        most *= 2
        if most > 1e4:
            raise ValueError(
                f"no noise multiplier up to 10,000 keeps {steps} steps at rate {rate:g} within epsilon {target:g}"
            )
    enough = search(epsilon_by_rdp, most / 2 if most > 0.5 else 0.01, most, 1e-2)
    low = enough
    while epsilon(Releases(low, rate, steps), delta) <= target:
        low *= 0.9
    return search(epsilon, low, min(enough, low / 0.9), 1e-3)
