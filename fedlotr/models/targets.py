"""Which layers --targets means: names as PEFT takes them, or a regular expression, each alternative of which is one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence

ALL = "all-linear"
_NAME = re.compile(r"[\w.-]+")
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(")


def matches(targets: str, name: str) -> bool:
    """Whether a layer is meant. targets: all-linear, or patterns with commas, each as `matches_one` has it."""
    return targets == ALL or any(matches_one(pattern, name) for pattern in patterns(targets))


def matches_one(pattern: str, name: str) -> bool:
    """A regular expression matches a whole name; a plain name also the end of one, behind a dot, as in PEFT."""
    plain = _NAME.fullmatch(pattern) is not None
    return re.fullmatch(pattern, name) is not None or (plain and name.endswith(f".{pattern}"))


def patterns(targets: str) -> list[str]:
    """The parts between commas, but for commas within brackets of a regular expression."""
    return [part.strip() for part in _split(targets, ",") if part.strip()]


def alternatives(targets: str) -> Iterator[tuple[str, str]]:
    """Each alternative by itself, as it is written, and the pattern in which it stands in place of its group.

    Groups that look ahead or behind, or that are repeated, are left as they are, and so are patterns that refer to a
    group.
    """
    for pattern in patterns(targets):
        if _REFERENCE.search(pattern):
            continue
        flags = re.match(r"\(\?[aimsux]+\)", pattern)
        lead = flags[0] if flags else ""
        branches = _split(pattern[len(lead) :], "|")
        if len(branches) > 1 or pattern != targets:
            yield from ((branch, lead + branch) for branch in branches)
        for branch in branches:
            yield from ((part, lead + variant) for part, variant in _of_groups(branch))


def _of_groups(branch: str) -> Iterator[tuple[str, str]]:
    """Of the groups of a branch, within each only the part that an alternative stands in."""
    for start, end in _groups(branch):
        inside = branch[start:end]
        body = inside.removeprefix("?:")
        if body.startswith("?") or branch[end + 1 : end + 2] in tuple("?*+{"):
            continue
        before, behind, parts = branch[: end - len(body)], branch[end:], _split(body, "|")
        for part in parts:
            if len(parts) > 1:
                yield part, before + part + behind
            yield from ((inner, before + variant + behind) for inner, variant in _of_groups(part))


def nearest_types(given: str, names: Sequence[str]) -> str:
    """The ends of layers' names that are most like what was given, for a message."""
    types = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    parts = dict.fromkeys([*types, *(part for name in names for part in name.split(".") if not part.isdecimal())])
    wanted = re.sub(r"\W+", " ", given.replace("\\", "")).split()
    close = difflib.get_close_matches(wanted[-1], [*parts, ALL], n=3, cutoff=0.5) if wanted else []
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(types[:12])}"


def meant(targets: str, names: Sequence[str], others: Collection[str]) -> list[str]:
    """The layers among these names that are meant. others: layers that are known and not adapted.

    Raises ValueError where one of several alternatives matches nothing, with the nearest names.
    """
    if targets == ALL:
        return list(names)
    chosen = [name for name in names if matches(targets, name)]
    if chosen:
        for part, pattern in alternatives(targets):
            if not any(matches_one(pattern, name) for name in (*names, *others)):
                raise ValueError(f"of it {part!r} matches no layer that can be adapted; {nearest_types(part, names)}")
    return chosen


def _split(pattern: str, mark: str) -> list[str]:
    """At a character that stands outside of all brackets."""
    parts, depth, start = [], 0, 0
    for at, character in _bare(pattern):
        depth += (character in "([{") - (character in ")]}")
        if character == mark and not depth:
            parts.append(pattern[start:at])
            start = at + 1
    return [*parts, pattern[start:]]


def _groups(pattern: str) -> Iterator[tuple[int, int]]:
    """The insides of the outermost pairs of parentheses."""
    depth = start = 0
    for at, character in _bare(pattern):
        if character == "(":
            start = start if depth else at + 1
            depth += 1
        elif character == ")":
            depth -= 1
            if not depth:
                yield start, at


def _bare(pattern: str) -> Iterator[tuple[int, str]]:
    """The characters that mean something: not escaped, nor within a class of characters, of which the brackets stay."""
    escaped = inside = False
    for at, character in enumerate(pattern):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif inside:
            if character == "]":
                inside = False
                yield at, character
        else:
            inside = character == "["
            yield at, character
