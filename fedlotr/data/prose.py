"""The plain sentences with which a docstring begins, without what only a reader of source code or a renderer needs."""

from __future__ import annotations

import re
from collections.abc import Iterator

SHORTEST, LONGEST = 30, 400
"""Characters of an answer: shorter ones say no more than the name, longer ones are cut after a sentence."""
LEAST_WORDS = 5

_SENTENCE = re.compile(r"""(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<!\bcf\.)\s+(?=[A-Z`"'(])""")
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`")
_LITERAL = re.compile(r"``(.+?)``|`([^`']+)'")
_CALL = re.compile(r"[\w.]+\s*\(.*\)\s*(?:->|=>|=|--?\s|$)|[\w.]+\s*(?:->|=>)|def |class \w+\(")
_FIELD = re.compile(r"\s*(?::\w+[^:`]*:(?!`)|@\w+|\.\. )")
_HEADING = re.compile(r"\w[\w /()]{0,40}:\s*$|[=~*#+-]{3,}\s*$")
_ITEM = re.compile(r"\s*(?:[-*+•o]|\d+[.)]|\w\))\s+\S")
_SHELL = re.compile(
    r"[%$>#] |>>>|Usage\b|usage:|Author|Copyright|Written by|Version\b|XXX|TODO|FIXME|\w+ \d{1,2}, \d{4}"
)


def prose(docstring: str) -> str | None:
    """Its first paragraphs as whole sentences of 30 to 400 characters in all, white space collapsed; None without any.

    docstring: cleaned, as `ast.get_docstring` gives it. A paragraph that is no prose (doctests, tables, listings,
    fields such as `:param x:`, headings, calls) is left out where it comes first, and ends the answer later on. Markup
    of references and literals becomes the backquotes of Markdown.
    """
    taken: list[str] = []
    length = 0
    for paragraph in _first_paragraphs(docstring):
        sentences = [_plainly(sentence) for sentence in _SENTENCE.split(paragraph)]
        if sentences[-1].endswith(":") or not sentences[-1].endswith((".", "!", "?", '."', ".)", ".'", ".`")):
            ending = sentences.pop()
            if not sentences and not taken and not ending.endswith((":", ",", ";", "-")):
                sentences = [f"{ending}."]
            elif not sentences:
                break
        for sentence in sentences:
            if sentence.endswith((" e.g.", " i.e.", "(e.g.", "(i.e.")):  # what it leads to is a listing
                return _answer(taken)
            if length + len(sentence) > LONGEST:
                return _answer(taken)
            taken.append(sentence)
            length += len(sentence) + 1
    return _answer(taken)


def _answer(sentences: list[str]) -> str | None:
    text = " ".join(sentences)
    if len(text) < SHORTEST or len(text.split()) < LEAST_WORDS:
        return None
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    odd = letters < 0.8 * len(text) or not (text[0].isupper() or text[0] in "`'\"") or text.count("`") % 2
    return None if odd or "  " in text or "__" in text[:2] else text


def _plainly(sentence: str) -> str:
    sentence = _ROLE.sub(r"`\1`", " ".join(sentence.split()))
    return _LITERAL.sub(lambda found: f"`{found[1] or found[2]}`", sentence)


def _first_paragraphs(docstring: str) -> Iterator[str]:
    """Paragraphs of prose up to the first that is none, after those at the beginning that are none."""
    begun = False
    for number, block in enumerate(re.split(r"\n\s*\n", docstring)):
        lines = block.strip("\n").split("\n")
        if number == 0 and _CALL.match(lines[0]):  # a signature, as functions in C have; its text may stand below
            lines = lines[1:]
        if lines and _is_prose(lines):
            begun = True
            yield " ".join(lines)
        elif begun or number > 1:
            return


def _is_prose(lines: list[str]) -> bool:
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    return indent < 4 and not any(
        _FIELD.match(line)
        or _HEADING.match(line)
        or _ITEM.match(line)
        or _SHELL.match(line.strip())
        or re.search(r"\S\s{3,}\S|\t\S| -- .* -- |\|.*\|", line)
        or (len(line) - len(line.lstrip()) > indent + 2 and number > 0)
        for number, line in enumerate(lines)
    )
