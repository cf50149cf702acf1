"""What each client has, by words: one thing for all, several in turn, or drawn by shares, as in '4g:0.7,3g:0.3'."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fedlotr.errors import InputError

_T = TypeVar("_T")
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "": 1.0}
"""What a rate may end in."""


def spread(
    entries: Sequence[str], read: Callable[[str], _T], clients: int, seed: int, kind: str, *, where: str, example: str
) -> list[_T]:
    """Of each client. entries: words, each with its share behind a colon, or none of them.

    read: a word's thing; raises InputError. kind: what the things are, and the purpose that shares are drawn for.
    where: what gave the entries; example: as it could be. Raises InputError with every mistake.
    """
    entries = [entry.strip() for entry in entries]
    pairs = [(name, share) if colon else (entry, "") for entry in entries for name, colon, share in [_share(entry)]]
    problems: list[str] = []
    things: list[_T] = []
    for name, _ in pairs:
        try:
            things.append(read(name))
        except InputError as error:
            problems += error.problems
    shares = [float(share) if re.fullmatch(r"\d+\.?\d*|\.\d+", share) else 0.0 for _, share in pairs]
    given_shares = [bool(share) for _, share in pairs]
    if any(given_shares) and not (all(given_shares) and all(shares)):
        problems.append(f"{where}: a share above 0 for every {kind}, or for none, such as '{example}'")
    if problems:
        raise InputError(problems)
    if not any(given_shares):
        return [things[client % len(things)] for client in range(clients)]
    import numpy as np  # here, since the options of `fedlotr cost` are told without it

    from fedlotr.streams import generator

    weights = np.array(shares)
    drawn = generator(seed, kind).choice(len(things), clients, p=weights / weights.sum())
    return [things[at] for at in drawn]


def amount(text: str, units: Mapping[str, float]) -> float | None:
    """A number above 0 with one of the units, in the units' own measure; None where it is something else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", text)
    if match is None or match[2] not in units or not float(match[1]):
        return None
    return float(match[1]) * units[match[2]]


def unknown_amount(units: Mapping[str, float]) -> str:
    """What `amount` expects, to be said where it found something else."""
    return f"expected a number above 0 with a unit of {', '.join(filter(None, units))}"


def _share(entry: str) -> tuple[str, str, str]:
    """(word, colon, share) of an entry that ends in one."""
    name, colon, share = entry.rpartition(":")
    return name, colon, share
