"""Which client holds which rows, and what that comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedlotr.config.partitions import CLIENT, read_partition
from fedlotr.data.clients import name_of
from fedlotr.data.columns import Rows
from fedlotr.data.dealing import BY_LABEL, DEALERS, Job, less
from fedlotr.data.groups import Groups
from fedlotr.data.labels import Labels
from fedlotr.errors import InputError
from fedlotr.streams import generator

if TYPE_CHECKING:
    import datasets

DEFAULT = "dirichlet:0.5"
"""Of rows with labels: uneven, as clients are."""


@dataclass(frozen=True)
class Holding:
    """What one client holds: its number of examples, and of those of each label it has, the most frequent first.

    groups: the same of the groups that rows were dealt by, where they were.
    """

    client: int
    examples: int
    labels: dict[str, int]
    groups: dict[str, int] = field(default_factory=dict)


def default_partition(columns: Collection[str], *, labelled: bool) -> str:
    """How rows with these columns are dealt where nothing is said: unevenly by label, or as they come to be held."""
    if labelled:
        return DEFAULT
    return "natural" if CLIENT in columns else "iid"


def parse_partition(rule: str) -> tuple[Any, ...]:
    """("iid", None), ("dirichlet", ALPHA[, COLUMN]), ("lengths", ALPHA), ("clusters", ALPHA, K), ("quantity", ALPHA),
    ("shards", shards a client) or ("natural", column).

    Raises InputError with the nearest rule.
    """
    try:
        return read_partition(rule)
    except ValueError as error:
        raise InputError(f"--partition {rule}: {error}") from None


def partition(
    rule: str,
    rows: datasets.Dataset,
    labels: Labels,
    *,
    clients: int,
    seed: int,
    max_examples: int | None,
    withheld: Mapping[str, int] | None = None,
    groups: Sequence[Any] = (),
    by: Groups | None = None,
) -> list[Rows]:
    """The rows of each client: sorted indices into `rows`, at least one a client, none twice.

    labels: (rows,) class indices, or numbers on a scale, which no rule divides by. max_examples: a seeded choice of so
    many is kept where a client has more. withheld: for messages, which rows of the data are not among these, in words,
    and how many. groups: the column of `natural` in all rows of the data, with those. by: what `groups_of` says of this
    rule and these rows.
    `shards` leaves out the fewer than clients * K rows that fill no shard; `natural` those of smaller groups and those
    whose column is None. Its clients are in the order of size, then of name.
    Raises InputError where the rule has no such partition of these rows, and says what to change.
    """
    name, *arguments = parse_partition(rule)
    if max_examples is not None and max_examples < 1:
        raise InputError(f"--max-examples {max_examples}: expected 1 or more")
    if not 1 <= clients <= len(rows):
        raise InputError(
            f"--clients {clients}: expected 1 to {len(rows)}, the number of rows there are to divide"
            f"{less(len(rows), withheld)}"
        )
    scale = np.asarray(labels).dtype.kind == "f"
    classes = np.zeros(len(rows), np.int64) if scale else cast(Rows, labels)
    if by is None and name in BY_LABEL and scale:
        raise InputError(
            f"--partition {rule}: divides by label, and these labels are numbers on a scale, not classes; choose iid "
            "or natural, or divide by a column (dirichlet:0.5:COLUMN), by lengths:0.5 or clusters:0.5"
        )
    if by is None and name in BY_LABEL and len(np.unique(classes)) < 2:
        raise InputError(
            f"--partition {rule}: divides by label and all rows have the same (a causal language model has no labels); "
            "choose iid or natural, or divide by a column (dirichlet:0.5:COLUMN), by lengths:0.5 or clusters:0.5"
        )
    job = Job(
        rule=rule,
        arguments=tuple(arguments),
        rows=rows,
        of=classes if by is None else by.of,
        kind="label" if by is None else "group",
        clients=clients,
        seed=seed,
        withheld=withheld,
        groups=groups,
    )
    parts = DEALERS[name](job)
    if max_examples is not None:
        parts = [_cap(part, max_examples, generator(seed, "max-examples", client)) for client, part in enumerate(parts)]
    return parts


def client_names(rule: str, rows: datasets.Dataset, parts: Sequence[Rows]) -> list[str] | None:
    """The name of each client's group under `natural`, otherwise None."""
    name, *arguments = parse_partition(rule)
    if name != "natural":
        return None
    (column,) = arguments
    return [name_of(value) for value in rows.select([int(part[0]) for part in parts])[str(column)][:]]


def describe(
    parts: Sequence[Rows], labels: Labels, label_names: Sequence[str], by: Groups | None = None
) -> list[Holding]:
    """What each client holds. label_names: empty where there are no labels, and then no holding has any."""
    return [
        Holding(
            client,
            len(part),
            _counted(labels[part].astype(np.int64), label_names),
            {} if by is None else _counted(by.of[part], by.names),
        )
        for client, part in enumerate(parts)
    ]


def _counted(numbers: Rows, names: Sequence[str]) -> dict[str, int]:
    counts = Counter(numbers.tolist()) if names else Counter[int]()
    return {names[one]: count for one, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def withhold_public(count: int, rows: int, seed: int, withheld: Mapping[str, int] | None = None) -> tuple[Rows, Rows]:
    """`count` of `rows` row indices drawn for public use, and the private rest; both sorted.

    withheld: as for `partition`. Raises InputError where nothing private would be left.
    """
    if not 0 <= count < rows:
        raise InputError(
            f"--public-examples {count}: expected 0 to {rows - 1}, fewer than the {rows} rows of train"
            f"{less(rows, withheld)}"
        )
    order = generator(seed, "public-examples").permutation(rows)
    return np.sort(order[:count]), np.sort(order[count:])


def _cap(part: Rows, most: int, random: np.random.Generator) -> Rows:
    return part if len(part) <= most else np.sort(random.choice(part, most, replace=False))
