"""Which layers --targets means: names as PEFT takes them, or a regular expression, each alternative of which is one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from fedlotr.errors import InputError, shorten, written

ALL = "all-linear"
_NAME = re.compile(r"[\w.-]+")
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(")


def matches(targets: str, name: str) -> bool:
    """Whether a layer is meant. targets: all-linear, or patterns with commas, each as `matches_one` has it."""
    return targets == ALL or any(matches_one(pattern, name) for pattern in patterns(targets))


def matches_one(pattern: str, name: str) -> bool:
    """A regular expression matches a whole name; a plain name also the end of one, behind a dot, as in PEFT.

    Of an expert's layer any of its names (`names_of`).
    """
    plain = _NAME.fullmatch(pattern) is not None
    return any(
        re.fullmatch(pattern, known) is not None or (plain and known.endswith(f".{pattern}"))
        for known in names_of(name)
    )


def names_of(layer: str) -> list[str]:
    """All names of a layer. One of an expert, `experts.3.gate_up_proj`, has three more.

    The parameter's that holds it, `experts.gate_up_proj`, as PEFT's target_parameters have it; and those of the layers
    that other mixtures, and the models without, have in its place: gate_proj and up_proj.
    """
    found = _EXPERT.fullmatch(layer)
    if found is None:
        return [layer]
    block, place, part = found.groups()
    halves = [f"{block}.{place}.{half}" for half in ("gate_proj", "up_proj")] if part == "gate_up_proj" else []
    return [layer, f"{block}.{part}", *halves]


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


def meant(targets: str, names: Sequence[str], others: Collection[str], refused: Mapping[str, str]) -> list[str]:
    """The layers among these names that are meant. others: layers that are known and not adapted.

    refused: what can never be adapted, with the reason. Raises ValueError where one of several alternatives means that
    alone, or matches nothing, then with the nearest names; or where all of them together mean nothing else.
    """
    if targets == ALL:
        return list(names)
    chosen = [name for name in names if matches(targets, name)]
    for part, pattern in alternatives(targets):
        if any(matches_one(pattern, name) for name in (*names, *others)):
            continue
        if known := [name for name in refused if matches_one(pattern, name)]:
            raise ValueError(f"of it {part!r} means {_first(known)}: {refused[known[0]]}")
        if chosen:
            raise ValueError(f"of it {part!r} matches no layer that can be adapted; {nearest_types(part, names)}")
    if not chosen and (known := [name for name in refused if matches(targets, name)]):
        raise ValueError(f"it means {_first(known)}: {refused[known[0]]}")
    return chosen


def without(names: Sequence[str], others: Collection[str]) -> str:
    """These layers and none of the others, as --targets takes them: the ends of their names, as short as can be."""
    ends = dict.fromkeys(
        next((end for end in _ends(name) if not any(matches_one(end, other) for other in others)), name)
        for name in names
    )
    return ",".join(ends)


def _ends(name: str) -> list[str]:
    """The last part of a name, the last two, and so on, as far as there is no number."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1) if not any(p.isdigit() for p in parts[at:])]


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def by_pattern(patterns: Mapping[str, int], name: str, other: int) -> int:
    """The number of the first pattern that means a layer, as PEFT reads those of its `rank_pattern`; else the other."""
    return next((number for pattern, number in patterns.items() if _ends_so(pattern, name)), other)


def check_patterns(option: str, patterns: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises InputError for each pattern, or alternative of one, that means none of these layers."""
    problems = []
    for pattern, number in patterns.items():
        for part, variant in list(alternatives(pattern)) or [(pattern, pattern)]:
            if not any(_ends_so(variant, name) for name in names):
                given = f"{option} {shorten(f'{pattern}={number:g}')}"
                near = nearest_types(part, names)
                problems.append(f"{given}: {written(part)} matches no layer that is adapted; {near}")
    if problems:
        raise InputError(problems)


def too_narrow(option: str, rank: int, name: str, width: int) -> str:
    """Of a layer that has no room for its rank, and the ways out."""
    return (
        f"{option} {rank}: above the width {width} of {name}; choose a rank of at most {width}, for that layer alone "
        f"by --rank-pattern '{name.rpartition('.')[2]}={width}', or give --cap-rank"
    )


def _ends_so(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


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
