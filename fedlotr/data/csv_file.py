"""Comma-, semicolon- and tab-separated values to columns of text.

By Python's own module: pyarrow's reader (26, with all columns as text) breaks promises kept here. It numbers records
and passes over blank lines, so that a short row in line 5, after a field of three lines, is said to be in 3; it reads
`"a"x` as ax without a word; of two columns of one name it keeps one; where quotes swallow lines it does not tell which.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedlotr.data.columns import Table, checked_table, too_many
from fedlotr.data.lines import UNREADABLE, lines_of
from fedlotr.errors import InputError

FIELD_LIMIT = 2**27
"""Characters of one field: a quote that is never closed swallows the rest of the file, and this much is no text."""
SEPARATOR_LINE = re.compile(r'"?sep=(.|\\t)"?[ \t]*(\r\n|\r|\n|$)', re.IGNORECASE)
"""What Excel writes, and reads, above the header."""


@dataclass
class _Records:
    """What a way of reading makes of a text.

    rows: those that have the header's number of fields, and lines: where each begins. joined: first and last line of
    records that go over several. problems: what is wrong.
    """

    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    joined: list[tuple[int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_csv(path: Path, label: str | None) -> Table:
    """Values with a header line, separated by commas (or semicolons or tabs, where it has no comma), all of it text.

    Nothing is guessed from what a value looks like: "007" stays what it is. Columns without a name, such as a data
    frame's index, are left out, as are rows without any value. A first line `sep=;` says the separator, as for Excel.
    Where quotation marks join lines though each line has the header's number of fields, a file of tabs is read without
    quoting, and one of commas is refused if no doubled mark shows that it is quoted. Raises InputError.
    """
    notes: list[str] = []
    found = _Records()
    try:
        text, begin, delimiter = _text(path)
        found = _records(path, text, delimiter, begin)
        if found.joined or found.problems:
            found = _unquoted(path, text, delimiter, begin, found, notes)
    except InputError as error:
        found.problems += error.problems
    except UNREADABLE as error:
        found.problems.append(f"--data: {path} cannot be read: {error}")
    if not found.rows and not found.problems:
        found.problems.append(f"--data: {path} has no rows; expected a header line and a line a row")
    columns = {name: [row[at] for row in found.rows] for at, name in enumerate(found.header) if name}
    return checked_table(path, columns, found.lines, found.problems, notes=notes)


def _text(path: Path) -> tuple[str, int, str]:
    """What the file holds, from the header on, the lines above that, and the separator."""
    content = b"".join(lines_of(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(10) + 1
        raise InputError(
            f"--data: {path}, line {line}: not UTF-8 ({error.reason}); save it again in that encoding"
        ) from None
    if said := SEPARATOR_LINE.match(text):
        return text[said.end() :], 1, "\t" if said[1] == "\\t" else said[1]
    first = text.lstrip().partition("\n")[0]
    marks = ("\t",) if path.name.lower().endswith((".tsv", ".tsv.gz")) else (",", ";", "\t")
    return text, 0, next((mark for mark in marks if mark in first), marks[0])


def _records(path: Path, text: str, delimiter: str, begin: int, *, quoted: bool = True) -> _Records:
    """The records of a text. begin: the lines above it."""
    found = _Records()
    limit = csv.field_size_limit(FIELD_LIMIT)
    above = begin
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            strict=True,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        for fields in reader:
            line, above = above + 1, begin + reader.line_num
            if not fields:
                continue  # a blank line
            if not found.header:
                found.header = [name.strip() for name in fields]
                found.problems += _of_header(path, line, found.header)
                if found.problems:
                    break
            elif len(fields) != len(found.header):
                found.problems.append(
                    f"--data: {path}, line {line}: {len(fields)} fields, but the header has "
                    f"{len(found.header)}; a field that holds the separator belongs in double quotes"
                )
            else:
                found.rows.append(fields)
                found.lines.append(line)
            if above > line:
                found.joined.append((line, above))
    except csv.Error as error:
        found.problems.append(f"--data: {path}, the row that begins in line {above + 1}: not CSV ({error})")
    finally:
        csv.field_size_limit(limit)
    return found


def _of_header(path: Path, line: int, header: list[str]) -> Iterator[str]:
    twice = sorted(name for name, times in Counter(header).items() if name and times > 1)
    if twice or not any(header):
        said = f", '{twice[0]}' is there twice" if twice else ""
        yield f"--data: {path}, line {line}: expected a header of different column names{said}"
    yield from too_many(f"--data: {path}, line {line}", 1, len(header))


def _unquoted(path: Path, text: str, delimiter: str, begin: int, quoted: _Records, notes: list[str]) -> _Records:
    """The same text with quotation marks as ordinary characters, where that is how it was written.

    It is where each line has the header's number of fields, though with quotes some lines make one row or none: by
    chance a quoted file's lines are hardly ever all like that. In a file of one column all lines are, so there it is
    said which were joined. Raises InputError where a file of commas or semicolons is as well one as the other.
    """
    plain = _records(path, text, delimiter, begin, quoted=False)
    lines = re.split("\r\n|\r|\n", text)
    quotes_all = next((line for line in lines if line), "").startswith('"')
    if plain.problems or not plain.rows or '"' not in text or quotes_all:
        return quoted
    if len(plain.header) == 1:
        if quoted.joined and not quoted.problems:
            first, last = quoted.joined[0]
            more = f", and {len(quoted.joined) - 1:,} more like that" if len(quoted.joined) > 1 else ""
            notes.append(f"{path.name}: lines {first} to {last} are one row, by the quotation marks around them{more}")
        return quoted
    if delimiter == "\t":
        first, last = quoted.joined[0] if quoted.joined else (0, 0)
        else_ = f"lines {first} to {last} would be one row" if last else quoted.problems[0].partition(f"{path}, ")[2]
        notes.append(
            f"{path.name}: quotation marks are text, since each line has {len(plain.header)} fields with them as they "
            f"stand; read as quotes, {else_}"
        )
        return plain
    if quoted.problems:
        return quoted
    for first, last in quoted.joined:
        swallowed = "\n".join(lines[first - begin - 1 : last - begin])
        if '""' not in swallowed:  # as a quoted field has for a mark of its own
            raise InputError(
                f"--data: {path}, line {first}: by a quotation mark there the lines up to {last} would be one row, "
                f"though each of them has the header's {len(plain.header)} fields; where marks are text, double them "
                'and put such fields in quotes ("a ""b"" c"), or save the file as .tsv; where they are quotes, quote '
                "the header too"
            )
    return quoted
