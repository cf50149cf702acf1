"""Links between server and clients: how long messages take that are only reckoned, never sent."""

import re
from dataclasses import dataclass

from fedlotr.errors import InputError, nearest


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

        def takes(count: float, rate: float) -> float:
            own = 8 * count / rate
            return own if self.server is None else max(own, 8 * count * clients / self.server)

        return 2 * self.latency + takes(down, self.down) + takes(up, self.up)


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
        raise InputError(f"--link {given}: no such link{nearest(given, PROFILES)} (or {CUSTOM})")
    pairs = dict(part.partition("=")[::2] for part in given.split(","))
    problems = [
        f"--link {key}={value}: unknown{nearest(key, _READ)}" for key, value in pairs.items() if key not in _READ
    ]
    problems += [f"--link {given}: {key} is missing; expected {CUSTOM}" for key in ("up", "down") if key not in pairs]
    read = {key: _amount(value, _READ[key]) for key, value in pairs.items() if key in _READ}
    problems += [
        f"--link {key}={pairs[key]}: expected a number above 0 with a unit of {', '.join(filter(None, _READ[key]))}"
        for key, amount in read.items()
        if amount is None
    ]
    if problems:
        raise InputError(problems)
    up, down = read["up"] or 0.0, read["down"] or 0.0
    return Link(given, up, down, read.get("latency") or 0.0, read.get("server"))


_READ = {"up": _UNITS, "down": _UNITS, "latency": _TIMES, "server": _UNITS}


def _amount(text: str, units: dict[str, float]) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", text)
    if match is None or match[2] not in units or not float(match[1]):
        return None
    return float(match[1]) * units[match[2]]
