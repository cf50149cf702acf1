"""From the words of a command line to values by key; and the help.

The options are the configuration's fields. What argparse cannot read is handed on as it is, for the validation to
report with all other mistakes: argparse itself would stop there.
"""

import argparse
import ast
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel

from fedlotr.adapters.kinds import BASES, TIES
from fedlotr.adapters.methods import METHODS
from fedlotr.config.partitions import PARTITIONS
from fedlotr.config.yaml_text import key_of
from fedlotr.fleet.modes import MODES

_PLACEHOLDERS = {
    "sample": "COUNT|SHARE",
    "max_examples": "int|none",
    "model": "ID|PATH",
    "data": "NAME|PATH",
    "format": "NAME|module:function|file.py:function",
    "columns": "NAME=COLUMN[,...]",
    "partition": "|".join(form.form for form in PARTITIONS.values()),
    "method": "|".join(METHODS),
    "basis": "|".join(BASES),
    "tie": "|".join(TIES),
    "targets": "all-linear|NAME,NAME|REGEX",
    "init_adapter": "PATH",
    "strategy": "NAME|module:Class|file.py:Class",
    "rank_pattern": "REGEX=RANK",
    "alpha_pattern": "REGEX=ALPHA",
    "strategy_arg": "KEY=VALUE",
    "clip_norm": "float|none",
    "link": "NAME|RATES[,...]",
    "mode": "|".join(MODES),
    "fleet": "NAME|FILE",
    "deadline": "SECONDS",
    "over_select": "FACTOR",
    "staleness": "NAME[:A[:B]]|module:function",
    "fault": "KIND:SHARE[,...]",
    "codec": "KIND[:DENSITY][+zstd]",
    "broadcast_codec": "[delta+]KIND[:DENSITY][+zstd]",
    "basis_codec": "KIND[+zstd]",
    "rebase": "T[:HOW]",
    "eval_data": "NAME|PATH",
    "eval_split": "NAME",
    "label_names": "FILE|NAME,NAME[,...]",
    "out": "FOLDER",
}
"""What the help shows for a value where the type alone does not say it."""

PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})
"""Options that are repeated, each with a pattern of layers' names, which may hold a sign of equality, and a number."""

_YAML = (".yaml", ".yml")


def flag_of(key: str) -> str:
    """The option of a key."""
    return "--" + key.replace("_", "-")


def option_parser(fields: type[BaseModel], sections: Mapping[str, str]) -> argparse.ArgumentParser:
    """The options of `python -m fedlotr.simulate` and its help; sections: the key each begins with, and its title."""
    parser = argparse.ArgumentParser(
        prog="python -m fedlotr.simulate",
        usage="python -m fedlotr.simulate [CONFIG.yaml] [options]",
        description="Fine-tune a model with a federation of simulated clients. "
        "Options win over CONFIG.yaml, whose keys have the options' names.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=110),
        allow_abbrev=False,
        exit_on_error=False,
    )
    group: Any = parser
    for name, field in fields.model_fields.items():
        key = field.alias or name
        if key in sections:
            group = parser.add_argument_group(sections[key])
        options: dict[str, Any] = {"metavar": _PLACEHOLDERS.get(key) or _kind(field.annotation)}
        if options["metavar"] == "bool":
            options = {"action": argparse.BooleanOptionalAction}
        elif key in ("strategy_arg", *PATTERNS):
            options["action"] = "append"
        # Where a field is left open, off or empty, its description says what that means.
        shown = "" if str(field.default) in ("None", "none", "False", "{}") else f" (default: {field.default})"
        text = f"{field.description}{shown}"
        group.add_argument(flag_of(key), dest=key, default=argparse.SUPPRESS, help=text, **options)
    return parser


def _kind(annotation: Any) -> str:
    """int, or {auto,int}: the type of a field, or the choices there are."""
    parts = [part for one in get_args(annotation) or [annotation] for part in get_args(one) or [one]]
    names = [part.__name__ if isinstance(part, type) else part for part in parts if part is not NoneType]
    words = [name for name in names if isinstance(name, str)]  # and no validator
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def read_words(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[dict[str, object], list[str]]:
    """Values by key, also of options that do not exist; and the words that are no options, a CONFIG.yaml first."""
    argv = [_with_hyphens(word) for word in argv]
    given = argparse.Namespace()
    unread: dict[str, object] = {}
    files: list[str] = []
    # One option at a time, so that a mistake in one leaves the others readable.
    starts = [index for index, word in enumerate(argv) if word.startswith("--")]
    for start, end in pairwise([0, *starts, len(argv)]):
        words = list(argv[start:end])
        try:
            _, rest = parser.parse_known_args(words, given)
        except argparse.ArgumentError:
            rest = words
        while rest:
            word = rest.pop(0)
            if not word.startswith("-"):
                files.append(word)
                continue
            option, _, value = word.partition("=")
            # What follows an unknown option is taken for its value, unless it looks like the CONFIG.yaml.
            if not value and rest and not rest[0].endswith(_YAML):
                value = rest.pop(0)
            unread[key_of(option)] = value
    read = vars(given)
    if "strategy_arg" in read:
        pairs = [pair.partition("=") for pair in read["strategy_arg"]]
        wrong = " ".join("".join(pair) for pair in pairs if not all(pair[:2]))
        read["strategy_arg"] = wrong or {name: _literal(value) for name, _, value in pairs}
    for key in PATTERNS & read.keys():
        cut = [pair.rpartition("=") for pair in read[key]]
        bad = next(("".join(pair) for pair in cut if not all(pair)), None)
        read[key] = bad if bad is not None else {pattern: number for pattern, _, number in cut}
    files.sort(key=lambda word: not (word.endswith(_YAML) or os.path.isfile(word)))
    return {**read, **unread}, files


def _with_hyphens(word: str) -> str:
    """An option spelt like its key, --max_examples=5, as the parser knows it."""
    option, equals, value = word.partition("=")
    return f"{option.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _literal(text: str) -> object:
    """The Python literal that a text is, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two for brackets nested very deeply
        return text
    return value
