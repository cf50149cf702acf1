"""Which texts are alike: what a model has learnt of one it knows of the others, so no split may part them."""

from __future__ import annotations

import re
from collections.abc import Sequence

RUN = 4
"""Words in a row that tell whether two texts share some."""
ALIKE = 0.3
"""Share of the shorter text's runs that stand in the other, from which on whoever learnt one may know the other."""


def words_of(text: str) -> list[str]:
    """For comparison: lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def runs(text: str) -> set[str]:
    """The runs of four words of a text, in lower case and without punctuation; of a shorter text, itself."""
    words = words_of(text)
    return {" ".join(words[at : at + RUN]) for at in range(max(1, len(words) - RUN + 1))}


def families(texts: Sequence[str], names: Sequence[str]) -> list[int]:
    """For each row the first row of its family: those that are alike, and those alike to these.

    Two rows are alike where three tenths of the shorter text's runs of four words stand in the other too, or where
    they have the same name. names: what each row is about.
    """
    family = list(range(len(texts)))

    def first(row: int) -> int:
        while family[row] != row:
            family[row] = row = family[family[row]]
        return row

    def join(one: int, other: int) -> None:
        one, other = sorted((first(one), first(other)))
        family[other] = one

    named: dict[str, int] = {}
    having: dict[str, list[int]] = {}
    sizes: list[int] = []
    for row, (text, name) in enumerate(zip(texts, names, strict=True)):
        join(named.setdefault(name, row), row)
        shared: dict[int, int] = {}
        own = runs(text)
        sizes.append(len(own))
        for run in own:
            for other in having.setdefault(run, []):
                shared[other] = shared.get(other, 0) + 1
            having[run].append(row)
        for other, count in shared.items():
            if count >= ALIKE * min(len(own), sizes[other]):
                join(other, row)
    return [first(row) for row in range(len(texts))]
