"""Labels that are numbers on a scale: when they are taken so, and what they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedlotr.data.labels import Place, is_number, row_problems

Why = Literal["fraction", "point", ""]
NO_LABEL = -1
"""Says in many sets that a row has none."""
LEAST = 3
"""Different whole numbers with a point that are a scale: two of them, 0.0 and 1.0, are rather no and yes."""


def why_scale(columns: Sequence[Sequence[Any]]) -> Why:
    """Whether labels are a scale where nobody says so, and by what; else they are classes, or nothing of either.

    `fraction`: one of them is no whole number. `point`: all are whole, and all are written with a decimal point.

    A table that lacks some label may be one of whole numbers that a program has turned into decimals on its way (pandas
    does so), and is no scale by its points alone.
    """
    every = [value for column in columns for value in column]
    there = [value for value in every if value is not None and value == value]
    if not there or any(_number(value) is None for value in there):
        return ""
    different = set(map(_number, there))
    if any(value is not None and value % 1 for value in different):
        return "fraction"
    whole = [value for value in there if not _has_point(value)]
    return "" if whole or len(there) < len(every) or len(different) < LEAST else "point"


def scale_values(
    where: str, values: Sequence[Any], place: Place | None = None
) -> tuple[npt.NDArray[np.float64], list[str]]:
    """(values,) as numbers, and what is wrong with those that are none. where, place: as for `labels.class_indices`."""
    found = [_number(value) for value in values]
    bad = {row: values[row] for row, number in enumerate(found) if number is None or not math.isfinite(number)}
    numbers = np.array([math.nan if number is None else number for number in found], np.float64)
    return numbers, row_problems(where, "label", bad, "a finite number (--task regression)", place)


def without_label(
    where: str, numbers: npt.NDArray[np.float64], values: Sequence[Any], place: Place | None = None
) -> list[str]:
    """What is to be said of rows with -1 where no other number is negative. where, place: as for `scale_values`."""
    none = numbers == NO_LABEL
    if not none.any() or (numbers[~none] < 0).any():
        return []
    bad = {int(row): values[int(row)] for row in np.flatnonzero(none)}
    expected = (
        "a number from 0 on, as the others are; -1 often says that there is none: leave such rows out, or give "
        "--task regression, which takes it as it is"
    )
    return row_problems(where, "label", bad, expected, place)


def _number(value: Any) -> float | None:
    """The number that a label is; None where it is none."""
    if isinstance(value, str):
        return float(value) if is_number(value.strip()) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _has_point(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, str) and not value.strip().lstrip("+-").isdecimal())
