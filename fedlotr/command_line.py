"""From the words of a command line, and the lines of a CONFIG.yaml, to values by field; and the help.

Words are read here and not by argparse, which only writes the help: argparse stops at the first mistake, and takes the
value of a misspelt option for the CONFIG.yaml.
"""

import argparse
import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import yaml
from pydantic.fields import FieldInfo

from fedlotr.adapters.methods import BASES, METHODS, TIES
from fedlotr.preflight import sibling

_KEYS = {"json_output": "json"}
"""Fields that options and YAML call otherwise: pydantic's models have a method `json`."""

_PLACEHOLDERS = {
    "sample": "N|SHARE",
    "max_examples": "N|none",
    "model": "ID|PATH",
    "data": "NAME|PATH",
    "partition": "iid|dirichlet:ALPHA|shards:K|natural[:COLUMN]",
    "method": "|".join(METHODS),
    "basis": "|".join(BASES),
    "tie": "|".join(TIES),
    "targets": "all-linear|REGEX",
    "strategy": "NAME|module:Class|file.py:Class",
    "strategy_arg": "KEY=VALUE",
    "clip_norm": "X|none",
    "eval_split": "NAME",
    "cohort": "auto|N",
    "out": "FOLDER",
}
"""What the help shows for a value where the type alone does not say it."""


def key_of(field: str) -> str:
    """The key of a field in YAML."""
    return _KEYS.get(field, field)


def flag_of(field: str) -> str:
    """The option of a field."""
    return "--" + key_of(field).replace("_", "-")


def field_of(word: str) -> str:
    """The field that an option or a key of YAML names."""
    name = word.lstrip("-").replace("-", "_")
    return next((field for field, key in _KEYS.items() if key == name), name)


def read_words(argv: Sequence[str], fields: Mapping[str, FieldInfo]) -> tuple[dict[str, object], list[str], list[str]]:
    """Options by field (also unknown ones, for the validation to report), CONFIG.yaml files, and problems."""
    values: dict[str, object] = {}
    arguments: dict[str, object] = {}
    files: list[str] = []
    problems: list[str] = []
    words = list(argv)
    while words:
        word, has_value, value = words.pop(0).partition("=")
        if not word.startswith("-"):
            files.append(word + has_value + value)
            continue
        field = field_of(word)
        known = fields.get(field)
        positive = field_of(word.removeprefix("--no-"))
        switch = fields.get(positive)
        if not has_value and switch is not None and switch.annotation is bool:
            values[positive] = not word.startswith("--no-")
            continue
        if not has_value and words and not words[0].startswith("--"):
            # What follows an unknown option is taken for its value, unless it looks like the CONFIG.yaml.
            if known is not None or not words[0].endswith((".yaml", ".yml")):
                value = words.pop(0)
        elif not has_value and known is not None:
            problems.append(f"{word}: expected a value after it")
            continue
        if field == "strategy_arg":
            name, is_pair, text = value.partition("=")
            if is_pair and name:
                arguments[name] = _literal(text)
            else:
                problems.append(f"{word} {value}: expected KEY=VALUE")
        else:
            values[field] = value
    if arguments:
        values["strategy_arg"] = arguments
    return values, files, problems


def _literal(text: str) -> object:
    """The Python literal that a text is, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value


def read_yaml(path: Path, problems: list[str]) -> dict[str, object]:
    """The fields a file sets; what is wrong with the file as such is added to the problems."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(
            f"{path}: cannot read this configuration file ({error.strerror}){sibling(path)}; options begin with --"
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not YAML ({' '.join(str(error).split())})")
    else:
        if content is None:
            return {}
        if isinstance(content, dict):
            return {field_of(str(key)): value for key, value in content.items()}
        problems.append(f"{path}: expected lines of the form 'clients: 50'")
    return {}


def usage(fields: Mapping[str, FieldInfo], sections: Mapping[str, str]) -> str:
    """The help of `python -m fedlotr.simulate`; sections: the field each begins with, and its title."""
    parser = argparse.ArgumentParser(
        prog="python -m fedlotr.simulate",
        usage="python -m fedlotr.simulate [CONFIG.yaml] [options]",
        description="Fine-tune a model with a federation of simulated clients. "
        "Options win over CONFIG.yaml, whose keys have the options' names.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=110),
    )
    add = parser.add_argument
    for name, field in fields.items():
        if name in sections:
            add = parser.add_argument_group(sections[name]).add_argument
        open_ended = field.default is None or field.annotation is bool or field.default == {}
        text = field.description or ""
        text = (text if open_ended else f"{text} (default: {field.default})").replace("%", "%%")
        if field.annotation is bool:
            add(flag_of(name), action="store_true", help=text)
        else:
            choices = "|".join(word for word in get_args(field.annotation) if isinstance(word, str))
            number = "N" if int in (field.annotation, *get_args(field.annotation)) else "X"
            add(flag_of(name), metavar=_PLACEHOLDERS.get(name, choices or number), help=text)
    return parser.format_help()
