"""The data sets that need no files, and how their rows are split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedlotr.data.columns import Columns
from fedlotr.data.pydoc import build_pydoc
from fedlotr.data.pydoc_chat import build_pydoc_chat
from fedlotr.data.splits import HELD_OUT, split_families, split_tenth, take
from fedlotr.errors import InputError, nearest

SPLIT_SEED = 0
"""Fixed, so that runs of different seeds are tested on the same rows."""


class Rows(NamedTuple):
    """All rows of a data set.

    label_names: the classes, where there are any. families: for each row a number that those have in common which no
    split may part; None where each stands for itself.
    """

    columns: Columns
    label_names: tuple[str, ...] | None = None
    families: Sequence[int] | None = None


class BuiltIn(NamedTuple):
    """A data set. rows: what its rows are called, for messages. build: makes them."""

    rows: str
    build: Callable[[], Rows]


class Split(NamedTuple):
    """Its rows apart: to train on and to test on, and what either is, in words."""

    train: Columns
    test: Columns
    label_names: tuple[str, ...] | None
    trained: str
    tested: str


def _pydoc() -> Rows:
    rows, label_names = build_pydoc()
    return Rows({name: [row[name] for row in rows] for name in rows[0]}, label_names)


def _pydoc_chat() -> Rows:
    columns, families = build_pydoc_chat()
    return Rows(columns, families=families)


BUILT_IN = {"pydoc": BuiltIn("paragraphs", _pydoc), "pydoc-chat": BuiltIn("conversations", _pydoc_chat)}
"""Name -> data set; `config.values.BUILT_IN_DATA` has the same names."""


def split_built_in(name: str, seed: int, eval_split: str | None) -> Split:
    """The data set of this name, split. eval_split: "test" (default), or held-out: a seeded tenth of what is not test.

    Raises InputError for another split, and where the interpreter comes without its library's sources.
    """
    if eval_split not in (None, "test", HELD_OUT):
        raise InputError(
            f"--eval-split {eval_split}: {name} has no such split{nearest(eval_split, ['test', HELD_OUT])}"
        )
    data = BUILT_IN[name]
    train, test = _tenth(data.build(), SPLIT_SEED, f"--data {name}")
    tested = f"a fixed tenth of the {data.rows}"
    if eval_split == HELD_OUT:
        train, test = _tenth(train, seed, f"--data {name}")
        tested = f"a seeded tenth of the other {data.rows}, held out"
    trained = f"the other {data.rows}" if eval_split is None else "the rest"
    return Split(train.columns, test.columns, train.label_names, trained, tested)


def _tenth(rows: Rows, seed: int, given: str) -> tuple[Rows, Rows]:
    """The rows without a seeded tenth, and the tenth."""
    count = len(next(iter(rows.columns.values())))
    families = rows.families
    parts = split_tenth(count, seed, given) if families is None else split_families(families, seed, given)
    kept, tenth = (
        Rows(take(rows.columns, part), rows.label_names, None if families is None else [families[row] for row in part])
        for part in parts
    )
    return kept, tenth
