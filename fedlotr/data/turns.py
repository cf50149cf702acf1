"""The turns of a conversation, in whatever form they are published, as a list of messages with roles and contents.

A message is {"role", "content", ...} as chat templates take it: the role is one of `ROLES`, the content is text or a
list of parts {"type": "text", "text": ...}; an assistant's may have `tool_calls` besides or instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedlotr.data.columns import SAID, SPEAKER, kind_of
from fedlotr.errors import nearest, shorten

Message = dict[str, Any]

ROLES: dict[str, tuple[str, ...]] = {
    "system": (),
    "developer": (),
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "model", "bot"),
    "tool": ("observation", "function_response", "function", "ipython"),
}
"""Role -> what else it is called; Vicuna's, LLaMA-Factory's and OpenAI's names."""
CALL = "function_call"
"""Who says, in ShareGPT's form, that the assistant calls a function."""
SILENT = {"weight": 0}
"""What marks an answer that is context and is not learnt, as in OpenAI's files for fine-tuning."""

_ROLE = {other: role for role, others in ROLES.items() for other in (role, *others)}


class RowError(ValueError):
    """Why a row cannot be read, in words that fit after "row 3: ".

    hidden: the same without anything of the row's own, for data that are private.
    """

    def __init__(self, told: str, hidden: str | None = None) -> None:
        super().__init__(told)
        self.hidden = told if hidden is None else hidden


def read_turns(given: Any, column: str) -> list[Message]:
    """The messages of a list of turns, of an object of lists, or of a JSON text of these.

    column: where it stands, for messages.

    Values that are None are left out, as they are what Arrow fills the gaps with where turns have different keys.
    Raises RowError for what is no list of turns, an unknown role, and contents that are no text.
    """
    given = from_json(given, column)
    if given is None:
        return []
    if isinstance(given, Mapping) and (parts := _in_parts(given)) is not None:
        given = parts
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise RowError(f"'{column}' is {kind_of(given)}; expected a list of messages")
    return [_message(turn, f"'{column}', message {number}") for number, turn in enumerate(given, start=1)]


def _in_parts(given: Mapping[str, Any]) -> list[Message] | None:
    """The turns of an object with a list for each key, as `datasets` has a `Sequence` of objects; None for another."""
    columns = {name: values for name, values in given.items() if values is not None}
    lengths = {len(values) if isinstance(values, list | tuple) else -1 for values in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        return None
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


def from_json(given: Any, column: str) -> Any:
    """What a text is JSON of that begins so; anything else as it is. Raises RowError for broken JSON."""
    if not isinstance(given, str) or not given.lstrip().startswith(("[", "{")):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        about = f" ({error.msg} at column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise RowError(f"'{column}' begins like JSON and is none{about}", f"'{column}' is broken JSON") from None


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {kind_of(turn)}; expected an object with role and content")
    turn = without_gaps(turn)
    who = next((name for name in SPEAKER if name in turn), None)
    what = next((name for name in SAID if name in turn and name != who), None)
    if who is None:
        raise RowError(
            f"{where} says not whose it is; expected role, or from", f"{where} says not whose it is; expected role"
        )
    said = turn.get(what) if what is not None else None
    others = {name: value for name, value in turn.items() if name not in (who, what)}
    if turn[who] == CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls(said, where), **others}
    role = _ROLE.get(turn[who].strip().casefold()) if isinstance(turn[who], str) else None
    if role is None:
        known = (*_ROLE, CALL)
        hint = nearest(turn[who], known) if isinstance(turn[who], str) else f"; choose one of: {', '.join(known)}"
        raise RowError(
            f"{where} is by {shorten(turn[who])!r}, which is no role that is known{hint}",
            f"{where} is by someone whose role is not known",
        )
    if said is None and not (role == "assistant" and "tool_calls" in others):
        raise RowError(f"{where} has no content")
    return {"role": role, "content": "" if said is None else _content(said, where), **others}


def _content(said: Any, where: str) -> Any:
    """Text, or a list of parts of text. Raises RowError for anything else."""
    if isinstance(said, str):
        return said
    if not isinstance(said, Sequence):
        raise RowError(f"{where}: its content is {kind_of(said)}; expected text, or a list of parts")
    for part in said:
        kind = part.get("type", "text") if isinstance(part, Mapping) else kind_of(part)
        if kind != "text" or not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise RowError(
                f"{where}: a part of its content is {shorten(str(kind))!r}; expected "
                '{"type": "text", "text": ...}, as nothing but text is learnt',
                f"{where}: a part of its content is no text",
            )
    return [{"type": "text", **part} for part in said]


def _calls(said: Any, where: str) -> list[Message]:
    """The calls of functions that a text of JSON is, as templates take them."""
    calls = from_json(said, "function_call")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f'{where} is a {CALL} and no JSON of {{"name": ..., "arguments": ...}}')
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]


def without_gaps(value: Any) -> Any:
    """Without the keys that have no value, however deep."""
    if isinstance(value, Mapping):
        return {str(key): without_gaps(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_gaps(item) for item in value]
    return value


def _says(content: Any) -> bool:
    """Whether there is more in it than white space."""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return any(text.strip() for text in texts)


def is_answered(messages: Sequence[Message]) -> bool:
    """Whether an assistant says something that is to be learnt."""
    return any(
        message["role"] == "assistant"
        and (_says(message["content"]) or message.get("tool_calls"))
        and message.get("weight") != SILENT["weight"]
        for message in messages
    )
