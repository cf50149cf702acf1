"""The answers that a question offers, as examples of which the answer alone is scored; and prompts to be answered.

What an answer is followed by (EOS, the end of a turn) is not scored: lm-evaluation-harness scores choices so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlotr.data.conversation import Message, Rendered, Style
from fedlotr.data.language import conversations, encode_answers
from fedlotr.data.row_formats import offered
from fedlotr.data.templates import prompt_of, render
from fedlotr.errors import InputError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedlotr.training.examples import Examples

_LETTERED = re.compile(r"^([A-Z])\. ", re.MULTILINE)
ROWS_SHOWN = 3


@dataclass(frozen=True)
class Asked:
    """A question: all turns before the last answer, with what may be called, and that answer."""

    before: Sequence[Message]
    answer: str
    tools: Sequence[Any] | None = None

    def with_answer(self, answer: str) -> list[Message]:
        """The conversation that ends in this answer."""
        return [*self.before, {"role": "assistant", "content": answer}]


def asked_of(columns: Mapping[str, Sequence[str]]) -> list[Asked | None]:
    """Each row's question, None of one whose last turn is no answer in words, or that has nothing before it."""
    found: list[Asked | None] = []
    for turns, tools in conversations(columns):
        last = turns[-1] if turns else {}
        whole = len(turns) > 1 and last.get("role") == "assistant" and isinstance(last.get("content"), str)
        found.append(Asked(turns[:-1], last["content"], tools) if whole else None)
    return found


def choices_of(asked: Asked, given: Sequence[str] = ()) -> tuple[str, ...]:
    """What may be answered: `given`, or what the last turn offers: "Answer format: true/false", or lines from "A. "
    on with "Answer:" behind them; nothing where it offers nothing, or not what is right.
    """
    content = asked.before[-1].get("content")
    text = content if isinstance(content, str) else ""
    found = tuple(given) or offered(text)
    if not found and text.rstrip().endswith("Answer:"):
        letters = _LETTERED.findall(text)
        found = tuple(letters[-(ord(letters[-1]) - ord("A") + 1) :]) if letters else ()
    return found if len(found) > 1 and asked.answer.strip() in found else ()


@dataclass(frozen=True)
class Choices:
    """Of each row its choices and the index of the right one; and all of them, end to end, as examples."""

    texts: list[tuple[str, ...]]
    right: list[int]
    examples: Examples


def encode_choices(
    questions: Sequence[Asked],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    max_length: int | None,
    given: Sequence[str],
    place: Callable[[int], str],
) -> Choices:
    """Every choice of every question as an example. given: the choices of all; else as `choices_of` finds them.

    place: where a question's row stands, for messages. Raises InputError for questions without choices, and for a
    choice that `max_length` leaves no room for.
    """
    texts = [choices_of(question, given) for question in questions]
    if without := [row for row, found in enumerate(texts) if not found]:
        row = without[0]
        offers = f"--choices {','.join(given)} has not" if given else "the prompt does not offer (by 'Answer format:')"
        raise InputError(
            f"--score choice: {len(without)} of {len(texts)} test rows, the first {place(row)}, have the answer "
            f"{shorten(questions[row].answer)!r}, which {offers}; give rows of the format choice, or all choices by "
            "--choices A,B,..."
        )
    rendered: list[Rendered] = []
    for question, found in zip(questions, texts, strict=True):
        rendered += [_bare(question, one, tokenizer, style) for one in found]
    examples = encode_answers(rendered, tokenizer, max_length)
    right = [found.index(question.answer.strip()) for question, found in zip(questions, texts, strict=True)]
    return Choices(texts, right, examples)


def _bare(question: Asked, answer: str, tokenizer: PreTrainedTokenizerBase, style: Style) -> Rendered:
    """The conversation up to the end of this answer, which alone is scored."""
    turns = question.with_answer(answer)
    shown = render(turns, tokenizer, replace(style, train_on="assistant"), question.tools)[-1]
    start, end = shown.targets[-1]
    at = shown.text.find(answer, start, end)
    if at < 0:
        raise InputError(f"--template {style.template}: it writes the answer {shorten(answer)!r} otherwise")
    return replace(shown, text=shown.text[: at + len(answer)], targets=((start, at + len(answer)),))


def encode_prompts(
    questions: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, style: Style, most: int | None
) -> Examples:
    """The tokens up to where each answer begins, of which at most `most` stay: the beginning and the end."""
    from fedlotr.training.examples import Examples

    tokens = [prompt_of(one.with_answer(one.answer), tokenizer, style, one.tools) for one in questions]
    if most is not None:
        tokens = [ids[: most // 2] + ids[len(ids) - most + most // 2 :] if len(ids) > most else ids for ids in tokens]
    flat = np.fromiter((token for ids in tokens for token in ids), np.int32)
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    return Examples(flat, offsets, np.ones(len(tokens), np.int64), causal=True)
