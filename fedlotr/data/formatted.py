"""A table as its format reads it: with the columns `text`, `prompt` and `answer`, or `messages`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlotr.data.canonical import CANONICAL, as_columns, checked
from fedlotr.data.columns import CHAT, Columns, Nested, Table, is_missing, undecoded
from fedlotr.data.formats import FORMATS, OF_THE_FILES, Format, Held, recognised
from fedlotr.data.own_format import find_function
from fedlotr.data.row_formats import OFFER, offered
from fedlotr.data.turns import RowError
from fedlotr.errors import InputError

ROWS_SHOWN = 3
"""Bad rows named one by one."""


@dataclass(frozen=True)
class Form:
    """How the rows of a data set are read.

    name: of the format. entry: it, if it is one of ours; function: of a row, where the rows are not the texts already.
    hidden: whether messages may tell nothing of single rows.
    """

    name: str
    entry: Format | None
    function: Callable[[Mapping[str, Any]], Any] | None
    hidden: bool = False

    @property
    def labelled(self) -> bool:
        """Whether its rows have labels."""
        return self.entry is not None and self.entry.labelled

    @property
    def scale(self) -> bool:
        """Whether these are numbers on a scale."""
        return self.entry is not None and self.entry.scale

    def fits(self, table: Table) -> bool:
        """Whether the columns are there that it needs."""
        return self.entry is None or self.entry.columns(held(table)) is not None

    def columns(self, table: Table) -> dict[str, str]:
        """The columns it reads, as its function knows them and as the table does."""
        there = held(table)
        if self.entry is None:
            return {name: name for name in there}
        return self.entry.columns(there) or {}

    def in_words(self, table: Table, called: Mapping[str, str]) -> str:
        """How this table is read, to be said; nothing where the columns are the texts already.

        called: what columns of the table were called before they were renamed.
        """
        columns = {known: called.get(name, name) for known, name in self.columns(table).items()}
        if self.entry is None:
            return f"read by {self.name}"
        if self._as_they_are(table) and not {*columns.values()} & {*called.values()}:
            return "" if self.hidden else _offers(self.name, table.columns)
        made = "" if self.hidden else self.entry.in_words(columns)
        return f"read as {self.name}{made and f': {made}'}"

    def read(self, table: Table, where: str, kept: Collection[str] = ()) -> tuple[Table, tuple[str, ...]]:
        """The table with the texts in the place of the columns that they are made of, without rows that have none; and
        what the texts are called.

        where: the split, for messages. kept: columns that stay although they are read. Raises InputError that names the
        rows which are not of this format.
        """
        if self.function is None or self._as_they_are(table):
            return table, tuple(self.entry.gives if self.entry is not None else ())
        columns = self.columns(table)
        count = len(next(iter(table.columns.values()), ())) or len(table.places)
        found = {known: _values(table, name, count) for known, name in columns.items()}
        reads: list[Any] = []
        problems: list[tuple[int, str]] = []
        for row in range(count):
            try:
                reads.append(checked(self.function({known: values[row] for known, values in found.items()})))
            except (Exception, SystemExit) as error:  # of a function of the caller's own, anything
                problems.append((row, _words(error, hidden=self.hidden, own=self.entry is None)))
                reads.append(None)
        if problems:
            raise InputError(self._refusal(problems, table, where))
        texts = as_columns(reads, self.name, where)
        rows = np.flatnonzero([read is not None for read in reads])
        read = set(columns.values()) if self.entry is not None else set(CANONICAL) & set(texts)
        return self._made(table, texts, rows, read - {*kept}, where), tuple(texts)

    def _as_they_are(self, table: Table) -> bool:
        columns = self.columns(table)
        plain = self.entry is not None and columns.keys() == self.entry.gives.keys() - {"tools"}
        there = held(table)
        return plain and all(known == name and there[name] == "text" for known, name in columns.items())

    def _refusal(self, problems: Sequence[tuple[int, str]], table: Table, where: str) -> list[str]:
        if self.hidden:
            words = sorted({re.sub(r"message \d+", "a message", words) for _, words in problems})[:ROWS_SHOWN]
            return [f"{where}: not of the format {self.name}: {said} in some row (which, is private)" for said in words]
        told = [f"{_place(table, where, row)}: {words}" for row, words in problems[:ROWS_SHOWN]]
        more = len(problems) - ROWS_SHOWN
        are = "row that is" if more == 1 else "rows that are"
        told += [f"{where}: {more:,} more {are} not of the format {self.name}"] if more > 0 else []
        return [f"{told[0]} (read as {self.name}; another is named by --format)", *told[1:]]

    def _made(self, table: Table, texts: Columns, rows: Any, read: Collection[str], where: str) -> Table:
        """The table of these rows with these texts, without the columns that were read."""
        chosen = rows.tolist()
        others = {
            (f"{name}{OF_THE_FILES}" if name in texts else name): [values[row] for row in chosen]
            for name, values in table.columns.items()
            if name not in read
        }
        gone = np.setdiff1d(np.arange(len(table.places)), rows)
        notes = table.notes
        if len(gone):
            said = "some rows" if self.hidden else f"{len(gone):,} row{'s' if len(gone) > 1 else ''}"
            first = "" if self.hidden else f", the first of them {_place(table, where, int(gone[0]))}"
            notes = (*notes, f"{where}: {said} without any answer to learn left out{first}")
        unread = {name: Nested(one.kind, undecoded) for name, one in table.nested.items() if name not in read}
        return table._replace(
            columns={**others, **texts},
            odd={name: kind for name, kind in table.odd.items() if name in others},
            places=table.places.take(rows) if len(table.places) else table.places,
            notes=notes,
            nested=unread,
        )


def form_named(name: str, table: Table, hidden: bool = False) -> Form:
    """The format of this name, one of ours or the caller's own. Raises InputError where the columns are not there."""
    entry = FORMATS.get(name)
    if entry is None:
        return Form(name, None, find_function(name), hidden)
    form = Form(name, entry, entry.read, hidden)
    if not form.fits(table):
        there = held(table)
        wanted = [one for one in entry.needs if one.among(there) is None]
        needed = ", ".join(" or ".join(one.names) for one in wanted or entry.needs)
        kinds = f" ({wanted[0].names[0]}: {_FORMS[wanted[0].holds]})" if wanted and wanted[0].holds != "text" else ""
        raise InputError(
            f"--format {name}: no column {needed}{kinds} among {', '.join(there) or 'none'}; say which is which by "
            f"--columns {(wanted or entry.needs)[0].names[0]}=NAME"
        )
    return form


def form_seen(table: Table, hidden: bool = False) -> Form | None:
    """The format without classes whose columns these are."""
    name = recognised(held(table), labelled=False)
    return None if name is None else Form(name, FORMATS[name], FORMATS[name].read, hidden)


def held(table: Table) -> dict[str, Held]:
    """What each column holds, of those that can be read."""
    kinds = {"a list", "an object", CHAT}
    there: dict[str, Held] = {name: _held(values) for name, values in table.columns.items()}
    return there | {name: "lists" for name, one in table.nested.items() if one.kind in kinds}


_FORMS = {
    "value": "a value a row",
    "lists": "a list or an object a row, or JSON of one",
    "either": "a text or a list a row",
}


def _held(values: Sequence[Any]) -> Held:
    first = next((value for value in values if not is_missing(value) and value != ""), None)
    if first is None:
        return "none"
    if not isinstance(first, str):
        return "value"
    if first.lstrip().startswith(("[", "{")):
        try:
            json.loads(first)
            return "json"
        except (ValueError, RecursionError):
            pass
    return "text"


def _values(table: Table, name: str, count: int) -> list[Any]:
    """Of a column; None where one is not there (as pandas' NaN is none), or cannot be decoded."""
    try:
        values = table.columns[name] if name in table.columns else table.nested[name].read()
    except TypeError:
        return [None] * count
    return [None if is_missing(value) else value for value in values]


def _words(error: BaseException, *, hidden: bool, own: bool) -> str:
    if isinstance(error, RowError):
        return error.hidden if hidden else str(error)
    name = type(error).__name__
    return name if hidden else f"{name}: {' '.join(str(error).split())[:200]}"


def _place(table: Table, where: str, row: int) -> str:
    return table.places[row] if len(table.places) else f"{where}, row {row + 1}"


def _offers(name: str, columns: Columns) -> str:
    """What is to be said of prompts that offer their answers."""
    if name != "prompt+answer" or OFFER not in (columns["prompt"][0] or ""):
        return ""
    pairs = zip(columns["prompt"], columns["answer"], strict=True)
    if not all(isinstance(p, str) and isinstance(a, str) and a.strip() in offered(p) for p, a in pairs):
        return ""
    return f"read as {name}, a multiple choice: each answer is one of those that its prompt offers after {OFFER!r}"
