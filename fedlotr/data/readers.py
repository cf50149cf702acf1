"""Files of rows to columns: JSON lines, CSV and TSV, Parquet; what cannot be read is named with its file and line.

Lines are read by Python's own modules: pyarrow takes text that looks like a date for one, lets broken quotes pass, and
numbers neither lines (but records, or from the start of a block) nor more than the first mistake in JSON.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedlotr.data.labels import label_among
from fedlotr.errors import InputError

PROBLEMS_SHOWN = 3
"""Broken lines named per file; a file that is of another kind altogether has one in each line."""

FIELD_LIMIT = 2**27
"""Characters of one CSV field: a quote that is never closed swallows the rest of the file, and this much is no text."""

KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
UNREAD = {"a list", "an object", "a number beyond 64 bits"}

Columns = dict[str, list[Any]]
"""Values by column; a missing one is None."""


class Table(NamedTuple):
    """What a file holds, and the names of its classes where the file knows them."""

    columns: Columns
    label_names: tuple[str, ...] | None = None


def read_files(paths: Iterable[Path], given: str, label: str | None = None) -> Table:
    """The rows of one split's files, one after the other.

    given: the option and its value, for messages. label: the column whose class names are wanted (None: the labels').

    Raises InputError with what is wrong in each file.
    """
    tables: list[Table] = []
    problems: list[str] = []
    for path in paths:
        try:
            tables.append(READERS[suffix_of(path)](path, label))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if len(tables) == 1:
        return tables[0]
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    columns: Columns = {name: [] for name in names}
    for table in tables:
        count = len(next(iter(table.columns.values())))
        for name in names:
            columns[name] += table.columns.get(name, [None] * count)
    for name, values in columns.items():
        if len(kinds := {_kind(value) for value in values} - {"null"}) > 1:
            problems.append(f"{given}: '{name}' is {' in one part and '.join(sorted(kinds))} in another of one split")
    if problems:
        raise InputError(problems)
    return Table(columns, tables[0].label_names)


def suffix_of(path: Path) -> str:
    """The ending that tells a file's form, or "" for a form that is not read."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), "")


def _read_json(path: Path, label: str | None) -> Table:
    """JSON lines; those of lists or objects, which no task reads, are left out."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    problems: list[str] = []
    try:
        for number, line in _lines(path):
            try:
                rows.append(_row(line))
                numbers.append(number)
            except ValueError as error:
                problems.append(f"--data: {path}, line {number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"--data: {path} cannot be read: {error}")
    if not rows and not problems:
        problems.append(f"--data: {path} is empty; expected one JSON object a line")
    found = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    return Table(_checked(path, found, numbers, problems))


def _read_csv(path: Path, label: str | None) -> Table:
    """Comma-separated values with a header line (or semicolons or tabs, where it has no comma), all of it text.

    Nothing is guessed from what a value looks like: "007" stays what it is. Columns without a name, such as a data
    frame's index, are left out.
    """
    rows: list[list[str]] = []
    numbers: list[int] = []
    problems: list[str] = []
    header: list[str] = []
    limit = csv.field_size_limit(FIELD_LIMIT)
    try:
        content = b"".join(_bytes(path))
        text = content.decode("utf-8-sig")
        first = text.lstrip().partition("\n")[0]
        marks = ("\t",) if "tsv" in suffix_of(path) else (",", ";", "\t")
        delimiter = next((mark for mark in marks if mark in first), marks[0])
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        above = 0
        for fields in reader:
            line, above = above + 1, reader.line_num  # a record may go over several lines
            if not fields:
                continue  # a blank line
            if not header:
                header = [name.strip() for name in fields]
                twice = sorted({name for name in header if name and header.count(name) > 1})
                if twice or not any(header):
                    problems.append(
                        f"--data: {path}, line 1: expected a header of different column names{_twice(twice)}"
                    )
                    break
            elif len(fields) != len(header):
                problems.append(
                    f"--data: {path}, line {line}: {len(fields)} fields, but the header has "
                    f"{len(header)}; a field that holds the separator belongs in double quotes"
                )
            else:
                rows.append(fields)
                numbers.append(line)
    except UnicodeDecodeError as error:
        problems.append(
            f"--data: {path}, line {content[: error.start].count(10) + 1}: not UTF-8 ({error.reason}); "
            "save it again in that encoding"
        )
    except csv.Error as error:
        problems.append(f"--data: {path}, the row that begins in line {above + 1}: not CSV ({error})")
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"--data: {path} cannot be read: {error}")
    finally:
        csv.field_size_limit(limit)
    if not rows and not problems:
        problems.append(f"--data: {path} has no rows; expected a header line and a line a row")
    found = {name: [row[at] for row in rows] for at, name in enumerate(header) if name}
    return Table(_checked(path, found, numbers, problems))


def _twice(names: list[str]) -> str:
    return f", '{names[0]}' is there twice" if names else ""


def _read_parquet(path: Path, label: str | None) -> Table:
    """Parquet, by pyarrow; class names as the `datasets` library keeps them in a file's schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, use_threads=False)
        found: Columns = {}
        for name in dict.fromkeys(table.column_names):
            column = table.column(table.column_names.index(name))
            kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            read = any(
                test(kind)
                for test in (
                    pa.types.is_string,
                    pa.types.is_large_string,
                    pa.types.is_string_view,
                    pa.types.is_integer,
                    pa.types.is_floating,
                    pa.types.is_boolean,
                    pa.types.is_null,
                )
            )
            found[name] = column.to_pylist() if read else [[]] * table.num_rows  # as a list: no task reads it
        names = _class_names(table.schema.metadata or {}, label)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        words = " ".join(str(error).split())[:200]
        raise InputError(f"--data: {path} cannot be read as Parquet: {words or type(error).__name__}") from None
    count = table.num_rows
    problems = [] if count else [f"--data: {path} has no rows"]
    return Table(_checked(path, found, range(1, count + 1), problems, unit="row"), names)


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...] | None:
    """The names that a schema has for the classes of a column; None where it has none, or not one for each."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[label or label_among(features)]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    different = isinstance(names, list) and names and len(set(map(str, names))) == len(names)
    return tuple(map(str, names)) if different else None


READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".jsonl": _read_json,
    ".jsonl.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".tsv": _read_csv,
    ".tsv.gz": _read_csv,
    ".parquet": _read_parquet,
}
"""Ending -> reader."""


def checked_columns(where: str, found: Columns) -> Columns:
    """The columns of rows that come from no file: those that can be read, each of one kind. Raises InputError."""
    count = len(next(iter(found.values()), []))
    problems = [] if count else [f"{where} has no rows"]
    problems += [f"{where}: column {name!r} is not named by text" for name in found if not isinstance(name, str)]
    found = {name: values for name, values in found.items() if isinstance(name, str)}
    for name, values in found.items():
        broken = [row for row, value in enumerate(values, start=1) if isinstance(value, str) and not _is_text(value)]
        problems += [f"{where}, row {row}: '{name}' has half of a surrogate pair" for row in broken]
    return _checked(where, found, range(1, count + 1), problems, unit="row")


def _checked(where: object, found: Columns, numbers: Sequence[int], problems: list[str], unit: str = "line") -> Columns:
    """The columns that can be read, each of one kind. Raises InputError with all problems, the first of them whole."""
    where = f"--data: {where}" if isinstance(where, Path) else where
    columns: Columns = {}
    for name, values in found.items():
        kinds: dict[str, int] = {}
        for value, number in zip(values, numbers, strict=True):
            kinds.setdefault(_kind(value), number)
        kinds.pop("null", None)
        if not name.isprintable():
            problems.append(f"{where}: the name of column {name!r} has characters that cannot be printed")
        elif len(kinds) > 1:
            (first, above), (kind, number), *_ = kinds.items()
            problems.append(f"{where}, {unit} {number}: '{name}' is {kind}, but {first} in {unit} {above}")
        elif name == "label" and not UNREAD.isdisjoint(kinds):
            problems.append(f"{where}: 'label' is {next(iter(kinds))}; expected a class index or name")
        elif UNREAD.isdisjoint(kinds):
            decimal = any(isinstance(value, float) for value in values)
            columns[name] = [float(value) if decimal and value is not None else value for value in values]
    if numbers and not columns and not problems:
        problems.append(f"{where} has no column of text or numbers")
    if len(problems) > PROBLEMS_SHOWN:
        problems[PROBLEMS_SHOWN:] = [f"{where}: {len(problems) - PROBLEMS_SHOWN} more problems"]
    if problems:
        raise InputError(problems)
    return columns


def _is_text(value: str) -> bool:
    """Whether this can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes(path: Path) -> Iterator[bytes]:
    """Lines, of what is in the archive where it is one."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1 as an editor does."""
    for number, line in enumerate(_bytes(path), start=1):
        if line.strip():
            yield number, line


def _row(line: bytes) -> dict[str, Any]:
    """One object; raises ValueError in words that fit after a colon."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if re.search(rb"\\u[dD]", line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f'expected an object such as {{"text": "..."}}, found {_kind(row)}')
    return row


def _kind(value: object) -> str:
    if type(value) is int and not -(2**63) <= value < 2**63:
        return "a number beyond 64 bits"
    return KINDS.get(type(value), "an object")
