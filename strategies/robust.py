"""Robust rules: a few hostile or broken clients cannot move the result far. None is a mean, so none is certified.

Each holds from a number of clients on, and says so (`fewest`). They count clients, not
examples: a weight that a client states about itself is no protection against that client.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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


def _flat(updates: Sequence[Update]) -> npt.NDArray[np.float64]:
    """(clients, numbers) of all tensors, end to end in the order of their names."""
    return np.stack([np.concatenate([u.arrays[name].ravel() for name in sorted(u.arrays)]) for u in updates])


def _scores(updates: Sequence[Update], f: int) -> npt.NDArray[np.float64]:
    """Krum's: Σ ||x_i - x_j||² over the n-f-2 nearest j."""
    flat = _flat(updates)
    squared = np.array([np.square(flat - own).sum(axis=1) for own in flat])
    nearest = max(1, len(updates) - f - 2)
    scores: npt.NDArray[np.float64] = np.sort(squared, axis=1)[:, 1 : 1 + nearest].sum(axis=1)
    return scores  # the first of each was the distance to itself


def _mean(updates: Sequence[Update]) -> Arrays:
    return {name: np.mean([u.arrays[name] for u in updates], axis=0) for name in updates[0].arrays}


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
        return dict(updates[int(_scores(updates, self.f).argmin())].arrays)


class MultiKrum(Krum):
    """The mean of the m updates with the best of Krum's scores: Blanchard et al. 2017, section 4 (m: n - f)."""

    def __init__(self, f: int = 1, m: int | None = None) -> None:
        super().__init__(f)
        if m is not None and m < 1:
            raise ValueError(f"m is {m}; expected a number of clients, 1 or more, or none for all but f")
        self.m = m

    def fewest(self) -> Fewest:
        """2 f + 3, and f + m."""
        return krum_of(self.f, self.m or 1)

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """1/m Σ x_i of those; of equals the first clients'."""
        best = np.argsort(_scores(updates, self.f), kind="stable")[: self.m or max(1, len(updates) - self.f)]
        return _mean([updates[at] for at in sorted(best)])


class GeometricMedian(Strategy):
    """The point nearest to all updates together, argmin_v Σ ||v - x_i||: RFA, Pillutla et al. 2022 (arXiv:1912.13445).

    By the smoothed Weiszfeld algorithm (there algorithm 2), from the coordinates' medians on: from the mean, each step
    would only take off a share of what a far outlier has moved it. All clients weigh the same.
    """

    def __init__(self, eps: float = 1e-6, iterations: int = 10) -> None:
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps is {eps}; expected a distance above 0, below which two points are one")
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; expected 1 or more")
        self.eps, self.iterations = eps, iterations

    def fewest(self) -> Fewest:
        """Three."""
        return Fewest(3, "of two every point between them is as near")

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """v ← Σ β_i x_i / Σ β_i with β_i = 1 / max(eps, ||v - x_i||), so many times."""
        flat = _flat(updates)
        point = np.median(flat, axis=0)
        for _ in range(self.iterations):
            nearness = 1 / np.maximum(self.eps, np.linalg.norm(flat - point, axis=1))
            point = nearness @ flat / nearness.sum()
        like, names = updates[0].arrays, sorted(updates[0].arrays)
        pieces = np.split(point, np.cumsum([like[name].size for name in names])[:-1])
        return {name: piece.reshape(like[name].shape) for name, piece in zip(names, pieces, strict=True)}
