"""Texts, questions and conversations as tokens, of which it is known what is learnt."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlotr.data.conversation import Message, Rendered, Style
from fedlotr.data.cutting import Example, cut
from fedlotr.data.templates import check_template, encode, render
from fedlotr.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedlotr.training.examples import Examples

AT_ONCE = 1000
"""Texts tokenised together: their tokens' places in the text take more memory than the tokens."""
PROBLEMS_SHOWN = 3


@dataclass
class Encoded:
    """Examples of rows; a row gives one, several (an answer each) or none.

    tokens, targets: of each example; a target is learnt from what precedes it, so the first token is never one. owner:
    the row that it is of. whole: its tokens before anything was cut. Of each row, prompt_cut and answer_cut: how many
    tokens that are no targets, and that are, are left out; dropped: how many of its examples are.
    """

    tokens: list[list[int]] = field(default_factory=list)
    targets: list[list[bool]] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    prompt_cut: list[int] = field(default_factory=list)
    answer_cut: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


def encode_language(
    columns: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    max_length: int | None,
    place: Callable[[int], str] | None = None,
    *,
    hidden: bool = False,
) -> Encoded:
    """The rows as examples of at most `max_length` tokens (None: however long they are).

    columns: by name: `text`; `prompt` and `answer`; or `messages` (JSON), perhaps with `tools` (JSON). place: where a
    row stands, for messages; hidden: whether these may tell nothing of single rows. A plain text is BOS (where the
    tokenizer has one), the text, and EOS where the style says so; it loses its end. Of conversations `cut` says what
    they lose. An example without a target is dropped.
    Raises InputError that names the rows that no example can be made of.
    """
    rows = len(next(iter(columns.values())))
    found = Encoded(prompt_cut=[0] * rows, answer_cut=[0] * rows, dropped=[0] * rows)
    for owner, rendered, borders, example in _examples(columns, tokenizer, style, place, hidden):
        kept: Example | None = example
        if max_length is not None and len(example.tokens) > max_length:
            kept = cut(replace(example, contents=_content_tokens(rendered, borders, example)), max_length)
        if kept is None or not any(kept.targets):
            found.dropped[owner] += 1
            continue
        learnt, left = sum(example.targets), sum(kept.targets)
        found.answer_cut[owner] += learnt - left
        found.prompt_cut[owner] += len(example.tokens) - learnt - (len(kept.tokens) - left)
        found.tokens.append(kept.tokens)
        found.targets.append(kept.targets)
        found.owner.append(owner)
        found.whole.append(len(example.tokens))
    return found


def encode_answers(answers: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Examples:
    """Conversations of which the last answer alone is a target, with nothing behind it, as examples in their order.

    Raises InputError where `max_length` leaves no room for one.
    """
    from fedlotr.training.examples import Examples

    tokens: list[list[int]] = []
    starts: list[int] = []
    for _, rendered, borders, example in _tokenised(list(enumerate(answers)), tokenizer, plain=False, eos=False):
        kept: Example | None = example
        if max_length is not None and len(example.tokens) > max_length:
            kept = cut(replace(example, contents=_content_tokens(rendered, borders, example)), max_length)
        if kept is None or not any(kept.targets):
            raise InputError(f"--max-length {max_length}: no room for a choice of the test rows; give a larger one")
        tokens.append(kept.tokens)
        starts.append(kept.targets.index(True))
    flat = np.fromiter((token for ids in tokens for token in ids), np.int32)
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    return Examples(flat, offsets, np.array(starts, np.int64), causal=True)


def rendered_rows(
    columns: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    place: Callable[[int], str] | None = None,
    *,
    hidden: bool = False,
) -> list[tuple[int, Rendered]]:
    """What each row becomes before it is tokens, with its index. Raises InputError as `encode_language`."""
    if "text" in columns:
        return [(row, Rendered(text, ((0, len(text)),), (), whole=False)) for row, text in enumerate(columns["text"])]
    found: list[tuple[int, Rendered]] = []
    problems: list[str] = []
    if hidden:  # what is wrong with the template itself tells nothing of rows
        check_template(style, tokenizer)
    for row, (messages, tools) in enumerate(conversations(columns)):
        try:
            found += [(row, rendered) for rendered in render(messages, tokenizer, style, tools)]
        except ValueError as error:
            problems.append(f"{place(row) if place else f'row {row + 1}'}: {error}")
    if problems and hidden:  # a template may say anything in the words with which it fails
        raise InputError(
            f"{place(0) if place else 'some row'}: --template {style.template} cannot write it out (which, and why, is "
            "private); try it with rows that may be seen"
        )
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        told = [f"{more} more row{'s' * (more > 1)} like these"] if more > 0 else []
        raise InputError(problems[:PROBLEMS_SHOWN] + told)
    return found


def conversations(columns: Mapping[str, Sequence[str]]) -> Iterator[tuple[list[Message], list[Any] | None]]:
    """Each row's messages and tools."""
    if "messages" in columns:
        tools = columns.get("tools") or [""] * len(columns["messages"])
        for said, given in zip(columns["messages"], tools, strict=True):
            yield json.loads(said), (json.loads(given) or None) if given else None
    else:
        for prompt, answer in zip(columns["prompt"], columns["answer"], strict=True):
            yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], None


def _examples(
    columns: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    place: Callable[[int], str] | None,
    hidden: bool,
) -> Iterator[tuple[int, Rendered, Borders, Example]]:
    plain = "text" in columns
    rows = rendered_rows(columns, tokenizer, style, place, hidden=hidden)
    return _tokenised(rows, tokenizer, plain=plain, eos=style.eos or not plain)


def _tokenised(
    rows: Sequence[tuple[int, Rendered]], tokenizer: PreTrainedTokenizerBase, *, plain: bool, eos: bool
) -> Iterator[tuple[int, Rendered, Borders, Example]]:
    for start in range(0, len(rows), AT_ONCE):
        batch = rows[start : start + AT_ONCE]
        texts = [rendered.text for _, rendered in batch]
        encoded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast), verbose=False
        )
        places = encoded["offset_mapping"] if tokenizer.is_fast else [None] * len(batch)
        for (row, rendered), ids, offsets in zip(batch, encoded["input_ids"], places, strict=True):
            borders = Borders(rendered.text, ids, offsets, tokenizer)
            yield row, rendered, borders, _example(rendered, borders, tokenizer, plain=plain, eos=eos)


def _example(
    rendered: Rendered, borders: Borders, tokenizer: PreTrainedTokenizerBase, *, plain: bool, eos: bool
) -> Example:
    """The tokens with BOS and EOS around them once, and which are learnt; none follows the last of these."""
    ids = borders.ids
    targets = [False] * len(ids)
    for start, end in rendered.targets:
        first, after = borders.first(start), borders.after(end)
        targets[first:after] = [True] * max(0, after - first)
    before, behind = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin: list[int] = []
    if not rendered.whole:
        ended = rendered.targets and rendered.targets[-1][1] == len(rendered.text)
        if eos and ended and isinstance(behind, int) and ids[-1:] != [behind]:
            ids, targets = [*ids, behind], [*targets, True]
        if isinstance(before, int) and ids[:1] != [before]:
            begin = [before]
        elif not isinstance(before, int) and not plain and targets[:1] == [True] and isinstance(behind, int):
            begin = [behind]  # an answer without a prompt follows something, as in lm-evaluation-harness
    ids, targets = begin + ids, [False] * len(begin) + targets
    targets[:1] = [False] * len(targets[:1])
    length = len(targets) - next((behind for behind, learnt in enumerate(reversed(targets)) if learnt), 0)
    return Example(ids[:length], targets[:length], (), len(begin))


def _content_tokens(rendered: Rendered, borders: Borders, example: Example) -> tuple[tuple[int, int], ...]:
    """The tokens that lie wholly within messages' contents and are not learnt."""
    spans = [
        (example.begin + borders.within(start), min(len(example.tokens), example.begin + borders.until(end)))
        for start, end in rendered.contents
    ]
    return tuple((start, end) for start, end in spans if start < end and not any(example.targets[start:end]))


class Borders:
    """Which tokens characters are in, by their places where the tokenizer tells them, else by encoding beginnings."""

    def __init__(
        self,
        text: str,
        ids: list[int],
        offsets: Sequence[tuple[int, int]] | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._text, self.ids, self._tokenizer = text, ids, tokenizer
        self._starts = [start for start, _ in offsets] if offsets is not None else []
        self._ends = [end for _, end in offsets] if offsets is not None else []
        self._told = offsets is not None

    def first(self, start: int) -> int:
        """The first token of what begins at this character.

        Where a token straddles the border, as many tokens as the text before it has alone are not learnt: so scores
        lm-evaluation-harness. But white space that goes with the next word is that word's.
        """
        if start == 0:
            return 0
        spaced = self._text[start - 1].isspace()
        if self._told and not (spaced and _trims(self._tokenizer)):
            index = bisect_right(self._ends, start)
            if index == len(self.ids) or self._starts[index] >= start:
                return index
        context = encode(self._tokenizer, self._text[:start])
        if spaced and not self._text[start : start + 1].isspace() and self.ids[: len(context)] != context:
            bare = encode(self._tokenizer, self._text[:start].rstrip())
            if self.ids[: len(bare)] == bare:
                return len(bare)
        return min(len(context), len(self.ids))

    def after(self, end: int) -> int:
        """The first token of what does not begin before this character."""
        if end >= len(self._text):
            return len(self.ids)
        if self._told:
            return bisect_left(self._starts, end)
        return self._alone(end)

    def within(self, start: int) -> int:
        """The first token that does not begin before this character."""
        return bisect_left(self._starts, start) if self._told else self._alone(start)

    def until(self, end: int) -> int:
        """The first token that does not end until this character."""
        return bisect_right(self._ends, end) if self._told else self._alone(end)

    def _alone(self, position: int) -> int:
        return min(len(encode(self._tokenizer, self._text[:position])), len(self.ids))


@lru_cache(maxsize=16)
def _trims(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the white space before a word is in no token's place."""
    places = tokenizer("a b", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return not any(start <= 1 < end for start, end in places)
