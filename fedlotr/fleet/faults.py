"""THE table of faults on purpose, which a configuration needs, and how often each is met with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlotr.errors import nearest

TIMES = 10.0
"""That a slow client takes, where it is not said."""
EXPECTED = "expected KIND:SHARE[,KIND:SHARE...], such as dropout:0.1,nan:0.05"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with a client in one round.

    text: in words. spoils: whether its reply may be refused for it, and is excused then; else a client that fails
    beside it has failed by itself. recalls: whether it takes a reply of before, so that one must be there.
    takes_time: whether it is about virtual time.
    """

    text: str
    spoils: bool = True
    recalls: bool = False
    takes_time: bool = False


FAULTS = {
    "dropout": Fault(text="it never answers"),
    "crash": Fault(text="it raises, and an error is its reply"),
    "nan": Fault(text="its tensors have a NaN"),
    "shape": Fault(text="one of its tensors has another shape"),
    "duplicate": Fault(text="its reply comes twice", spoils=False),
    "reordered": Fault(text="its reply comes after all others, the last one first", spoils=False),
    "replayed": Fault(text="its last reply comes again instead of this round's", recalls=True),
    "stale": Fault(text="it trained on the last message that it answered, and not on this round's", recalls=True),
    "slow": Fault(text="it takes X times as long, in virtual time, by slow=X:SHARE", spoils=False, takes_time=True),
}


@dataclass(frozen=True)
class FaultPlan:
    """shares: kind -> the chance of each message to meet with it. times: that a slow client takes."""

    shares: Mapping[str, float]
    times: float = TIMES

    def kind(self, at: float) -> str | None:
        """What a client suffers that has drawn this number from 0 to 1; None: nothing."""
        for kind, share in self.shares.items():
            if at < share:
                return kind
            at -= share
        return None

    @property
    def recalls(self) -> bool:
        """Whether replies of before are needed."""
        return any(FAULTS[kind].recalls for kind in self.shares)

    @property
    def takes_time(self) -> bool:
        """Whether one of them needs virtual time."""
        return any(FAULTS[kind].takes_time for kind in self.shares)


def read_faults(words: str) -> FaultPlan:
    """KIND:SHARE[,KIND:SHARE...]. Raises ValueError."""
    shares: dict[str, float] = {}
    times = TIMES
    for one in words.split(","):
        named, colon, given = one.strip().partition(":")
        kind, equals, number = named.partition("=")
        if kind not in FAULTS:
            raise ValueError(f"{kind!r} is no fault{nearest(kind, FAULTS)}")
        share = _number(given)
        if not colon or not 0 <= share <= 1:
            raise ValueError(f"{kind} has the share {given!r}, expected one from 0 to 1; {EXPECTED}")
        if kind in shares:
            raise ValueError(f"{kind} is named twice")
        if equals:
            if not FAULTS[kind].takes_time:
                raise ValueError(f"{kind} takes no number; {EXPECTED}")
            times = _number(number)
            if not 1 <= times < math.inf:
                raise ValueError(f"{named}: expected how many times as long it takes, 1 or more, such as {kind}=10:0.2")
        shares[kind] = share
    if (together := math.fsum(shares.values())) > 1:
        raise ValueError(f"its shares come to {together:g} together, and a message meets with one fault at most")
    return FaultPlan(shares, times)


def check_faults(words: str) -> str:
    """Raises ValueError for words that `read_faults` cannot read."""
    read_faults(words)
    return words


def _number(text: str) -> float:
    """NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
