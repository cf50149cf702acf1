"""What an example loses that is longer than a model is given: turns, the middle of a prompt, the end of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PROMPT_SHARE = 4
"""A prompt's contents keep at least the fourth part of the length, before an answer loses its end."""


@dataclass
class Example:
    """tokens; targets: which are learnt; contents: the ranges of tokens that may lose their middle; begin: how many
    tokens were put before the text's own."""

    tokens: list[int]
    targets: list[bool]
    contents: tuple[tuple[int, int], ...] = ()
    begin: int = 0


def cut(example: Example, max_length: int) -> Example | None:
    """At most `max_length` tokens of the example, none after the last target; None where no example is left.

    Later turns are left out first. Then the contents of the prompt lose their middle, the longest first, down to a
    quarter of the length, and then the answer its end. What is neither (the template's framing) stays whole. None is
    left where there is no room for a target, or for any of the prompt's content where it had some.
    """
    after = [*example.targets[1:], False]
    ends = [index + 1 for index, learnt in enumerate(example.targets) if learnt and not after[index]]
    if not ends:
        return None
    end = max((end for end in ends if end <= max_length), default=ends[0])
    tokens, targets = example.tokens[:end], example.targets[:end]
    contents = [(start, min(stop, end)) for start, stop in example.contents if start < end]
    answer = end - targets.index(True)
    content = sum(stop - start for start, stop in contents)
    room = max_length - (end - content - answer)  # for what is not framing
    if end <= max_length:
        return Example(tokens, targets, tuple(contents), example.begin)
    if room < 1 + (content > 0):
        return None
    kept = min(content, max(1, max_length // PROMPT_SHARE, room - answer))
    if kept >= room:
        kept = room // 2
    level = _level([stop - start for start, stop in contents], kept)
    gone: set[int] = set()
    spare = kept - sum(min(stop - start, level) for start, stop in contents)
    for start, stop in contents:
        left = min(stop - start, level)
        if left < stop - start and spare:
            left, spare = left + 1, spare - 1
        gone.update(range(start + (left + 1) // 2, stop - left // 2))
    last = end - max(0, answer - (room - kept))
    stay = [index for index in range(last) if index not in gone]
    return Example([tokens[index] for index in stay], [targets[index] for index in stay], (), example.begin)


def _level(sizes: Sequence[int], kept: int) -> int:
    """The most that each may keep so that all together keep at most `kept`."""
    for number, size in enumerate(sorted(sizes)):
        level = kept // (len(sizes) - number)
        if size > level:
            return level
        kept -= size
    return max(sizes, default=0)
