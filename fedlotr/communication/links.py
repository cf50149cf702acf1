"""Links between server and clients: how long messages take that are only reckoned, never sent."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "": 1.0}
_TIMES = {"ms": 1e-3, "s": 1.0}


def read_link(given: str) -> Link:
    """A profile by name, or one that is written out. Raises InputError."""
    if given in PROFILES:
        return PROFILES[given]
    if "=" not in given:
        raise InputError(f"--link {shorten(given)}: no such link{nearest(given, PROFILES)} (or {CUSTOM})")
    pairs = dict(part.partition("=")[::2] for part in given.split(","))
    shown, parts = f"--link {shorten(given)}", {key: shorten(f"{key}={value}") for key, value in pairs.items()}
    problems = [f"--link {parts[key]}: unknown{nearest(key, _READ)}" for key in pairs if key not in _READ]
    problems += [f"{shown}: {key} is missing; expected {CUSTOM}" for key in ("up", "down") if key not in pairs]
    read = {key: _amount(value, _READ[key]) for key, value in pairs.items() if key in _READ}
    problems += [
        f"--link {parts[key]}: expected a number above 0 with a unit of {', '.join(filter(None, _READ[key]))}"
        for key, amount in read.items()
        if amount is None
    ]
    if problems:
        raise InputError(problems)
    up, down = read["up"] or 0.0, read["down"] or 0.0
    return Link(given, up, down, read.get("latency") or 0.0, read.get("server"))


def read_links(given: str, clients: int, seed: int) -> list[Link]:
    """The link of each client: one for all; several in turn; or drawn from the seed by shares, as in '4g:0.7,3g:0.3'.

    Several are told apart by commas, or by semicolons where one is written out. Raises InputError.
    """
    entries = [part.strip() for part in given.split(";" if ";" in given or "=" in given else ",")]
    pairs = [(name, share) if colon else (entry, "") for entry in entries for name, colon, share in [_share(entry)]]
    problems: list[str] = []
    links: list[Link] = []
    for name, _ in pairs:
        try:
            links.append(read_link(name))
        except InputError as error:
            problems += error.problems
    shares = [float(share) if re.fullmatch(r"\d+\.?\d*|\.\d+", share) else 0.0 for _, share in pairs]
    given_shares = [bool(share) for _, share in pairs]
    if any(given_shares) and not (all(given_shares) and all(shares)):
        problems.append(
            f"--link {shorten(given)}: a share above 0 for every link, or for none, such as '4g:0.7,3g:0.3'"
        )
    if problems:
        raise InputError(problems)
    if not any(given_shares):
        return [links[client % len(links)] for client in range(clients)]
    import numpy as np  # here, since the options of `fedlotr cost` are told without it

    from fedlotr.streams import generator

    weights = np.array(shares)
    drawn = generator(seed, "link").choice(len(links), clients, p=weights / weights.sum())
    return [links[at] for at in drawn]


def _share(entry: str) -> tuple[str, str, str]:
    """(link, colon, share) of an entry that ends in one."""
    name, colon, share = entry.rpartition(":")
    return name, colon, share


_READ = {"up": _UNITS, "down": _UNITS, "latency": _TIMES, "server": _UNITS}


def _amount(text: str, units: dict[str, float]) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", text)
    if match is None or match[2] not in units or not float(match[1]):
        return None
    return float(match[1]) * units[match[2]]
