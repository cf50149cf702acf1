"""Files of JSON lines that a run wrote, read line by line: what makes no sense in them is left out and noted."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

MOST_BYTES = 2**30
"""Of a file: four million lines."""
LONGEST_LINE = 2**16
NOTES_SHOWN = 5
LARGEST = 1e150

One = TypeVar("One")


def count(value: object) -> bool:
    """Whether this is a whole number of 0 or more."""
    return type(value) is int and 0 <= value <= LARGEST


def number(value: object) -> bool:
    """Whether this is a number of 0 or more."""
    return count(value) or (type(value) is float and math.isfinite(value) and 0 <= value <= LARGEST)


class Lines(Generic[One]):
    """The lines of a file, each with its number; once they are read, `notes` says what had to be left out.

    what: they tell. else_: what a line is that makes no sense. read: what a line says, None of such.
    """

    def __init__(self, path: Path, what: str, else_: str, read: Callable[[dict[str, Any]], One | None]) -> None:
        self._path, self._what, self._else, self._read = path, what, else_, read
        self._told: list[str] = []
        self._whole: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, One]]:
        path = self._path
        try:
            if (size := path.stat().st_size) > MOST_BYTES:
                self._whole.append(f"{path} has {size:,} bytes, more than the {MOST_BYTES:,} that are read: left out")
                return
            with path.open("rb") as file:
                at = 0
                while line := file.readline(LONGEST_LINE):
                    at += 1
                    if (found := self._said(line)) is not None:
                        yield at, found
                        continue
                    while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                        line = file.readline(LONGEST_LINE)
                    if line:  # the last one may have been cut off by a crash
                        self.gap(at, f"is {self._else}")
        except FileNotFoundError:
            self._whole.append(f"{path} is missing: {self._what} is not told")
        except OSError as error:
            self._whole.append(f"{path} cannot be read ({error.strerror}): {self._what} is not told")

    def _said(self, line: bytes) -> One | None:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return self._read(found) if isinstance(found, dict) else None

    def gap(self, at: int, why: str) -> None:
        """A line that is left out."""
        self._told.append(f"{self._path}, line {at} {why}: a gap")

    @property
    def notes(self) -> list[str]:
        """What had to be left out, and why."""
        more = len(self._told) - NOTES_SHOWN
        return [
            *self._whole,
            *self._told[:NOTES_SHOWN],
            *([f"{self._path}: {more:,} more lines like these"] if more > 0 else []),
        ]
