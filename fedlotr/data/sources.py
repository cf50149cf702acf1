"""Where rows come from: the built-in set, files, the Hugging Face hub, or a data set of the caller's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlotr.config.own import own_name
from fedlotr.config.values import is_data_id
from fedlotr.data.hub import fetch_data
from fedlotr.data.labels import label_among
from fedlotr.data.pydoc import build_pydoc
from fedlotr.data.readers import READERS, Columns, Table, checked_columns, read_files
from fedlotr.data.splits import HELD_OUT, choose_only, choose_test, split_files, split_tenth
from fedlotr.errors import InputError, nearest

if TYPE_CHECKING:
    import datasets

PYDOC_SPLIT_SEED = 0
"""Fixed, so that runs of different seeds are tested on the same paragraphs."""

OwnData = Mapping[str, Any]
"""Split -> `datasets.Dataset`, `IterableDataset` (read to its end) or rows (mappings of column to value); a
`datasets.DatasetDict` is one."""


@dataclass(frozen=True)
class Source:
    """The rows of a data set.

    name: "pydoc", the folder's or file's name, the hub id, or own:HASH. train: rows in file order. test: the
    split to evaluate on, with those of its columns that train has too. test_split: where test came from, in words.
    label_names: the classes where their names are known. sha256: of the rows of both, whatever the files' form.
    drawn: whether test is a part of what is otherwise trained on, and no split of its own.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    test_split: str
    label_names: tuple[str, ...] | None
    sha256: str
    drawn: bool = False


@dataclass(frozen=True)
class Names:
    """Which columns are the texts and the label, where they are not called as the tasks call them.

    text: one name or two; label: one. causal: whether two texts are a prompt and its answer though there are labels.
    """

    text: tuple[str, ...] = ()
    label: str | None = None
    causal: bool = False

    def apply(self, columns: Columns, where: str) -> Columns:
        """The columns under the names that tasks know. Raises InputError for one that is not there."""
        problems = [
            f"--{option}-column {column}: {where} has no such column{nearest(column, columns)}"
            for option, column in [
                *(("text", name) for name in self.text),
                *([("label", self.label)] if self.label else []),
            ]
            if column not in columns
        ]
        if problems:
            raise InputError(problems)
        label = self.label or label_among(columns)
        pair = ("prompt", "answer") if self.causal or label is None else ("text_a", "text_b")
        renamed = dict(zip(self.text, ("text",) if len(self.text) == 1 else pair, strict=False))
        if label is not None and label not in renamed:
            renamed[label] = "label"
        kept = {name: values for name, values in columns.items() if name in renamed or name not in renamed.values()}
        if self.text:  # those that were meant, and no others that a task would prefer
            kept = {name: values for name, values in kept.items() if name in renamed or name not in _TEXTS}
        named = {renamed.get(name, name): values for name, values in kept.items()}
        if "label" in named:  # as a CSV file leaves a label out
            named["label"] = [None if value == "" else value for value in named["label"]]
        return named


_TEXTS = ("text", "text_a", "text_b", "prompt", "answer")


def load_source(
    data: str | OwnData,
    *,
    seed: int = 0,
    eval_split: str | None = None,
    names: Names | None = None,
    eval_data: str | None = None,
) -> Source:
    """Load "pydoc", a folder with a split train, a single file, a data set on the hub, or splits of one's own.

    The test split is `eval_split`, or the first with labels (where train has some) of `test`, `eval*`, `dev`, `val` and
    `validation`, or a tenth of train drawn with `seed`. eval_data: what else, named like `data`, has that split; its
    only one serves whatever its name, and none is drawn of train. A column that a row lacks is None. Nothing is
    written beside the data. Raises InputError for what is missing, and for what cannot be read.
    """
    names = names or Names()
    if not isinstance(data, str):
        return _load_own(data, seed, eval_split, names, eval_data)
    if data == "pydoc":
        return _load_pydoc(eval_split, seed, names, eval_data)
    path, given = Path(data).expanduser(), f"--data {data}"
    name = path.resolve().name.split(".")[0] if path.is_file() else path.resolve().name
    if not path.exists() and is_data_id(data):
        path, name = fetch_data(data, READERS), data
    files = split_files(path, given)
    return _assemble(
        name,
        list(files),
        lambda split: read_files(files[split], given, names.label),
        seed,
        eval_split,
        names,
        given,
        eval_data,
    )


def _assemble(
    name: str,
    splits: Sequence[str],
    read: Any,
    seed: int,
    eval_split: str | None,
    names: Names,
    given: str,
    eval_data: str | None,
) -> Source:
    """Read the splits that are used, under the tasks' names of columns."""
    table: Table = read("train")
    train, label_names = names.apply(table.columns, "train"), table.label_names
    if eval_data is not None:
        return _evaluated_on(eval_data, eval_split, names, name, train, label_names)
    others = [split for split in splits if split != "train"]
    test, words = choose_test(others, lambda split: _named(names, read(split).columns, split), train, eval_split)
    drawn = test is None
    if test is None:
        train, test = split_tenth(train, seed, given)
    return source_of(name, train, test, words, label_names, drawn)


def _named(names: Names, columns: Columns, split: str) -> Columns:
    if not {*names.text, names.label} - {None} <= set(columns):  # the task says what this split lacks
        return columns
    return names.apply(columns, split)


def _evaluated_on(
    eval_data: str, eval_split: str | None, names: Names, name: str, train: Columns, labels: tuple[str, ...] | None
) -> Source:
    """A source whose test split comes from elsewhere. labels: the names of the classes, where train's form has them."""
    given = f"--eval-data {eval_data}"
    if eval_data == "pydoc":
        public = _load_pydoc(None, 0, Names(), None)
        there = {"test": Table(public.test.to_dict(), public.label_names)}
    else:
        path = Path(eval_data).expanduser()
        if not path.exists() and is_data_id(eval_data):
            path = fetch_data(eval_data, READERS, given)
        files = split_files(path, given, train=False)
        chosen = [split for split in files if eval_split in (None, split)] or list(files)
        there = {split: read_files(files[split], given, names.label) for split in chosen}
    read = {split: _named(names, table.columns, f"{given}, {split}") for split, table in there.items()}
    test, words = choose_only(list(read), read.__getitem__, train, eval_split, given)
    own = next((there[split].label_names for split in there if words.startswith(split)), None)
    if labels is not None and own is not None and labels != own:
        raise InputError(
            f"{given}: its classes are {', '.join(own[:5])}…, and those of --data {', '.join(labels[:5])}…"
        )
    return source_of(name, train, test, f"{words} of {given}", labels)


def _load_pydoc(eval_split: str | None, seed: int, names: Names, eval_data: str | None) -> Source:
    if eval_data is None and eval_split not in (None, "test", HELD_OUT):
        raise InputError(f"--eval-split {eval_split}: pydoc has no such split{nearest(eval_split, ['test', HELD_OUT])}")
    rows, label_names = build_pydoc()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    train, test = split_tenth(columns, PYDOC_SPLIT_SEED, "--data pydoc")
    if eval_data is not None:
        return _evaluated_on(eval_data, eval_split, names, "pydoc", train, label_names)
    words = "a fixed tenth of the paragraphs"
    if eval_split == HELD_OUT:
        train, test = split_tenth(train, seed, "--data pydoc")
        words = "a seeded tenth of the other paragraphs, held out"
    return source_of("pydoc", train, test, words, label_names, eval_split == HELD_OUT)


def _load_own(data: OwnData, seed: int, eval_split: str | None, names: Names, eval_data: str | None) -> Source:
    import datasets

    splits = dict(data) if isinstance(data, Mapping) else {"train": data}
    for split, given in splits.items():
        if isinstance(given, str) or not (hasattr(given, "column_names") or isinstance(given, Iterable)):
            raise InputError(
                f"data['{split}'] is a {type(given).__name__}; expected a datasets.Dataset, or rows that are mappings "
                "of column to value"
            )
    if "train" not in splits:
        raise InputError(f"data: no split 'train' among {', '.join(map(str, splits)) or 'none'}")

    def read(split: str) -> Table:
        given = splits[split]
        features = getattr(given, "features", None) or {}
        feature = features.get(names.label or label_among(features))
        classes = tuple(getattr(feature, "names", ())) or None
        if isinstance(given, datasets.Dataset):
            columns = {name: list(given[name][:]) for name in given.column_names}
            return Table(checked_columns(f"data['{split}']", columns), classes)
        rows = list(given.with_format(None) if isinstance(given, datasets.IterableDataset) else given)
        if not all(isinstance(row, Mapping) for row in rows):
            raise InputError(
                f"data['{split}']: expected a datasets.Dataset, or rows that are mappings of column to value"
            )
        found = {column: [row.get(column) for row in rows] for column in dict.fromkeys(c for row in rows for c in row)}
        return Table(checked_columns(f"data['{split}']", found), classes)

    source = _assemble("", list(splits), read, seed, eval_split, names, "data", eval_data)
    return replace(source, name=own_name(source.sha256))


def source_of(
    name: str, train: Columns, test: Columns, words: str, label_names: tuple[str, ...] | None, drawn: bool = False
) -> Source:
    """A source of these columns; of test those that train has too."""
    import datasets

    test = {column: values for column, values in test.items() if column in train}
    digest = hashlib.sha256()
    for columns in (train, test):
        digest.update(json.dumps(columns, sort_keys=True).encode())
    splits = [datasets.Dataset.from_dict(columns) for columns in (train, test)]
    return Source(name, splits[0], splits[1], words, label_names, digest.hexdigest(), drawn)
