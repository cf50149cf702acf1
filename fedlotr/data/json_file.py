"""JSON to columns: an object a line, or a file that is one array of objects; what cannot be read is named by its place.

By Python's own module: pyarrow's reader (26) breaks promises kept here. Text that looks like a time becomes one; whole
numbers beyond 64 bits become decimal ones, so that two clients are one; two objects in a line are two rows; the first
mistake ends all, and is named by its row within a block, blank lines not counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlotr.data.columns import CHAT, Table, checked_table, kind_of, too_many
from fedlotr.data.lines import UNREADABLE, bytes_of, lines_of
from fedlotr.errors import InputError

_SPACE = re.compile(r"[ \t\r\n]*")
_ESCAPED = re.compile(r"\\u[dD]")
"""How a half of a surrogate pair is written, and a whole one too."""
_SHOWN = 'an object such as {"text": "..."}'
ROWS = "data"
"""Whose list holds the rows where a file is one object, as of question sets that have a version beside them."""


class _Rows:
    """The rows of a file as they come: their numbers, the columns seen, and what is wrong."""

    def __init__(self, path: Path, unit: str) -> None:
        self.path, self.unit = path, unit
        self.rows: list[dict[str, Any]] = []
        self.numbers: list[int] = []
        self.names: dict[str, None] = {}
        self.problems: list[str] = []

    def add(self, number: int, row: dict[str, Any]) -> None:
        """One row more. Raises InputError where there are too many columns by now."""
        self.rows.append(row)
        self.numbers.append(number)
        if row.keys() - self.names.keys():
            self.names |= dict.fromkeys(row)
            if wide := too_many(f"--data: {self.path}, up to {self.unit} {number}", 1, len(self.names)):
                raise InputError(wide)

    def wrong(self, number: int, what: object) -> None:
        """What is wrong with one row."""
        self.problems.append(f"--data: {self.path}, {self.unit} {number}: {what}")

    def table(self, expected: str) -> Table:
        """All that was read. Raises InputError with all that is wrong."""
        self.problems += too_many(f"--data: {self.path}", len(self.rows), len(self.names))
        if not self.rows and not self.problems:
            self.problems.append(f"--data: {self.path} is empty; expected {expected}")
        found = {name: [row.get(name) for row in self.rows] for name in self.names}
        return checked_table(self.path, found, self.numbers, self.problems, unit=self.unit)

    def refused(self, problems: list[str]) -> Table:
        """Nothing of what was read, for these reasons alone. Raises InputError."""
        return checked_table(self.path, {}, [], problems)


def read_json_lines(path: Path, label: str | None) -> Table:
    """JSON lines."""
    found = _Rows(path, "line")
    try:
        for number, line in enumerate(lines_of(path), start=1):
            if not line.strip():
                continue
            try:
                found.add(number, _row(line))
            except ValueError as error:
                found.wrong(number, error)
    except InputError as error:
        return found.refused(error.problems)
    except UNREADABLE as error:
        found.problems.append(f"--data: {path} cannot be read: {error}")
    return found.table("one JSON object a line")


def read_json(path: Path, label: str | None) -> Table:
    """A file that is an array of objects, or one object whose `data` is it; JSON lines that are called so are read too.

    A mistake within the JSON ends the reading, as nobody can tell where the next row begins.
    """
    found = _Rows(path, "row")
    try:
        if _are_lines(path):
            return read_json_lines(path, label)
        text = _decoded(bytes_of(path), path)
        halves = _ESCAPED.search(text) is not None
        for number, row in enumerate(_objects(text, path), start=1):
            try:
                found.add(number, _checked(row, halves=halves))
            except ValueError as error:
                found.wrong(number, error)
    except InputError as error:
        return found.refused([*found.problems, *error.problems])
    except UNREADABLE as error:
        found.problems.append(f"--data: {path} cannot be read: {error}")
    return found.table(f"an array of objects, [{{...}}, ...], or {_SHOWN} a line")


def _are_lines(path: Path) -> bool:
    """Whether the first line that is not blank is a whole object, and so a row; an array in one line is none.

    One object with its rows within is no row, if it is all there is.
    """
    lines = (line for line in lines_of(path, whole=True) if line.strip(b"\xef\xbb\xbf \t\r\n"))
    first = next(lines, b"")
    if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return False
    try:
        row = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # it goes on in the next line, or is broken
        return next(lines, b"").lstrip().startswith(b'{"')
    return next(lines, None) is not None or not _holds_rows(row)


def _holds_rows(row: dict[str, Any]) -> bool:
    rows = row.get(ROWS)
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and kind_of(rows) != CHAT


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"--data: {path}, line {line}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None


def _objects(text: str, path: Path) -> Iterator[Any]:
    """The elements of the array that a file is, one by one. Raises InputError where there is none, or it breaks off."""
    decoder, begin = json.JSONDecoder(), _after_space(text, 0)
    if not text[begin:]:
        return
    if text[begin] != "[":
        yield from _within(text, path)
        return
    at, number = _after_space(text, begin + 1), 0
    while at < len(text) and text[at] != "]":
        number += 1
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(_broken(path, number, error.msg, text, error.pos)) from None
        except RecursionError:
            raise InputError(f"--data: {path}, row {number}: nested too deeply") from None
        yield row
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
            if text[at : at + 1] == "]":
                raise InputError(_broken(path, number, "a comma after the last row", text, at))
        elif at < len(text) and text[at] != "]":
            raise InputError(_broken(path, number, "Expecting ',' or ']' after the row", text, at))
    if at >= len(text):
        raise InputError(_broken(path, number + 1, "the file ends within the array", text, at))
    if (end := _after_space(text, at + 1)) < len(text):
        raise InputError(_broken(path, number, "more text after the end of the array", text, end))


def _within(text: str, path: Path) -> Iterator[Any]:
    """The rows of a file that is one object."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(_broken(path, 1, error.msg, text, error.pos)) from None
    except RecursionError:
        raise InputError(f"--data: {path}: nested too deeply") from None
    if isinstance(whole, dict) and isinstance(whole.get(ROWS), list):
        yield from whole[ROWS]
        return
    lists = [name for name, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    held = f"one object with {', '.join(map(repr, list(whole)[:5]))}" if isinstance(whole, dict) else kind_of(whole)
    hint = f"; its rows, if they are those of {lists[0]!r}, as {ROWS!r}" if len(lists) == 1 else ""
    raise InputError(
        f"--data: {path} holds {held}; expected an array of objects, [{{...}}, ...], or an object a line{hint}"
    )


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _broken(path: Path, number: int, what: str, text: str, at: int) -> str:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return f"--data: {path}, row {number}: not JSON ({what} at line {line}, column {column})"


def _row(line: bytes) -> dict[str, Any]:
    """One object; raises ValueError in words that fit after a colon."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _checked(row, halves=re.search(rb"\\u[dD]", line) is not None)


def _checked(row: Any, *, halves: bool) -> dict[str, Any]:
    """A row that is an object of text. halves: whether there may be halves of surrogate pairs. Raises ValueError."""
    try:
        if halves:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected {_SHOWN}, found {kind_of(row)}")
    return row
