"""Rows as people have them, each form a plain function from a row to what is learnt from it.

A function gets a row's columns under the names that its entry in `formats.FORMATS` gives them. It returns a text, a
pair (prompt, answer), a list of messages as `turns` describes it, `Chat`, or None for a row without anything to learn;
it raises `RowError` with what is wrong. A user's own function does the same.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedlotr.data.columns import is_turn, kind_of
from fedlotr.data.turns import SILENT, Message, RowError, from_json, is_answered, read_turns, without_gaps
from fedlotr.errors import shorten

Row = Mapping[str, Any]
OFFER = "Answer format:"
"""What stands before the answers to choose from, with strokes, in the commonsense sets of LLM-Adapters."""


class Chat(NamedTuple):
    """A conversation. tools: what an assistant may call, as JSON; None where there is nothing."""

    messages: list[Message]
    tools: str | None = None


Read = str | tuple[str, str] | Sequence[Message] | Chat | None
"""What is learnt from a row."""


def messages(row: Row) -> Read:
    """Turns with their roles, of OpenAI's form, ShareGPT's, or others'; a system prompt may stand beside them."""
    turns = read_turns(row["messages"], "messages")
    system = _text(row, "system", missing="")
    if system and not any(turn["role"] in ("system", "developer") for turn in turns):
        turns = [{"role": "system", "content": system}, *turns]
    return Chat(turns, _tools(row.get("tools"))) if is_answered(turns) else None


def prompt_completion(row: Row) -> Read:
    """TRL's: both texts, or both lists of messages; the completion alone is learnt."""
    prompt, completion = (_turns_written(row[name]) for name in ("prompt", "completion"))
    if _is_list(prompt) != _is_list(completion):
        raise RowError(f"'prompt' is {kind_of(prompt)} and 'completion' {kind_of(completion)}; expected two of a kind")
    if not _is_list(prompt):
        return _answered(_text(row, "prompt"), _text(row, "completion", missing=""))
    asked = [turn | SILENT if turn["role"] == "assistant" else turn for turn in read_turns(prompt, "prompt")]
    turns = [*asked, *read_turns(completion, "completion")]
    return Chat(turns, _tools(row.get("tools"))) if is_answered(turns) else None


def alpaca(row: Row) -> Read:
    """An instruction, what it is applied to where there is something, and what comes out; also with turns before it."""
    asked = _joined(_text(row, "instruction"), _text(row, "input", missing=""))
    answer, system = _text(row, "output", missing=""), _text(row, "system", missing="")
    history = from_json(row.get("history"), "history") or []
    if not answer.strip():
        return None
    if not system and not history:
        return asked, answer
    turns = [{"role": "system", "content": system}] if system else []
    if not _is_list(history) or not all(_is_list(turn) and len(turn) == 2 for turn in history):
        raise RowError(
            f"'history' is {kind_of(history)}; expected a list of pairs, [[what was asked, the answer], ...]"
        )
    return [*turns, *(message for turn in (*history, (asked, answer)) for message in _turn(*turn))]


def dolly(row: Row) -> Read:
    """As Alpaca's, with a text that the question is about."""
    asked = _joined(_text(row, "instruction"), _text(row, "context", missing=""))
    return _answered(asked, _text(row, "response", missing=""))


def prompt_answer(row: Row) -> Read:
    """One turn, maybe after a system prompt."""
    prompt, answer, system = _text(row, "prompt"), _text(row, "answer"), _text(row, "system", missing="")
    return [{"role": "system", "content": system}, *_turn(prompt, answer)] if system else (prompt, answer)


def choice(row: Row) -> Read:
    """A question with its choices, lettered as lm-eval's `mmlu` letters them; the letter is the answer.

    choices: a list of texts, or of {"text", "label"}; {"text": [...], "label": [...]}, as ARC has them; or an object of
    text by label. answer: a label where the choices have some, else their index from 0, their text, or a letter.
    """
    texts, labels = _choices(from_json(row["choices"], "choices"))
    answer = row["answer"]
    if answer is None or answer == "":
        return None
    right = _which(answer, texts, labels)
    letters = string.ascii_uppercase[: len(texts)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    return "\n".join([_text(row, "question").strip(), *lines, "Answer:"]), letters[right]


def offered(prompt: str) -> tuple[str, ...]:
    """The answers that a prompt offers after its last `OFFER`; none where there is nothing of the kind."""
    _, found, answers = prompt.rpartition(OFFER)
    return tuple(answer.strip() for answer in answers.split("/")) if found else ()


def _choices(given: Any) -> tuple[list[str], list[str]]:
    """The texts, and the labels where there are some."""
    given = without_gaps(given)
    if isinstance(given, dict) and _is_list(given.get("text")):
        texts, labels = list(given["text"]), list(map(str, given.get("label", ())))
    elif isinstance(given, dict):
        texts, labels = list(given.values()), list(given)
    elif _is_list(given) and given and all(isinstance(one, dict) and "text" in one for one in given):
        texts, labels = [one["text"] for one in given], [str(one["label"]) for one in given if "label" in one]
    else:
        texts, labels = list(given) if _is_list(given) else [], []
    if not 2 <= len(texts) <= len(string.ascii_uppercase) or len(labels) not in (0, len(texts)):
        raise RowError(
            f"'choices' is {kind_of(given)} with {len(texts)} texts; expected from 2 to 26, each with a label or none"
        )
    if odd := next((text for text in texts if not isinstance(text, str)), None):
        raise RowError(f"'choices' has {kind_of(odd)} in it; expected texts")
    return texts, labels


def _which(answer: Any, texts: list[str], labels: list[str]) -> int:
    """The index of the right choice. Raises RowError where none is, or two are."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    said = str(answer).strip()
    if said in labels:
        return labels.index(said)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    if isinstance(answer, str):
        if texts.count(answer) == 1:
            return texts.index(answer)
        letter = string.ascii_uppercase.find(said.upper()) if len(said) == 1 else -1
        index = letter if letter >= 0 else int(said) if said.isdecimal() and len(said) < 3 else -1
        if 0 <= index < len(texts):
            return index
    raise RowError(
        f"'answer' is {shorten(repr(answer))}; expected the label, the index from 0, the letter or the text of one of "
        f"the {len(texts)} choices",
        "'answer' is none of the choices",
    )


def _text(row: Row, name: str, *, missing: str | None = None) -> str:
    """A column's text. missing: what stands for none. Raises RowError for what is no text."""
    value = row.get(name)
    if value is None and missing is not None:
        return missing
    if not isinstance(value, str):
        shown = "nothing" if value is None else kind_of(value)
        raise RowError(f"'{name}' is {shown}; expected text")
    return value


def _joined(asked: str, about: str) -> str:
    return f"{asked}\n\n{about}" if asked and about.strip() else asked or about


def _answered(prompt: str, answer: str) -> Read:
    return (prompt, answer) if answer.strip() else None


def _turn(prompt: Any, answer: Any) -> list[Message]:
    return read_turns([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], "history")


def _tools(given: Any) -> str | None:
    """As JSON. Raises RowError for what is no list."""
    given = from_json(given, "tools")
    if given is None or given == "" or given == []:
        return None
    if not _is_list(given):
        raise RowError(f"'tools' is {kind_of(given)}; expected a list of what may be called")
    return json.dumps(without_gaps(given), ensure_ascii=False)


def _turns_written(value: Any) -> Any:
    """What a text is JSON of where that is a list of turns, as CSV files have them; any other text is one."""
    try:
        found = from_json(value, "")
    except RowError:
        return value
    return found if _is_list(found) and all(isinstance(turn, dict) and is_turn(turn) for turn in found) else value


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
