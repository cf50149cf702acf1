"""The table of kinds of availability, and the words that name them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlotr.communication.spread import spread
from fedlotr.errors import InputError, nearest, shorten
from fedlotr.fleet.availability import DAY, Always, Availability, Bernoulli, DayNight
from fedlotr.fleet.trace import read_trace
from fedlotr.streams import generator

HOUR = 3600
SLOT = 600
"""Seconds of a slot where they are not said."""
NIGHT = "22-6"
"""When phones are charged and idle, where hours are not said."""
CHANCES = 0.001, 0.999
"""Within them a client is found to come or go after some thousand slots."""
ZONES = 24


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a kind is made for beside its words. folder: what a trace's name is told from."""

    clients: int
    seed: int
    zones: str | None
    repeat: int | None
    folder: Path
    where: str


@dataclass(frozen=True, kw_only=True)
class Kind:
    """form: with what may stand behind the colon. example: one that can be given. takes: keys that it alone has.

    read: what stands behind the colon, '' for nothing. Raises ValueError with what was expected, or InputError.
    """

    form: str
    text: str
    example: str
    read: Callable[[str, Asked], Availability]
    takes: frozenset[str] = frozenset()


def _always(given: str, asked: Asked) -> Availability:
    if given:
        raise ValueError("always takes no value")
    return Always(clients=asked.clients)


def _bernoulli(given: str, asked: Asked) -> Availability:
    chance, colon, seconds = given.partition(":")
    if not re.fullmatch(r"\d*\.?\d+", chance) or not CHANCES[0] <= float(chance) <= CHANCES[1]:
        raise ValueError(f"a chance from {CHANCES[0]:g} to {CHANCES[1]:g}; 'always' where all are there")
    if colon and not (re.fullmatch(r"\d{1,9}", seconds) and int(seconds)):
        raise ValueError("whole seconds of a slot, above 0, after the second colon")
    slot = int(seconds) if colon else SLOT
    return Bernoulli(clients=asked.clients, seed=asked.seed, chance=float(chance), seconds=slot)


def _day_night(given: str, asked: Asked) -> Availability:
    hours = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", given or NIGHT)
    begin, end = (_seconds(float(hours[1])), _seconds(float(hours[2]))) if hours else (0, 0)
    stays = (end - begin) % DAY
    if hours is None or not stays or max(begin, end) > DAY:
        raise ValueError(f"two different hours of a day, as in day-night:{NIGHT}")
    if asked.zones is None:
        zones = generator(asked.seed, "zone").integers(ZONES, size=asked.clients) * HOUR
    else:
        where = f"{asked.where}: zones"
        found = spread(
            re.split("[,;]", asked.zones),
            lambda word: _zone(word, where),
            asked.clients,
            asked.seed,
            "zone",
            where=f"{where} {shorten(asked.zones)}",
            example="0:0.5,8:0.5",
        )
        zones = np.array(found, np.int64)
    count = len(np.unique(zones))
    words = f"there from {given or NIGHT} h local time, in {count} time zone{'s' * (count > 1)}"
    return DayNight(begins=begin - zones, stays=stays, words=words)


def _zone(given: str, where: str) -> int:
    """Seconds ahead of UTC."""
    if not re.fullmatch(r"[-+]?\d{1,2}(\.\d+)?", given) or not -ZONES < float(given) < ZONES:
        raise InputError(f"{where} {shorten(given)}: expected hours ahead of UTC, from -23 to 23, as in 0,8,-5")
    return _seconds(float(given))


def _seconds(hours: float) -> int:
    return round(hours * HOUR)


def _trace(given: str, asked: Asked) -> Availability:
    if not given:
        raise ValueError("a file of intervals")
    return read_trace(asked.folder / given, asked.clients, asked.repeat)


AVAILABILITY = {
    "always": Kind(form="always", text="nobody is ever away", example="always", read=_always),
    "bernoulli": Kind(
        form="bernoulli:P[:SECONDS]",
        text=f"in each slot of SECONDS ({SLOT}) a client is there with chance P, independent of all else",
        example="bernoulli:0.9",
        read=_bernoulli,
    ),
    "day-night": Kind(
        form="day-night[:FROM-UNTIL]",
        text=f"there from one hour to another ({NIGHT}) of local time, in {ZONES} time zones drawn, or in `zones`",
        example="day-night:22-6",
        read=_day_night,
        takes=frozenset({"zones"}),
    ),
    "trace": Kind(
        form="trace:FILE",
        text="there in the intervals of a file, JSON lines or CSV: client, from, until, in seconds",
        example="trace:trace.csv",
        read=_trace,
        takes=frozenset({"repeat"}),
    ),
}
"""What `availability` may say."""


def read_availability(given: str, asked: Asked) -> Availability:
    """By its words. Raises InputError with every mistake."""
    name, _, behind = given.partition(":")
    shown = f"{asked.where}: availability {shorten(given)}"
    if name not in AVAILABILITY:
        raise InputError(f"{shown}: no such kind{nearest(name, AVAILABILITY)}")
    kind = AVAILABILITY[name]
    problems = [
        f"{asked.where}: {key}: {name} has none; remove it, or give availability: {other.form}"
        for other in AVAILABILITY.values()
        for key in sorted(other.takes - kind.takes)
        if getattr(asked, key) is not None
    ]
    found = None
    try:
        found = kind.read(behind, asked)
    except InputError as error:
        problems += error.problems
    except ValueError as error:
        problems.append(f"{shown}: expected {kind.form}: {error}")
    if found is None or problems:
        raise InputError(problems)
    return found
