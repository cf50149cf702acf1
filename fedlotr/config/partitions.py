"""The ways to deal rows to clients, as a configuration names them; how rows are dealt is `data/dealing.py`'s."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedlotr.errors import closest

CLIENT = "client"
"""The column that names the clients, where no other is given."""

MAX_ALPHA = 1e6
"""Already indistinguishable from equal shares; far larger ones overflow the sampler."""

CLUSTERS = 10
"""Clusters of texts where their number is not said."""
MAX_CLUSTERS = 1000


@dataclass(frozen=True)
class Form:
    """A rule. form: with its arguments, as help texts show it. text: what it does. example: one that can be given.

    read: what stands behind the colon (None: no colon), as arguments. Raises ValueError with what was expected.
    """

    form: str
    text: str
    example: str
    read: Callable[[str | None], tuple[Any, ...]]


def _nothing(given: str | None) -> tuple[None]:
    if given is not None:
        raise ValueError("iid takes no value; expected iid")
    return (None,)


def _alpha(given: str | None) -> float:
    try:
        value = float(given or "")
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_ALPHA:
        raise ValueError(f"a concentration above 0, up to {MAX_ALPHA:g}")
    return value


def _only_alpha(given: str | None) -> tuple[float]:
    return (_alpha(given),)


def _alpha_and_column(given: str | None) -> tuple[float] | tuple[float, str]:
    alpha, colon, column = (given or "").partition(":")
    if colon and not column:
        raise ValueError("the name of a column after the second colon")
    return (_alpha(alpha), column) if column else (_alpha(alpha),)


def _alpha_and_clusters(given: str | None) -> tuple[float, int]:
    alpha, colon, count = (given or "").partition(":")
    if colon and not (re.fullmatch(r"\d{1,9}", count) and 2 <= int(count) <= MAX_CLUSTERS):
        raise ValueError(f"2 to {MAX_CLUSTERS:,} clusters after the second colon")
    return _alpha(alpha), int(count or CLUSTERS)


def _shards(given: str | None) -> tuple[int]:
    if not re.fullmatch(r"\d{1,9}", given or "") or int(given or 0) < 1:
        raise ValueError("a number of shards a client, 1 or more")
    return (int(given or 0),)


def _column(given: str | None) -> tuple[str]:
    if given == "":
        raise ValueError("the name of a column")
    return (given or CLIENT,)


PARTITIONS = {
    "iid": Form("iid", "equal shares at random", "iid", _nothing),
    "dirichlet": Form(
        "dirichlet:ALPHA[:COLUMN]",
        "the rows of each value of COLUMN (the label) divided by a Dirichlet draw; the smaller ALPHA, the fewer values "
        "a client has",
        "dirichlet:0.5",
        _alpha_and_column,
    ),
    "lengths": Form(
        "lengths:ALPHA",
        "the same over ten ranges of the texts' lengths in characters, each with as many rows",
        "lengths:0.5",
        _only_alpha,
    ),
    "clusters": Form(
        "clusters:ALPHA[:K]",
        f"the same over K clusters of texts with words in common ({CLUSTERS})",
        "clusters:0.5",
        _alpha_and_clusters,
    ),
    "quantity": Form(
        "quantity:ALPHA",
        "random rows, shares of one Dirichlet draw; the smaller ALPHA, the more uneven",
        "quantity:0.5",
        _only_alpha,
    ),
    "shards": Form(
        "shards:K", "rows sorted by label, cut in equal shards, K random ones a client", "shards:2", _shards
    ),
    "natural": Form(
        "natural[:COLUMN]", f"a client for each of the largest groups of COLUMN ({CLIENT})", "natural:client", _column
    ),
}
"""THE table of rules: name -> what there is to say of it."""


def read_partition(given: str) -> tuple[Any, ...]:
    """The rule's name and its arguments: ("iid", None), ("dirichlet", ALPHA) or ("dirichlet", ALPHA, COLUMN), ...

    Raises ValueError with the form that was meant, or the nearest rule.
    """
    name, colon, argument = given.strip().partition(":")
    if name not in PARTITIONS:
        meant = closest(name.lower(), PARTITIONS) if name else None
        examples = ", ".join(form.example for form in PARTITIONS.values())
        raise ValueError(
            f"not a partition, did you mean '{PARTITIONS[meant].example}'?"
            if meant
            else f"not a partition; choose one such as {examples}"
        )
    form = PARTITIONS[name]
    try:
        return name, *form.read(argument if colon else None)
    except ValueError as error:
        raise ValueError(f"expected {form.form}: {error}, such as {form.example}") from None


def column_of(given: str) -> str | None:
    """The column that a rule deals by, where it names one."""
    return next((one for one in read_partition(given)[1:] if isinstance(one, str)), None)
