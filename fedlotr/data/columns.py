"""Columns of values, whatever form they came in: what kinds there are, which are read, and where each row stands."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedlotr.config.plain import deeply, scalar
from fedlotr.errors import InputError

PROBLEMS_SHOWN = 3
"""Broken lines named per file; a file that is of another kind altogether has one in each line."""

MOST_COLUMNS = 5_000
"""Different columns of one file: more are a table that lies on its side, or an object whose keys are data."""
MOST_CELLS = 10**9
"""Rows times columns of one file, which lie in memory as 8 bytes each beside what they point to."""

KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
TEXT = "text"
CHAT = "chat"
"""A list of messages, each of which says whose it is."""
NO_TEXT = "bytes that are no text in UTF-8"
UNREAD = {"a list", "an object", "an array", CHAT, NO_TEXT}
"""Kinds that no task of ours reads."""
SPEAKER = ("role", "from", "speaker", "author", "sender")
SAID = ("content", "value", "text", "message", "utterance")
"""What the parts of a message are called, in the forms in which chat is published."""
FIT = {"text", "a number", "true or false"}
"""Kinds that a text or a label may be of."""
FIT_LABEL = FIT | {"a decimal number"}
"""Databases keep whole numbers so."""
BEYOND = "a number beyond 64 bits"
ODD: dict[type, str] = {
    datetime.datetime: "a date or time",
    datetime.date: "a date or time",
    datetime.time: "a date or time",
    datetime.timedelta: "a length of time",
    decimal.Decimal: "a decimal number",
    uuid.UUID: "an identifier",
}
"""Kinds that no task learns from, but that can name a client, a class or be a text: they are read as text."""
NOTHING = ("NaTType", "NAType")
"""Types of pandas' own missing values."""

Columns = dict[str, list[Any]]
"""Values by column; a missing one is None."""
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where rows stand, as messages name it: for each the words before its number, and that number.

    words: such as "--data: train.csv, line". part: (rows,) indices of them; number: (rows,).
    """

    words: tuple[str, ...] = ()
    part: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    number: Rows = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, words: str, numbers: Sequence[int]) -> Places:
        """Of rows that have these numbers in one file."""
        return cls((words,), np.zeros(len(numbers), np.int64), np.array(numbers, np.int64))

    def __getitem__(self, row: int) -> str:
        return f"{self.words[self.part[row]]} {self.number[row]}"

    def __len__(self) -> int:
        return len(self.number)

    def take(self, rows: Rows) -> Places:
        """Of some of the rows."""
        return Places(self.words, self.part[rows], self.number[rows])


def joined(places: Sequence[Places]) -> Places:
    """Of the rows of several files, one after the other."""
    starts = np.cumsum([0, *(len(place.words) for place in places)])
    return Places(
        tuple(words for place in places for words in place.words),
        np.concatenate([place.part + start for place, start in zip(places, starts, strict=False)]),
        np.concatenate([place.number for place in places]),
    )


@dataclass(frozen=True)
class Nested:
    """A column that no task of ours reads: what it is, and its values, made of a file's bytes where they are asked for.

    read raises TypeError for what has no form in JSON.
    """

    kind: str
    read: Callable[[], list[Any]]


class Table(NamedTuple):
    """What a file holds.

    label_names: the names of its classes, where the file knows them. odd: columns of a kind that no task learns from,
    as text, and the kind. places: where its rows stand. notes: what the user must be told of the file. nested:
    its columns of lists and objects, which a task of the caller's own may read.
    """

    columns: Columns
    label_names: tuple[str, ...] | None = None
    odd: Mapping[str, str] = {}
    places: Places = Places()
    notes: tuple[str, ...] = ()
    nested: Mapping[str, Nested] = {}

    @property
    def unread(self) -> dict[str, str]:
        """The kinds of columns that are not among those here."""
        return {name: column.kind for name, column in self.nested.items() if name not in self.columns}


def appended(tables: Sequence[Table], given: str) -> Table:
    """The tables of one split's files, one after the other; a column that a file lacks is None there.

    given: the option and its value, for messages. Raises InputError where a column is of several kinds.
    """
    if len(tables) == 1:
        return tables[0]
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    odd = {name: kind for table in tables for name, kind in table.odd.items()}
    columns: Columns = {name: [] for name in names}
    for table in tables:
        for name in names:
            values = table.columns.get(name, [None] * len(table.places))
            columns[name] += _written(values) if name in odd else values
    problems = []
    for name, values in columns.items():
        if len(kinds := {kind_of(value) for value in values} - {"null"}) > 1:
            problems.append(f"{given}: '{name}' is {' in one part and '.join(sorted(kinds))} in another of one split")
    if problems:
        raise InputError(problems)
    return Table(
        columns,
        tables[0].label_names,
        odd,
        joined([table.places for table in tables]),
        tuple(note for table in tables for note in table.notes),
        _nested_of(tables),
    )


def _nested_of(tables: Sequence[Table]) -> dict[str, Nested]:
    """The columns of lists and objects of several files, one after the other."""

    def read(name: str) -> list[Any]:
        parts = [t.nested[name].read() if name in t.nested else [None] * len(t.places) for t in tables]
        return [value for part in parts for value in part]

    kinds = {name: column.kind for table in tables for name, column in table.nested.items()}
    return {name: Nested(kind, partial(read, name)) for name, kind in kinds.items()}


def checked_columns(
    where: str,
    found: Columns,
    *,
    odd: Mapping[str, str] | None = None,
    nested: Mapping[str, Nested] | None = None,
    count: int | None = None,
) -> Table:
    """The columns of rows that come from no file: those that can be read, each of one kind. Raises InputError.

    odd, nested: as for `checked_table`. count: of the rows (default: as many as there are values).
    """
    count = len(next(iter(found.values()), [])) if count is None else count
    problems = [] if count else [f"{where} has no rows"]
    problems += [f"{where}: column {name!r} is not named by text" for name in found if not isinstance(name, str)]
    plainly = {str(name): list(map(scalar, values)) for name, values in found.items() if isinstance(name, str)}
    found, nested = {}, dict(nested or {})
    for name, values in plainly.items():
        try:
            found[name] = [value.decode() if isinstance(value, bytes | bytearray) else value for value in values]
        except UnicodeDecodeError:
            nested[name] = Nested(NO_TEXT, undecoded)
    for name, values in found.items():
        broken = [row for row, value in enumerate(values, start=1) if isinstance(value, str) and not _is_text(value)]
        problems += [f"{where}, row {row}: '{name}' has half of a surrogate pair" for row in broken]
    return checked_table(where, found, range(1, count + 1), problems, unit="row", odd=odd, nested=nested)


def checked_table(
    where: object,
    found: Columns,
    numbers: Sequence[int],
    problems: list[str],
    *,
    unit: str = "line",
    label_names: tuple[str, ...] | None = None,
    odd: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    nested: Mapping[str, Nested] | None = None,
) -> Table:
    """The columns that can be read, each of one kind, of the rows that have some value.

    where: the file, or words. numbers: where each row stands in it. problems: what is known to be wrong already.
    odd: the kind of columns that came as text though they are none. nested: columns of lists and objects that are not
    among these, a value for each number from 1 on. Raises InputError with all problems, the first of them whole.
    """
    short = where.name if isinstance(where, Path) else str(where)
    where = f"--data: {where}" if isinstance(where, Path) else where
    found, numbers, blank = _without_blank_rows(found, numbers)
    if blank and not numbers and not problems:
        problems.append(f"{where} has no rows with any value in them")
    columns: Columns = {}
    strange: dict[str, str] = dict(odd or {})
    within = {name: Nested(column.kind, partial(_chosen, column, numbers)) for name, column in (nested or {}).items()}
    for name, values in found.items():
        kinds = _kinds(values, numbers)
        if not name.isprintable():
            problems.append(f"{where}: the name of column {name!r} has characters that cannot be printed")
        elif kinds and kinds.keys() <= UNREAD:
            within[name] = Nested(CHAT if CHAT in kinds else next(iter(kinds)), partial(_within, values))
        elif name == "label" and (
            unfit := {strange[name]} - FIT_LABEL if name in strange else kinds.keys() - FIT_LABEL
        ):
            problems.append(f"{where}: 'label' is {min(unfit)}; expected a class index or name")
        elif kinds and kinds.keys() <= {*ODD.values(), BEYOND, "a number"} and kinds.keys() != {"a number"}:
            strange[name] = next(kind for kind in kinds if kind != "a number")
            columns[name] = _written(values)
        elif len(kinds) > 1:
            (first, above), (kind, number), *_ = kinds.items()
            problems.append(f"{where}, {unit} {number}: '{name}' is {kind}, but {first} in {unit} {above}")
        else:
            columns[name] = _of_one_kind(values, kinds)
    if numbers and not columns and not within and not problems:
        problems.append(f"{where} has no column of text or numbers")
    if len(problems) > PROBLEMS_SHOWN:
        problems[PROBLEMS_SHOWN:] = [f"{where}: {len(problems) - PROBLEMS_SHOWN} more problems"]
    if problems:
        raise InputError(problems)
    told = [*notes, *([_of_blank_rows(short, blank, unit)] if blank else [])]
    strange = {name: kind for name, kind in strange.items() if name in columns}
    return Table(columns, label_names, strange, Places.of(f"{where}, {unit}", numbers), tuple(told), within)


def _chosen(column: Nested, numbers: Sequence[int]) -> list[Any]:
    values = column.read()
    return [values[number - 1] for number in numbers]


def _within(values: Iterable[Any]) -> list[Any]:
    """Lists and objects, with Python's own values in them."""
    return list(map(deeply, values))


def undecoded() -> list[Any]:
    """The values of a column that nobody looks into. Raises TypeError."""
    raise TypeError("not decoded")


def but_unread(unread: Mapping[str, str]) -> str:
    """What is to be added to a message that says what is missing: which columns are there and no task reads."""
    told = [f"'{name}' is {kind}" for name, kind in unread.items() if kind != CHAT][:PROBLEMS_SHOWN]
    told += [f"'{name}' is {instead_of_chat(name)}" for name, kind in unread.items() if kind == CHAT][:PROBLEMS_SHOWN]
    return "".join(f"; {words}" for words in told)


def instead_of_chat(name: str) -> str:
    """What is to be said of a column of chat that nothing reads, in words that fit after "is"."""
    return f"chat, which --columns messages={name} reads, without any classes (--task causal-lm)"


def too_many(where: str, rows: int, columns: int) -> list[str]:
    """What is wrong with a table of this size, if anything is."""
    if columns > MOST_COLUMNS:
        return [
            f"{where}: {columns:,} columns; expected at most {MOST_COLUMNS:,}: one a kind of value, and a row a line"
        ]
    if rows * columns > MOST_CELLS:
        return [
            f"{where}: {rows:,} rows of {columns:,} columns; expected at most {MOST_CELLS:,} values in all: leave out "
            "columns that are not needed, or rows"
        ]
    return []


def kind_of(value: object) -> str:
    """In words that fit after "is"."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        return BEYOND
    if isinstance(value, list | tuple):
        return CHAT if value and isinstance(value[0], Mapping) and is_turn(value[0]) else "a list"
    if kind := KINDS.get(type(value)):
        return kind
    odd = next((odd for kind, odd in ODD.items() if isinstance(value, kind)), None)
    return odd or ("an array" if hasattr(value, "shape") else "an object")


def is_turn(names: Iterable[object]) -> bool:
    """Whether what has parts of these names is a message of a chat: who says it, and what."""
    parts = set(names)
    return not parts.isdisjoint(SPEAKER) and not parts.isdisjoint(SAID)


def is_missing(value: object) -> bool:
    """Whether this is no value: None, NaN, or pandas' NaT and NA."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ in NOTHING


def _kinds(values: Iterable[object], numbers: Iterable[int]) -> dict[str, int]:
    """The kinds of what is there, and the number of the first row of each."""
    kinds: dict[str, int] = {}
    for value, number in zip(values, numbers, strict=True):
        if not is_missing(value):
            kinds.setdefault(kind_of(value), number)
    return kinds


def _of_one_kind(values: list[Any], kinds: Mapping[str, int]) -> list[Any]:
    """Whole numbers as decimal ones where there are any of these; NaN is a value only among numbers."""
    if kinds.keys() <= {"a number"}:
        decimals = any(isinstance(value, float) for value in values)
        return [None if value is None or not isinstance(value, int | float) else float(value) if decimals else value
                for value in values]  # fmt: skip
    return [None if is_missing(value) else value for value in values]


def _written(values: Iterable[Any]) -> list[Any]:
    """As text: dates as in ISO 8601, numbers digit by digit."""
    return [None if is_missing(value) else _plain(value) for value in values]


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ")
    return format(value, "f") if isinstance(value, decimal.Decimal) and value.is_finite() else str(value)


def _without_blank_rows(found: Columns, numbers: Sequence[int]) -> tuple[Columns, Sequence[int], list[int]]:
    """The rows that have some value, their numbers, and the numbers of the others."""
    if not found or any(not any(map(_is_blank, values)) for values in found.values()):
        return found, numbers, []
    kept = [not all(map(_is_blank, row)) for row in zip(*found.values(), strict=True)]
    if all(kept):
        return found, numbers, []
    filled = {name: [v for v, keep in zip(values, kept, strict=True) if keep] for name, values in found.items()}
    blank = [number for number, keep in zip(numbers, kept, strict=True) if not keep]
    return filled, [number for number, keep in zip(numbers, kept, strict=True) if keep], blank


def _is_blank(value: object) -> bool:
    return not value.strip() if isinstance(value, str) else is_missing(value)


def _of_blank_rows(where: str, numbers: list[int], unit: str) -> str:
    if len(numbers) == 1:
        return f"{where}: {unit} {numbers[0]} has no value at all and is skipped"
    return f"{where}: {len(numbers):,} {unit}s have no value at all and are skipped, the first of them {numbers[0]:,}"


def _is_text(value: str) -> bool:
    """Whether this can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
