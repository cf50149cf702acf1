"""Who is there by a trace: a file of intervals, one a line."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fedlotr.errors import InputError
from fedlotr.fleet.availability import Availability
from fedlotr.fleet.forms import Interval, beyond
from fedlotr.fleet.rows import read_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace(Availability):
    """There in intervals [start, end), which begin again after `repeat` seconds, if at all.

    starts, ends: (intervals,) seconds, a client's next to each other and in their order, apart from each other.
    first: (clients + 1,) where each client's begin. repeat: whole seconds, so that sums are exact.
    """

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    first: NDArray[np.int64]
    repeat: int | None
    words: str

    @override
    def available(self, at: float) -> NDArray[np.bool_]:
        begun = self._begun(at)
        now = (begun + self.starts <= at) & (at < begun + self.ends)
        there = np.zeros(len(self.first) - 1, bool)
        there[self._owners()[now]] = True
        return there

    @override
    def until(self, client: int, at: float) -> float:
        begun, own = self._begun(at), slice(self.first[client], self.first[client + 1])
        starts, ends = self.starts[own], self.ends[own]
        now = np.flatnonzero((begun + starts <= at) & (at < begun + ends))
        if not now.size:
            return at
        end = float(ends[now[0]])
        if end != self.repeat or starts[0] > 0:
            return begun + end
        return math.inf if ends[0] == self.repeat else begun + self.repeat + float(ends[0])

    @override
    def next_arrival(self, at: float) -> float:
        begun, away = self._begun(at), ~self.available(at)
        starts = self.starts[away[self._owners()]]
        later = begun + starts[begun + starts > at]
        if not later.size and self.repeat:
            later = begun + self.repeat + starts
        return float(later.min()) if later.size else math.inf

    @override
    def in_words(self) -> str:
        return self.words

    def _begun(self, at: float) -> float:
        """When the intervals began last."""
        return at // self.repeat * self.repeat if self.repeat else 0.0

    def _owners(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))


def read_trace(path: Path, clients: int, repeat: int | None) -> Trace:
    """Of a file of intervals, of which those that overlap or touch are one. Raises InputError."""
    problems: list[str] = []
    found: list[tuple[int, float, float]] = []

    def keep(row: Interval) -> None:
        if wrong := _wrong(row, clients, repeat):
            raise InputError(wrong)
        found.append((row.client, row.begin, row.until))

    read_rows(path, Interval, keep, problems)
    if problems:
        raise InputError(problems)
    joined: list[tuple[int, float, float]] = []
    for client, begin, until in sorted(found):
        if joined and joined[-1][0] == client and begin <= joined[-1][2]:
            joined[-1] = (client, joined[-1][1], max(until, joined[-1][2]))
        else:
            joined.append((client, begin, until))
    owners = np.array([client for client, _, _ in joined], np.int64)
    absent = clients - len(np.unique(owners))
    again = f", again every {repeat:,} s" if repeat else ""
    return Trace(
        starts=np.array([begin for _, begin, _ in joined], float),
        ends=np.array([until for _, _, until in joined], float),
        first=np.searchsorted(owners, np.arange(clients + 1)),
        repeat=repeat,
        words=f"there as {path.name} says{again}" + (f", {absent:,} without a line never" if absent else ""),
    )


def _wrong(row: Interval, clients: int, repeat: int | None) -> str | None:
    if row.client >= clients:
        return beyond(row.client, clients)
    if row.until <= row.begin:
        return f"from {row.begin:g} until {row.until:g}; expected an end after the beginning"
    if repeat and row.until > repeat:
        return f"until {row.until:g}, but all begins again after repeat: {repeat}; end it there, or raise repeat"
    return None
