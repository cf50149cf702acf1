"""How many clients a round needs for what a strategy promises: below that, a robust rule is a mean, or worse."""

import math
from typing import NamedTuple

from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, MultiKrum

MOST = 2**31 - 1
"""Clients of any federation."""


class Fewest(NamedTuple):
    """clients: in a round, at least. why: what the rule is with fewer, as a sentence for the user."""

    clients: int
    why: str


def median_of() -> Fewest:
    """Of a median."""
    return Fewest(3, "the median of fewer is their mean, or the one update there is")


def trimmed_mean_of(beta: float) -> Fewest:
    """Of a mean without ⌊β n⌋ clients at either end: the least n with one there."""
    clients = max(3, math.floor(min(1 / beta, MOST)))
    while int(beta * clients) < 1 and clients < MOST:  # as the rules round it
        clients += 1
    return Fewest(clients, f"of fewer it trims nobody (beta {beta:g} of them is less than one) and is the plain mean")


def krum_of(f: int, chosen: int = 1) -> Fewest:
    """Of Krum, n > 2 f + 2: Blanchard et al. 2017, proposition 4.2; and n ≥ f + m for the mean of m chosen updates."""
    if f + chosen > 2 * f + 3:
        return Fewest(f + chosen, f"its mean of {chosen} clients would have hostile ones in it")
    return Fewest(2 * f + 3, f"Krum holds against {f} hostile clients among 2 f + 3 or more, and not among fewer")


def fewest_of_flowers(strategy: MultiKrum | Bulyan | FedTrimmedAvg | FedMedian) -> Fewest | None:
    """What is known of Flower's own; None where any number of clients goes."""
    if isinstance(strategy, MultiKrum):  # Flower's Krum is one
        return krum_of(strategy.num_malicious_nodes, strategy.num_nodes_to_select)
    if isinstance(strategy, Bulyan):
        f = strategy.num_malicious_nodes
        return Fewest(4 * f + 3, f"Bulyan holds against {f} hostile clients among 4 f + 3, and skips a round of fewer")
    if isinstance(strategy, FedTrimmedAvg):
        return trimmed_mean_of(strategy.beta) if strategy.beta > 0 else None
    return median_of()
