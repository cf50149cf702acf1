"""What a user's data can name, as it may stand in Markdown, in a table of a spreadsheet and on a terminal."""

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedlotr.errors import visible

FORMULA = re.compile(r"[\s\x00]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""How a cell begins that a spreadsheet computes; a number does so too."""


def lines(text: str) -> str:
    """For a terminal or a log: lines stay lines, and all else that cannot be printed is escaped."""
    return "\n".join(map(visible, text.split("\n")))


def markdown(text: object) -> str:
    """On one line, without any of Markdown's or HTML's marks being one; a line break is shown as such."""
    plain = re.sub(r"([\\`*\[\]|~])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", visible(str(text)))
    return html.escape(plain, quote=False)


def code_span(text: object) -> str:
    """As code within a line of Markdown, whatever marks it holds."""
    plain = visible(str(text))
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    return f"{fence} {plain} {fence}" if plain.startswith("`") or plain.endswith("`") else f"{fence}{plain}{fence}"


def cell(value: Any) -> Any:
    """A value for CSV: text that a spreadsheet would compute begins with an apostrophe, as text does there."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def cells(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for CSV, names of columns too."""
    return [{cell(key): cell(value) for key, value in row.items()} for row in rows]
