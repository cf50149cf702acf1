"""Arrow's columns as columns of Python's values; those of kinds that no task reads stay as they are, undecoded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from fedlotr.data.columns import CHAT, NO_TEXT, Columns, Nested, is_turn, undecoded
from fedlotr.data.labels import label_among

if TYPE_CHECKING:
    import pyarrow as pa

MEDIA = {"Image": "an image", "Audio": "a sound", "Video": "a video", "Pdf": "a PDF", "Nifti": "an image"}
"""Features of the `datasets` library that are objects to look at, which Arrow holds as any other object."""


class Found(NamedTuple):
    """The columns that can be read; the kind of those that are text for want of a better type; and the others."""

    columns: Columns
    odd: dict[str, str]
    nested: dict[str, Nested]


def to_columns(table: pa.Table) -> Found:
    """A table's columns, the first of several of one name. Raises what pyarrow raises for data that are broken."""
    found = Found({}, {}, nested_of(table.schema, lambda name: _first(table, name).to_pylist()))
    for name in dict.fromkeys(table.column_names):
        if name in found.nested:
            continue
        column = _unwrapped(_first(table, name))
        if (what := _odd(column.type)) is not None:
            if (written := _as_text(column)) is not None:
                found.columns[name], found.odd[name] = written, what
            continue
        try:
            found.columns[name] = _values(column)
        except UnicodeDecodeError:
            found.nested[name] = Nested(NO_TEXT, undecoded)
    return found


def _first(table: pa.Table, name: str) -> pa.ChunkedArray:
    return table.column(table.column_names.index(name))


def nested_of(schema: pa.Schema, read: Callable[[str], list[Any]]) -> dict[str, Nested]:
    """The columns of kinds that no task of ours reads. read: the values of one, unless they are to be looked at."""
    seen = set(MEDIA.values())
    return {
        name: Nested(kind, undecoded if kind in seen else partial(read, name))
        for name, kind in kinds_unread(schema).items()
    }


def kinds_unread(schema: pa.Schema) -> dict[str, str]:
    """The columns of kinds that no task reads, and the kinds in words."""
    features = _features(schema.metadata)
    found = {field.name: _unread(field.type, features.get(field.name)) for field in reversed(schema)}
    return {name: kind for name in dict.fromkeys(schema.names) if (kind := found[name]) is not None}


def class_names(metadata: Mapping[bytes, bytes] | None, label: str | None) -> tuple[str, ...] | None:
    """The names that a schema has for the classes of a column; None where it has none, or not one for each."""
    features = _features(metadata)
    try:
        names = features[label or label_among(features) or ""]["names"]
    except (KeyError, TypeError):
        return None
    different = isinstance(names, list) and names and len(set(map(str, names))) == len(names)
    return tuple(map(str, names)) if different else None


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What the `datasets` library says of columns in a schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """What a type's values are, however they are packed."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def _unread(kind: pa.DataType, feature: Any) -> str | None:
    """The kind of a column that no task reads, in words; None for others."""
    from pyarrow import types

    if isinstance(feature, dict) and feature.get("_type") in MEDIA:
        return MEDIA[feature["_type"]]
    kind = _plain_type(kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or "list_view" in str(kind):
        turn = kind.value_type
        named = types.is_struct(turn) and is_turn([turn.field(at).name for at in range(turn.num_fields)])
        return CHAT if named else "a list"
    if types.is_nested(kind):  # structs, maps and unions
        return "an object"
    return None if any(test(kind) for test in _read()) or _odd(kind) else f"of the type {kind}"


def _read() -> Sequence[Any]:
    from pyarrow import types

    return (
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
        *(types.is_integer, types.is_floating, types.is_boolean, types.is_null),
    )


def _odd(kind: pa.DataType) -> str | None:
    """What a column is that no task learns from but that can name a client, in words; None for other kinds."""
    import pyarrow as pa

    if isinstance(kind, pa.UuidType):
        return "an identifier"
    kind = _plain_type(kind)
    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        return "a date or time"
    if pa.types.is_duration(kind):
        return "a length of time"
    return "a decimal number" if pa.types.is_decimal(kind) else None


def _unwrapped(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without what packs its values, but for dictionaries."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if isinstance(column.type, pa.BaseExtensionType) and not isinstance(column.type, pa.UuidType):
        column = column.cast(column.type.storage_type)
    return column


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Bytes as the text that they are in UTF-8. Raises UnicodeDecodeError where they are none."""
    import pyarrow as pa

    if column.type in (pa.binary(), pa.large_binary()):  # here a photograph is found out before it is copied
        try:
            column = column.cast(pa.large_string())
        except pa.ArrowInvalid as error:
            raise UnicodeDecodeError("utf-8", b"", 0, 1, str(error)) from None
    values: list[Any] = column.to_pylist()
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _as_text(column: pa.ChunkedArray) -> list[Any] | None:
    """Each value as pyarrow writes it, whatever Python's own types could hold; None where it cannot."""
    import pyarrow as pa

    if isinstance(column.type, pa.UuidType):
        return [None if value is None else str(value) for value in column.to_pylist()]
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
