"""arrivals.jsonl, summed up: what became of messages in virtual time, and what clients waited for.

It is read line by line, however long it is; what makes no sense in it is left out and noted.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedlotr.errors import shorten
from fedlotr.reporting.documents import Arrival

MOST_BYTES = 2**30
"""Of the file: four million messages."""
LONGEST_LINE = 2**16
MOST_KINDS = 100
"""Reasons why updates are not used; a file that has more is not a run's."""
NOTES_SHOWN = 5
LARGEST = 1e150


@dataclass
class Amount:
    """Messages with one outcome, and their bytes on the wire."""

    messages: int = 0
    down: int = 0
    up: int = 0


@dataclass
class OfClient:
    """used: its updates, of which the seconds computing and on its links are, and staleness, their sum in server steps.

    lost: why others were not used -> how many; in_vain: seconds until that was known.
    """

    asked: int = 0
    used: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    computing: float = 0.0
    on_links: float = 0.0
    in_vain: float = 0.0
    staleness: int = 0


@dataclass
class Arrivals:
    """outcomes: what became of messages -> how many. clients: by number. notes: what had to be left out."""

    outcomes: dict[str, Amount] = field(default_factory=dict)
    clients: dict[int, OfClient] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, arrival: Arrival) -> None:
        """One more message."""
        amount = self.outcomes.setdefault(arrival["outcome"], Amount())
        amount.messages += 1
        amount.down += arrival["bytes_down"]
        amount.up += arrival["bytes_up"]
        client = self.clients.setdefault(arrival["client"], OfClient())
        client.asked += 1
        took = arrival["ended"] - arrival["asked"]
        if arrival["outcome"] == USED:
            client.used += 1
            client.computing += arrival["computing"]
            client.on_links += max(0.0, took - arrival["computing"])
            client.staleness += arrival["staleness"]
        else:
            client.lost[arrival["outcome"]] += 1
            client.in_vain += took


USED = "used"


def arrivals_in(folder: Path, rounds: int) -> Arrivals:
    """Of a run's folder, up to a round; empty, with a note, where the file cannot be read."""
    path, found, told = folder / "arrivals.jsonl", Arrivals(), list[str]()
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            found.notes.append(f"{path} has {size:,} bytes, more than the {MOST_BYTES:,} that are read: left out")
            return found
        with path.open("rb") as file:
            at = 0
            while line := file.readline(LONGEST_LINE):
                at += 1
                if (arrival := _arrival(line)) is None:
                    while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                        line = file.readline(LONGEST_LINE)
                    if line:  # the last one may have been cut off by a crash
                        told.append(f"{path}, line {at} is nothing that became of a message: a gap")
                elif arrival["outcome"] not in found.outcomes and len(found.outcomes) == MOST_KINDS:
                    told.append(f"{path}, line {at} has one reason more than {MOST_KINDS}: a gap")
                elif arrival["round"] <= rounds:
                    found.add(arrival)
    except FileNotFoundError:
        found.notes.append(f"{path} is missing: what became of messages is not told")
    except OSError as error:
        found.notes.append(f"{path} cannot be read ({error.strerror}): what became of messages is not told")
    found.notes += told[:NOTES_SHOWN]
    if len(told) > NOTES_SHOWN:
        found.notes.append(f"{path}: {len(told) - NOTES_SHOWN:,} more lines like these")
    return found


def _arrival(line: bytes) -> Arrival | None:
    """What a line says, where it is as a run writes it."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(fits(found.get(key)) for key, fits in FORM.items()):
        return None
    arrival: Arrival = {key: found[key] for key in FORM}  # type: ignore[assignment]
    return arrival if arrival["ended"] >= arrival["asked"] else None


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _seconds(value: object) -> bool:
    return _count(value) or (type(value) is float and math.isfinite(value) and 0 <= value <= LARGEST)


FORM: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("round", "client", "staleness", "bytes_down", "bytes_up"), _count),
    **dict.fromkeys(("asked", "ended", "computing"), _seconds),
    "outcome": lambda value: isinstance(value, str) and value == shorten(value),
}
"""What is read of a line, and whether it is what a run writes there."""
