"""What a sequence of noised sums has spent: sampled Gaussian mechanisms, Poisson sampling, add or remove one.

The figure that is reported is dp-accounting's, by privacy loss distributions (PLD); Opacus' PRV and the RDP bound
stand beside it. None is computed by code of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import dp_accounting
from dp_accounting import pld, rdp
from opacus.accountants import PRVAccountant

SIGMA_MAX = 1e4
"""No larger noise multiplier is searched for."""


@dataclass(frozen=True)
class Releases:
    """steps releases, each of a sum over a Poisson sample of rate `rate`, with noise of `sigma` times the bound."""

    sigma: float
    rate: float
    steps: int


def _event(spent: Sequence[Releases]) -> dp_accounting.DpEvent:
    def one(sigma: float, rate: float) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        return gaussian if rate == 1.0 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)

    return dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(one(part.sigma, part.rate), part.steps) for part in spent if part.steps]
    )


def epsilon(spent: Sequence[Releases], delta: float) -> float:
    """By PLD, at its default interval of 1e-4: pessimistic by construction."""
    if not any(part.steps for part in spent):
        return 0.0
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(_event(spent)).get_epsilon(delta))


def epsilon_by_rdp(spent: Sequence[Releases], delta: float) -> float:
    """An upper bound of another kind."""
    if not any(part.steps for part in spent):
        return 0.0
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(_event(spent)).get_epsilon(delta))


def epsilon_by_prv(spent: Sequence[Releases], delta: float) -> float:
    """Opacus' upper end: its estimate and 0.01."""
    accountant = PRVAccountant()
    accountant.history = [(part.sigma, part.rate, part.steps) for part in spent if part.steps]
    return float(accountant.get_epsilon(delta=delta)) if accountant.history else 0.0


def calibrate(target: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise multiplier, to three digits and rounded up, that keeps so many steps within epsilon `target`."""

    def fits(sigma: float) -> bool:
        return epsilon([Releases(sigma, rate, steps)], delta) <= target

    high = 0.5
    while not fits(high):
        high *= 2
        if high > SIGMA_MAX:
            raise ValueError(f"no noise multiplier up to {SIGMA_MAX:g} keeps {steps} steps within epsilon {target:g}")
    low = high / 2 if high > 0.5 else 0.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
