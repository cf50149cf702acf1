"""A YAML text to values by key, with what is wrong in it in a user's words.

Values are read as YAML 1.2 and JSON read them: 1e-3 is a number, 010 is ten, and neither 1:30 nor a date is one.
"""

import re
from typing import Any

import yaml

from fedlotr.errors import shorten

MAX_VALUES = 10_000
"""Values in one file, each counted as often as it is referred to."""
FLOAT = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"


class _Reader(yaml.SafeLoader):
    """Whole numbers are decimal, numbers may have an exponent alone, dates are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML reads it from the class)
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Reader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789"))
_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"(?:{FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"),
    list("-+0123456789."),
)
_Reader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def key_of(word: str) -> str:
    """The key that an option, or the word before a colon in YAML, names."""
    return word.lstrip("-").replace("-", "_")


def mapping(text: str, name: str, problems: list[str], *, expected: str, hint: str = "") -> dict[str, object]:
    """The values a text sets, by key; what is wrong with it is added to the problems.

    name: of its file. expected: a line as it should be. hint: what else there is to say of a file that is no such text.
    """
    reader = _Reader("")
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        content = None if node is None else reader.construct_document(node)
    except yaml.YAMLError as error:
        problems.append(f"{name}: not YAML ({_place(error)}){hint}")
        return {}
    # PyYAML converts tagged values (!!int, !!bool) with whatever errors Python has for them.
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        problems.append(f"{name}: a value in it cannot be read ({type(error).__name__}: {error}){hint}")
        return {}
    except RecursionError:
        problems.append(f"{name}: nested too deeply; expected lines of the form '{expected}'{hint}")
        return {}
    finally:
        reader.dispose()
    if content is None:
        return {}
    if not isinstance(content, dict):
        problems.append(f"{name}: expected lines of the form '{expected}'{hint}")
        return {}
    if not _is_small(content):
        problems.append(f"{name}: more than {MAX_VALUES:,} values, or one that holds itself{hint}")
        return {}
    problems += [f"{name}: {problem}" for problem in _repeated(node)]
    return {key_of(str(key)): value for key, value in content.items()}


def _place(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def _is_small(content: dict[Any, Any]) -> bool:
    """Whether all values, written out, are few: an anchor can refer to itself, or grow without bounds."""
    count, waiting = 0, [content]
    while waiting and count <= MAX_VALUES:
        value: Any = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | set | tuple):
            waiting += value
    return count <= MAX_VALUES


def _repeated(node: Any) -> list[str]:
    """Keys that are set twice, of which YAML would silently keep the last."""
    lines: dict[str, int] = {}
    problems = []
    for name, _ in node.value:
        key, line = key_of(str(name.value)), name.start_mark.line + 1
        if key in lines:
            problems.append(
                f"{shorten(name.value)} is set in line {lines[key]} and again in line {line}; keep one of them"
            )
        lines[key] = line
    return problems
