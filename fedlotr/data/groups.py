"""What rows are dealt by where that is not their label: groups of rows, and what these are called."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlotr.config.partitions import column_of, read_partition
from fedlotr.data.clients import name_of
from fedlotr.data.columns import Rows, is_missing
from fedlotr.errors import InputError, nearest

if TYPE_CHECKING:
    import datasets

NONE = "none"
"""The group of the rows that have no value in the column: they are dealt as any other group is."""
LEAST = 2
"""Rows that a group must have on the average: values that hardly occur twice, such as ids, group nothing."""
MOST = 10_000
"""Groups; each is drawn for by itself."""
RANGES = 10
"""Of lengths, with as many rows each as equal lengths allow."""


@dataclass(frozen=True)
class Groups:
    """by: what groups them, in a word, for tables. of: (rows,) the group of each row. names: of the groups."""

    by: str
    of: Rows
    names: tuple[str, ...]


def groups_of(rule: str, rows: datasets.Dataset, texts: Sequence[str], seed: int) -> Groups | None:
    """The groups that a rule deals by; None where it deals by the label, or by none.

    texts: the columns that a task reads. Raises InputError where the rows have no such groups, and says why.
    """
    kind, *arguments = read_partition(rule)
    if (column := column_of(rule)) is not None and kind == "dirichlet":
        found = by_column(rows, column, f"--partition {rule}")
    elif kind == "lengths":
        found = by_length(texts_of(rows, texts))
    elif kind == "clusters":
        from fedlotr.data.clusters import by_cluster

        found = Groups("cluster", *by_cluster(texts_of(rows, texts), int(arguments[1]), seed, f"--partition {rule}"))
    else:
        return None
    if len(found.names) < 2:
        raise InputError(
            f"--partition {rule}: all rows are of one group ({found.by} {found.names[0]}); choose iid or quantity:ALPHA"
        )
    return found


def by_column(rows: datasets.Dataset, column: str, given: str) -> Groups:
    """A group for each value of a column, in the order of their names; rows without a value are one more group."""
    if column not in rows.column_names:
        raise InputError(f"{given}: no column '{column}'{nearest(column, rows.column_names)}")
    names = [_called(value) for value in rows[column][:]]
    sizes = Counter(names)
    if len(sizes) > min(MOST, len(names) // LEAST):
        raise InputError(
            f"{given}: '{column}' has {len(sizes):,} values in {len(names):,} rows; expected one that tells the kind "
            f"of a row (its task, source, language), with {LEAST} rows a value or more, and at most {MOST:,} values"
        )
    ordered = tuple(sorted(sizes))
    numbers = {name: number for number, name in enumerate(ordered)}
    return Groups(column, np.array([numbers[name] for name in names], np.int64), ordered)


def _called(value: Any) -> str:
    return NONE if is_missing(value) or (isinstance(value, str) and not value.strip()) else name_of(value)


def by_length(texts: Sequence[str]) -> Groups:
    """Ranges of lengths in characters, shortest first, with as many rows each; equal lengths are in one range."""
    lengths = np.array([len(text) for text in texts], np.int64)
    limits = np.unique(np.quantile(lengths, np.arange(1, RANGES) / RANGES, method="lower"))
    of = np.searchsorted(limits, lengths)  # up to and with its limit
    present, of = np.unique(of, return_inverse=True)
    names = []
    for number in range(len(present)):
        inside = lengths[of == number]
        names.append(f"{inside.min():,}-{inside.max():,}" if inside.min() < inside.max() else f"{inside.min():,}")
    return Groups("length", of.astype(np.int64), tuple(names))


def texts_of(rows: datasets.Dataset, columns: Collection[str]) -> list[str]:
    """The text of each row: of its columns, or of all that is said in its `messages`, line by line."""
    read = [rows[column][:] for column in columns if column != "tools"]
    if list(columns)[:1] == ["messages"]:
        return ["\n".join(_said(json.loads(messages))) for messages in read[0]]
    return ["\n".join(map(str, parts)) for parts in zip(*read, strict=True)]


def _said(messages: Any) -> list[str]:
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    return [str(part.get("text") or "") if isinstance(part, dict) else str(part or "") for part in parts]
