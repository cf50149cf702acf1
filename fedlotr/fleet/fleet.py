"""The clients of a run in virtual seconds: who is there, how fast they compute, and who drops out in mid-job.

The wall clock has no part in it: each answer follows from the description, the seed and what is asked, in any order.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlotr.communication.links import Link, read_links
from fedlotr.errors import InputError, shorten, visible
from fedlotr.fleet.availability import Availability
from fedlotr.fleet.devices import Device, read_devices
from fedlotr.fleet.file import Own, path_of, read_description
from fedlotr.fleet.forms import Client
from fedlotr.fleet.kinds import Asked, read_availability
from fedlotr.fleet.presets import FLEETS
from fedlotr.fleet.rows import read_rows
from fedlotr.streams import generator

NAMED = 4
"""Devices and links that a header names, the most frequent ones."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What is asked of a run's clients, by their numbers from 0 on, at virtual seconds from 0 on.

    devices, links, dropouts: of each client. links: None, messages take no time. dropouts: the chance that it vanishes
    in a job.
    """

    name: str
    seed: int
    devices: Sequence[Device]
    links: Sequence[Link] | None
    dropouts: Sequence[float]
    availability: Availability

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.devices)

    def compute_seconds(self, client: int, operations: float) -> float:
        """That a client takes for so many floating point operations of training."""
        return operations / self.devices[client].flops

    def available(self, at: float) -> NDArray[np.bool_]:
        """(clients,): who is there."""
        return self.availability.available(at)

    def until(self, client: int, at: float) -> float:
        """The second up to which a client stays that is there at `at`: inf, for ever; `at` itself, it is away."""
        return self.availability.until(client, at)

    def next_arrival(self, at: float) -> float:
        """The earliest second after `at` at which a client comes that is away at `at`; inf: none ever does."""
        return self.availability.next_arrival(at)

    def drops_out(self, client: int, job: int) -> float | None:
        """The share of its job, in [0, 1), after which the client vanishes; None: it does not."""
        if not self.dropouts[client]:
            return None
        drawn, share = generator(self.seed, "dropout", client, job).random(2)
        return float(share) if drawn < self.dropouts[client] else None

    def in_words(self) -> str:
        """One line for a run's header."""
        devices = _counted(device.name for device in self.devices)
        links = "messages take no time" if self.links is None else f"on {_counted(link.name for link in self.links)}"
        mean = sum(self.dropouts) / self.clients
        lost = f"; {100 * mean:.3g}% of all jobs are broken off" if mean else ""
        return visible(f"{self.name}: {devices}; {links}; {self.availability.in_words()}{lost}")


def _counted(names: Iterable[str]) -> str:
    counts = Counter(names).most_common()
    if len(counts) == 1:
        return counts[0][0]
    rest = sum(count for _, count in counts[NAMED:])
    return ", ".join(f"{count:,} {name}" for name, count in counts[:NAMED]) + (f", {rest:,} others" if rest else "")


def read_fleet(given: str, clients: int, seed: int, links: Sequence[Link] | None) -> Fleet:
    """A fleet by the name of a preset or by its FILE, whose own files are told from its folder.

    links: those of --link, which win over a preset's. Raises InputError with every mistake.
    """
    if given in FLEETS:
        name, where, folder, words = given, f"--fleet {given}", Path(), FLEETS[given]
        words = words.model_copy(update={"links": None}) if links is not None else words
    else:
        path = path_of(given)
        name, where, folder, words = path.name, shorten(path), path.parent, read_description(path)
    problems: list[str] = []

    def made(make: Callable[[], _T]) -> _T | None:
        try:
            return make()
        except InputError as error:
            problems.extend(error.problems)
            return None

    if words.trace is not None and words.availability is not None:
        problems.append(f"{where}: trace, availability {shorten(words.availability)}: expected one of both")
    asked = Asked(clients=clients, seed=seed, zones=words.zones, repeat=words.repeat, folder=folder, where=where)
    kind = words.availability or "always" if words.trace is None else f"trace:{words.trace}"
    availability = made(lambda: read_availability(kind, asked))
    devices = made(lambda: read_devices(words.devices, clients, seed, f"{where}: devices"))
    on: Sequence[Link] | None = links
    if (own_links := words.links) is not None:
        on = made(lambda: read_links(own_links, clients, seed, f"{where}: links"))
    own, before = Own(clients), len(problems)
    if words.clients is not None:
        read_rows(folder / words.clients, Client, own.keep, problems)
    if links is not None and (own_links is not None or own.links):
        problems.append(f"{where}: links: --link gives them too; keep one of both")
    elif own_links is None and len(problems) == before and 0 < len(own.links) < clients:
        problems.append(
            f"{where}: links: {clients - len(own.links):,} clients have none in {shorten(words.clients)}; expected one"
            " for all others, as in 'links: 4g', or none in that file"
        )
    if availability is None or devices is None or problems:
        raise InputError(problems)
    linked = {**dict(enumerate(on or ())), **own.links}
    return Fleet(
        name=name,
        seed=seed,
        devices=tuple(own.devices.get(client, device) for client, device in enumerate(devices)),
        links=tuple(linked[client] for client in range(clients)) if linked else None,
        dropouts=tuple(own.dropouts.get(client, words.dropout) for client in range(clients)),
        availability=availability,
    )
