"""Which split is tested on, and what is tested on where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedlotr.data.columns import Columns, Rows
from fedlotr.data.layouts import test_rank
from fedlotr.errors import InputError, nearest
from fedlotr.streams import generator

HELD_OUT = "held-out"
"""As the split to evaluate on: a seeded tenth of train, which no client and no public example is taken from."""


def choose_test(
    splits: Sequence[str], read: Callable[[str], Columns], train: Columns, eval_split: str | None
) -> tuple[Columns | None, str]:
    """The columns of the split to test on, and where they came from in words; None where no split serves.

    splits: the names besides train. read: reads one. A split without labels is passed over where train has some.
    Raises InputError for an `eval_split` that is not there, or that has no labels.
    """
    if eval_split == HELD_OUT and HELD_OUT not in splits:
        return None, "a seeded tenth of train, held out"
    if eval_split is not None:
        eval_split = next((name for name in splits if name.casefold() == eval_split.casefold()), eval_split)
        if eval_split not in splits:
            hint = nearest(eval_split, splits) if splits else f"; there is train only, or {HELD_OUT}, a tenth of it"
            raise InputError(f"--eval-split {eval_split}: no such split{hint}")
        test = read(eval_split)
        if labelled(train) and not labelled(test):
            raise InputError(f"--eval-split {eval_split}: it has no labels; train has")
        if _is_empty(test):
            raise InputError(f"--eval-split {eval_split}: none of its rows has an answer")
        return test, eval_split
    passed_over: dict[str, str] = {}
    ranked = sorted((rank, at, name) for at, name in enumerate(splits) if (rank := test_rank(name)) is not None)
    for *_, name in ranked:
        test = read(name)
        if _is_empty(test):
            passed_over[name] = "answers"
        elif labelled(test) or not labelled(train):
            return test, " ".join([name, *_reasons(passed_over)])
        else:
            passed_over[name] = "labels"
    return None, " ".join(["a seeded tenth of train", *_reasons(passed_over)])


def _reasons(passed_over: Mapping[str, str]) -> list[str]:
    """Why splits were passed over. passed_over: the name of each, and what it lacks."""
    if not passed_over:
        return []
    lacking = " or ".join(dict.fromkeys(passed_over.values()))
    return [f"({' and '.join(passed_over)} {'has' if len(passed_over) == 1 else 'have'} no {lacking})"]


def _is_empty(columns: Columns) -> bool:
    """Whether no row is left, as of a split whose answers are kept secret."""
    return not any(columns.values())


def choose_only(
    splits: Sequence[str], read: Callable[[str], Columns], train: Columns, eval_split: str | None, given: str
) -> tuple[Columns, str]:
    """As `choose_test`, of data that are there to be evaluated on: their one split serves too, whatever its name.

    given: the option and its value, for messages. Raises InputError where none serves.
    """
    try:
        test, words = choose_test(splits, read, train, eval_split)
    except InputError as error:
        raise InputError([f"{given}: {problem}" for problem in error.problems]) from error
    if test is not None:
        return test, words
    if len(splits) > 1:
        raise InputError(f"{given}: which of its splits is meant ({', '.join(splits[:10])}); say so by --eval-split")
    test = read(splits[0])
    if labelled(train) and not labelled(test):
        raise InputError(f"{given}: it has no labels; train has")
    return test, splits[0]


def labelled(columns: Mapping[str, Sequence[object]]) -> bool:
    """Whether some row has a label; hidden ones are None, nothing or, as in GLUE, -1."""
    return any(value not in (None, -1, "", "-1", "-1.0") for value in columns.get("label", []))


def split_tenth(count: int, seed: int, given: str) -> tuple[Rows, Rows]:
    """Of so many rows those of train without a seeded tenth, and the tenth. Raises InputError for less than two."""
    if count < 2:
        raise InputError(f"{given}: one row cannot be split in train and test; add rows, or a file for test")
    chosen = np.sort(generator(seed, "test-split").permutation(count)[: max(1, count // 10)])
    return np.setdiff1d(np.arange(count), chosen), chosen


def split_families(families: Sequence[int], seed: int, given: str) -> tuple[Rows, Rows]:
    """As `split_tenth`, of whole families: the tenth are seeded ones, as many as it takes to have a tenth of the rows.

    families: the family of each row. Raises InputError for less than two of them.
    """
    numbers, of, sizes = np.unique(np.asarray(families), return_inverse=True, return_counts=True)
    if len(numbers) < 2:
        raise InputError(f"{given}: its rows are all alike, so there is nothing to test on")
    order = generator(seed, "test-split").permutation(len(numbers))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), max(1, len(of) // 10))) + 1
    tested = np.isin(of, order[: min(enough, len(numbers) - 1)])
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def take(columns: Columns, rows: Rows) -> Columns:
    """Some rows of all columns."""
    kept = rows.tolist()
    return {name: [values[row] for row in kept] for name, values in columns.items()}
