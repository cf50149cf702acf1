"""arrivals.jsonl, summed up: what became of messages in virtual time, and what clients waited for.

It is read line by line, however long it is; what makes no sense in it is left out and noted.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlotr.errors import shorten
from fedlotr.reporting.documents import Arrival
from fedlotr.reporting.lines import Lines, count, number

MOST_KINDS = 100
"""Reasons why updates are not used; a file that has more is not a run's."""


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
    found = Arrivals()
    lines = Lines(folder / "arrivals.jsonl", "what became of messages", "nothing that became of a message", _arrival)
    for at, arrival in lines:
        if arrival["outcome"] not in found.outcomes and len(found.outcomes) == MOST_KINDS:
            lines.gap(at, f"has one reason more than {MOST_KINDS}")
        elif arrival["round"] <= rounds:
            found.add(arrival)
    found.notes = lines.notes
    return found


def _arrival(found: dict[str, Any]) -> Arrival | None:
    """What a line says, where it is as a run writes it."""
    if not all(fits(found.get(key)) for key, fits in FORM.items()):
        return None
    arrival: Arrival = {key: found[key] for key in FORM}  # type: ignore[assignment]
    return arrival if arrival["ended"] >= arrival["asked"] else None


FORM: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("round", "client", "staleness", "bytes_down", "bytes_up"), count),
    **dict.fromkeys(("asked", "ended", "computing"), number),
    "outcome": lambda value: isinstance(value, str) and value == shorten(value),
}
"""What is read of a line, and whether it is what a run writes there."""
