"""Files of rows to columns: JSON, CSV and TSV, Parquet and Arrow; what cannot be read is named with its place.

Parquet and Arrow are read by pyarrow, the others by Python's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlotr.data.arrow import class_names, kinds_unread, nested_of, to_columns
from fedlotr.data.columns import Table, appended, checked_table, too_many
from fedlotr.data.csv_file import read_csv
from fedlotr.data.json_file import read_json, read_json_lines
from fedlotr.data.lines import check_size
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


def _read_parquet(path: Path, label: str | None) -> Table:
    """Parquet, by pyarrow; class names as the `datasets` library keeps them in a file's schema."""
    import pyarrow.parquet as pq

    def table() -> tuple[pa.Table, pa.Schema]:
        with pq.ParquetFile(path) as file:
            about = file.metadata
            check_size(path, sum(about.row_group(at).total_byte_size for at in range(about.num_row_groups)))
            if wide := too_many(f"--data: {path}", about.num_rows, len(file.schema_arrow.names)):
                raise InputError(wide)
            schema = file.schema_arrow
            unread = kinds_unread(schema)  # some of which pyarrow itself cannot read
            wanted = [name for name in dict.fromkeys(schema.names) if name not in unread]
            return file.read(wanted, use_threads=False), schema

    def again(name: str) -> list[Any]:
        with pq.ParquetFile(path) as file:
            values: list[Any] = file.read([name], use_threads=False).column(name).to_pylist()
            return values

    return _columnar(path, label, "Parquet", table, again)


def _read_arrow(path: Path, label: str | None) -> Table:
    """Arrow, as `save_to_disk` of the `datasets` library leaves it (a stream), or as a file (Feather)."""
    import pyarrow as pa

    def table() -> tuple[pa.Table, pa.Schema]:
        check_size(path, path.stat().st_size)
        with pa.OSFile(str(path)) as file:
            try:
                found = pa.ipc.open_stream(file).read_all()
            except pa.ArrowInvalid:
                file.seek(0)
                found = pa.ipc.open_file(file).read_all()
        if wide := too_many(f"--data: {path}", found.num_rows, found.num_columns):
            raise InputError(wide)
        return found, found.schema

    return _columnar(path, label, "Arrow", table)


def _columnar(
    path: Path,
    label: str | None,
    form: str,
    read: Callable[[], tuple[pa.Table, pa.Schema]],
    again: Callable[[str], list[Any]] = list,
) -> Table:
    """The table that `read` finds in a file, as columns of Python's values. It gives the schema of all columns too.

    again: reads one that is in the schema alone.
    """
    import pyarrow as pa

    try:
        table, schema = read()
        found = to_columns(table)
        names = class_names(schema.metadata, label)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        words = " ".join(str(error).split())[:200]
        raise InputError(f"--data: {path} cannot be read as {form}: {words or type(error).__name__}") from None
    count = table.num_rows
    problems = [] if count else [f"--data: {path} has no rows"]
    return checked_table(
        path,
        found.columns,
        range(1, count + 1),
        problems,
        unit="row",
        label_names=names,
        odd=found.odd,
        nested=nested_of(schema, again) | found.nested,
    )


READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".ndjson": read_json_lines,
    ".ndjson.gz": read_json_lines,
    ".json": read_json,
    ".json.gz": read_json,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".tsv": read_csv,
    ".tsv.gz": read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
"""Ending -> reader."""
