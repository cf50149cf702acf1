"""What a sequence of noised sums has spent: sampled Gaussian mechanisms, Poisson sampling, add or remove one.

The figure that is reported is dp-accounting's, by privacy loss distributions (PLD: Koskela et al. 2020, Doroshenko et
al. 2022); Opacus' PRV and the RDP bound stand beside it. None is computed by code of ours.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dp_accounting import DpEvent

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


@lru_cache(maxsize=4096)
def epsilon(spent: Releases, delta: float) -> float:
    """By PLD, at its default interval of 1e-4: pessimistic by construction. By RDP where so little noise has no PLD."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    if not spent.steps:
        return 0.0
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    try:
        return float(accountant.compose(_event(spent)).get_epsilon(delta))
    except ValueError:  # its grid would have too many points: an epsilon in the hundreds, whichever way
        return epsilon_by_rdp(spent, delta)


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
    """Opacus' upper end: its estimate and 0.01. None where it cannot tell."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(spent.sigma, spent.rate, spent.steps)] if spent.steps else []
    with warnings.catch_warnings(action="ignore"):  # numpy's, on logarithms of zero at a rate of one
        try:
            return float(accountant.get_epsilon(delta=delta)) if accountant.history else 0.0
        except (RuntimeError, ValueError, MemoryError):  # for so little noise
            return None


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
    from scipy.optimize import brentq

    def over(log_sigma: float, spent: Callable[[Releases, float], float] = epsilon) -> float:
        return math.log(spent(Releases(math.exp(log_sigma), rate, steps), delta) / target)

    # From the quick bound's answer, which is always enough, down to the least that still is.
    high = math.log(0.5)
    while over(high, epsilon_by_rdp) > 0:
        high += math.log(2)
        if high > math.log(1e4):
            raise ValueError(
                f"no noise multiplier up to 10,000 keeps {steps} steps at rate {rate:g} within epsilon {target:g}"
            )
    low = high
    while over(low) <= 0:
        low -= 0.1
    found = float(brentq(over, low, low + 0.1, xtol=2e-4)) if low < high else high
    while over(found) > 0:
        found += 5e-4
    return math.exp(found)
