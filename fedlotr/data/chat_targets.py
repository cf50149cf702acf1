"""Which characters of a conversation's text are the assistant's: what a chat template shows when it is tried."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fedlotr.data.chat_template import REASONED, Chat, written
from fedlotr.data.conversation import Message, Rendered, Span, Style, common, forms, is_learnt, text_of, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNTHINKING = ("enable_thinking", "thinking")
"""Variables that close a reasoning which a template's generation prompt would else open."""
_PROBES = ("Zq7", "Kx4")
"""Answers that begin and end alike nowhere, and that no template holds."""
_PLACE = re.compile("\ue000(\\d+)\ue001")


def render_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, style: Style, tools: Sequence[Any] | None
) -> list[Rendered]:
    """By the chat template: one text, or one for each answer where a conversation's beginning is no text's beginning.

    What comes after the last answer is left out. Raises ValueError where the template refuses, leaves words out, or
    does not show where an answer begins.
    """
    last = max(index for index, message in enumerate(messages) if is_learnt(message))
    chat = Chat.of(tokenizer, style.date, tools)
    messages, text = chat.fit(messages if style.train_on == "all" else messages[: last + 1])
    if style.train_on == "all":
        return [Rendered(*_closed(chat, text, ((0, _end(chat, text)),)), (), whole=True)]
    targets = _marked(chat, messages, text) or _answers(chat, messages, text)
    if targets is not None:
        return [Rendered(*_closed(chat, text, targets), _contents(chat, messages, text, targets), whole=True)]
    return [_alone(chat, messages[: index + 1]) for index, message in enumerate(messages) if is_learnt(message)]


def open_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, style: Style, tools: Sequence[Any] | None
) -> str:
    """The text from which an assistant goes on after these messages: what answers follow that are learnt."""
    chat = Chat.of(tokenizer, style.date, tools)
    probe = {"role": "assistant", "content": _PROBES[0]}
    return _opening(chat, chat.fit([*messages, probe])[0][:-1])


def _answers(chat: Chat, messages: Sequence[Message], text: str) -> tuple[Span, ...] | None:
    """The answers' characters, each from the generation prompt's end to that of its turn; None where none shows."""
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if not is_learnt(message):
            continue
        start = _start(chat, messages[:index], text)
        end = _turn_end(chat, messages[: index + 1], text, last=index + 1 == len(messages))
        if start is None or end is None or end <= start or (spans and start < spans[-1][1]):
            return None
        spans.append((start, end))
    return tuple(spans)


def _start(chat: Chat, before: Sequence[Message], text: str) -> int | None:
    head = chat.tried(before, prompt=True)
    if head is not None and text.startswith(head):
        return len(head)
    for dropped, instead in chat.gaps.items():
        if head is not None and head.endswith(dropped) and text.startswith(head[: -len(dropped)] + instead):
            return len(head) - len(dropped) + len(instead)
    try:
        opening = _opening(chat, before, head)
    except ValueError:
        return None
    if not text.startswith(opening):
        return None
    if head is not None and (same := common(head, opening)) < len(head):
        chat.gaps[head[same:]] = opening[same:]
    return len(opening)


def _turn_end(chat: Chat, through: Sequence[Message], text: str, *, last: bool) -> int | None:
    if last:
        return _end(chat, text)
    closed = chat.tried(through)
    if closed is None:
        return None
    end = _end(chat, closed)
    return end if text.startswith(closed[:end]) else None


def _end(chat: Chat, text: str) -> int:
    """Where the last turn of a rendering ends: after its end-of-turn token, before white space and what only ends
    a conversation."""
    tail, mark = _ending(chat.tokenizer, chat.template, chat.date) or ("", "")
    if tail and text.endswith(tail):
        return len(text) - len(tail) + len(mark)
    return chat.trimmed(text, len(text))


def _closed(chat: Chat, text: str, targets: tuple[Span, ...]) -> tuple[str, tuple[Span, ...]]:
    """With EOS after the last answer, and as a part of it, where the template itself (GLM's) ends it by nothing."""
    eos = chat.tokenizer.eos_token
    ends = _ending(chat.tokenizer, chat.template, chat.date) != ("", "") or chat.marks
    if ends or not isinstance(eos, str) or text.endswith(eos) or targets[-1][1] != len(text):
        return text, targets
    return text + eos, (*targets[:-1], (targets[-1][0], len(text + eos)))


def _opening(chat: Chat, before: Sequence[Message], head: str | None = None) -> str:
    """What an answer to these messages follows: the generation prompt where answers are rendered after it.

    Some prompts begin a reasoning that no message holds: such a template is asked not to reason, and else what
    precedes any answer counts. Raises ValueError where not even that shows.
    """
    head = head or chat.tried(before, prompt=True)
    shown = [chat.render([*before, {"role": "assistant", "content": probe}]) for probe in _PROBES]
    stem = shown[0][: common(*shown)]
    if head is None:
        return stem
    if stem.startswith(head):
        return head
    for name in _UNTHINKING:
        if name in chat.template:
            quiet = chat.tried(before, prompt=True, **{name: False})
            if quiet is not None and stem.startswith(quiet):
                return quiet
    start = chat.retreat(common(head, stem), head, stem)
    done = chat.tried(before)
    covered = 0 if done is None else common(done[: _end(chat, done)], stem)
    if start < covered or start == 0:
        raise ValueError("the chat template does not show where an assistant's turn begins")
    return stem[:start]


def _alone(chat: Chat, messages: Sequence[Message]) -> Rendered:
    """The last answer of these messages, as an example of its own. Raises ValueError where it does not show."""
    text = chat.render(messages)
    start, end = _start(chat, messages[:-1], text), _end(chat, text)
    if start is None or end <= start:
        raise ValueError(
            "the chat template does not show which part is the assistant's: what it renders before an answer is no "
            "beginning of what it renders with it"
        )
    targets = ((start, end),)
    return Rendered(*_closed(chat, text, targets), _contents(chat, messages, text, targets), whole=True)


def _marked(chat: Chat, messages: Sequence[Message], text: str) -> tuple[Span, ...] | None:
    """The answers' characters by the template's own marks; None where it has none, they do not fit, or
    some answer is not to be learnt, which no mark says."""
    if not chat.marks or any(message["role"] == "assistant" and not is_learnt(message) for message in messages):
        return None
    shown, marks = chat.marked(messages)
    if shown != text:
        return None
    spans = [(start, chat.trimmed(text, end)) for start, end in marks if start < end]
    answer = text_of(messages[-1]).split(REASONED)[-1].strip()
    held = any(answer in text[start:end] for start, end in spans)
    return tuple(spans) if held and all(a[1] <= b[0] for a, b in pairwise(spans)) else None


def _contents(chat: Chat, messages: Sequence[Message], text: str, targets: Sequence[Span]) -> tuple[Span, ...]:
    """Where the words of messages stand that are not learnt, as far as that shows."""
    words = [said for message in messages for said in texts_of(message) if said.strip()]
    spans = _found(words, text)
    if spans is None:
        marks = [f"\ue000{number}\ue001" for number in range(len(words))]
        replaced = chat.tried(_replaced(messages, iter(marks)))
        spans = [] if replaced is None else _filled(replaced, words, text)
    return tuple(span for span in spans if not any(a < span[1] and span[0] < b for a, b in targets))


@lru_cache(maxsize=16)
def _ending(tokenizer: PreTrainedTokenizerBase, template: str, date: datetime.date) -> tuple[str, str] | None:
    """What this template writes after the last answer, and how much of it belongs to the answer's turn.

    That is what stands there too where a conversation goes on, without white space at its end: the end-of-turn token. A
    template that ends its last turn otherwise (gpt-oss) is taken at its word. None where trying shows nothing.
    """
    chat, probe = Chat(tokenizer, template, date), _PROBES[0]
    for form in forms([{"role": role, "content": probe} for role in ("user", "assistant", "user")]):
        texts = [chat.tried(form[:2]), chat.tried(form)]
        if all(text is not None and text.count(probe) == count for text, count in zip(texts, (2, 3), strict=True)):
            tail, more = (text.split(probe)[2] for text in texts if text is not None)
            start, more = len(probe), probe + more
            end = chat.retreat(common(probe + tail, more), probe + tail, more)
            shared = (probe + tail)[start:end].rstrip()
            return tail, shared or tail.rstrip() or tail
    return None


def _found(words: Sequence[str], text: str) -> list[Span] | None:
    """Where each stands, if it stands in one place alone."""
    spans = []
    for said in words:
        shown = said.strip()
        start = text.find(shown)
        if start < 0 or text.find(shown, start + 1) >= 0:
            return None
        spans.append((start, start + len(shown)))
    return spans


def _replaced(messages: Sequence[Message], marks: Iterator[str]) -> list[dict[str, Any]]:
    def mark(said: str) -> str:
        return next(marks) if said.strip() else said

    replaced = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = mark(content)
        elif content is not None:
            content = [{**part, "text": mark(part["text"])} for part in content]
        replaced.append({**message, "content": content})
    return replaced


def _filled(replaced: str, words: Sequence[str], text: str) -> list[Span]:
    """Where words stand in a text, as far as it agrees with the one that was rendered with marks in their places."""
    framing = _PLACE.split(replaced)
    if not text.startswith(framing[0]):
        return []
    spans, position = [], len(framing[0])
    for number, after in zip(framing[1::2], framing[2::2], strict=True):
        if int(number) >= len(words):  # not one of ours
            break
        said = words[int(number)]
        shown = [form for word in (said, said.strip(), said.rstrip(), said.lstrip()) for form in written(word)]
        found = next((form for form in shown if text.startswith(form + after, position)), None)
        if found is None:
            break
        spans.append((position, position + len(found)))
        position += len(found) + len(after)
    return spans
