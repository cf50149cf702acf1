"""Templates: how a conversation becomes a text of which it is known what is learnt. A registry of plain functions."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlotr.config import values
from fedlotr.data.chat_targets import open_chat, render_chat
from fedlotr.data.chat_template import WORDS_SHOWN, asks_for_date, has_template
from fedlotr.data.conversation import FIXED, Message, Rendered, Span, Style, check, common, is_learnt, text_of
from fedlotr.errors import InputError, nearest, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FIXED", "TEMPLATES", "Rendered", "Style", "Template", "asks_for_date", "prompt_of", "render"]

Piece = tuple[str, bool, bool]
"""A text, whether it is learnt, and whether it is a message's content."""
OwnFunction = Callable[[list[dict[str, Any]]], Sequence[tuple[str, bool]]]


@dataclass(frozen=True)
class Template:
    """An entry of `TEMPLATES`. text: what it is, in a line. make: from messages and the tokenizer's EOS as text to
    pieces; None where the tokenizer's chat template does it."""

    text: str
    make: Callable[[Sequence[Message], str], list[Piece]] | None = None


def _plain(messages: Sequence[Message], eos: str) -> list[Piece]:
    """One question: it, a line break unless it ends in white space, the answer. More: the system's text, a blank line,
    and turns that say whose they are. EOS after each answer; after the last it is put by hand."""
    if [message["role"] for message in messages] == ["user", "assistant"]:
        prompt, answer = map(text_of, messages)
        return [
            (prompt, False, True),
            ("" if not prompt or prompt[-1].isspace() else "\n", False, False),
            (answer, True, False),
        ]
    pieces: list[Piece] = []
    for index, message in enumerate(messages):
        said, role = text_of(message), message["role"]
        if role in ("system", "developer"):
            pieces += [(said, False, True), ("\n\n", False, False)]
        elif role == "user":
            pieces += [("User: ", False, False), (said, False, True), ("\n", False, False)]
        else:
            ended = [] if index + 1 == len(messages) else [(eos, is_learnt(message), False), ("\n", False, False)]
            pieces += [("Assistant: ", False, False), (said, is_learnt(message), False), *ended]
    return pieces


def _none(messages: Sequence[Message], eos: str) -> list[Piece]:
    """The contents as they are, nothing between."""
    return [(text_of(message), is_learnt(message), message["role"] != "assistant") for message in messages]


_MAKERS = {"plain": _plain, "none": _none}

TEMPLATES = {name: Template(text, _MAKERS.get(name)) for name, text in values.TEMPLATES.items()}
"""By the names that `--template` takes, beside module:function and path/to/file.py:function."""


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    tools: Sequence[Any] | None = None,
) -> list[Rendered]:
    """The conversation as a text, or as one for each of its answers where the template renders them differently.

    messages: `role` and `content` (a text, or a list of parts of the kind text), also `tool_calls`. tools: JSON
    schemas. What comes after the last answer is left out, unless all is learnt.
    Raises ValueError in words that follow "row 3: ".
    """
    check(messages)
    if not any(map(is_learnt, messages)):
        silent = any(message["role"] == "assistant" for message in messages)
        raise ValueError(
            "all of the assistant's messages have the weight 0; there is nothing to learn"
            if silent
            else "no message is an assistant's; there is nothing to learn an answer from"
        )
    make = _made_by(style.template, tokenizer)
    if make is None:
        return render_chat(messages, tokenizer, style, tools)
    if style.train_on == "assistant":
        messages = messages[: 1 + max(i for i, message in enumerate(messages) if is_learnt(message))]
    return [_put_together(_pieces(messages, tokenizer, make, tools), style)]


def prompt_of(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    tools: Sequence[Any] | None = None,
) -> list[int]:
    """The tokens up to where the assistant begins to answer: what generation starts from. A last answer is left out.

    Raises ValueError as `render`.
    """
    check(messages)
    before = list(messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages)
    make = _made_by(style.template, tokenizer)
    if make is None:
        return encode(tokenizer, open_chat(before, tokenizer, style, tools))
    shown = []
    for probe in ("Zq7", "Kx4"):
        answered = [*before, {"role": "assistant", "content": probe}]
        shown.append(_put_together(_pieces(answered, tokenizer, make, tools), replace(style, train_on="all")).text)
    ids = encode(tokenizer, shown[0][: common(*shown)].rstrip())
    bos = tokenizer.bos_token_id
    return [bos, *ids] if isinstance(bos, int) and ids[:1] != [bos] else ids


def check_template(style: Style, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError where there is no such template, whatever the rows are."""
    try:
        _made_by(style.template, tokenizer)
    except ValueError as error:
        raise InputError(f"--template {style.template}: {error}") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of the text alone; special tokens that it writes out are tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _made_by(name: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Message], str], list[Piece]] | None:
    if name == "auto":
        name = "chat" if has_template(tokenizer) else "plain"
    if name == "chat" and not has_template(tokenizer):
        raise ValueError("the tokenizer has no chat template; choose another template (plain, none)")
    if name in TEMPLATES:
        return TEMPLATES[name].make
    return _own(name, _changed(name))


def _changed(name: str) -> int:
    """When the file of a function of one's own was last written: in a notebook it may be edited between runs."""
    path = Path(name.rpartition(":")[0])
    return path.stat().st_mtime_ns if path.suffix == ".py" and path.is_file() else 0


def _pieces(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[Sequence[Message], str], list[Piece]],
    tools: Sequence[Any] | None,
) -> list[Piece]:
    called = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if make in (_plain, _none) and (tools or called):
        raise ValueError("tools are only rendered by a tokenizer's chat template that knows them")
    return make(messages, tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else "")


def _put_together(pieces: Sequence[Piece], style: Style) -> Rendered:
    """White space before what is learnt belongs to it, as lm-evaluation-harness has it (`TemplateLM._encode_pair`)."""
    text = "".join(said for said, _, _ in pieces)
    if style.train_on == "all":
        return Rendered(text, ((0, len(text)),), (), whole=False)
    targets: list[Span] = []
    contents: list[Span] = []
    position = 0
    for said, learnt, content in pieces:
        end = position + len(said)
        if learnt and targets and targets[-1][1] == position:
            targets[-1] = (targets[-1][0], end)
        elif learnt:
            least = targets[-1][1] if targets else 0
            targets.append((max(least, len(text[:position].rstrip())), end))
        elif content:
            contents.append((position, end))
        position = end
    kept = tuple((start, min(end, len(text[:end].rstrip()))) for start, end in contents)
    return Rendered(text, tuple(targets), tuple((a, b) for a, b in kept if a < b), whole=False)


@lru_cache(maxsize=8)
def _own(name: str, changed: int) -> Callable[[Sequence[Message], str], list[Piece]]:
    """A function of the caller's own, as it was then. Raises ValueError where there is none, and for what it gives."""
    function = _load(name)

    def make(messages: Sequence[Message], eos: str) -> list[Piece]:
        try:
            pieces = function([dict(message) for message in messages])
            given: list[tuple[Any, ...]] = list(map(tuple, pieces)) if isinstance(pieces, Iterable) else [()]
        except (Exception, SystemExit) as error:  # of the caller's own, anything
            words = visible(" ".join(str(error).split())[:WORDS_SHOWN])
            raise ValueError(f"the template {name} failed: {type(error).__name__}: {words}") from error
        if not all(len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], bool) for one in given):
            raise ValueError(f"the template {name} gave no list of (text, whether it is learnt)")
        if not any(said and learnt for said, learnt in given):
            raise ValueError(f"the template {name} gave nothing that is learnt")
        said_of = {text_of(message).strip() for message in messages}
        return [(said, learnt, not learnt and said.strip() in said_of) for said, learnt in given]

    return make


def _load(name: str) -> OwnFunction:
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"no such template: {name}{nearest(name, TEMPLATES)} (or give your own as module:function or "
            "path/to/file.py:function)"
        )
    try:
        if where.endswith(".py"):
            if not Path(where).is_file():
                raise ValueError(f"there is no file {where}")
            spec = importlib.util.spec_from_file_location(f"fedlotr_user_template_{Path(where).stem}", where)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function: OwnFunction = getattr(module, attribute)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the template {name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"the template {name} is no function")
    return function
