"""Values as libraries hand them out (numpy, torch, pyarrow, pandas) as Python's own, which files can hold."""

from __future__ import annotations

from typing import Any

_PLAIN = frozenset({str, bool, int, float, bytes, list, tuple, dict, type(None)})


def plain(value: Any) -> Any:
    """A scalar as Python's own of its value, exactly so; an array or a tensor as lists; anything else as it is.

    What is derived from text or a number, as members of an IntEnum are, is that text or number. Times are kept to the
    microsecond.
    """
    if type(value) in _PLAIN:
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        if value.dtype.kind in "mM":
            return value.astype(f"{value.dtype.name.partition('[')[0]}[us]").tolist()
        if value.dtype.char == "g":  # of more bits than Python's, who has no other
            return value.astype(float).tolist()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__index__(value)
    for method in ("tolist", "as_py", "to_pylist"):  # numpy, torch and pandas; pyarrow's scalars; its arrays
        if callable(found := getattr(value, method, None)) and not isinstance(value, type):
            try:
                return found()
            except (TypeError, ValueError, RuntimeError, NotImplementedError):  # a sparse tensor, or one on "meta"
                return value
    return float.__float__(value) if isinstance(value, float) else value


def scalar(value: Any) -> Any:
    """As `plain`, but what has many values stays as it is."""
    return value if getattr(value, "shape", ()) else plain(value)


def deeply(value: Any) -> Any:
    """As `plain`, also within lists and mappings."""
    value = plain(value)
    if isinstance(value, dict):
        return {plain(key): deeply(item) for key, item in value.items()}
    return type(value)(map(deeply, value)) if type(value) in (list, tuple) else value
