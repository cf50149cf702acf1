"""A griffe extension: what docstrings say of arguments and fields, `name: text.` in a row, is a list on the page."""

import re
from typing import Any

import griffe


class HouseDocstrings(griffe.Extension):
    """Splits paragraphs where a sentence begins with the name of a parameter, a field or two of them, and a colon."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """As each object has been read, with its members."""
        if obj.docstring is not None and (names := _names(obj)):
            obj.docstring.value = listed(obj.docstring.value, names)


def _names(obj: griffe.Object) -> set[str]:
    if isinstance(obj, griffe.Function):
        return {parameter.name for parameter in obj.parameters}
    if isinstance(obj, griffe.Class):
        init = obj.members.get("__init__")
        given = {parameter.name for parameter in init.parameters} if isinstance(init, griffe.Function) else set()
        return given | {name for name, member in obj.members.items() if member.is_attribute}
    return set()


def listed(text: str, names: set[str]) -> str:
    """A docstring whose paragraphs of `name: text` are lists."""
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    start = re.compile(rf"(?:^|(?<=[.;:] )|(?<=\) ))((?:{name})(?:, (?:{name}))*): ")
    parts = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        cut = start.split(line)
        if len(cut) == 1 or paragraph.startswith("    "):
            parts.append(paragraph)
            continue
        items = [f"- `{names_}`: {said.strip()}" for names_, said in zip(cut[1::2], cut[2::2], strict=True)]
        parts += [*([cut[0].strip()] if cut[0].strip() else []), "\n".join(items)]
    return "\n\n".join(parts)
