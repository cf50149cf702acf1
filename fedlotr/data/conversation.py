"""What a conversation is made of, and what a template makes of one."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedlotr.config.values import TEMPLATE_DATE
from fedlotr.data import turns

Message = Mapping[str, Any]
Span = tuple[int, int]
"""From the first character (or token) to the one after the last."""

ROLES = tuple(turns.ROLES)
FIXED = datetime.date.fromisoformat(TEMPLATE_DATE)
"""The day that it is for templates: Llama 3's own, where nobody says another, so that its renderings are those of its
makers. Never today's: a run would train on other bytes tomorrow."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How conversations and texts become what is learnt.

    template: a name of `TEMPLATES`, or a function of one's own (module:function, path/to/file.py:function).
    train_on: the assistant's turns alone, or everything. date: today's, for templates that ask. eos: whether a plain
    text ends in EOS; an answer always does.
    """

    template: str = "auto"
    train_on: Literal["assistant", "all"] = "assistant"
    date: datetime.date = FIXED
    eos: bool = False


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    targets: the characters that are learnt. contents: those of messages' contents, which may lose their middle. whole:
    whether BOS and EOS stand in the text where they belong; else they are put around it.
    """

    text: str
    targets: tuple[Span, ...]
    contents: tuple[Span, ...]
    whole: bool


def check(messages: Sequence[Message]) -> None:
    """Raises ValueError for a role that nobody knows, for what is no text, and where no assistant says anything."""
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}; expected one of {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise ValueError(f"message {number} ({role}) has no content")
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"message {number} ({role}) has a part of the kind {kind!r}; only text is learnt here")
        if content is not None and not isinstance(content, str | list):
            raise ValueError(f"message {number} ({role}) has {type(content).__name__} as its content; expected text")


def is_learnt(message: Message) -> bool:
    """Whether an assistant's turn is there to be learnt: one of weight 0 is context, as OpenAI's format has it."""
    return bool(message["role"] == "assistant" and message.get("weight") != 0)


def text_of(message: Message) -> str:
    """Its content, the parts of a list one after the other."""
    return "".join(texts_of(message))


def texts_of(message: Message) -> list[str]:
    """Its content, part by part."""
    content = message.get("content")
    if content is None:
        return []
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The conversation in the ways in which a template may want it, each once, the given one first.

    Arguments of tool calls as objects (as transformers says), else as they came; contents as they came, as one text, as
    a list of parts; a developer's words as the system's; and a system's words before those of the first user.
    """
    seen: list[list[dict[str, Any]]] = []
    for called in (_with_objects(messages), [dict(message) for message in messages]):
        for contents in (called, [_joined(message) for message in called], [_parted(message) for message in called]):
            for form in (contents, _without_developer(contents), _without_system(contents)):
                if form is not None and form not in seen:
                    seen.append(form)
                    yield form


def _with_objects(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _with_object(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_object(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            return {**call, "arguments": json.loads(call["arguments"])}
        except ValueError:
            pass
    return dict(call)


def _joined(message: Message) -> dict[str, Any]:
    return dict(message) if isinstance(message.get("content"), str) else {**message, "content": text_of(message)}


def _parted(message: Message) -> dict[str, Any]:
    if not isinstance(message.get("content"), str):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _without_developer(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**message, "role": "system"} if message["role"] == "developer" else dict(message) for message in messages]


def _without_system(messages: Sequence[Message]) -> list[dict[str, Any]] | None:
    """The system's words in front of the first user's, a blank line between; None where there is none or no user."""
    said = [text_of(message) for message in messages if message["role"] in ("system", "developer")]
    others = [dict(message) for message in messages if message["role"] not in ("system", "developer")]
    user = next((message for message in others if message["role"] == "user"), None)
    if not said or user is None:
        return None
    opening = "\n\n".join(said) + "\n\n"
    content = user["content"]
    user["content"] = opening + content if isinstance(content, str) else [{"type": "text", "text": opening}, *content]
    return others


def common(first: str, second: str) -> int:
    """How many characters both begin with."""
    least = min(len(first), len(second))
    return next((index for index in range(least) if first[index] != second[index]), least)
