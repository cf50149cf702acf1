"""A split of the caller's own as columns: data sets, tables and rows, as the libraries of the trade have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlotr.data.arrow import class_names, nested_of, to_columns
from fedlotr.data.columns import Nested, Table, checked_columns, undecoded
from fedlotr.errors import InputError

EXPECTED = (
    "expected a datasets.Dataset, or rows that are mappings of column to value; a table of pandas or pyarrow and "
    "columns by name are taken too"
)


def read_rows(where: str, given: Any, label: str | None) -> Table:
    """What a split holds. where: how messages name it. label: the column whose class names are wanted (None: the
    labels').

    Taken are what the `datasets` library has in any format, also as a stream; tables of pandas, of pyarrow, and of
    those that give one as Arrow does; structured arrays; columns by name; rows that are mappings, named tuples or
    dataclasses, also one by one. Columns that no task reads are not decoded. Raises InputError for anything else.
    """
    try:
        return _read(where, given, label)
    except InputError:
        raise
    except Exception as error:  # what a library, or a stream or transform of the caller's, says of its own rows
        words = " ".join(str(error).split())[:200]
        raise InputError(f"{where} cannot be read: {type(error).__name__}: {words}; {EXPECTED}") from error


def _read(where: str, given: Any, label: str | None) -> Table:
    import datasets
    import pyarrow as pa

    nested: dict[str, Nested] = {}
    names = None
    if isinstance(given, datasets.Dataset) and given.format["type"] != "custom":
        schema = given.features.arrow_schema
        nested = nested_of(schema, lambda name: given.select_columns([name]).with_format("arrow")[:][name].to_pylist())
        wanted = [name for name in given.column_names if name not in nested]
        table = given.select_columns(wanted).with_format("arrow")[:] if wanted else pa.table({})
        return _of_arrow(where, table, nested, class_names(schema.metadata, label), len(given))
    if hasattr(given, "to_table"):  # pyarrow.dataset
        given = given.to_table()
    if not _is_pandas(given) and (hasattr(given, "__arrow_c_stream__") or hasattr(given, "__arrow_c_array__")):
        table = given if isinstance(given, pa.Table) else pa.table(given)
        return _of_arrow(where, table, {}, class_names(table.schema.metadata, label), table.num_rows)
    if isinstance(given, datasets.IterableDataset):
        given = given.with_format(None)
        if given.features is not None:
            schema = given.features.arrow_schema
            nested = {name: column for name, column in nested_of(schema, list).items() if column.read is undecoded}
            names = class_names(schema.metadata, label)
            given = given.decode(False).remove_columns(list(nested))
    columns = _columns(where, given)
    if columns is None:
        columns = _of_rows(where, given)
    columns = {name: list(map(_listed, values)) if _has_arrays(values) else values for name, values in columns.items()}
    return checked_columns(where, columns, nested=nested)._replace(label_names=names)


def _of_arrow(where: str, table: Any, nested: Mapping[str, Nested], names: tuple[str, ...] | None, count: int) -> Table:
    found = to_columns(table)
    every = {**nested, **found.nested}
    return checked_columns(where, found.columns, odd=found.odd, nested=every, count=count)._replace(label_names=names)


def _has_arrays(values: Iterable[Any]) -> bool:
    """Whether a column has arrays of texts or objects, as pandas makes of lists that it reads from Parquet."""
    return any(isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "OU" for value in values)


def _listed(value: Any) -> Any:
    """With lists in the place of arrays, however deep."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list) else value


def _is_pandas(given: object) -> bool:
    return type(given).__module__.partition(".")[0] == "pandas"


def _columns(where: str, given: Any) -> dict[Any, list[Any]] | None:
    """The values of what has them by column; None for what has rows. Raises InputError where columns are not alike."""
    if _is_pandas(given) and hasattr(given, "columns"):
        if any(name is not None for name in given.index.names):  # a column that was made the index
            given = given.reset_index()
        names = list(given.columns)
        if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
            raise InputError(f"{where}: the column {twice!r} is there twice; give each a name of its own")
        return {name: given[name].tolist() for name in names}
    if getattr(getattr(given, "dtype", None), "names", None):
        return {name: list(given[name]) for name in given.dtype.names}
    if not isinstance(given, Mapping):
        return None
    odd = [name for name, values in given.items() if isinstance(values, str | bytes) or not hasattr(values, "__len__")]
    if odd:
        raise InputError(f"{where}: {odd[0]!r} is a {type(given[odd[0]]).__name__}, no values of a column; {EXPECTED}")
    columns = {name: list(values) for name, values in given.items()}
    if len(lengths := {len(values): name for name, values in columns.items()}) > 1:
        (one, first), (other, second), *_ = lengths.items()
        raise InputError(f"{where}: {first!r} has {one:,} values and {second!r} {other:,}; expected as many of each")
    return columns


def _of_rows(where: str, given: Any) -> dict[Any, list[Any]]:
    """Columns of rows; one that a row lacks is None there."""
    if isinstance(given, str | bytes | Path):
        hint = "; a folder or a file of data is named by the configuration: SimulationConfig(data=...)"
        raise InputError(f"{where} is a {type(given).__name__}; {EXPECTED}{hint}")
    # A data set of torch has no more than a length and rows by number.
    if not isinstance(given, Iterable) and not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        raise InputError(f"{where} is a {type(given).__name__}; {EXPECTED}")
    every = given if isinstance(given, Iterable) else (given[at] for at in range(len(given)))
    rows: list[Mapping[Any, Any]] = []
    for number, row in enumerate(every, start=1):
        if dataclasses.is_dataclass(row) and not isinstance(row, type):
            row = {part.name: getattr(row, part.name) for part in dataclasses.fields(row)}
        elif hasattr(row, "_asdict"):
            row = row._asdict()
        if not isinstance(row, Mapping):
            raise InputError(f"{where}, row {number} is a {type(row).__name__}; {EXPECTED}")
        rows.append(row)
    return {column: [row.get(column) for row in rows] for column in dict.fromkeys(c for row in rows for c in row)}
