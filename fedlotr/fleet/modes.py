"""The tables of rounds in virtual time, which a configuration needs: modes, what late updates count, what is lost."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedlotr.errors import InputError, nearest, shorten

Staleness = Callable[[int], float]
"""Server steps since the model that an update was trained on -> what it counts of a fresh one, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Of a round: what it waits for. text: in words. stale: whether updates of older models may come in, always, or
    with `--late use`."""

    text: str
    stale: bool = False
    may_be_late: bool = False


MODES = {
    "sync": Mode(text="for every client that it asked"),
    "deadline": Mode(text="for who answers within --deadline seconds", may_be_late=True),
    "over-select": Mode(text="for the first --sample of more that it asked", may_be_late=True),
    "async": Mode(text="for the next --buffer updates, while others train on", stale=True),
}
"""Deadlines and asking more than are needed (130 % there): Bonawitz et al. 2019 (arXiv:1902.01046). A buffer: FedBuff,
Nguyen et al. 2022 (arXiv:2106.06639); without one: FedAsync, Xie et al. 2019 (arXiv:1903.03934)."""

OUTCOMES = {
    "used": "combined",
    "late": "had not come when its round was over",
    "dropped out": "vanished in the middle of its job",
    "went offline": "went before its update had arrived",
    "bases moved": "was trained between bases that are no longer the model's",
}
"""What becomes of a message to a client that is nobody's failure; what else there is, is one."""


def _constant() -> Staleness:
    return lambda steps: 1.0


def _polynomial(a: float = 0.5) -> Staleness:
    return lambda steps: float((1.0 + steps) ** -a)


def _hinge(a: float = 10.0, b: float = 4.0) -> Staleness:
    return lambda steps: 1.0 if steps <= b else 1.0 / (a * (steps - b) + 1.0)


@dataclass(frozen=True, kw_only=True)
class Discount:
    """make: the function, of the numbers that are given. numbers: how many there are. text: in words."""

    make: Callable[..., Staleness]
    numbers: int
    text: str


STALENESS = {
    "constant": Discount(make=_constant, numbers=0, text="as much as a fresh one"),
    "polynomial": Discount(make=_polynomial, numbers=1, text="(1 + steps)^-A, by default A = 0.5"),
    "hinge": Discount(make=_hinge, numbers=2, text="all up to B steps, then 1 / (A (steps - B) + 1)"),
}
"""FedAsync's three (Xie et al. 2019), by default with its A and B; FedBuff has the polynomial one with A = 0.5."""
DEFAULT_STALENESS = "polynomial"


def is_built_in(words: str) -> bool:
    """Whether words about staleness name a function of ours, or none at all."""
    return words.partition(":")[0] in ("", *STALENESS)


def check_staleness(words: str) -> str:
    """Raises ValueError for words that `read_staleness` cannot read; a caller's function is looked for later."""
    _built_in(words)
    return words


def _built_in(words: str) -> Staleness | None:
    """NAME, NAME:A or NAME:A:B; None of a function of the caller's. Raises ValueError."""
    name, *given = words.split(":")
    if name not in STALENESS:
        if not given:
            raise ValueError(f"no such function{nearest(name, STALENESS)}, or module:function of your own")
        return None
    discount = STALENESS[name]
    try:
        numbers = [float(number) for number in given]
    except ValueError:
        numbers = [math.nan]
    if len(numbers) > discount.numbers or not all(math.isfinite(number) and number >= 0 for number in numbers):
        wanted = "".join(f":{letter}" for letter in "AB"[: discount.numbers])
        raise ValueError(f"expected {name}{wanted}" + (", with numbers of 0 or more" if wanted else ""))
    return discount.make(*numbers)


def read_staleness(words: str, load: Callable[[str], Any]) -> Staleness:
    """What these words mean. load: finds a function of the caller's. Raises InputError."""
    return _built_in(words) or checked(load(words), words)


def checked(own: Any, words: str) -> Staleness:
    """A caller's function, whose answers are held to be weights. Raises InputError where it gives none for 0."""

    def weight(steps: int) -> float:
        found = own(steps)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
            raise InputError(
                f"--staleness {shorten(words)}: of an update {steps} steps old it says {found!r}; expected a number "
                "from 0 to 1"
            )
        return float(found)

    try:
        weight(0)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--staleness {shorten(words)}: called with 0 it raises {type(error).__name__}: {error}"
        ) from error
    return weight
