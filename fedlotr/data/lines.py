"""The lines of a file, also of a compressed one, within limits: what is larger is refused before memory is full."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from fedlotr import machine
from fedlotr.errors import InputError

LONGEST_LINE = 2**26
"""Bytes of one line: no row of text is as long, and a compressed file can hold any number of bytes without a break."""
MOST_BYTES = 2**34
"""Of one file, decompressed, where the memory of this machine does not set a lower limit."""
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file may raise."""


def bytes_of(path: Path) -> bytes:
    """The whole file, or what is in the archive where it is one. Raises InputError where that is too large."""
    return b"".join(lines_of(path, whole=True))


def lines_of(path: Path, *, whole: bool = False) -> Iterator[bytes]:
    """Lines with their ends, of what is in the archive where it is one.

    whole: the file is not one of lines, so that too long a line comes in pieces. Raises InputError for a line or a file
    that is too large, of a file as it is before any of it is read.
    """
    most = min(MOST_BYTES, machine.memory().usable or MOST_BYTES)
    packed = path.suffix.lower() == ".gz"
    if not packed:
        check_size(path, path.stat().st_size, most)
    read = number = 0
    with gzip.open(path) if packed else path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            read += len(line)
            if len(line) > LONGEST_LINE and not whole:
                raise InputError(
                    f"--data: {path}, line {number}: longer than {LONGEST_LINE:,} bytes, the most of a line; "
                    "is it a file of one row a line?"
                )
            if read > most:
                check_size(path, read, most)
            yield line


def check_size(path: Path, size: int, most: int | None = None) -> None:
    """Raise InputError where a file has more bytes, decompressed, than are read."""
    most = most or min(MOST_BYTES, machine.memory().usable or MOST_BYTES)
    if size > most:
        more = "more than " if path.suffix.lower() == ".gz" else ""
        raise InputError(
            f"--data: {path} holds {more}{size:,} bytes{' of text' if more else ''}; at most {most:,} are read here "
            f"({'the memory there is' if most < MOST_BYTES else 'the limit of a file'}): divide it, or take fewer rows"
        )
