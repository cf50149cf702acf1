"""What the generated pages have in common: the code's own words as Markdown, links and tables."""

import re
from collections.abc import Iterable, Sequence

from fedlotr.config.command_line import flag_of
from fedlotr.config.configuration import SimulationConfig

FLAGS = {flag_of(field.alias or name) for name, field in SimulationConfig.model_fields.items()}
"""Every option, as it is given."""

_CODE = r"`[^`]+`"
_OPTION = r"--[a-z][a-z0-9-]*"
_COMMAND = r"'fedlotr [^']+'"
_PAPER = r"arXiv:\d{4}\.\d{4,5}"
_TOKEN = re.compile(f"{_CODE}|{_OPTION}|{_COMMAND}|{_PAPER}")
_SPECIAL = re.compile(r"([\\*_<>\[\]#|~$])")


def markdown(text: str, to_options: str | None = "options.md") -> str:
    """Plain text as Markdown that reads the same: options and papers are links, all that would be markup is escaped.

    to_options: the page of options as seen from here; None: they are code and no links.
    """
    found, end = [], 0
    for match in _TOKEN.finditer(text):
        found += [_SPECIAL.sub(r"\\\1", text[end : match.start()]), _marked(match[0], to_options)]
        end = match.end()
    return "".join([*found, _SPECIAL.sub(r"\\\1", text[end:])])


def _marked(word: str, to_options: str | None) -> str:
    if word.startswith("`"):
        return word
    if word.startswith("arXiv:"):
        return f"[{word}](https://arxiv.org/abs/{word.removeprefix('arXiv:')})"
    if word.startswith("'"):
        return f"`{word.strip(chr(39))}`"
    known = FLAGS & {word, "--" + word.removeprefix("--no-")}
    if to_options is None or not known:
        return f"`{word}`"
    return f"[`{word}`]({to_options}#{next(iter(known)).removeprefix('--')})"


def code(text: object) -> str:
    """A word as code."""
    return f"`{text}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of cells that are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """On one line; a bar, also in code, is no end of it."""
    return re.sub(r"(?<!\\)\|", r"\|", " ".join(text.split()))


def paragraphs(docstring: str | None, item: str = "\n") -> list[str]:
    """Of a docstring, each on one line; lines that begin with `item` are paragraphs too."""
    blocks = re.split(rf"\n\s*\n|\n(?={re.escape(item)})", (docstring or "").strip())
    return [" ".join(block.split()) for block in blocks if block.strip()]


def sentence(text: str) -> str:
    """Text that begins with a capital and ends with a stop."""
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+[ ,;]", text) else text
    return text if text.endswith((".", ":", "?", "!")) else f"{text}."


GENERATED = "<!-- Made when the site is built, from the code's own tables: nothing here is written by hand. -->\n"
"""Stands in every generated page's source."""
