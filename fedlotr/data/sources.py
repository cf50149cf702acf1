"""Where rows come from: the built-in set, or a folder of JSON lines with a train and a test split."""

from __future__ import annotations

import difflib
import fnmatch
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlotr.data.pydoc import build_pydoc
from fedlotr.errors import InputError, nearest
from fedlotr.streams import generator

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".jsonl.gz")
TEST_NAMES = ("test", "eval*", "dev", "val", "validation")
"""Splits to test on, best first."""

PYDOC_SPLIT_SEED = 0
"""Fixed, so that runs of different seeds are tested on the same paragraphs."""

PROBLEMS_SHOWN = 3
"""Broken lines named per file; a file that is of another kind altogether has one in each line."""

KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
UNREAD = {"a list", "an object", "a number beyond 64 bits"}

_Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Source:
    """The rows of a data set.

    name: "pydoc" or the folder's name. train: rows in file order. test: the split to evaluate on, with those of its
    columns that train has too. test_split: where test came from, in words. label_names: the classes where their names
    are known. sha256: of the rows of both, whatever the files' compression.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    test_split: str
    label_names: tuple[str, ...] | None
    sha256: str


def load_source(data: str, *, seed: int = 0, eval_split: str | None = None) -> Source:
    """Load "pydoc" or a folder with `train.jsonl` or `train.jsonl.gz`.

    The test split is `eval_split`, or the first with labels (where train has some) of `test`, `eval*`, `dev`, `val` and
    `validation`, or a tenth of train drawn with `seed`. A column that a row lacks is None. Nothing is written.
    Raises InputError for a missing folder or split, and for lines that are no JSON objects.
    """
    if data == "pydoc":
        return _load_pydoc(eval_split)
    folder = Path(data).expanduser()
    files = _split_files(folder, data)
    if "train" not in files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "an empty folder"
        raise InputError(f"--data {data}: no split to train on; expected train.jsonl or train.jsonl.gz, found {found}")
    train = _read(files.pop("train"))
    test, words = _choose_test(files, train, eval_split)
    if test is None:
        train, test = _split_tenth(train, seed, data)
    return _source(folder.resolve().name, train, test, words, None)


def _load_pydoc(eval_split: str | None) -> Source:
    if eval_split not in (None, "test"):
        raise InputError(f"--eval-split {eval_split}: pydoc has no such split{nearest(eval_split, ['test'])}")
    rows, label_names = build_pydoc()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    train, test = _split_tenth(columns, PYDOC_SPLIT_SEED, "pydoc")
    return _source("pydoc", train, test, "a fixed tenth of the paragraphs", label_names)


def _split_files(folder: Path, data: str) -> dict[str, Path]:
    """Split name -> file, in the order of the names."""
    if folder.is_file():
        raise InputError(f"--data {data}: a file; expected the folder that holds it, {folder.parent}")
    if not folder.is_dir():
        raise InputError(f"--data {data}: no such folder{_nearest_folder(folder)}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        for suffix in SUFFIXES:
            if path.is_file() and path.name.endswith(suffix):
                split = path.name.removesuffix(suffix)
                if split in files:
                    raise InputError(f"--data {data}: both {files[split].name} and {path.name}; keep one of them")
                files[split] = path
    return files


def _nearest_folder(folder: Path) -> str:
    parent = folder.parent
    if not parent.is_dir():
        return f", nor is there {parent}; give a folder or 'pydoc'"
    choices = {path.name: str(path) for path in parent.iterdir() if path.is_dir()} | {"pydoc": "pydoc"}
    close = difflib.get_close_matches(folder.name, choices, n=1)
    return f", did you mean '{choices[close[0]]}'?" if close else "; give a folder or 'pydoc'"


def _choose_test(files: dict[str, Path], train: _Columns, eval_split: str | None) -> tuple[_Columns | None, str]:
    """The columns of the split to test on, and where they came from; None where no file serves."""
    if eval_split is not None:
        if eval_split not in files:
            hint = nearest(eval_split, files) if files else "; the folder holds train only"
            raise InputError(f"--eval-split {eval_split}: no such split{hint}")
        test = _read(files[eval_split])
        if _labelled(train) and not _labelled(test):
            raise InputError(f"--eval-split {eval_split}: {files[eval_split]} has no labels; train has")
        return test, eval_split
    passed_over: list[str] = []
    for pattern in TEST_NAMES:
        for name in fnmatch.filter(files, pattern):
            test = _read(files[name])
            if _labelled(test) or not _labelled(train):
                return test, " ".join([name, *_reasons(passed_over)])
            passed_over.append(name)
    return None, " ".join(["a seeded tenth of train", *_reasons(passed_over)])


def _reasons(passed_over: list[str]) -> list[str]:
    if not passed_over:
        return []
    return [f"({' and '.join(passed_over)} {'has' if len(passed_over) == 1 else 'have'} no labels)"]


def _labelled(columns: _Columns) -> bool:
    """Whether some row has a label; hidden ones are None or, as in GLUE, -1."""
    return any(label not in (None, -1) for label in columns.get("label", []))


def _split_tenth(columns: _Columns, seed: int, data: str) -> tuple[_Columns, _Columns]:
    count = len(next(iter(columns.values())))
    if count < 2:
        raise InputError(f"--data {data}: one row cannot be split in train and test; add rows or a test.jsonl")
    chosen = set(generator(seed, "test-split").permutation(count)[: max(1, count // 10)].tolist())
    train = {name: [value for row, value in enumerate(column) if row not in chosen] for name, column in columns.items()}
    test = {name: [value for row, value in enumerate(column) if row in chosen] for name, column in columns.items()}
    return train, test


def _source(name: str, train: _Columns, test: _Columns, words: str, label_names: tuple[str, ...] | None) -> Source:
    import datasets

    test = {column: values for column, values in test.items() if column in train}
    digest = hashlib.sha256()
    for columns in (train, test):
        digest.update(json.dumps(columns, sort_keys=True).encode())
    splits = [datasets.Dataset.from_dict(columns) for columns in (train, test)]
    return Source(name, splits[0], splits[1], words, label_names, digest.hexdigest())


def _read(path: Path) -> _Columns:
    """The columns of a file of JSON lines; those of lists or objects, which no task reads, are left out."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    problems: list[str] = []
    try:
        for number, line in _lines(path):
            try:
                rows.append(_row(line))
                numbers.append(number)
            except ValueError as error:
                problems.append(f"--data: {path}, line {number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"--data: {path} cannot be read: {error}")
    if not rows and not problems:
        problems.append(f"--data: {path} is empty; expected one JSON object a line")
    columns: _Columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        kinds: dict[str, int] = {}
        for value, number in zip(values, numbers, strict=True):
            kinds.setdefault(_kind(value), number)
        kinds.pop("null", None)
        if len(kinds) > 1:
            (first, above), (kind, number), *_ = kinds.items()
            problems.append(f"--data: {path}, line {number}: '{name}' is {kind}, but {first} in line {above}")
        elif name == "label" and not UNREAD.isdisjoint(kinds):
            problems.append(f"--data: {path}: 'label' is {next(iter(kinds))}; expected a class index or name")
        elif UNREAD.isdisjoint(kinds):
            decimal = any(isinstance(value, float) for value in values)
            columns[name] = [float(value) if decimal and value is not None else value for value in values]
    if rows and not columns and not problems:
        problems.append(f"--data: {path} has no column of text or numbers")
    if len(problems) > PROBLEMS_SHOWN:
        problems[PROBLEMS_SHOWN:] = [f"--data: {path}: {len(problems) - PROBLEMS_SHOWN} more problems"]
    if problems:
        raise InputError(problems)
    return columns


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1 as an editor does."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _row(line: bytes) -> dict[str, Any]:
    """One object; raises ValueError in words that fit after a colon."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if rb"\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f'expected an object such as {{"text": "..."}}, found {_kind(row)}')
    return row


def _kind(value: object) -> str:
    if type(value) is int and not -(2**63) <= value < 2**63:
        return "a number beyond 64 bits"
    return KINDS[type(value)]
