"""What is learnt from rows as the columns that tasks read: a text, a prompt and its answer, or messages as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedlotr.data.columns import Columns
from fedlotr.data.row_formats import Chat
from fedlotr.data.turns import RowError, is_answered, read_turns
from fedlotr.errors import InputError

CANONICAL = ("text", "prompt", "answer", "messages", "tools")
"""What the columns are called that a task of a language model reads."""


class Written(NamedTuple):
    """A conversation as columns hold it."""

    messages: str
    tools: str | None = None


def checked(read: Any) -> str | tuple[str, str] | Written | None:
    """What a function gave, None where nothing is to be learnt of it. Raises RowError for what is none of these."""
    if read is None or isinstance(read, str):
        return read
    if isinstance(read, tuple) and len(read) == 2 and all(isinstance(text, str) for text in read):
        return read[0], read[1]
    if isinstance(read, Chat):
        return _written(read)
    if isinstance(read, Mapping) and "messages" in read:
        tools = read.get("tools")
        return _written(Chat(read_turns(read["messages"], "messages"), json.dumps(tools) if tools else None))
    if isinstance(read, list | tuple) and all(isinstance(turn, Mapping) for turn in read):
        return _written(Chat(read_turns(read, "messages")))
    raise RowError(
        f"it gave {repr(read)[:60]}; expected a text, a pair (prompt, answer), a list of messages or None",
        "it gave no text, pair (prompt, answer) or list of messages",
    )


def _written(chat: Chat) -> Written | None:
    """As JSON. Raises RowError for what has no form in it."""
    if not is_answered(chat.messages):
        return None
    try:
        written = Written(json.dumps(chat.messages, ensure_ascii=False), chat.tools)
        written.messages.encode()
    except UnicodeEncodeError:
        raise RowError("half of a surrogate pair, which is no character") from None
    except (TypeError, ValueError, RecursionError):
        raise RowError("a message holds what is no text, number, list or object") from None
    return written


def as_columns(reads: Sequence[Any], name: str, where: str) -> Columns:
    """The texts of all rows in one form: pairs are turns where others are. Raises InputError for texts beside turns."""
    there = [read for read in reads if read is not None]
    texts, chats = (any(isinstance(read, kind) for read in there) for kind in (str, Written))
    if not texts and not chats:
        return {"prompt": [prompt for prompt, _ in there], "answer": [answer for _, answer in there]}
    if all(isinstance(read, str) for read in there):
        return {"text": there}
    if texts:
        raise InputError(f"{where}: {name} gives texts of some rows and turns of others; expected one kind")
    written = [read if isinstance(read, Written) else Written(turn_of(*read)) for read in there]
    columns: Columns = {"messages": [chat.messages for chat in written]}
    return columns | ({"tools": [chat.tools for chat in written]} if any(chat.tools for chat in written) else {})


def turn_of(prompt: str, answer: str) -> str:
    """A prompt and its answer as a conversation, as a column holds it."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps(turns, ensure_ascii=False)


def alike(train: Columns, others: Columns) -> tuple[Columns, Columns]:
    """Both as conversations where one of them is."""
    if "messages" in train and {"prompt", "answer"} <= others.keys() - {"messages"}:
        others = as_turns(others)
    elif "messages" in others and {"prompt", "answer"} <= train.keys() - {"messages"}:
        train = as_turns(train)
    if "tools" in train and "messages" in others and "tools" not in others:
        others = {**others, "tools": [None] * len(others["messages"])}
    return train, others


def as_turns(columns: Columns) -> Columns:
    """Columns with `messages` in the place of `prompt` and `answer`."""
    pairs = zip(columns["prompt"], columns["answer"], strict=True)
    rest = {name: values for name, values in columns.items() if name not in ("prompt", "answer")}
    return {**rest, "messages": [turn_of(*pair) for pair in pairs]}
