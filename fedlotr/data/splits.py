"""Which files of a folder, or splits of a mapping, are trained and tested on."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlotr.data.readers import READERS, Columns, suffix_of
from fedlotr.errors import InputError, nearest
from fedlotr.streams import generator

TEST_NAMES = ("test", "eval*", "dev", "val", "validation")
"""Splits to test on, best first."""
HELD_OUT = "held-out"
"""As the split to evaluate on: a seeded tenth of train, which no client and no public example is taken from."""

SHARD = re.compile(r"-\d{5}-of-(\d{5})$")
"""What ends the name of a part of a split, as the `datasets` library writes them."""

FORMS = ", ".join(READERS)


def split_files(folder: Path, given: str, *, train: bool = True) -> dict[str, list[Path]]:
    """Split name -> its files, in the order of the names.

    A single file is a split called train. Of a folder without such files the one folder in it that has some is taken
    (`data/` in a repository on the hub). given: the option and its value, for messages. train: whether there must be
    a split to train on.
    Raises InputError for what is missing, and for two forms of one split.
    """
    if folder.is_file():
        if not suffix_of(folder):
            raise InputError(f"{given}: not a form that is read; expected a folder, or a file that ends in {FORMS}")
        return {"train": [folder]}
    if not folder.is_dir():
        raise InputError(f"{given}: no such folder or file{_nearest_path(folder)}")
    files = _files(folder, given)
    if not files:
        inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and _files(path, given)]
        if len(inner) > 1:
            raise InputError(
                f"{given}: data in several folders ({', '.join(path.name for path in inner[:10])}); name one of "
                f"them, as {inner[0]}, or {inner[0].name} after a colon for a data set on the hub"
            )
        files = _files(inner[0], given) if inner else {}
    if not files or (train and "train" not in files):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "an empty folder"
        wanted = "no split to train on; expected train" if train else "no split to evaluate on; expected test"
        raise InputError(f"{given}: {wanted} with one of the endings {FORMS}, found {found}")
    return files


def _files(folder: Path, given: str) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        suffix = suffix_of(path)
        if not suffix or not path.is_file():
            continue
        stem = path.name[: -len(suffix)]
        split = SHARD.sub("", stem)
        others = files.setdefault(split, [])
        if others and (stem == split or not SHARD.search(others[0].name[: -len(suffix_of(others[0]))])):
            raise InputError(f"{given}: both {others[0].name} and {path.name}; keep one of them")
        others.append(path)
    for split, paths in files.items():
        part = SHARD.search(paths[0].name[: -len(suffix_of(paths[0]))])
        if part and len(paths) != int(part[1]):
            raise InputError(
                f"{given}: {len(paths)} of the {int(part[1])} parts of {split} are there; fetch the others"
            )
    return files


def _nearest_path(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f", nor is there {parent}; give a folder, a file or 'pydoc'"
    there = [entry for entry in parent.iterdir() if entry.is_dir() or suffix_of(entry)]
    choices = {entry.name: str(entry) for entry in there} | {"pydoc": "pydoc"}
    close = difflib.get_close_matches(path.name, choices, n=1)
    return f", did you mean '{choices[close[0]]}'?" if close else "; give a folder, a file or 'pydoc'"


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
        if eval_split not in splits:
            hint = nearest(eval_split, splits) if splits else f"; there is train only, or {HELD_OUT}, a tenth of it"
            raise InputError(f"--eval-split {eval_split}: no such split{hint}")
        test = read(eval_split)
        if labelled(train) and not labelled(test):
            raise InputError(f"--eval-split {eval_split}: it has no labels; train has")
        return test, eval_split
    passed_over: list[str] = []
    for pattern in TEST_NAMES:
        for name in fnmatch.filter(splits, pattern):
            test = read(name)
            if labelled(test) or not labelled(train):
                return test, " ".join([name, *_reasons(passed_over)])
            passed_over.append(name)
    return None, " ".join(["a seeded tenth of train", *_reasons(passed_over)])


def _reasons(passed_over: list[str]) -> list[str]:
    if not passed_over:
        return []
    return [f"({' and '.join(passed_over)} {'has' if len(passed_over) == 1 else 'have'} no labels)"]


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
    return any(value not in (None, -1, "", "-1") for value in columns.get("label", []))


def split_tenth(columns: Columns, seed: int, given: str) -> tuple[Columns, Columns]:
    """Train without a seeded tenth of its rows, and the tenth. Raises InputError for less than two rows."""
    count = len(next(iter(columns.values())))
    if count < 2:
        raise InputError(f"{given}: one row cannot be split in train and test; add rows, or a file for test")
    chosen = set(generator(seed, "test-split").permutation(count)[: max(1, count // 10)].tolist())
    train = {name: [value for row, value in enumerate(column) if row not in chosen] for name, column in columns.items()}
    test = {name: [value for row, value in enumerate(column) if row in chosen] for name, column in columns.items()}
    return train, test
