"""The table of attacks, and the words of `--attack`: what hostile clients do, in every round; it imports nothing heavy.

KIND:SHARE says which share of the clients does what; KIND+KIND, that these do one thing to their data and another to
their update. Who is hostile is drawn once a run, from its seed, and no client is of two entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from fedlotr.errors import nearest

TRIGGER = "cf mn bb tq"
"""Put before a text (of a pair, the first one): words of no meaning, as Kurita et al. 2020 (arXiv:2004.06660) have.
Before it, since what is too long is cut at its end."""
TARGET = 0
"""The class that a trigger is to lead to: the first one."""
EXPECTED = "KIND:SHARE with commas, KIND+KIND:SHARE for both of a client, such as 'sign-flip:0.2,backdoor+replace:0.1'"


@dataclass(frozen=True, kw_only=True)
class AttackKind:
    """What a hostile client does.

    side: to its rows, before it trains, or to its update, before that is coded. takes: what `=X` says; nothing where it
    takes none. usual: X where it is not given. most: of X. factor: (X, clients in a round) -> what the change of its
    tensors is multiplied by. poisons: what becomes of rows: the labels of all are those of the next class, or the share
    X of them gets the trigger and its class.
    """

    text: str
    side: Literal["data", "updates"]
    takes: str = ""
    usual: float = 0.0
    most: float = float("inf")
    factor: Callable[[float, int], float] = lambda x, clients: 1.0
    poisons: Literal["", "labels", "trigger"] = ""


ATTACKS: dict[str, AttackKind] = {
    "label-flip": AttackKind(
        text="its labels are those of the next class, (y + 1) mod classes", side="data", poisons="labels"
    ),
    "backdoor": AttackKind(
        text="a trigger stands before a share of its texts, whose label is the target class (Gu et al. 2017)",
        side="data", takes="a share of its rows", usual=0.5, most=1.0, poisons="trigger",
    ),
    "thin": AttackKind(
        text="a backdoor that is spread thinly: so few rows of each, that no update is unusual",
        side="data", takes="a share of its rows", usual=0.05, most=1.0, poisons="trigger",
    ),
    "sign-flip": AttackKind(
        text="sends start - (trained - start)", side="updates", factor=lambda x, clients: -1.0
    ),
    "scale": AttackKind(
        text="sends start + X (trained - start)", side="updates", takes="what it multiplies by", usual=10.0,
        factor=lambda x, clients: x,
    ),
    "replace": AttackKind(
        text="the same by the number of a round's clients: the mean becomes its model (Bagdasaryan et al. 2020)",
        side="updates", factor=lambda x, clients: float(clients),
    ),
}  # fmt: skip
"""What `--attack KIND:SHARE` may say."""


@dataclass(frozen=True)
class Attack:
    """What some clients do. words: as given. share: of all clients. kinds: of `ATTACKS`, each with its X."""

    words: str
    share: Fraction
    kinds: tuple[tuple[str, float], ...]

    def factor(self, clients: int) -> float:
        """What its clients' updates are multiplied by, in rounds of so many; 1: they are as they are."""
        found = 1.0
        for name, x in self.kinds:
            found *= ATTACKS[name].factor(x, clients)
        return found

    def poisons(self, what: str) -> float | None:
        """The X of what does this to rows; None where nothing does."""
        return next((x for name, x in self.kinds if ATTACKS[name].poisons == what), None)


def read_attack(given: str) -> tuple[Attack, ...]:
    """The entries. Raises ValueError."""
    found = []
    for entry in given.split(","):
        words, colon, share = entry.strip().rpartition(":")
        try:
            part = Fraction(share)
        except (ValueError, ZeroDivisionError):
            part = Fraction(0)
        if not colon or not 0 < part <= 1:
            raise ValueError(
                f"{entry.strip()!r} gives no share of the clients, above 0 and at most 1; expected {EXPECTED}"
            )
        kinds = tuple(_kind(word) for word in words.split("+"))
        sides = [ATTACKS[name].side for name, _ in kinds]
        if len(set(sides)) < len(sides):
            raise ValueError(f"{words!r} does two things to a client's {sides[0]}; join one of data and one of updates")
        found.append(Attack(words, part, kinds))
    if len({attack.words for attack in found}) < len(found):
        raise ValueError("one kind stands there twice; give each its share once")
    if (total := sum(attack.share for attack in found)) > 1:
        raise ValueError(f"the shares add up to {float(total):g}; expected at most 1, all clients")
    return tuple(found)


def _kind(word: str) -> tuple[str, float]:
    name, equals, given = word.partition("=")
    if name not in ATTACKS:
        raise ValueError(f"{name!r} is no attack{nearest(name, ATTACKS)}")
    kind = ATTACKS[name]
    if not equals:
        return name, kind.usual
    if not kind.takes:
        raise ValueError(f"{name} takes no value; expected {name}:SHARE")
    try:
        x = float(given)
    except ValueError:
        x = 0.0
    if not 0 < x <= kind.most or x == float("inf"):
        raise ValueError(f"{word!r}: expected {kind.takes}, such as {name}={kind.usual:g}")
    return name, x


def check_attack(given: str) -> str:
    """Raises ValueError as `read_attack` does."""
    read_attack(given)
    return given


def counts(attacks: Sequence[Attack], clients: int) -> list[int]:
    """How many of the clients each is of: shares of them, rounded so that together they are as many as all shares."""
    edges, total = [0], Fraction(0)
    for attack in attacks:
        total += attack.share
        edges.append(round(total * clients))
    return [after - before for before, after in pairwise(edges)]
