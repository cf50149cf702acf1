"""Who is asked of the clients that are there: drawn by size, by what they told, or by how often they were.

A client that is drawn with another chance than the rest weighs by the inverse of it (Horvitz & Thompson 1952), so
that the mean of a round stands for the mean of all, whatever they hold.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlotr.fleet.sampling import DEFAULT_SAMPLING, Sampling, read_sampling

Clients = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass
class Known:
    """What the server has seen of clients. asked: how often each was. losses: that each told last; nan: none."""

    asked: Clients
    losses: Floats

    @classmethod
    def nothing(cls, clients: int) -> "Known":
        """Before the first round."""
        return cls(np.zeros(clients, np.int64), np.full(clients, np.nan))

    def after(self, asked: Iterable[int], losses: Mapping[int, float | None]) -> "Known":
        """Once these were asked, and those told so much."""
        found = Known(self.asked.copy(), self.losses.copy())
        np.add.at(found.asked, np.fromiter(asked, np.int64), 1)
        for client, loss in losses.items():
            found.losses[client] = np.nan if loss is None else loss
        return found

    @property
    def expected(self) -> Floats:
        """A loss of each: boundless of who was never asked, and the mean of those known of who was and told none."""
        told = self.losses[~np.isnan(self.losses)]
        mean = float(told.mean()) if len(told) else 0.0
        return np.where(self.asked == 0, np.inf, np.where(np.isnan(self.losses), mean, self.losses))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"asked": self.asked, "losses": self.losses}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a run draws. sizes: examples of each client."""

    sampling: Sampling = field(default_factory=lambda: read_sampling(DEFAULT_SAMPLING))
    sizes: Sequence[int] = ()

    @property
    def remembers(self) -> bool:
        """Whether a draw depends on rounds before."""
        return self.sampling.rule.remembers

    def draw(self, stream: np.random.Generator, there: Clients, wanted: int, known: Known) -> dict[int, float]:
        """Clients to ask, in their order, each with its chance over that of an even draw.

        there: in their order, who may be asked. wanted: how many, at most as many as are there; where sizes decide,
        fewer come where fewer hold any examples.
        """
        rule, chances, count = self.sampling.rule, np.ones(len(there)), wanted
        if self.sampling.candidates is None:
            count = len(there)
        elif self.sampling.candidates > 1:
            count = min(len(there), math.ceil(wanted * self.sampling.candidates))
        if rule.by_size:
            sizes = np.asarray(self.sizes, np.float64)[there]
            chances = inclusion(sizes, count)
            drawn = systematic(stream, chances)
            chances = chances * len(there) / max(len(drawn), 1)
        else:
            drawn = stream.choice(len(there), count, replace=False)
        if rule.first is not None:
            order = -known.expected if rule.first == "loss" else known.asked
            drawn = drawn[np.argsort(order[there[drawn]], kind="stable")][:wanted]
        return {int(there[at]): float(chances[at]) for at in sorted(drawn.tolist())}


EVEN = Sampler()


def inclusion(sizes: Floats, wanted: int) -> Floats:
    """Chances in proportion to sizes, none above 1, that add up to `wanted`, or to as many as have a size."""
    chances, whole = np.zeros(len(sizes)), np.zeros(len(sizes), bool)
    wanted = min(wanted, int((sizes > 0).sum()))
    while (rest := wanted - int(whole.sum())) > 0:
        chances = np.where(whole, 1.0, sizes * (rest / sizes[~whole].sum()))
        if not (over := ~whole & (chances >= 1)).any():
            return chances
        whole |= over
    return np.where(whole, 1.0, 0.0)


def systematic(stream: np.random.Generator, chances: Floats) -> Clients:
    """Places that are drawn each with just its chance, in the order drawn; their number is the sum of the chances.

    Randomised systematic sampling: Hartley & Rao 1962.
    """
    order = stream.permutation(len(chances))
    ends = np.cumsum(chances[order])
    if len(ends):
        ends *= round(float(ends[-1])) / (ends[-1] or 1.0)
    marks = np.floor(ends + stream.random())
    return order[np.diff(marks, prepend=0.0) > 0]
