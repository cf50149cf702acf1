"""Who is there at a virtual second: what is asked of any kind of availability, and the kinds that need no file."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fedlotr.streams import generator

DAY = 86_400


class Availability(ABC):
    """Who is there at a virtual second `at`, from 0 on; whoever comes or goes does so at that very second."""

    @abstractmethod
    def available(self, at: float) -> NDArray[np.bool_]:
        """(clients,): who is there."""

    @abstractmethod
    def until(self, client: int, at: float) -> float:
        """The second up to which a client stays that is there at `at`: inf, for ever; `at` itself, it is away."""

    @abstractmethod
    def next_arrival(self, at: float) -> float:
        """The earliest second after `at` at which a client comes that is away at `at`; inf: none ever does."""

    @abstractmethod
    def in_words(self) -> str:
        """As a run's header says it."""


@dataclass(frozen=True, kw_only=True)
class Always(Availability):
    """Nobody is ever away."""

    clients: int

    @override
    def available(self, at: float) -> NDArray[np.bool_]:
        return np.ones(self.clients, bool)

    @override
    def until(self, client: int, at: float) -> float:
        return math.inf

    @override
    def next_arrival(self, at: float) -> float:
        return math.inf

    @override
    def in_words(self) -> str:
        return "always there"


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Availability):
    """In each slot of so many seconds a client is there with this chance, whatever it was before.

    A slot has one stream of random numbers, of which client k has the k-th: one client's is found without the others'.
    """

    clients: int
    seed: int
    chance: float
    seconds: int

    @override
    def available(self, at: float) -> NDArray[np.bool_]:
        return self._draws(int(at // self.seconds)).random(self.clients) < self.chance

    @override
    def until(self, client: int, at: float) -> float:
        slot = first = int(at // self.seconds)
        while self._has(client, slot):
            slot += 1
        return at if slot == first else float(slot * self.seconds)

    @override
    def next_arrival(self, at: float) -> float:
        away = ~self.available(at)
        if not away.any():
            return math.inf
        slot = int(at // self.seconds) + 1
        while not (self.available(slot * self.seconds) & away).any():
            slot += 1
        return float(slot * self.seconds)

    @override
    def in_words(self) -> str:
        return f"there with a chance of {self.chance:g} in each slot of {self.seconds:,} s"

    def _draws(self, slot: int) -> np.random.Generator:
        return generator(self.seed, "available", slot)

    def _has(self, client: int, slot: int) -> bool:
        draws = self._draws(slot)
        assert isinstance(draws.bit_generator, np.random.PCG64)
        draws.bit_generator.advance(client)  # a step for each number
        return draws.random() < self.chance


@dataclass(frozen=True, kw_only=True, eq=False)
class DayNight(Availability):
    """There from one hour of its own day up to another. The clock starts at 0:00 UTC.

    begins: (clients,) of each client a second at which it comes, and so each day; whole numbers, so that sums are
    exact. stays: seconds from then on, less than a day.
    """

    begins: NDArray[np.int64]
    stays: int
    words: str

    @override
    def available(self, at: float) -> NDArray[np.bool_]:
        return at < _came(self.begins, at) + self.stays

    @override
    def until(self, client: int, at: float) -> float:
        return max(at, float(_came(self.begins[client], at)) + self.stays)

    @override
    def next_arrival(self, at: float) -> float:
        came = _came(self.begins, at)
        away = at >= came + self.stays
        return float(came[away].min()) + DAY if away.any() else math.inf

    @override
    def in_words(self) -> str:
        return self.words


def _came(begins: NDArray[np.int64], at: float) -> NDArray[np.float64]:
    """When whoever comes at these seconds of each day came last."""
    days: NDArray[np.float64] = np.floor((at - begins) / DAY)
    return begins + days * DAY
