"""Which prompts a language model is asked: rows whose text may be shown, and what it goes on from in each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlotr.adapters.methods import METHODS
from fedlotr.data import Style
from fedlotr.data.language import conversations
from fedlotr.data.templates import prompt_of
from fedlotr.evaluation.generation import positions
from fedlotr.run.checking import Checked
from fedlotr.run.examples import style_of
from fedlotr.run.preparation import Prepared
from fedlotr.run.public_rows import shown
from fedlotr.streams import generator

USUAL = 3
"""Prompts, where --samples does not say."""
PLAIN_TOKENS = 32
"""Of a text, at most so many are the prompt."""
LOOKED_AT = 16
"""Rows for each prompt among which one is looked for that need not be cut."""


@dataclass(frozen=True)
class Prompt:
    """What the model goes on from: tokens. row: of the rows that it is one of, from 0.

    asked: what a person asks there. reference: how the data go on. left_out: tokens cut out of its middle.
    """

    row: int
    asked: str
    tokens: list[int]
    reference: str
    left_out: int = 0

    def within(self, most: int) -> "Prompt":
        """Of at most so many tokens: its beginning and its end stay, where a template says who speaks."""
        over = len(self.tokens) - most
        if over <= 0:
            return self
        return replace(self, tokens=self.tokens[: most // 2] + self.tokens[most // 2 + over :], left_out=over)


def wanted(checked: Checked) -> int:
    """How many prompts a run asks its model; 0 for a classifier, and where `why_none` says why."""
    config = checked.config
    if checked.task.kind != "causal-lm" or why_none(checked) is not None:
        return 0
    rows = shown(config, checked.source, checked.public_source)
    there = 0 if rows is None else len(rows[0])
    return min(there, USUAL if config.samples is None else config.samples)


def why_none(checked: Checked) -> str | None:
    """Why a language model is asked nothing, in words; None where it may be asked."""
    config = checked.config
    if METHODS[config.method].personal or config.baseline == "local":
        return "each client has a model of its own"
    if shown(config, checked.source, checked.public_source) is None:
        return "the data are hidden, and no row is said to be nobody's secret (--public-eval, --public-data)"
    return None


def in_words(checked: Checked) -> str | None:
    """For the run's header; None where there is nothing to say."""
    config = checked.config
    if checked.task.kind != "causal-lm" or config.samples == 0:
        return None
    if (reason := why_none(checked)) is not None:
        return f"none: {reason}"
    count = wanted(checked)
    prompts = f"{count} prompt{'' if count == 1 else 's'} of {rows_in_words(checked)}"
    return f"{prompts}, answered before training, at the best round and at the end (samples.md)"


def rows_in_words(checked: Checked) -> str:
    """Which rows the prompts are of."""
    rows = shown(checked.config, checked.source, checked.public_source)
    return "" if rows is None else rows[1]


def answer_tokens(prepared: Prepared) -> int:
    """How many tokens an answer may have: half of a model's positions are left to the prompt."""
    most = positions(prepared.model.module)
    given = prepared.checked.config.sample_tokens
    return given if most is None else min(given, max(1, most // 2))


def chosen(prepared: Prepared) -> list[Prompt]:
    """The prompts, drawn by the seed; rather such as need not be cut to what training sees and the model takes.

    More of them begin with the same ones.
    """
    checked, count = prepared.checked, wanted(prepared.checked)
    rows = shown(checked.config, checked.source, checked.public_source)
    if not count or rows is None:
        return []
    most, places = checked.config.longest, positions(prepared.model.module)
    if places is not None:
        most = min(most, max(1, places - answer_tokens(prepared)))
    order = generator(checked.config.seed, "samples").permutation(len(rows[0]))[: LOOKED_AT * count]
    asked = list(_asked(rows[0], order, checked))
    fit = [prompt for prompt in asked if len(prompt.tokens) <= most]
    others = [prompt.within(most) for prompt in asked if len(prompt.tokens) > most]
    return (fit + others)[:count]


def _asked(rows: Any, order: Iterable[int], checked: Checked) -> Iterator[Prompt]:
    """Of the rows in this order those that make a prompt."""
    for row in map(int, order):
        held = {name: rows[row][name] for name in checked.task.columns}
        if "text" in held:
            found = _of_text(row, held["text"], checked.tokenizer)
        else:
            found = _of_turns(row, held, checked.tokenizer, style_of(checked.config))
        if found is not None and found.tokens:
            yield found


def _of_text(row: int, text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    """The first half of a text, and of that its first tokens; nothing of a text that is too short to be halved."""
    ids = _plain(text, tokenizer)
    half = min(len(ids) // 2, PLAIN_TOKENS)
    if not half:
        return None
    return Prompt(row, _text(ids[:half], tokenizer), _begin(tokenizer) + ids[:half], _text(ids[half:], tokenizer))


def _of_turns(row: int, held: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, style: Style) -> Prompt | None:
    """All that stands before an assistant's last turn; nothing of a conversation without one, or with nothing before.

    A prompt and its answer are two turns.
    """
    ((turns, tools),) = conversations({name: [value] for name, value in held.items()})
    last = max((at for at, turn in enumerate(turns) if turn.get("role") == "assistant"), default=0)
    if not last:
        return None
    try:  # with its answer, which is left out: a turn of the assistant's before it would be taken for that
        tokens = prompt_of(turns[: last + 1], tokenizer, style, tools)
    except ValueError:  # a template that does not open such a conversation
        return None
    return Prompt(row, _content(turns[last - 1]), tokens, _content(turns[last]))


def _content(turn: Mapping[str, Any]) -> str:
    """What is said in a turn, in words; of its parts those that are text."""
    content = turn.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    begin = tokenizer.bos_token_id
    return [begin] if isinstance(begin, int) else []


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids)))
