"""CONFIG.yaml to values by key and back, with what is wrong in the file in a user's words.

Values are read as YAML 1.2 and JSON read them: 1e-3 is a number, 010 is ten, and neither 1:30 nor a date is one.
What is written is quoted wherever this reader or a plain YAML 1.1 reader would take text for something else.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from fedlotr.config.preflight import sibling
from fedlotr.errors import shorten

MAX_BYTES = 2**20
"""A configuration has a few kilobytes; what is larger is something else, such as data."""
MAX_VALUES = 10_000
"""Values in one file, each counted as often as it is referred to."""
DATA_SUFFIXES = (".jsonl", ".ndjson", ".gz", ".csv", ".tsv", ".parquet", ".json", ".txt")
FLOAT = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"


class _Reader(yaml.SafeLoader):
    """Whole numbers are decimal, numbers may have an exponent alone, dates are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML reads it from the class)
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Writer(yaml.SafeDumper):
    """Quotes text that YAML 1.1 leaves plain and `_Reader` reads as a number."""


_Reader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789"))
_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"(?:{FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"),
    list("-+0123456789."),
)
_Reader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Writer.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"{FLOAT}\Z"), list("-+0123456789."))


def key_of(word: str) -> str:
    """The key that an option, or the word before a colon in YAML, names."""
    return word.lstrip("-").replace("-", "_")


def read_yaml(path: Path, problems: list[str]) -> dict[str, object]:
    """The values a file sets, by key; what is wrong with the file as such is added to the problems."""
    text = _text(path, problems)
    if text is None:
        return {}
    hint = "; data are given by --data" if path.name.lower().endswith(DATA_SUFFIXES) else ""
    reader = _Reader("")
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        content = None if node is None else reader.construct_document(node)
    except yaml.YAMLError as error:
        problems.append(f"{shorten(path)}: not YAML ({_place(error)}){hint}")
        return {}
    # PyYAML converts tagged values (!!int, !!bool) with whatever errors Python has for them.
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        problems.append(f"{shorten(path)}: a value in it cannot be read ({type(error).__name__}: {error}){hint}")
        return {}
    except RecursionError:
        problems.append(f"{shorten(path)}: nested too deeply; expected lines of the form 'clients: 50'{hint}")
        return {}
    finally:
        reader.dispose()
    if content is None:
        return {}
    if not isinstance(content, dict):
        problems.append(f"{shorten(path)}: expected lines of the form 'clients: 50'{hint}")
        return {}
    if not _is_small(content):
        problems.append(f"{shorten(path)}: more than {MAX_VALUES:,} values, or one that holds itself{hint}")
        return {}
    problems += [f"{shorten(path)}: {problem}" for problem in _repeated(node)]
    return {key_of(str(key)): value for key, value in content.items()}


def to_yaml(key: str, value: object) -> str:
    """One key and its value as the lines of a file, without the last line break."""
    text: str = yaml.dump({key: value}, Dumper=_Writer, sort_keys=False, allow_unicode=True)
    return text.rstrip()


def _text(path: Path, problems: list[str]) -> str | None:
    """What a file says, without reading devices and large files; None, and a problem, where it is no text."""
    try:
        if path.is_dir():
            run = path / "config.yaml"
            instead = f", did you mean '{run}'?" if run.is_file() else "; a model is given by --model, data by --data"
            problems.append(f"{shorten(path)}: a folder; expected a configuration file{instead}")
            return None
        if path.exists() and not path.is_file():
            problems.append(f"{shorten(path)}: not a file; expected a configuration file such as run.yaml")
            return None
        if (size := path.stat().st_size) > MAX_BYTES:
            problems.append(
                f"{shorten(path)}: {size:,} bytes are too many for a configuration; data are given by --data"
            )
            return None
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{shorten(path)}: not text in UTF-8 (at byte {error.start + 1}); expected a CONFIG.yaml")
    except ValueError as error:  # a null byte in the name
        problems.append(f"{shorten(path)}: cannot be the name of a file ({error})")
    except OSError as error:
        problem = f"cannot read this configuration file ({error.strerror}){sibling(path)}; options begin with --"
        problems.append(f"{shorten(path)}: {problem}")
    return None


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
