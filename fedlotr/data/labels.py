"""The classes of a data set: what its labels say they are, whatever file they come from, and their indices."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlotr.errors import InputError, shorten

MAX_CLASSES = 10_000
"""With more, a label is an identifier rather than a class."""

ROWS_SHOWN = 3
"""Bad rows named one by one."""

NAMES_SHOWN = 10
"""Classes named one by one."""

LABEL_COLUMNS = ("label", "labels")
"""What the column of the labels is called where nothing is said of it, also with capitals; the first that there is."""

Place = Callable[[int], str]
"""From a row's index to the words for where it stands."""
Labels = npt.NDArray[np.int64] | npt.NDArray[np.float64]
"""Of rows: class indices, or numbers on a scale."""
Split = tuple[str, Sequence[Any]]
"""How messages name a split, and the labels of its rows."""

_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")
_DIGITS = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_UNSEEN = ("Cf", "Cc")
"""Categories of characters that show nothing, such as a zero-width space."""
_VARIATION = range(0xFE00, 0xFE10)


def key_of(name: str) -> str:
    """What is equal for names that differ in case, white space or Unicode form alone, or are one whole number."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    key = "".join(c for c in plain if not c.isspace() and not _shows_nothing(c)) or name
    return str(int(key)) if _DIGITS.fullmatch(key) else key


def may_be_classes(values: Sequence[Any]) -> bool:
    """Whether a column looks like one of classes: whole numbers, or true and false, of which some are in several rows.

    A number that each row has for itself is its name, and one that all rows have tells nothing.
    """
    there = [value for value in values if value not in (None, "") and value == value]
    different = set(there)
    if not 1 < len(different) < len(there):
        return False
    return all(
        value.lower() in ("true", "false") or _WHOLE.fullmatch(value) if isinstance(value, str) else value % 1 == 0
        for value in different
    )


def label_among(columns: Iterable[str]) -> str | None:
    """Which of the columns has the labels, by its name: as written here rather than with capitals."""
    there = list(columns)
    written = [name for name in LABEL_COLUMNS if name in there]
    return next(iter([*written, *(name for name in there if name.lower() in LABEL_COLUMNS)]), None)


def are_numbers(names: Iterable[str]) -> bool:
    """Whether each name is a number, so that a number in the data is a name and not an index."""
    return all(map(is_number, names))


def is_number(text: str) -> bool:
    """Whether a text is a decimal number."""
    return _NUMBER.fullmatch(text) is not None


def class_names(
    where: str, splits: Sequence[Split], own: Sequence[str] | None, *, joined: bool, told: bool, asked: bool = False
) -> tuple[tuple[str, ...], bool]:
    """The classes of labels, and whether a number in the data is the name of one.

    Whole numbers are classes named by their numbers, in their order and as many as there are; names are classes in
    sorted order. where: the data, for messages. own: the names of the indices, where the data's form has them.
    joined: whether names that are equal but for case, white space or Unicode form, or as whole numbers, are one class,
    called as the first of them in sorted order. told: whether messages may repeat labels. asked: whether classes are
    asked for, so that whole numbers written with a point are some.
    Raises InputError where labels are no classes.
    """
    every = [value for _, column in splits for value in column]
    values = {value for value in every if value is not None and value == value}
    texts = {value for value in values if isinstance(value, str)}
    numbers = {value for value in values if not isinstance(value, str)}
    if texts and numbers and not all(_WHOLE.fullmatch(text) for text in texts):
        raise InputError(f"{where}: labels are names in one split and numbers in the other")
    if own is not None and numbers:
        return tuple(own), False
    # A column of whole numbers that lacks some is one of decimals in many a table: the rows that lack one are named.
    if texts or any(value % 1 for value in numbers) or all(value == value and value is not None for value in every):
        _check_whole(where, texts, numbers, told=told, asked=asked)
    if numbers and all(isinstance(value, bool) for value in numbers):
        return tuple(str(value).lower() for value in sorted(numbers)), False
    names = texts | {str(int(value)) for value in numbers}
    found = sorted(_joined(names) if joined else names, key=_in_order)
    if len(found) > MAX_CLASSES:
        raise InputError(
            f"{where}: 'label' has {len(found):,} different values, as an identifier has; expected {MAX_CLASSES:,} "
            "classes or fewer (--task regression predicts the number itself)"
        )
    if not joined and (alike := _alike(found)):
        raise InputError(_refusal(where, alike, told=told))
    by_name = bool(numbers) or (bool(found) and are_numbers(found))
    if "-1" in found and "0" in found and not any(name.startswith("-") and name != "-1" for name in found):
        found.remove("-1")  # which says in many sets that a row has none, so each row that has it is refused
    return tuple(found), by_name


def class_indices(
    where: str,
    values: Sequence[Any],
    names: Sequence[str],
    *,
    by_name: bool = False,
    joined: bool = False,
    place: Place | None = None,
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """(values,) class indices, and what is wrong with the values that are no class.

    by_name, joined: as for `class_names`. place: where a row stands, for messages. Without by_name a number is an
    index, also one that is text.
    """
    classes: dict[Any, int] = {_number(name) if by_name else index: index for index, name in enumerate(names)}
    keys = {key_of(name): index for index, name in enumerate(names)}
    if not by_name and all(isinstance(value, str) and _WHOLE.fullmatch(value) for value in values if value is not None):
        classes |= {str(index): index for index in range(len(names))}
    classes |= {name: index for index, name in enumerate(names)}

    def index_of(value: Any) -> int | None:
        index = classes.get(value)
        if index is None and isinstance(value, str):
            index = keys.get(key_of(value)) if joined else None
            if index is None and by_name and _NUMBER.fullmatch(value):
                index = classes.get(_number(value))
        return index

    known = {value: index_of(value) for value in dict.fromkeys(values)}
    bad = {row: value for row, value in enumerate(values) if known[value] is None}
    expected = (
        f"one of the classes {shorten(names[0])} to {shorten(names[-1])}"
        if names
        else "a class index from 0, or a name"
    )
    if any(value in (-1, "-1") for value in bad.values()):
        shown = ",".join(["-1", *names]) if len(names) < NAMES_SHOWN else "-1,..."
        expected += f"; -1 often says that there is none: leave such rows out, or give --label-names={shown}"
    elif near := [names[keys[key_of(v)]] for v in bad.values() if isinstance(v, str) and key_of(v) in keys]:
        alike = "is equal but for case, space or Unicode form, or as a number"
        expected += f"; {shorten(near[0])} {alike}: --join-labels takes both"
    indices = np.array([-1 if (index := known[value]) is None else index for value in values], np.int64)
    return indices, row_problems(where, "label", bad, expected, place)


def row_problems(where: str, column: str, bad: dict[int, Any], expected: str, place: Place | None = None) -> list[str]:
    """A line for each of the first bad rows, named by where it stands or counted from 1, and one for the rest."""
    problems = [
        f"{place(row) if place else f'{where}, row {row + 1}'}: '{column}' is {repr(value)[:50]}; expected {expected}"
        for row, value in list(bad.items())[:ROWS_SHOWN]
    ]
    return problems + ([f"{where}: {len(bad) - ROWS_SHOWN} more rows like these"] if len(bad) > ROWS_SHOWN else [])


def unshared(
    where: str, test: str, names: Sequence[str], train_has: set[int], test_has: set[int], *, told: bool
) -> list[str]:
    """Lines on the classes that a split lacks. told: whether they may tell of the rows of train."""
    every = set(range(len(names)))
    found = {
        "in train alone, so that nothing tests them": train_has - test_has,
        f"in {test} alone, so that no client learns them": test_has - train_has,
        "in no row": every - train_has - test_has,
    }
    if not told:
        found = {f"not in {test}, so that nothing tests them": every - test_has}
    return [f"{where}: {_some(names, which)} are {words}" for words, which in found.items() if which]


def _some(names: Sequence[str], which: set[int]) -> str:
    shown = ", ".join(shorten(names[index]) for index in sorted(which)[:NAMES_SHOWN])
    more = f" and {len(which) - NAMES_SHOWN:,} more" if len(which) > NAMES_SHOWN else ""
    return f"{len(which):,} of {len(names):,} classes ({shown}{more})"


def _number(name: str) -> int | float:
    return int(name) if re.fullmatch(r"[+-]?\d+", name) else float(name)


def _check_whole(where: str, texts: set[str], numbers: set[Any], *, told: bool, asked: bool) -> None:
    """Raise InputError for numbers with a decimal point: a scale, or classes that passed for numbers on their way.

    asked: whether classes are asked for: then whole ones are some, each number written in one way.
    """
    found: set[Any] = {value for value in numbers if isinstance(value, float)}
    if texts and are_numbers(texts):
        found |= {text for text in texts if not re.fullmatch(r"[+-]?\d+", text)}
    values = [float(value) for value in texts | numbers] if found else []
    if not found or (asked and len(set(values)) == len(values) and not any(value % 1 for value in values)):
        return
    written = sorted((str(value) for value in texts | numbers), key=len, reverse=True)
    names = [name for _, name in sorted({float(name): name for name in written}.items())]  # each number the short way
    way = "--label-names with all of them in their order"
    if told and len(names) <= NAMES_SHOWN:
        way = f"--label-names={','.join(names)}"
    shown = sorted(map(str, found), key=float)
    some = f" ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})" if told else ""
    raise InputError(
        f"{where}: 'label' holds numbers with a decimal point or an exponent{some}. Where they are classes, write "
        f"them as whole numbers or names, or give {way}; where they are a scale that is to be predicted, give --task "
        "regression"
    )


def _shows_nothing(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN or ord(character) in _VARIATION


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(key_of(name), []).append(name)
    return groups


def _joined(names: Iterable[str]) -> set[str]:
    """One name for each of those that are alike: the first, its white space tidied up where there is some."""
    tidy = [sorted(_tidy(name) for name in group)[0] for group in _groups(names).values()]
    return set(tidy)


def _tidy(name: str) -> str:
    visible = "".join(c for c in unicodedata.normalize("NFC", name) if c.isspace() or not _shows_nothing(c))
    return " ".join(visible.split()) or name


def _alike(names: Sequence[str]) -> list[list[str]]:
    return [group for group in _groups(names).values() if len(group) > 1]


def _refusal(where: str, alike: Sequence[Sequence[str]], *, told: bool) -> str:
    shown = " (which, is private)"
    if told:
        groups = [" and ".join(_unlike(name, group) for name in group[:3]) for group in alike[:ROWS_SHOWN]]
        more = f"; {len(alike) - ROWS_SHOWN} more" if len(alike) > ROWS_SHOWN else ""
        shown = f": {'; '.join(groups)}{more}"
    return (
        f"{where}: labels that are equal but for case, space or Unicode form, or as numbers{shown}. Make them one in "
        "the data or by --join-labels, or say by --label-names that they are different classes"
    )


def _unlike(name: str, group: Sequence[str]) -> str:
    """A name so that one sees how it differs from the others."""
    looks = unicodedata.normalize("NFKC", name)
    twins = any(other != name and unicodedata.normalize("NFKC", other) == looks for other in group)
    return (ascii(name) if twins or not name.isprintable() else repr(name))[:50]


def _in_order(name: str) -> tuple[bool, int, str]:
    """Names in alphabetical order, after those that are numbers in theirs."""
    whole = re.fullmatch(r"-?\d{1,18}", name) and name.isascii()
    return (False, int(name), name) if whole else (True, 0, name)
