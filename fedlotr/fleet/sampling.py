"""THE table of whom a round asks of the clients that are there; a configuration needs it."""

import math
from dataclasses import dataclass

from fedlotr.errors import nearest


@dataclass(frozen=True, kw_only=True)
class Rule:
    """form: how it is written. text: in words. by_size: drawn with chances that go with clients' examples, and weighed
    against these chances.

    first: what decides between those that were drawn, where there are more of them than a round asks: "loss", the
    larger first, or "asked", the fewer times first; None: all that were drawn are asked. candidates: times as many as a
    round asks that are drawn for that, unless the words say otherwise; None: whoever is there.
    """

    form: str
    text: str
    by_size: bool = False
    first: str | None = None
    candidates: float | None = 1.0

    @property
    def remembers(self) -> bool:
        """Whether a draw depends on rounds before."""
        return self.first is not None


SAMPLINGS = {
    "uniform": Rule(form="uniform", text="whoever is there, evenly"),
    "size": Rule(form="size", text="by their examples, each then weighed by its share over its chance", by_size=True),
    "loss": Rule(
        form="loss[:D]",
        text="those with the largest training loss, as last told, of D times as many drawn by size (D = 2)",
        by_size=True,
        first="loss",
        candidates=2.0,
    ),
    "availability": Rule(
        form="availability",
        text="those that were asked least often so far, so that who is seldom there counts as much",
        first="asked",
        candidates=None,
    ),
}
"""By size with equal weights: scheme I of Li et al. 2020 (arXiv:1907.02189), here without replacement. By loss:
π_rpow-d of Cho, Wang & Joshi 2020 (arXiv:2010.01243), which asks nobody for a loss on the present model."""
DEFAULT_SAMPLING = "uniform"


@dataclass(frozen=True)
class Sampling:
    """A rule, and how many are drawn for each that is asked; None: whoever is there."""

    rule: Rule
    candidates: float | None


def read_sampling(words: str) -> Sampling:
    """NAME, or NAME:D. Raises ValueError."""
    name, _, given = words.partition(":")
    if name not in SAMPLINGS:
        raise ValueError(f"no such rule{nearest(name, SAMPLINGS)}")
    rule = SAMPLINGS[name]
    if ":" not in words:
        return Sampling(rule, rule.candidates)
    if not rule.candidates or rule.candidates == 1:
        raise ValueError(f"{name} takes no number")
    try:
        candidates = float(given)
    except ValueError:
        candidates = math.nan
    if not 1 <= candidates <= 1000:
        raise ValueError(f"expected {name}:D, D from 1 to 1000: how many are drawn for each that is asked")
    return Sampling(rule, candidates)


def check_sampling(words: str) -> str:
    """Raises ValueError for what `read_sampling` cannot read."""
    read_sampling(words)
    return words
