"""Robust rules: a few hostile or broken clients cannot move the result far. None is a mean, so none is certified.

Each holds from a number of clients on, and says so (`fewest`). They count clients, not
examples: a weight that a client states about itself is no protection against that client.
"""

from collections.abc import Sequence

import numpy as np

from fedlotr.flower import Arrays, Fewest, Strategy, Update
from fedlotr.flower.fewest import krum_of, median_of, trimmed_mean_of


class Median(Strategy):
    """Coordinate by coordinate the median of the clients: Yin et al. 2018 (arXiv:1803.01498), option I."""

    def fewest(self) -> Fewest:
        """Three."""
        return median_of()

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """median_i x_i."""
        return {name: np.median([u.arrays[name] for u in updates], axis=0) for name in updates[0].arrays}


class TrimmedMean(Strategy):
    """The mean without the largest and smallest share β of every coordinate: Yin et al. 2018, option II."""

    def __init__(self, beta: float = 0.2) -> None:
        if not 0 < beta < 0.5:
            raise ValueError(f"beta is {beta}; expected a share above 0 (the plain mean has none) and below 0.5")
        self.beta = beta

    def fewest(self) -> Fewest:
        """The least n with ⌊β n⌋ = 1."""
        return trimmed_mean_of(self.beta)

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """The mean of x_(k+1) ... x_(n-k), k = ⌊β n⌋."""
        n = len(updates)
        k = int(self.beta * n)
        return {
            name: np.sort([u.arrays[name] for u in updates], axis=0)[k : n - k].mean(axis=0)
            for name in updates[0].arrays
        }


class Krum(Strategy):
    """The one update nearest to its n-f-2 neighbours: Blanchard et al. 2017 (NeurIPS), f hostile clients foreseen."""

    def __init__(self, f: int = 1) -> None:
        if f < 0:
            raise ValueError(f"f is {f}; expected a number of clients, 0 or more")
        self.f = f

    def fewest(self) -> Fewest:
        """2 f + 3."""
        return krum_of(self.f)

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """x_i with the least Σ ||x_i - x_j||² over its nearest j; of equals the first client's."""
        flat = np.stack([np.concatenate([u.arrays[k].ravel() for k in sorted(u.arrays)]) for u in updates])
        squared = np.array([np.square(flat - own).sum(axis=1) for own in flat])
        nearest = max(1, len(updates) - self.f - 2)
        scores = np.sort(squared, axis=1)[:, 1 : 1 + nearest].sum(axis=1)  # the first is the distance to itself
        return dict(updates[int(scores.argmin())].arrays)
