"""Tables and lines that fit the width of a console without a word broken across lines."""

import os
import shutil
from collections.abc import Collection, Sequence
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlotr.reporting.escaping import lines

Cells = Sequence[str]
SHORT = 24
"""Cells of a value and its name that stay together: '49.2 kB' is no two things."""


def columns_of(stream: TextIO, plain: int) -> int:
    """The width of a terminal; of anything else what COLUMNS says, or `plain`."""
    if stream.isatty():
        return shutil.get_terminal_size().columns
    said = os.environ.get("COLUMNS", "")
    return int(said) if said.isdigit() and int(said) else plain


def filled(parts: Cells, width: int, *, first: str = "", indent: str = "", gap: str = " ") -> str:
    """The parts one after another, each whole, in lines of at most `width` cells; a longer part has a line of its own.

    first: what the first line begins with; indent: what the others begin with.
    """
    lines, line, bare = [], first, True
    for part in parts:
        longer = f"{line}{'' if bare else gap}{part}"
        if not bare and cell_len(longer) > width:
            lines.append(line)
            longer = f"{indent}{part}"
        line, bare = longer, False
    return "\n".join([*lines, line])


def wrapped(text: str, width: int, *, first: str = "", indent: str = "") -> str:
    """A text in lines of at most `width` cells, broken between its words where it is longer."""
    if "\n" not in text and cell_len(first + text) <= width:
        return first + text
    return filled(text.split(), width, first=first + text[: len(text) - len(text.lstrip())], indent=indent)


def fits(rows: Sequence[Cells], width: int) -> bool:
    """Whether a table of these rows, its head among them, has room for the longest word of each column."""
    return sum(_narrowest(rows)) + _frame(rows) <= width


def show_table(
    console: Console,
    head: Cells,
    rows: Sequence[Cells],
    *,
    title: str = "",
    right: Collection[int] = (),
    bold: Collection[int] = (),
    sections: Collection[int] = (),
    styles: Cells = (),
    frame: box.Box = box.HEAVY_HEAD,
) -> None:
    """Print a table; where its words have no room side by side, a paragraph a row, which begins with its first cell.

    What a terminal would obey in any of them is escaped.
    head: names of the columns; none: a table without a head. right: columns that are set to the right; bold: those in
    bold. sections: rows that a line follows. styles: of the rows.
    """
    title, head, rows = lines(title), list(map(lines, head)), [list(map(lines, row)) for row in rows]
    every, width = [*([head] if head else []), *rows], console.width
    if not fits(every, width):
        _show_paragraphs(console, head, rows, title)
        return
    table = Table(title=title or None, title_justify="left", show_header=bool(head), box=frame)
    for at, columns in enumerate(_widths(every, width)):
        name = Text(head[at]) if head else ""
        style = "bold" if at in bold else None
        table.add_column(name, justify="right" if at in right else "left", width=columns, style=style)
    for at, row in enumerate(rows):
        style = styles[at] if styles else None
        table.add_row(*map(Text, row), end_section=at in sections, style=style)
    console.print(table)


def _show_paragraphs(console: Console, head: Cells, rows: Sequence[Cells], title: str) -> None:
    for line in title.splitlines():
        console.print(Text(wrapped(line, console.width)), style="italic", soft_wrap=True)
    for name, *cells in rows:
        if head:
            told = [f"{what}: {cell}" for what, cell in zip(head[1:], cells, strict=True) if cell]
            parts = [f"{text}{';' if text is not told[-1] else ''}" for text in told]
            most = min(SHORT, console.width - 2)
            parts = [piece for text in parts for piece in ([text] if cell_len(text) <= most else text.split())]
            console.print(Text(wrapped(name, console.width)), style="bold", soft_wrap=True)
            console.print(Text(filled(parts, console.width, first="  ", indent="  ")), soft_wrap=True)
        else:
            console.print(
                Text(wrapped(" ".join(cells), console.width, first=f"{name}  ", indent="    ")), soft_wrap=True
            )


def _frame(rows: Sequence[Cells]) -> int:
    """Cells of a table that are lines and space between columns."""
    return 3 * len(rows[0]) + 1


def _narrowest(rows: Sequence[Cells]) -> list[int]:
    return [
        max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in zip(*rows, strict=True)
    ]


def _widths(rows: Sequence[Cells], width: int) -> list[int]:
    """Of each column: at least its longest word, and the widest share the room evenly."""
    found = _narrowest(rows)
    wanted = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)]
    room = width - _frame(rows) - sum(found)
    while room > 0 and (short := [at for at, cells in enumerate(found) if cells < wanted[at]]):
        found[min(short, key=found.__getitem__)] += 1
        room -= 1
    return found
