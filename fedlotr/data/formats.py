"""The forms that rows have, by name: which columns tell one, and how such rows are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedlotr.data import row_formats
from fedlotr.data.columns import Table
from fedlotr.data.row_formats import Read, Row
from fedlotr.errors import InputError, nearest

_T = TypeVar("_T")

OF_THE_FILES = " (of the files)"
"""Ends the name of a column where another takes its own."""

Held = Literal["text", "json", "value", "lists", "none"]
"""What a column holds; json: text that is a list or an object; value: numbers and the like; lists: objects too."""

WANTED: dict[str, tuple[Held, ...]] = {
    "text": ("text", "json", "none"),
    "value": ("text", "json", "value", "none"),
    "lists": ("lists", "json", "none"),
    "either": ("text", "json", "lists", "none"),
}
"""What a format may ask of a column -> what it may hold then."""


@dataclass(frozen=True)
class Column:
    """A column that a format reads. names: what it is called, the first as its function knows it."""

    names: tuple[str, ...]
    holds: str = "text"

    def among(self, there: Mapping[str, Held]) -> str | None:
        """Which of the columns it is: as it is written here, rather than with capitals."""
        fitting = [name for name, held in there.items() if held in WANTED[self.holds]]
        exact = [name for name in self.names if name in fitting]
        return next(iter([*exact, *(one for name in self.names for one in fitting if one.casefold() == name)]), None)


def column(*names: str, holds: str = "text") -> Column:
    """A column of any of these names."""
    return Column(names, holds)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A form of rows.

    text: what rows of it are, for people. needs: the columns that tell it. also: those that it reads where there are.
    gives: the texts of its tasks, and the names of the columns they are made of. read: from a row to what is learnt;
    None where the columns are the texts already. labelled: whether it has labels. scale: whether these are numbers on a
    scale, and no classes.
    """

    text: str
    needs: tuple[Column, ...]
    also: tuple[Column, ...] = ()
    gives: Mapping[str, tuple[str, ...]]
    read: Callable[[Row], Read] | None = None
    labelled: bool = False
    scale: bool = False

    def columns(self, there: Mapping[str, Held]) -> dict[str, str] | None:
        """Which columns it reads, by the names that its function knows; None where one is not there that it needs."""
        needed = {one.names[0]: one.among(there) for one in self.needs}
        if None in needed.values() or len(set(needed.values())) < len(needed):
            return None
        found = {name: held for name, held in there.items() if name not in needed.values()}
        both = needed | {one.names[0]: one.among(found) for one in self.also}
        return {known: name for known, name in both.items() if name is not None}

    def in_words(self, columns: Mapping[str, str]) -> str:
        """What is made of which columns, such as "instruction + input -> prompt, output -> answer"."""
        made = {text: [columns[known] for known in names if known in columns] for text, names in self.gives.items()}
        return ", ".join(f"{' + '.join(names)} -> {text}" for text, names in made.items() if names not in ([], [text]))


_SYSTEM, _TOOLS = column("system", "system_prompt"), column("tools", holds="either")
_CHAT = {"messages": ("system", "messages"), "tools": ("tools",)}

FORMATS: dict[str, Format] = {
    "messages": Format(
        text="a column messages: turns with role and content; also tools, system",
        needs=(column("messages", holds="lists"),),
        also=(_SYSTEM, _TOOLS),
        gives=_CHAT,
        read=row_formats.messages,
    ),
    "sharegpt": Format(
        text="a column conversations: turns with from and value; also tools, system",
        needs=(column("messages", "conversations", "conversation", holds="lists"),),
        also=(_SYSTEM, _TOOLS),
        gives=_CHAT,
        read=row_formats.messages,
    ),
    "trl": Format(
        text="prompt, completion: texts, or lists of messages of which the completion is learnt; also tools",
        needs=(column("prompt", holds="either"), column("completion", holds="either")),
        also=(_TOOLS,),
        gives={"prompt": ("prompt",), "answer": ("completion",), "tools": ("tools",)},
        read=row_formats.prompt_completion,
    ),
    "choice": Format(
        text="question, choices, answer: the index, letter or text of the right choice",
        needs=(
            column("question", "question_stem"),
            column("choices", "options", holds="lists"),
            column("answer", "answerKey", "answer_idx", holds="value"),
        ),
        gives={"prompt": ("question", "choices"), "answer": ("answer",)},
        read=row_formats.choice,
    ),
    "alpaca": Format(
        text="instruction, output; also input, system, history",
        needs=(column("instruction"), column("output")),
        also=(column("input"), _SYSTEM, column("history", holds="lists")),
        gives={"prompt": ("system", "history", "instruction", "input"), "answer": ("output",)},
        read=row_formats.alpaca,
    ),
    "dolly": Format(
        text="instruction, context, response; or question, context, answer",
        needs=(column("instruction", "question"), column("context"), column("response", "answer")),
        gives={"prompt": ("instruction", "context"), "answer": ("response",)},
        read=row_formats.dolly,
    ),
    "pair": Format(
        text="text_a, text_b, label: two texts and their class",
        needs=(column("text_a"), column("text_b"), column("label", holds="value")),
        gives={"text_a": ("text_a",), "text_b": ("text_b",)},
        labelled=True,
    ),
    "text+label": Format(
        text="text, label: a text and its class",
        needs=(column("text"), column("label", holds="value")),
        gives={"text": ("text",)},
        labelled=True,
    ),
    "pair+score": Format(
        text="text_a, text_b, label: two texts and a number on a scale",
        needs=(column("text_a"), column("text_b"), column("label", holds="value")),
        gives={"text_a": ("text_a",), "text_b": ("text_b",)},
        labelled=True,
        scale=True,
    ),
    "text+score": Format(
        text="text, label: a text and a number on a scale",
        needs=(column("text"), column("label", holds="value")),
        gives={"text": ("text",)},
        labelled=True,
        scale=True,
    ),
    "prompt+answer": Format(
        text="prompt, answer (also question, query, instruction, input; response, output); also system",
        needs=(
            column("prompt", "question", "query", "instruction", "input"),
            column("answer", "response", "output", "completion"),
        ),
        also=(_SYSTEM,),
        gives={"prompt": ("system", "prompt"), "answer": ("answer",)},
        read=row_formats.prompt_answer,
    ),
    "text": Format(text="text alone", needs=(column("text"),), gives={"text": ("text",)}),
}
"""Name -> format, in the order in which they are recognised."""


def recognised(there: Mapping[str, Held], *, labelled: bool) -> str | None:
    """The first format whose columns are there. labelled: whether one with labels is meant, or one without.

    Which labels are a scale no column's name tells: that is for the task to see.
    """
    fitting = (name for name, entry in FORMATS.items() if entry.labelled == labelled)
    return next((name for name in fitting if FORMATS[name].columns(there) is not None), None)


def renamed(table: Table, names: Iterable[tuple[str, str]], where: str, *, strict: bool = True) -> Table:
    """The table with its columns called as formats call them; one whose name another takes is called otherwise.

    names: (what formats call a column, what the table does). where: the split, for messages. strict: whether each of
    them must be there. Raises InputError for one that is not, and for a name that no format has.
    """
    there = [*table.columns, *table.nested]
    known = [name for entry in FORMATS.values() for one in (*entry.needs, *entry.also) for name in one.names]
    known.append("client")
    problems = [
        f"--columns {name}={column}: no format reads a column {name}{nearest(name, known)}"
        for name, column in names
        if name not in known
    ]
    problems += [
        f"--columns {name}={column}: {where} has no such column{nearest(column, there)}"
        for name, column in names
        if strict and column not in there
    ]
    if problems:
        raise InputError(problems)
    new = {column: name for name, column in names if column in there}
    new |= {name: f"{name}{OF_THE_FILES}" for name in there if name in new.values() and name not in new}

    def called(part: Mapping[str, _T]) -> dict[str, _T]:
        return {new.get(name, name): held for name, held in part.items()}

    return table._replace(columns=called(table.columns), nested=called(table.nested), odd=called(table.odd))
