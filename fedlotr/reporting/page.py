"""What pages are made of: figures with their tables, numbers that keep their exact value, and the shell around them."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedlotr.reporting.escaping import lines

MISSING = "–"
"""Where a value is null."""


@dataclass(frozen=True)
class Table:
    """columns: their titles. rows: cells of text or numbers; None is shown as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def kinds(self) -> list[str]:
        """The class of each column: n for numbers, which stand to the right; nothing for one that holds text too."""
        if not self.rows:
            return ["" for _ in self.columns]
        columns = zip(*self.rows, strict=True)
        return ["n" if all(value is None or _number(value) for value in column) else "" for column in columns]


@dataclass(frozen=True)
class Figure:
    """A plot with the table behind it, and texts; any may be missing.

    note: one sentence under it. open: the table is shown. texts: whole ones, line by line, each under its title.
    beside: more of these, side by side where there is room.
    """

    name: str
    title: str
    plot: Markup = field(default_factory=Markup)
    table: Table | None = None
    note: str = ""
    open: bool = False
    wide: bool = False
    texts: Sequence[tuple[str, str]] = ()
    beside: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Section:
    """Figures under one heading. text: a sentence before them; code: lines to copy."""

    title: str
    figures: Sequence[Figure] = ()
    text: str = ""
    code: str = ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: Any, kind: str = "") -> Markup:
    """A table's cell; a number that is shown rounded carries all its digits too."""
    shown: str = lines(str(value))
    if value is None:
        shown = MISSING
    elif isinstance(value, bool):
        shown = str(value).lower()
    elif isinstance(value, int):
        shown = f"{value:,}"
    elif isinstance(value, float):
        shown = Markup(f'<data value="{value!r}">{value:.6g}</data>')
    return Markup(f'<td class="{kind}">' if kind else "<td>") + shown + Markup("</td>")


@dataclass(frozen=True)
class Script:
    """A file of `templates` that a page carries, without which it reads in full too.

    every: seconds after which it asks where it came from for the page as it is now, as the page does without it.
    """

    name: str
    every: int | None = None


def render(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    *,
    warning: str = "",
    language: str = "en",
    script: Script | None = None,
) -> str:
    """One self-contained page: nothing to load, and no script but the one given, known by its hash; text is escaped."""
    environment = _environment()
    code = "" if script is None else environment.get_template(script.name).render(every=script.every)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script is not None:
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'" + ("; connect-src 'self'" if script.every else "")
    return environment.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        warning=warning,
        language=language,
        policy=Markup(policy),
        code=Markup(code),
        every=None if script is None else script.every,
    )


def _printable(value: Any) -> Any:
    """Text of whatever origin without a terminal's codes and marks of direction; what is HTML already stays HTML."""
    if not isinstance(value, str):
        return value
    return Markup(lines(value)) if isinstance(value, Markup) else lines(value)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedlotr.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters["cell"] = cell
    return environment
