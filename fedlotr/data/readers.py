"""Files of rows to columns: JSON lines, CSV and TSV, Parquet and Arrow; what cannot be read is named with its place.

JSON lines are read by Python's own module: pyarrow's reader (26) breaks promises kept here. Text that looks like a time
becomes one; whole numbers beyond 64 bits become decimal ones, so that two clients are one; two objects in a line are
two rows; the first mistake ends all, and is named by its row within a block, blank lines not counted. Parquet and Arrow
are read by pyarrow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlotr.data.columns import Columns, Nested, Table, appended, checked_table, kind_of, too_many
from fedlotr.data.csv_file import read_csv
from fedlotr.data.labels import label_among
from fedlotr.data.lines import UNREADABLE, check_size, lines_of
from fedlotr.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


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
    return appended(tables, given)


def suffix_of(path: Path) -> str:
    """The ending that tells a file's form, or "" for a form that is not read."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), "")


def _read_json(path: Path, label: str | None) -> Table:
    """JSON lines."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    problems: list[str] = []
    names: dict[str, None] = {}
    try:
        for number, line in enumerate(lines_of(path), start=1):
            if not line.strip():
                continue
            try:
                rows.append(_row(line))
                numbers.append(number)
            except ValueError as error:
                problems.append(f"--data: {path}, line {number}: {error}")
                continue
            if rows[-1].keys() - names.keys():
                names |= dict.fromkeys(rows[-1])
                if wide := too_many(f"--data: {path}, up to line {number}", 1, len(names)):
                    raise InputError(wide)
        problems += too_many(f"--data: {path}", len(rows), len(names))
    except InputError as error:
        problems, rows, names = error.problems, [], {}
    except UNREADABLE as error:
        problems.append(f"--data: {path} cannot be read: {error}")
    if not rows and not problems:
        problems.append(f"--data: {path} is empty; expected one JSON object a line")
    found = {name: [row.get(name) for row in rows] for name in names}
    return checked_table(path, found, numbers if rows else [], problems)


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
        raise ValueError(f'expected an object such as {{"text": "..."}}, found {kind_of(row)}')
    return row


def _read_parquet(path: Path, label: str | None) -> Table:
    """Parquet, by pyarrow; class names as the `datasets` library keeps them in a file's schema."""
    import pyarrow.parquet as pq

    def table() -> pa.Table:
        with pq.ParquetFile(path) as file:
            about = file.metadata
            check_size(path, sum(about.row_group(at).total_byte_size for at in range(about.num_row_groups)))
            if wide := too_many(f"--data: {path}", about.num_rows, len(file.schema_arrow.names)):
                raise InputError(wide)
            return file.read(use_threads=False)

    return _columnar(path, label, "Parquet", table)


def _read_arrow(path: Path, label: str | None) -> Table:
    """Arrow, as `save_to_disk` of the `datasets` library leaves it (a stream), or as a file (Feather)."""
    import pyarrow as pa

    def table() -> pa.Table:
        check_size(path, path.stat().st_size)
        with pa.OSFile(str(path)) as file:
            try:
                found = pa.ipc.open_stream(file).read_all()
            except pa.ArrowInvalid:
                file.seek(0)
                found = pa.ipc.open_file(file).read_all()
        if wide := too_many(f"--data: {path}", found.num_rows, found.num_columns):
            raise InputError(wide)
        return found

    return _columnar(path, label, "Arrow", table)


def _columnar(path: Path, label: str | None, form: str, read: Callable[[], pa.Table]) -> Table:
    """The table that `read` finds in a file, as columns of Python's values."""
    import pyarrow as pa

    try:
        table = read()
        found: Columns = {}
        odd: dict[str, str] = {}
        nested: dict[str, Nested] = {}
        unread: dict[str, str] = {}
        for name in dict.fromkeys(table.column_names):
            column = table.column(table.column_names.index(name))
            kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            if any(test(kind) for test in _plain_types()):
                found[name] = column.to_pylist()
            elif (what := _odd(kind)) and (written := _as_text(column)) is not None:
                found[name], odd[name] = written, what
            elif pa.types.is_nested(kind) or name in ("label", label):
                lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
                what = "a list" if lists else "an object" if pa.types.is_nested(kind) else str(kind)
                nested[name] = Nested(what, column.to_pylist)
            else:
                unread[name] = f"of type {kind}"
        names = _class_names(table.schema.metadata or {}, label)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        words = " ".join(str(error).split())[:200]
        raise InputError(f"--data: {path} cannot be read as {form}: {words or type(error).__name__}") from None
    count = table.num_rows
    problems = [] if count else [f"--data: {path} has no rows"]
    more: dict[str, Any] = {"label_names": names, "odd": odd, "nested": nested, "unread": unread}
    return checked_table(path, found, range(1, count + 1), problems, unit="row", **more)


def _plain_types() -> tuple[Callable[[Any], bool], ...]:
    from pyarrow import types

    return (
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_integer, types.is_floating, types.is_boolean, types.is_null),
    )


def _odd(kind: pa.DataType) -> str | None:
    """What a column is that no task learns from but that can name a client, in words; None for other kinds."""
    from pyarrow import types

    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        return "a date or time"
    if types.is_duration(kind):
        return "a length of time"
    return "a decimal number" if types.is_decimal(kind) else None


def _as_text(column: pa.ChunkedArray) -> list[Any] | None:
    """Each value as pyarrow writes it, whatever Python's own types could hold; None where it cannot."""
    import pyarrow as pa

    try:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_duration(column.type):
            column = column.cast(pa.int64())
        try:
            written: list[Any] = column.cast(pa.string()).to_pylist()
        except pa.ArrowInvalid:  # a zone that this machine does not know: as the same times of UTC
            written = column.cast(pa.timestamp(column.type.unit, "UTC")).cast(pa.string()).to_pylist()
    except (pa.ArrowException, ValueError, KeyError, AttributeError):
        return None
    return [None if text is None else re.sub(r"(:\d\d)\.0+(?=(Z|[+-]\d\d:?\d\d)?$)", r"\1", text) for text in written]


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
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".tsv": read_csv,
    ".tsv.gz": read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
"""Ending -> reader."""
