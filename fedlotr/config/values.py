"""How single values of a configuration are read: each a function that returns the value or raises ValueError."""

import datetime
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import AfterValidator

from fedlotr.config.own import is_own
from fedlotr.config.partitions import read_partition
from fedlotr.config.plain import deeply, plain
from fedlotr.errors import nearest, shorten, written
from fedlotr.models.kinds import METRICS, TASK_KINDS

BUILT_IN_DATA = ("pydoc", "pydoc-chat")
"""Data sets that need no files."""

TASKS = ("auto", *TASK_KINDS)
TEMPLATES = {
    "auto": "the tokenizer's chat template where it has one, else plain",
    "chat": "the tokenizer's chat template",
    "plain": "the prompt, a line break, the answer; of more turns each says whose it is",
    "none": "what is there as it is, nothing between: for texts that are formatted already",
}
"""How a conversation is written out -> what that is."""
TEMPLATE_DATE = "2024-07-26"
"""Today, for templates that ask and where nobody says another."""

LARGEST = 2**31 - 1
"""What any whole number may be at most: what counts clients, rows and tokens has to fit the ledger's 32 bits."""
MAX_SEED = 2**63 - 1
"""A seed travels to the clients in a message, as a number of 64 bits."""
MAX_WEIGHT = 1e15
"""Of one client: the weights of all that there can be sum to a number with all its digits."""
MAX_ROUNDS = 99_999
"""The files of a round are in order by their names, which have five digits."""
MAX_LABELS = 10_000
"""Classes; more names than that are no label set."""
MAX_NAMES_BYTES = 10**7
"""Read of a file of them."""
MAX_PROCESSES = 1024
"""Workers, or threads of one: more is a slip of the finger, and would take the machine down."""
DATA_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w./-]+)?")
"""org/name, or org/name:folder for one of several folders of data in a repository."""
LONGEST_ID = 200


def is_data_id(given: str) -> bool:
    """Whether this can be a data set on the hub; a path into a folder that exists here is none."""
    return len(given) <= LONGEST_ID and DATA_ID.fullmatch(given) is not None and not Path(given).parent.is_dir()


def one_of(what: str, choices: Collection[str]) -> AfterValidator:
    """A validator that lets only these names through, and says which is the nearest."""

    def check(name: str) -> str:
        if name not in choices:
            raise ValueError(f"not a {what}{nearest(name, choices)}")
        return name

    return AfterValidator(check)


def read_sample(given: object) -> object:
    """Text to a number that keeps the point: '1' is one client, '1.0' all of them."""
    if isinstance(given, str):
        with_point = re.fullmatch(r"\d*\.\d+|\d+\.\d*", given.strip())
        given = float(given) if with_point else int(given) if re.fullmatch(r"\d{1,10}", given.strip()) else given
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise ValueError("expected a number of clients (10) or a share of them with a decimal point (0.2)")
    if isinstance(given, float) and not 0 < given <= 1:
        raise ValueError("a number with a decimal point is a share of the clients: expected more than 0.0, at most 1.0")
    if isinstance(given, int) and given < 1:
        raise ValueError("expected at least 1 client")
    if isinstance(given, int) and given > LARGEST:
        raise ValueError(f"expected at most {LARGEST} clients")
    return given


def read_cohort(given: object) -> object:
    """'auto', or a number of clients."""
    if given == "auto":
        return given
    count = int(given) if isinstance(given, str) and re.fullmatch(r"\d{1,10}", given) else given
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= LARGEST:
        raise ValueError("expected 'auto' or a number of clients, at least 1")
    return count


def read_max_length(given: object) -> object:
    """'auto', or a number of tokens."""
    if given == "auto":
        return given
    count = int(given) if isinstance(given, str) and re.fullmatch(r"\d{1,10}", given.strip()) else given
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= LARGEST:
        raise ValueError(f"expected 'auto' or a number of tokens from 2 to {LARGEST}")
    return count


def check_template(given: str) -> str:
    """Raises ValueError for what is neither one of the templates nor names a function."""
    where, colon, function = given.rpartition(":")
    if given not in TEMPLATES and not (colon and where and function.isidentifier()):
        raise ValueError(f"not a template{nearest(given, TEMPLATES)}; one of your own is module:function")
    return given


def check_date(given: str) -> str:
    """Raises ValueError for what is no date."""
    if re.fullmatch(r"\d{4}-\d\d-\d\d", given) is None:
        raise ValueError("expected a date as YYYY-MM-DD, such as 2026-01-01")
    datetime.date.fromisoformat(given)
    return given


def check_partition(given: str) -> str:
    """Raises ValueError for what is no partition, with the form that was meant."""
    read_partition(given)
    return given


def check_text_columns(given: str) -> str:
    """One name of a column, or two different ones."""
    columns = given.split(",")
    if not all(columns) or len(columns) > 2 or len(set(columns)) < len(columns):
        raise ValueError("expected the name of a column, or two different ones with a comma: NAME or FIRST,SECOND")
    return given


def read_columns(given: object) -> object:
    """What formats call columns, and what the data do, as one text: NAME=COLUMN with commas.

    given: such a text, or a mapping. As JSON where a name has a comma or a sign of equality.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return None
    pairs = deeply(given) if isinstance(given, Mapping) else columns_of(given) if isinstance(given, str) else None
    if not isinstance(pairs, dict) or not all(
        isinstance(name, str) and name for pair in pairs.items() for name in pair
    ):
        raise ValueError("expected names of columns, such as answer=output,prompt=instruction")
    for name in (name for pair in pairs.items() for name in pair):
        check_text(name, lines=False)
    if twice := next((column for column in pairs.values() if list(pairs.values()).count(column) > 1), None):
        raise ValueError(f"the column {shorten(twice)} stands there twice")
    plainly = not any(mark in name for pair in pairs.items() for name in pair for mark in ",={")
    return ",".join(f"{name}={column}" for name, column in pairs.items()) if plainly else json.dumps(pairs)


def columns_of(text: str) -> dict[str, str] | None:
    """The names in a text of `read_columns`, and the columns they stand for; None where it is not of the form."""
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None
    parts = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in parts]
    if len(set(names)) < len(names):
        return None
    return {name: column.strip() for name, (_, _, column) in zip(names, parts, strict=True)}


def check_task(given: str) -> str:
    """A task of ours, or the name of one that the caller brings."""
    if given not in TASKS and not is_own(given):
        raise ValueError(f"not a task{nearest(given, TASKS)}")
    return given


def read_client_rank(given: object) -> object:
    """Ranks in turn, or with shares, as one text."""
    text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given) if type(given) is int else given
    if not isinstance(text, str):
        return text
    text = text.replace(" ", "")
    turns, shares = r"[1-9]\d{0,8}", r"[1-9]\d{0,8}:(?=[\d.]*[1-9])(\d+\.?\d*|\.\d+)"
    if not any(re.fullmatch(f"{one}(,{one})*", text) for one in (turns, shares)):
        raise ValueError("expected ranks with commas, such as '4,8,16', or with shares, such as '4:0.5,8:0.3,16:0.2'")
    return text


def read_label_names(given: object) -> object:
    """Names of classes in their order as one text: with commas, or as a JSON list where a name has a comma.

    given: such a text, a list, or the name of a file with a name a line.
    """
    if given is None:
        return given
    if not isinstance(given, str | list | tuple):
        raise ValueError("expected the names of the classes in a list, in their order")
    found = _names_of(given) if type(given) is str else [plain(name) for name in given]
    names = [str(name) if type(name) is int else name for name in found]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("expected names of classes, none of them empty")
    names = [name.strip() for name in names]
    if len(names) < 2:
        raise ValueError(
            "expected two names or more with commas (no,maybe,yes), or a file that is there, a name a line"
        )
    if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise ValueError(f"{shorten(twice)} stands there twice")
    if len(names) > MAX_LABELS:
        raise ValueError(f"{len(names):,} names; expected {MAX_LABELS:,} or fewer")
    for name in names:
        check_text(name, lines=False)
    return json.dumps(names) if any("," in name or name.startswith("[") for name in names) else ",".join(names)


def read_score(given: object) -> object:
    """Names of metrics, from "macro_f1,matthews" or a list of them, each once, with commas. Raises ValueError."""
    parts = given.split(",") if isinstance(given, str) else given
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        return given
    names = [part.strip().replace("-", "_").lower() for part in parts]
    if unknown := next((name for name in names if name not in METRICS), None):
        hint = nearest(unknown, METRICS)
        raise ValueError(f"{shorten(unknown)!r} is no metric{hint}; there are {', '.join(METRICS)}")
    return ",".join(dict.fromkeys(names))


def label_names_of(text: str) -> tuple[str, ...]:
    """The names in what `read_label_names` gave."""
    return tuple(json.loads(text) if text.startswith("[") else text.split(","))


def _names_of(text: str) -> list[Any]:
    if text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list):
            return found
    try:
        path = Path(text).expanduser()
        if not path.is_file():
            return text.split(",")
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read(MAX_NAMES_BYTES).splitlines()
    except (OSError, ValueError, RuntimeError) as error:
        if "," in text and not isinstance(error, UnicodeError):
            return text.split(",")
        raise ValueError("expected names of classes with commas, or a file of text in UTF-8, a name a line") from None
    return [line for line in lines if line.strip()]


def read_targets(given: object) -> object:
    """Names of layers in a list, as PEFT takes them, as one text with commas."""
    if isinstance(given, list | tuple | set) and given and all(isinstance(name, str) for name in given):
        return ",".join(sorted(given) if isinstance(given, set) else given)
    return given


def check_targets(given: str) -> str:
    """Names of layers with commas, a regular expression, or all-linear."""
    try:
        re.compile(given)
    except re.error as error:
        raise ValueError(f"expected 'all-linear' or a regular expression of module names ({error})") from None
    return given


def read_patterns(given: object) -> dict[str, Any]:
    """Regular expressions of layers' names with a number each: a mapping, or one as text, 'k_proj|v_proj=64'."""
    if isinstance(given, str):
        pattern, equals, number = given.rpartition("=")
        given = {pattern: number} if equals and pattern else given
    if not isinstance(given, Mapping):
        raise ValueError("expected a pattern of layers' names and a number, such as 'k_proj|v_proj=64'")
    for pattern in given:
        try:
            check_text(_plain_name(plain(pattern)), lines=False)
            re.compile(str(plain(pattern)))
        except re.error as error:
            raise ValueError(f"{shorten(pattern)} is no regular expression of layers' names ({error})") from None
    return {str(plain(pattern)): plain(number) for pattern, number in given.items()}


def _held(value: object, name: str) -> object:
    """An argument of a strategy as YAML and JSON can hold it, so that config.yaml can. Raises ValueError otherwise."""
    if isinstance(value, list | tuple):
        return [_held(item, name) for item in value]
    if isinstance(value, dict):
        return {_plain_name(key): _held(item, name) for key, item in value.items()}
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} is not a number (nan)")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ValueError(
            f"{name} is of the type {type(value).__name__}; expected numbers, text, true, false, none, or lists of them"
        )
    return value


def _plain_name(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"expected names of arguments, and {written(key)} is none; a name is text")
    return key


def read_arguments(given: object) -> object:
    """The arguments of a strategy, as YAML and JSON can hold them."""
    if not isinstance(given, Mapping):
        return given
    return {_plain_name(plain(key)): _held(deeply(value), str(key)) for key, value in given.items()}


def check_text(given: str, *, lines: bool = True) -> None:
    """Raises ValueError for text that no file of ours can hold, or (lines=False) that no name is made of."""
    if not given.isprintable() and any("\ud800" <= character <= "\udfff" for character in given):
        raise ValueError("expected text in UTF-8, which this is not")
    if not lines and (odd := next((character for character in given if ord(character) < 32), None)) is not None:
        raise ValueError(f"expected text without control characters, such as {odd!r}")


def expand(path: Path) -> Path:
    """With the home folder for ~. Raises ValueError where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"there is no user whose home folder {path.parts[0]} is") from None
