"""Where rows come from: the built-in sets, files, the Hugging Face hub, or a data set of the caller's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlotr.config.own import own_name
from fedlotr.config.values import is_data_id
from fedlotr.data.built_in import BUILT_IN, split_built_in
from fedlotr.data.canonical import alike, as_turns
from fedlotr.data.clients import one_client_each
from fedlotr.data.columns import CHAT, TEXT, Columns, Nested, Places, Table, but_unread, instead_of_chat
from fedlotr.data.formats import FORMATS, recognised, renamed
from fedlotr.data.formatted import Form, form_named, form_seen, held
from fedlotr.data.hub import fetch_data
from fedlotr.data.labels import are_numbers, label_among, may_be_classes
from fedlotr.data.layouts import Layout, layout_of, train_splits
from fedlotr.data.own_rows import read_rows
from fedlotr.data.readers import READERS, read_files
from fedlotr.data.scales import why_scale
from fedlotr.data.splits import HELD_OUT, choose_only, choose_test, split_tenth, take
from fedlotr.errors import InputError, nearest
from fedlotr.models.kinds import TASK_KINDS

if TYPE_CHECKING:
    import datasets

SHOWN = 5
"""Files and columns that a line names."""

OwnData = Mapping[str, Any]
"""Split -> its rows, in a form that `read_rows` takes; a `datasets.DatasetDict` is one."""


@dataclass(frozen=True)
class Source:
    """The rows of a data set.

    name: "pydoc", "pydoc-chat", the folder's or file's name, the hub id, or own:HASH. train: rows in file order. test:
    the split to evaluate on, with those of its columns that train has too. test_split: where test came from, in words.
    label_names: the classes where their names are known. sha256: of the rows of both, whatever the files' form.
    drawn: whether test is a part of what is otherwise trained on, and no split of its own.
    nested: the columns that are JSON.
    format: how the rows were read, where that was seen or said, and read_as: that in words, where it is not plain;
    texts: the columns that a task reads then; causal: whether it has no classes; instead: how the rows would be read if
    they had none.
    trained: the split or file that train is, in words. unread: files and splits that are neither. beside: columns of
    train of a kind that no task reads, or of text that is not named, and their kind; left_out: those that the task
    which is chosen leaves out. unnamed: columns that may be of labels, and are not said to be. notes: what the user
    must be told of the files. train_places, test_places: where the rows stand, of these None where they stand nowhere.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    test_split: str
    label_names: tuple[str, ...] | None
    sha256: str
    drawn: bool = False
    trained: str = "train"
    unread: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    unnamed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    train_places: Places | None = None
    test_places: Places | None = None
    nested: tuple[str, ...] = ()
    format: str = ""
    read_as: str = ""
    texts: tuple[str, ...] = ()
    causal: bool = False
    instead: str = ""

    @property
    def splits(self) -> str:
        """What is trained on, what is scored, and what was left unread, in words."""
        unread = f"; left unread: {', '.join(self.unread[:SHOWN])}" if self.unread else ""
        more = f" and {len(self.unread) - SHOWN} more" if len(self.unread) > SHOWN else ""
        columns = [f"'{name}'" if kind == TEXT else f"'{name}' ({kind})" for name, kind in self.left_out.items()]
        left = f"; columns not read: {', '.join(columns[:SHOWN])}" if columns else ""
        left += f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
        read = self.read_as and f" ({self.read_as})"
        return f"trained on {self.trained}{read}, scored on {self.test_split}{unread}{more}{left}"

    def read_by(self, columns: Collection[str]) -> Source:
        """As a task leaves it that reads these columns."""
        return replace(self, left_out={name: kind for name, kind in self.beside.items() if name not in columns})

    def as_conversations(self, columns: tuple[str, ...] = ("messages",)) -> Source:
        """With pairs of prompt and answer as turns, and with these columns; itself where it has none, or has them."""
        pairs = "messages" not in self.texts and {"prompt", "answer"} <= {*self.train.column_names}
        if not pairs and not ("messages" in self.texts and {*columns} - {*self.train.column_names} == {"tools"}):
            return self
        found = [rows.to_dict() for rows in (self.train, self.test)]
        train, test = (alike({name: [] for name in columns}, as_turns(rows) if pairs else rows)[1] for rows in found)
        made = source_of(self.name, train, test, self.test_split, self.label_names, self.drawn)
        return replace(self, train=made.train, test=made.test, sha256=made.sha256, texts=columns)

    def place(self, split: str, row: int) -> str:
        """Where a row of "train" or "test" stands, as a message begins: its file and line, if it has any."""
        return self.places(split)[row]

    def places(self, split: str) -> Places:
        """Where the rows of "train" or "test" stand."""
        places, rows = (self.train_places, self.train) if split == "train" else (self.test_places, self.test)
        if places is not None:
            return places
        words = f"--data {self.name}, {'train' if split == 'train' else self.test_split}, row"
        return Places.of(words, np.arange(1, len(rows) + 1))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Names:
    """Which columns are the texts, the label and the clients', where they are not called as the tasks call them.

    text: one name or two; label: one. causal: whether two texts are a prompt and its answer though there are labels.
    client: the column that names the clients, where one does; client_if_unlabelled: it does so in data without classes
    alone. grouped: the column that `dirichlet` deals by, where it does not deal by the label. told: whether numbers of
    rows may be said. nested: whether columns of lists and objects are wanted.
    format: how the rows are read, where that is said. columns: (what a format calls a column, what the files do).
    asked: the task that is asked for, if one is. hidden: whether nothing may be said of single rows.
    """

    text: tuple[str, ...] = ()
    label: str | None = None
    causal: bool = False
    client: str | None = None
    client_if_unlabelled: bool = False
    grouped: str | None = None
    told: bool = True
    nested: bool = False
    format: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    asked: str = ""
    hidden: bool = False

    @property
    def label_in_files(self) -> str | None:
        """What the column of the labels is called there, where that is said."""
        return self.label or dict(self.columns).get("label")

    @property
    def needs_labels(self) -> bool:
        """Whether a task is asked for that learns labels."""
        return self.asked in TASK_KINDS and TASK_KINDS[self.asked].headed

    def form_of(self, table: Table) -> Form | None:
        """How the rows of train are read, where that is said or seen and they have no classes. Raises InputError."""
        if self.nested or self.text:
            return None
        label = self.label or label_among([*table.columns, *table.nested])
        if self.format is not None:
            labels = {"label": table.columns[label]} if label in table.columns else {}
            form = form_named(self.format, table._replace(columns=table.columns | labels), self.hidden)
            if form.labelled and self.causal:
                raise InputError(f"--format {self.format} with --task causal-lm: its rows have labels; leave one out")
            if self.needs_labels and not form.labelled:
                raise InputError(f"--format {self.format} with --task {self.asked}: its rows have no labels")
            if self.needs_labels and form.scale != TASK_KINDS[self.asked].scale:
                has = "numbers on a scale" if form.scale else "classes"
                raise InputError(
                    f"--format {self.format} with --task {self.asked}: its labels are {has}; leave one out"
                )
            return form
        if self.needs_labels or (label is not None and not self.causal):
            return None
        return form_seen(table, self.hidden)

    def with_usual(self, table: Table) -> Names:
        """With the texts of labelled rows by names that are usual for them, where no others are said or there."""
        labelled = self.label or label_among(table.columns)
        own = self.text or self.causal or self.nested or self.format is not None
        if own or labelled is None or not {*_TEXTS}.isdisjoint(table.columns):
            return self
        found = (names for names in USUAL_TEXTS if all(_are_texts(table.columns.get(name, ())) for name in names))
        usual = next(found, None)
        return self if usual is None else replace(self, text=usual)

    def passed_over(self, table: Table, read: Collection[str]) -> str:
        """What to say of columns that a format would read beside those that are named; nothing where there are none.

        table: under the files' own names. read: the columns that are read, by these names.
        """
        option = "--text-column" if len(self.text) == 2 else "--columns" if self.columns else ""
        seen = form_seen(table) if option and not self.nested else None
        whole = list(seen.columns(table).values()) if seen is not None else []
        lost = ", ".join(f"'{name}'" for name in whole if name not in read)
        if seen is None or not lost or not {*read} < {*whole}:
            return ""
        return f"{option} leaves {lost} out, which the format {seen.name} reads; without it all are read"

    def client_of(self, columns: Columns) -> str | None:
        """Which of the columns names the clients, if any does."""
        if self.client not in columns or not self.client_if_unlabelled or self.causal:
            return self.client if self.client in columns else None
        label = self.label or label_among(columns)
        return self.client if label is None or self._on_scale(columns.get(label, [])) else None

    def _on_scale(self, labels: Sequence[Any]) -> bool:
        """Whether a task takes labels as numbers on a scale, as far as those of train tell."""
        if self.asked in TASK_KINDS:
            return TASK_KINDS[self.asked].scale
        return (self.format in FORMATS and FORMATS[self.format].scale) or why_scale([labels]) != ""

    def unread(self, kinds: Mapping[str, str]) -> list[str]:
        """What is wrong where a column that is asked for is there, but is none that is read. kinds: what these are."""
        if self.nested:  # they are JSON then
            return []
        asked = [("--text-column ", name) for name in self.text]
        asked += [("--label-column ", self.label)] if self.label else []
        asked += [("--partition natural:", self.client)] if self.client and not self.client_if_unlabelled else []
        asked += [("--partition dirichlet:ALPHA:", self.grouped)] if self.grouped else []
        return [
            f"{option}{name}: '{name}' is {instead_of_chat(name)}"
            if kinds[name] == CHAT
            else f"{option}{name}: '{name}' is {kinds[name]}, which is not read; expected text or numbers"
            + (", dates or times" if name in (self.client, self.grouped) else "")
            for option, name in asked
            if name in kinds
        ]

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

    def beside(self, table: Table) -> dict[str, str]:
        """The columns of a table that no task reads, and the texts that none reads which is not told so."""
        label = None if self.causal else self.label or label_among(table.columns)
        known = {*self.text, label, self.client_of(table.columns), self.grouped, *table.odd, *table.nested}
        texts = [name for name, values in table.columns.items() if name not in known and _are_texts(values)]
        return {name: TEXT for name in texts} | table.unread

    def unnamed(self, table: Table) -> tuple[str, ...]:
        """The columns of a table that may be of labels, where none is said or called so."""
        if self.causal or (self.label or label_among(table.columns)) is not None:
            return ()
        known = {*self.text, self.client_of(table.columns), self.grouped, "client", *table.odd}
        return tuple(name for name, values in table.columns.items() if name not in known and may_be_classes(values))


_TEXTS = ("text", "text_a", "text_b", "prompt", "answer")
USUAL_TEXTS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
)
"""What the texts of labelled rows are called in GLUE and in sets that look like it; pairs first."""


def _are_texts(values: Sequence[Any]) -> bool:
    """Whether some value is text, and no number that a file keeps as such."""
    return any(isinstance(value, str) and value and not are_numbers([value]) for value in values)


def load_source(
    data: str | OwnData,
    *,
    seed: int = 0,
    eval_split: str | None = None,
    names: Names | None = None,
    eval_data: str | None = None,
) -> Source:
    """Load a built-in set, a folder with a split train, a single file, a data set on the hub, or splits of one's own.

    The test split is `eval_split`, or the first with labels (where train has some) of `test`, `eval*`, `dev`, `val` and
    `validation` (or of other names with these words), or a tenth of train drawn with `seed`. eval_data: what else,
    named like `data`, has that split; its only one serves whatever its name, and none is drawn of train. A column that
    a row lacks is None; rows without any value are skipped. Nothing is written beside the data. Raises InputError for
    what is missing, and for what cannot be read.
    """
    names = names or Names()
    if not isinstance(data, str):
        return _load_own(data, seed, eval_split, names, eval_data)
    if data in BUILT_IN:
        if told := names.format or ",".join(map("=".join, names.columns)):
            option = "format" if names.format else "columns"
            raise InputError(f"--{option} {told}: --data {data} is built in, and read as it is; leave it out")
        return _load_built_in(data, eval_split, seed, names, eval_data)
    path, given = Path(data).expanduser(), f"--data {data}"
    name = path.resolve().name.split(".")[0] if path.is_file() else path.resolve().name
    if not path.exists() and is_data_id(data):
        path, name = fetch_data(data, READERS), data
    layout = layout_of(path, given)
    return _assemble(
        name,
        layout,
        lambda split: read_files(layout.files[split], given, names.label_in_files),
        seed,
        eval_split,
        names,
        given,
        eval_data,
    )


def _assemble(
    name: str,
    layout: Layout,
    read: Callable[[str], Table],
    seed: int,
    eval_split: str | None,
    names: Names,
    given: str,
    eval_data: str | None,
) -> Source:
    """Read the splits that are used, under the tasks' names of columns."""
    names, form, table, about = _train(read("train"), names, given)
    beside = names.beside(table) if form is None or form.entry is not None else {}  # a function of one's own gets all
    about |= {"trained": layout.trained, "beside": beside, "unnamed": names.unnamed(table)}
    about |= _seen(names, table) if form is None else {}
    table = table._replace(columns=names.apply(table.columns, "train"))
    if eval_data is not None:
        source = _evaluated_on(eval_data, eval_split, names, name, table, form)
        unread = (*(s for s in layout.files if s != "train"), *layout.others)
        return _with_turns(replace(source, unread=unread, **about))
    others = [split for split in layout.files if split != "train"]
    tables: dict[str, Table] = {}

    def columns_of(split: str) -> Columns:
        tables[split] = _scored(read(split), names, form, split, f"{given}, ")
        return _named(names, tables[split], split)

    test, words = choose_test(others, columns_of, table.columns, eval_split)
    if test is None:
        source = _of_a_tenth(table, seed, given, name, words)
    else:
        scored = list(tables)[-1]
        others.remove(scored)
        train, test = alike(table.columns, test)
        source = _located(source_of(name, train, test, words, table.label_names), table, tables[scored])
    told = source.notes
    if test is None and others and eval_split is None and not tables:
        told += (
            f"{given}: no split there is called as one to test on is, so {words} is scored; left unread: "
            f"{', '.join(others[:SHOWN])} (--eval-split names one)",
        )
    return _with_turns(replace(source, unread=(*others, *layout.others), notes=told, **about))


def _train(table: Table, names: Names, given: str) -> tuple[Names, Form | None, Table, dict[str, Any]]:
    """The rows to train on as their format reads them, what a source says of that, and the names as they are then."""
    given_so, table = table, renamed(table, names.columns, "train")
    names = replace(
        names, client=next((known for known, there in names.columns if there == names.client), names.client)
    )
    form, about = names.form_of(table), {}
    read = (
        names.text if form is None else [dict(names.columns).get(name, name) for name in form.columns(table).values()]
    )
    lost = names.passed_over(given_so, read)
    if form is not None:
        names = replace(names, causal=names.causal or (names.format is not None and not form.labelled))
        words = form.in_words(table, dict(names.columns))
        table, texts = form.read(table, f"{given}, train", [names.client or ""])
        about = {"format": form.name, "read_as": words, "texts": texts, "causal": not form.labelled}
        if not any(table.columns.values()):
            raise InputError(f"{given}: no row of train has an answer to learn ({words or form.name})")
    if form is None and (usual := names.with_usual(table)) is not names:
        names = usual
        about = {"read_as": f"read as {'pair' if len(usual.text) == 2 else 'text'} + label: {' + '.join(usual.text)}"}
    if lost and not names.hidden:
        table = table._replace(notes=(*table.notes, f"{given}: {lost}"))
    table = _asked_for(table, names, "train")
    if problems := names.unread(table.unread):
        raise InputError(problems)
    if (client := names.client_of(table.columns)) is not None:
        clients, notes = one_client_each(client, table.columns[client], told=names.told)
        table = table._replace(columns={**table.columns, client: clients}, notes=(*table.notes, *notes))
    return names, form, table, about


def _scored(table: Table, names: Names, form: Form | None, where: str, whose: str = "") -> Table:
    """The rows of another split, read as those of train are, or by their own format where they have another.

    where: the split, for messages; whose: begins it where it does not say of what data.
    """
    table = renamed(table, names.columns, where, strict=False)
    if form is not None:
        form = form if form.fits(table) else form_seen(table, names.hidden)
        table = form.read(table, f"{whose}{where}", [names.client or ""])[0] if form is not None else table
    return _asked_for(table, names, where)


def _seen(names: Names, table: Table) -> dict[str, Any]:
    """What a source says of the format of rows that have classes, or may have. table: under the files' own names."""
    if names.nested:
        return {}
    named = names.apply(table.columns, "train")
    there = held(table._replace(columns=named))
    seen = recognised(there, labelled=True) if "label" in named and not names.causal else None
    if seen is None:
        return {"instead": recognised(there, labelled=False) or ""}
    return {"format": seen, "texts": tuple(FORMATS[seen].gives)}


def _with_turns(source: Source) -> Source:
    """With its texts as they are where pairs have become conversations."""
    if source.texts == ("prompt", "answer") and "prompt" not in source.train.column_names:
        return replace(source, texts=("messages", *(["tools"] if "tools" in source.train.column_names else [])))
    return source


def _located(source: Source, train: Table, test: Table) -> Source:
    """With what the tables of its two splits say of their files."""
    return replace(
        source,
        notes=tuple(dict.fromkeys((*train.notes, *test.notes))),
        nested=tuple(name for name in train.nested if name in source.train.column_names),
        train_places=train.places if len(train.places) else None,
        test_places=test.places if len(test.places) else None,
    )


def _with_nested(table: Table, names: Names, split: str) -> Table:
    """With the columns of lists and objects as JSON, where a task of the caller's own may read them.

    Raises InputError where such a column has the labels, or is all there is, and the task is one of ours.
    """
    if names.nested:
        columns = {name: _as_json(column) for name, column in table.nested.items()}
        return table._replace(columns={**table.columns, **{name: text for name, text in columns.items() if text}})
    label = names.label or label_among([*table.columns, *table.nested])
    if (
        label is not None
        and label in table.nested
        and (names.label or (not names.causal and label_among(table.columns) is None))
    ):
        where = table.places.words[0].rpartition(",")[0] if table.places.words else split
        raise InputError(
            f"{where}: '{label}' is {table.nested[label].kind}; expected a class index or name, one a row (several are "
            "not there yet); a language model of the texts is --task causal-lm"
        )
    if not table.columns:
        raise InputError(
            f"{split} has no column of text or numbers; an OwnTask can read such columns{but_unread(table.unread)}"
        )
    return table


def _as_json(column: Nested) -> list[str | None] | None:
    """Each value as JSON; None where some value is none of JSON's, such as an image."""
    try:
        return [None if value is None else json.dumps(value, ensure_ascii=False) for value in column.read()]
    except (TypeError, ValueError, RecursionError, NotImplementedError):
        return None


def _asked_for(table: Table, names: Names, split: str) -> Table:
    """Without the columns that no task learns from, where they are not asked for; that is said."""
    table = _with_nested(table, names, split)
    wanted = {*names.text, names.label or label_among(table.columns), names.client_of(table.columns), names.grouped}
    left_out = {name: kind for name, kind in table.odd.items() if name not in wanted}
    if not left_out:
        return table
    kept = {name: values for name, values in table.columns.items() if name not in left_out}
    said = ", ".join(f"'{name}' ({kind})" for name, kind in list(left_out.items())[:SHOWN])
    more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    note = f"{split}: {said}{more}: passed over, as no task reads such a column; --partition natural:COLUMN can"
    return table._replace(columns=kept, notes=(*table.notes, note))


def _of_a_tenth(table: Table, seed: int, given: str, name: str, words: str) -> Source:
    """A source whose test split is a seeded tenth of its rows."""
    train, test = split_tenth(len(next(iter(table.columns.values()), [])), seed, given)
    source = source_of(name, take(table.columns, train), take(table.columns, test), words, table.label_names, True)
    parts = [table._replace(places=table.places.take(rows)) if len(table.places) else table for rows in (train, test)]
    return _located(source, *parts)


def _named(names: Names, table: Table, split: str) -> Columns:
    if not {*names.text, names.label} - {None} <= set(table.columns):  # the task says what this split lacks
        return table.columns
    return names.apply(table.columns, split)


def _evaluated_on(
    eval_data: str, eval_split: str | None, names: Names, name: str, table: Table, form: Form | None = None
) -> Source:
    """A source whose test split comes from elsewhere. table: train, under the tasks' names; form: how it was read."""
    given, train, labels = f"--eval-data {eval_data}", table.columns, table.label_names
    if eval_data in BUILT_IN:
        public = split_built_in(eval_data, 0, None)
        there = {"test": Table(public.test, public.label_names)}
    else:
        path = Path(eval_data).expanduser()
        if not path.exists() and is_data_id(eval_data):
            path = fetch_data(eval_data, READERS, given)
        files = layout_of(path, given, train=False).files
        chosen = [split for split in files if eval_split in (None, split)] or list(files)
        there = {
            split: _scored(read_files(files[split], given, names.label_in_files), names, form, f"{given}, {split}")
            for split in chosen
        }
    read = {split: _named(names, found, f"{given}, {split}") for split, found in there.items()}
    test, words = choose_only(list(read), read.__getitem__, train, eval_split, given)
    scored = next((split for split in there if words.partition(" ")[0] == split), words)
    own = there[scored].label_names if scored in there else None
    if labels is not None and own is not None and labels != own:
        raise InputError(
            f"{given}: its classes are {', '.join(own[:5])}…, and those of --data {', '.join(labels[:5])}…"
        )
    train, test = alike(train, test)
    source = source_of(name, train, test, f"{words} of {given}", labels)
    return _located(source, table, there.get(scored, Table({})))


def _load_built_in(data: str, eval_split: str | None, seed: int, names: Names, eval_data: str | None) -> Source:
    split = split_built_in(data, seed, None if eval_data is not None else eval_split)
    beside = names.beside(Table(split.train))
    if eval_data is not None:
        source = _evaluated_on(eval_data, eval_split, names, data, Table(split.train, split.label_names))
        return replace(source, beside=beside)
    drawn = eval_split == HELD_OUT
    source = source_of(data, split.train, split.test, split.tested, split.label_names, drawn)
    return replace(source, trained=split.trained, beside=beside)


def _load_own(data: OwnData, seed: int, eval_split: str | None, names: Names, eval_data: str | None) -> Source:
    splits = {str(name): rows for name, rows in data.items()} if isinstance(data, Mapping) else {"train": data}
    trained = train_splits(splits)
    if len(trained) != 1:
        found = "several splits to train on" if trained else "no split 'train'"
        hint = "" if trained else "; splits are given by name: {'train': ..., 'test': ...}"
        raise InputError(f"data: {found} among {', '.join(splits) or 'none'}{hint}")

    def read(split: str) -> Table:
        split = trained[0] if split == "train" else split
        return read_rows(f"data['{split}']", splits[split], names.label_in_files)

    layout = Layout({"train": [], **{split: [] for split in splits if split != trained[0]}}, trained[0])
    source = _assemble("", layout, read, seed, eval_split, names, "data", eval_data)
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
