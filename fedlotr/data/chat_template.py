"""A tokenizer's own chat template, and what it writes.

Templates are programs from a model's folder. They run in transformers' sandbox alone, and nothing is taken for granted
of them but what trying shows.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedlotr.data.conversation import Message, Span, forms, texts_of
from fedlotr.errors import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATES = {"date_string": "%d %b %Y", "current_date": "%Y-%m-%d", "currentDate": "%Y-%m-%d"}
"""Variables by which templates take a date, in the form in which those that use them write one."""
_ASKS = re.compile(rf"\b(strftime_now|{'|'.join(DATES)})\b")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CODES = ("%d", "%b", "%B", "%Y", "%m", "%y", "%A", "%a", "%H", "%M", "%S", "%p", "%I", "%j")
_TODAY = """\
{%- macro strftime_now(format) %}{% set told = namespace(text=format) %}{% for code, value in fedlotr_date.items() %}\
{% set told.text = told.text | replace(code, value) %}{% endfor %}{{ told.text }}{% endmacro %}
"""
"""Before a template that asks for today's date: transformers lets no function in, a template may bring its own."""
WORDS_SHOWN = 300
"""Characters of what a template says of what it refuses."""
REASONED = "</think>"
"""What ends a reasoning."""


class RefusedError(ValueError):
    """A template cannot render these messages; the message holds its own words."""


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what the tokenizer's chat template writes depends on a date."""
    return any(_ASKS.search(text) for text in _templates(tokenizer))


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(_templates(tokenizer))


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template = getattr(tokenizer, "chat_template", None)
    return list(template.values()) if isinstance(template, Mapping) else [template] if template else []


class Chat:
    """A chat template at work, for conversations with the same tools.

    special: the texts that are one token wherever they stand. marks: whether the template says itself what is the
    assistant's. gaps: ends of generation prompts that no answer follows, and what precedes answers instead.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, date: datetime.date, tools: Any = None
    ) -> None:
        self.tokenizer, self.template, self.date, self.tools = tokenizer, template, date, tools
        self.special = _special(tokenizer, len(tokenizer))
        self._dated, self._variables = _dated(template, date)
        self.marks = _MARKS.search(template) is not None
        self.gaps: dict[str, str] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, date: datetime.date, tools: Any = None) -> Chat:
        """By the tokenizer's own template. Raises ValueError where it has none, or several and no default."""
        try:
            template = tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise ValueError(f"the tokenizer has no chat template to use ({' '.join(str(error).split())})") from None
        return cls(tokenizer, template, date, tools) if tools else _chat(tokenizer, template, date)

    def render(self, messages: Sequence[Message], prompt: bool = False, **variables: Any) -> str:
        """The template's text. prompt: with what an assistant's turn begins with. RefusedError has its words."""
        given: Any = messages
        try:
            text = self.tokenizer.apply_chat_template(
                given,
                tools=self.tools,
                chat_template=self._dated,
                tokenize=False,
                add_generation_prompt=prompt,
                **self._variables,
                **variables,
            )
        except Exception as error:  # a template is a program of others
            words = visible(" ".join(str(error).split())[:WORDS_SHOWN]) or type(error).__name__
            raise RefusedError(f"the chat template refuses: {words}") from error
        if not isinstance(text, str):
            raise RefusedError("the chat template gives no text")
        return text

    def tried(self, messages: Sequence[Message], prompt: bool = False, **variables: Any) -> str | None:
        """As `render`; None where the template refuses."""
        try:
            return self.render(messages, prompt, **variables) if messages else None
        except RefusedError:
            return None

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and the characters that the template marks as the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        told: Any = [{key: value for key, value in message.items() if value is not None} for message in messages]
        found: Any = render_jinja_template(  # a pair, unlike what it says of itself
            conversations=[told],
            tools=self.tools,
            chat_template=self._dated,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self._variables},
        )
        return found[0][0], found[1][0]

    def fit(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], str]:
        """The messages in the first form of which every word is rendered, and that text.

        Raises ValueError with what is wrong with the form that was given.
        """
        problem: ValueError | None = None
        for form in forms(messages):
            try:
                text = self.render(form)
                _complete(form, text, self.tools)
                return form, text
            except ValueError as error:
                problem = problem or error
        assert problem is not None
        raise ValueError(str(problem)) from problem

    def retreat(self, position: int, *texts: str) -> int:
        """The position, or the beginning of a special token that it lies within in one of the texts."""
        for token in self.special:
            for text in texts:
                found = text.find(token, max(0, position - len(token) + 1), position + len(token) - 1)
                if -1 < found < position:
                    position = found
        return position

    def trimmed(self, text: str, end: int) -> int:
        """Without white space after a special token."""
        shown = text[:end].rstrip()
        return len(shown) if shown.endswith(self.special) else end


@lru_cache(maxsize=16)
def _chat(tokenizer: PreTrainedTokenizerBase, template: str, date: datetime.date) -> Chat:
    return Chat(tokenizer, template, date)


@lru_cache(maxsize=16)
def _special(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str, ...]:
    return tuple(token for token in tokenizer.get_added_vocab() if token.strip())


def _dated(template: str, date: datetime.date) -> tuple[str, dict[str, Any]]:
    """The template that takes this day for today, and the variables that tell it."""
    variables: dict[str, Any] = {
        name: date.strftime(form) for name, form in DATES.items() if re.search(rf"\b{name}\b", template)
    }
    if "strftime_now" in template:
        template = _TODAY + template
        variables["fedlotr_date"] = {
            "%-d": str(date.day),
            "%-m": str(date.month),
            **{code: date.strftime(code) for code in _CODES},
        }
    return template, variables


def _complete(messages: Sequence[Message], text: str, tools: Sequence[Any] | None) -> None:
    """Raises ValueError where words of these messages are not in the text. Of an answer its end is enough: templates
    drop earlier reasoning."""
    for number, message in enumerate(messages, 1):
        role, said = message["role"], [part.strip() for part in texts_of(message)]
        if role == "assistant":
            said = [part.split(REASONED)[-1].strip()[-20:] for part in said]
        listed = isinstance(message.get("content"), list) and str(message["content"]) in text
        if listed or not all(_holds(text, part) for part in said):
            raise ValueError(f"the chat template leaves out what message {number} ({role}) says")
        for call in message.get("tool_calls") or []:
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            given = function.get("arguments")
            values = given.values() if isinstance(given, Mapping) else ()
            wanted = [function.get("name"), *(value for value in values if isinstance(value, str))]
            if not all(isinstance(word, str) and _holds(text, word.strip()) for word in wanted):
                raise ValueError(f"the chat template leaves out the tool calls of message {number} ({role})")
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or name not in text:
            raise ValueError(f"the chat template leaves out the tool {name!r}")


def _holds(text: str, words: str) -> bool:
    return any(form in text for form in written(words))


def written(words: str) -> tuple[str, ...]:
    """Words as they are, and as JSON writes them."""
    return words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]
