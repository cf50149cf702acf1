"""What pages are made of: figures with their tables, numbers that keep their exact value, and the shell around them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MISSING = "–"
"""Where a value is null."""


@dataclass(frozen=True)
class Table:
    """columns: their titles. rows: cells of text or numbers; None is shown as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Figure:
    """A plot with the table behind it; either may be missing. note: one sentence under it. open: the table is shown."""

    name: str
    title: str
    plot: Markup = field(default_factory=Markup)
    table: Table | None = None
    note: str = ""
    open: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """Figures under one heading. text: a sentence before them; code: lines to copy."""

    title: str
    figures: Sequence[Figure] = ()
    text: str = ""
    code: str = ""


def cell(value: Any) -> Markup:
    """A table's cell; a number that is shown rounded carries all its digits too."""
    if value is None:
        return Markup("<td>") + MISSING + Markup("</td>")
    if isinstance(value, bool):
        return Markup("<td>") + str(value).lower() + Markup("</td>")
    if isinstance(value, int):
        return Markup(f'<td class="n">{value:,}</td>')
    if isinstance(value, float):
        return Markup(f'<td class="n"><data value="{value!r}">{value:.6g}</data></td>')
    return Markup("<td>") + str(value) + Markup("</td>")


def render(title: str, subtitle: str, sections: Sequence[Section], *, warning: str = "", language: str = "en") -> str:
    """One self-contained page: no script, nothing to load. All text is escaped."""
    return _environment().get_template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, warning=warning, language=language
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedlotr.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    return environment
