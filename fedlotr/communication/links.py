"""Links between server and clients: how long messages take that are only reckoned, never sent."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlotr.communication.spread import UNITS, amount, spread, unknown_amount
from fedlotr.errors import InputError, nearest, shorten


@dataclass(frozen=True)
class Link:
    """up, down: of a client, bits a second. latency: seconds one way. server: bits a second that its one line takes in
    or gives out, shared by all clients of a round; None where only the clients' own lines limit them."""

    name: str
    up: float
    down: float
    latency: float
    server: float | None = None

    def seconds(self, up: float, down: float, clients: int) -> float:
        """Of one round in which each of these clients receives and sends so many bytes, all at once."""
        return self.takes(up, down, clients * up, clients * down)

    def takes(self, up: float, down: float, all_up: float, all_down: float) -> float:
        """Seconds of one client that receives and sends so many bytes, while all clients of the round together move
        so many: a direction takes as long as the client's own line, or the server's, whichever is later done."""

        def phase(own: float, everyone: float, rate: float) -> float:
            return max(8 * own / rate, 0.0 if self.server is None else 8 * everyone / self.server)

        return 2 * self.latency + phase(down, all_down, self.down) + phase(up, all_up, self.up)


@dataclass(frozen=True)
class RoundTime:
    """What the messages of a round would take: until its slowest client is done, and until half of them are.

    Sending alone, in seconds; slowest: that client.
    """

    seconds: float
    median: float
    slowest: int


def round_time(links: Sequence[Link], up: Mapping[int, float], down: Mapping[int, float]) -> RoundTime:
    """Of clients that receive (down) and send (up) so many bytes, each on its link; one at least."""
    servers = [links[client].server for client in down if links[client].server is not None]
    server = min(rate for rate in servers if rate is not None) if servers else None
    all_up, all_down = sum(up.values()), sum(down.values())
    taken = {}
    for client in sorted(down):
        own = links[client]
        line = Link(own.name, own.up, own.down, own.latency, server)  # the server has one line for all
        taken[client] = line.takes(up.get(client, 0), down[client], all_up, all_down)
    slowest = max(taken, key=lambda client: taken[client])
    return RoundTime(taken[slowest], statistics.median(taken.values()), slowest)


M = 1e6
PROFILES = {
    link.name: link
    for link in (
        Link("data-centre", 10_000 * M, 10_000 * M, 0.0005),
        Link("broadband", 20 * M, 100 * M, 0.02),
        Link("4g", 10 * M, 30 * M, 0.05),
        Link("3g", 1 * M, 3 * M, 0.1),
        Link("satellite", 3 * M, 25 * M, 0.3),
    )
}
"""Round figures of ours, typical rather than measured; broadband is what the FCC has called so since 2024 (100 down,
20 up), satellite is geostationary, whose way up and down alone is a quarter of a second."""

CUSTOM = "up=RATE,down=RATE[,latency=TIME][,server=RATE], as in up=5M,down=20M,latency=40ms"
_TIMES = {"ms": 1e-3, "s": 1.0}


def read_link(given: str, where: str = "--link") -> Link:
    """A profile by name, or one that is written out. where: what gave it. Raises InputError."""
    if given in PROFILES:
        return PROFILES[given]
    if "=" not in given:
        raise InputError(f"{where} {shorten(given)}: no such link{nearest(given, PROFILES)} (or {CUSTOM})")
    pairs = dict(part.partition("=")[::2] for part in given.split(","))
    shown, parts = f"{where} {shorten(given)}", {key: shorten(f"{key}={value}") for key, value in pairs.items()}
    problems = [f"{where} {parts[key]}: unknown{nearest(key, _READ)}" for key in pairs if key not in _READ]
    problems += [f"{shown}: {key} is missing; expected {CUSTOM}" for key in ("up", "down") if key not in pairs]
    read = {key: amount(value, _READ[key]) for key, value in pairs.items() if key in _READ}
    problems += [f"{where} {parts[key]}: {unknown_amount(_READ[key])}" for key in read if read[key] is None]
    if problems:
        raise InputError(problems)
    up, down = read["up"] or 0.0, read["down"] or 0.0
    return Link(given, up, down, read.get("latency") or 0.0, read.get("server"))


def read_links(given: str, clients: int, seed: int, where: str = "--link") -> list[Link]:
    """The link of each client: one for all; several in turn; or drawn from the seed by shares, as in '4g:0.7,3g:0.3'.

    Several are told apart by commas, or by semicolons where one is written out. where: what gave them. Raises
    InputError.
    """
    return spread(
        given.split(";" if ";" in given or "=" in given else ","),
        lambda word: read_link(word, where),
        clients,
        seed,
        "link",
        where=f"{where} {shorten(given)}",
        example="4g:0.7,3g:0.3",
    )


_READ = {"up": UNITS, "down": UNITS, "latency": _TIMES, "server": UNITS}
