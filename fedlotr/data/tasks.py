"""What is learnt from the rows of a data set, and the rows as token sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedlotr.data.columns import TEXT, but_unread
from fedlotr.data.conversation import Style
from fedlotr.data.formats import FORMATS, Held, recognised
from fedlotr.data.labels import Labels, Place, are_numbers, class_indices, class_names, row_problems, unshared
from fedlotr.data.language import Encoded as Written
from fedlotr.data.language import encode_language
from fedlotr.data.scales import scale_values, why_scale, without_label
from fedlotr.data.seen import Seen, look
from fedlotr.data.sources import Source
from fedlotr.errors import InputError, nearest
from fedlotr.models.kinds import TASK_KINDS

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from fedlotr.training.examples import Examples

HEADED, GOING_ON = (("text",), ("text_a", "text_b")), (("prompt", "answer"), ("text",))
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    name: HEADED if kind.headed else GOING_ON for name, kind in TASK_KINDS.items()
}
"""Task -> the text columns it can read, the preferred ones first, where no format says which."""
DOUBT = (
    "--data {name}: all labels are whole numbers written with a decimal point, taken as a scale (regression); "
    "--task classification takes them as classes"
)
COLUMNS_SHOWN = 5
"""That a message names."""


@dataclass(frozen=True)
class Task:
    """What is learnt from which columns.

    columns: the text columns it reads. label_names: the classes in the order of their indices; empty where there are
    none. by_name: whether a number in the data is the name of a class, as 1, 2 and 3 are or those of
    `--label-names 3,2,1`, and not its index. joined: whether a label may differ from its class in case, white space and
    Unicode form. doubt: what is to be said of how labels are taken.
    """

    kind: Literal["classification", "regression", "causal-lm"]
    columns: tuple[str, ...]
    label_names: tuple[str, ...]
    by_name: bool = False
    joined: bool = False
    doubt: str = ""

    @property
    def headed(self) -> bool:
        """Whether rows have labels, and a head reads the model out."""
        return TASK_KINDS[self.kind].headed

    @property
    def scale(self) -> bool:
        """Whether labels are numbers on a scale."""
        return TASK_KINDS[self.kind].scale

    @property
    def outputs(self) -> int:
        """Numbers that the head makes of a text; 0 without one."""
        return 1 if self.scale else len(self.label_names)

    def labels(self, rows: datasets.Dataset, place: Place | None = None) -> Labels:
        """(rows,) class indices, or numbers on a scale; zeros for a causal language model.

        place: where a row stands, for messages (default: its number). Raises InputError that names the rows whose label
        is missing or none of this task.
        """
        if not self.headed:
            return np.zeros(len(rows), np.int64)
        if self.scale:
            numbers, problems = scale_values("--data", rows["label"][:], place)
            if problems:
                raise InputError(problems)
            return numbers
        indices, problems = self.indices("--data", rows, place)
        if problems:
            raise InputError(problems)
        return indices

    def indices(
        self, where: str, rows: datasets.Dataset, place: Place | None = None
    ) -> tuple[npt.NDArray[np.int64], list[str]]:
        """(rows,) class indices, and what is wrong with labels that are no class.

        where, place: the rows, and where each stands, for messages.
        """
        forms = {"by_name": self.by_name, "joined": self.joined}
        return class_indices(where, rows["label"][:], self.label_names, **forms, place=place)


def resolve_task(
    kind: str,
    source: Source,
    label_names: tuple[str, ...] | None = None,
    *,
    joined: bool = False,
    told: bool = True,
) -> Task:
    """The task that `kind` ("auto" or one of `TASK_KINDS`) is on this source, every row checked.

    "auto" is, where train has a column `label`, regression if `why_scale` says that labels are a scale, else
    classification, unless a format without labels was asked for. Whole
    numbers as labels are indices of the names that the source has, or else the classes that there are, in their order
    and named by their numbers; names as labels are classes in sorted order. label_names: the classes in their order,
    where they are settled whatever the rows hold.
    joined: whether labels that are equal but for case, white space or Unicode form are one class. told: whether a
    message may say which labels rows have.
    Raises InputError for an unknown kind, missing columns, rows without text and rows without a valid label.
    """
    if kind not in ("auto", *COLUMNS):
        raise InputError(f"--task {kind}: no such task{nearest(kind, ['auto', *COLUMNS])}")
    asked = kind != "auto"
    if kind == "causal-lm" or (kind == "auto" and (source.causal or "label" not in source.train.column_names)):
        if label_names is not None:
            raise InputError("--label-names: a language model has no labels; leave it out, or give --label-column")
        columns = _text_columns("causal-lm", (), source)
        if kind == "auto" and (doubt := _perhaps_labelled(source, columns)):
            raise InputError(f"--data {source.name}: {doubt}")
        return Task("causal-lm", columns, ())
    entry = FORMATS.get(source.format)
    columns = _text_columns("regression" if kind == "regression" else "classification", ("label",), source)
    if kind == "regression" or (not asked and entry is not None and entry.scale):
        return _on_scale(source, Task("regression", columns, ()), told=told)
    if not asked and label_names is None and source.label_names is None and not joined:
        why = why_scale([rows["label"][:] for _, rows, _ in _splits(source)])
        if why:
            doubt = DOUBT.format(name=source.name) if why == "point" else ""
            return _on_scale(source, Task("regression", columns, (), doubt=doubt), told=told, asked=False)
    if label_names is None:
        return _with_labels(source, columns, joined=joined, told=told, asked=asked)
    by_name = source.label_names is None and are_numbers(label_names)
    task = Task("classification", columns, label_names, by_name, joined)
    _check_labels(source, task, told=told)
    return task


def _perhaps_labelled(source: Source, columns: tuple[str, ...]) -> str:
    """What to say of rows that may well have labels and do not say so; nothing where all is plain."""
    if columns != ("text",) or not source.unnamed:
        return ""
    named = ", ".join(f"'{name}'" for name in source.unnamed[:COLUMNS_SHOWN])
    more = f" and {len(source.unnamed) - COLUMNS_SHOWN} more" if len(source.unnamed) > COLUMNS_SHOWN else ""
    return (
        f"text beside whole numbers ({named}{more}), and no column label; give the column of the labels by "
        f"--label-column {source.unnamed[0]}, or --task causal-lm to learn the text alone"
    )


def _numbers_as_text(source: Source) -> str:
    """What to say of columns that a format would read, were the numbers in them texts; nothing where there is none."""
    kinds = {name: feature.dtype for name, feature in source.train.features.items()}
    texts: dict[str, Held] = dict.fromkeys(kinds, "text")
    name = recognised(texts, labelled=False)
    read = (FORMATS[name].columns(texts) or {}).values() if name is not None else ()
    wrong = [f"'{column}'" for column in read if kinds[column] != "string"]
    return f"; the format {name} would read it, were {' and '.join(wrong)} text and not numbers" if wrong else ""


def _splits(source: Source) -> list[tuple[str, datasets.Dataset, Place]]:
    """How messages name each split, its rows, and where each of these stands."""
    name = f"--data {source.name}"
    return [
        (f"{name}, train", source.train, partial(source.place, "train")),
        (f"{name}, {source.test_split}", source.test, partial(source.place, "test")),
    ]


def _text_columns(kind: str, others: tuple[str, ...], source: Source) -> tuple[str, ...]:
    """The text columns of this kind of task: in both splits, with text in every row."""
    present = source.train.column_names
    settled = source.texts and source.causal != TASK_KINDS[kind].headed
    usable = [
        columns for columns in ([source.texts] if settled else COLUMNS[kind]) if {*columns, *others} <= {*present}
    ]
    if not usable:
        expected = " or ".join(" + ".join([*columns, *others]) for columns in COLUMNS[kind])
        instead = f"; --task causal-lm reads it as {source.instead}" if source.instead and kind != "causal-lm" else ""
        instead = instead or _numbers_as_text(source)
        unread = {name: what for name, what in source.beside.items() if what != TEXT}
        raise InputError(
            f"--data {source.name}: --task {kind} needs the columns {expected}; train has {', '.join(present)}; "
            f"say which are which by --columns, or --text-column and --label-column{instead}{but_unread(unread)}"
        )
    problems: list[str] = []
    for where, rows, place in _splits(source):
        missing = [column for column in (*usable[0], *others) if column not in rows.column_names]
        if missing:
            problems.append(f"{where}: no column {' or '.join(missing)}, unlike train; choose another --eval-split")
        for column in (column for column in usable[0] if column not in missing):
            if column == "tools":  # where a conversation has some
                continue
            bad = {row: text for row, text in enumerate(rows[column][:]) if not isinstance(text, str)}
            problems += row_problems(where, column, bad, "text", place)
    if problems:
        raise InputError(problems)
    return usable[0]


def _check_labels(source: Source, task: Task, *, told: bool) -> None:
    """Raises InputError where a row has another label than one of the task's, by its name or its index."""
    names, own = task.label_names, source.label_names
    if own is not None and own != names:  # what the rows hold are indices of these
        raise InputError(
            f"--label-names: --data {source.name} names its classes {', '.join(own[:10])}; give just these"
        )
    problems: list[str] = []
    for where, rows, place in _splits(source):
        found = task.indices(where, rows, place)[1]
        if found and not told:
            found = [f"{where}: some label is none of the {len(names)} that --label-names gives (which, is private)"]
        problems += found
    if problems:
        raise InputError(problems)


def _on_scale(source: Source, task: Task, *, told: bool, asked: bool = True) -> Task:
    """The task, once every row of both splits has a number. asked: whether it was asked for, so that -1 is one too."""
    problems: list[str] = []
    different: set[float] = set()
    for of, rows, place in _splits(source):
        values = rows["label"][:]
        numbers, found = scale_values(of, values, place)
        found = found or ([] if asked else without_label(of, numbers, values, place))
        if found and not told:
            found = [f"{of}: some label is no finite number, or -1 for none (which, is private); leave such rows out"]
        problems += found
        different |= set(numbers.tolist())
    if len(different) == 1 and not problems:
        problems = [f"--data {source.name}: every label is the same; --task regression needs different ones"]
    if problems:
        raise InputError(problems)
    return task


def _with_labels(source: Source, columns: tuple[str, ...], *, joined: bool, told: bool, asked: bool) -> Task:
    """The task with the classes that labels say there are, once every row of both splits has one.

    asked: whether classes are asked for.
    """
    where = f"--data {source.name}"
    splits = [(of, rows["label"][:]) for of, rows, _ in _splits(source)]
    names, by_name = class_names(where, splits, source.label_names, joined=joined, told=told, asked=asked)
    task = Task("classification", columns, names, by_name, joined)
    problems = []
    for of, rows, place in _splits(source):
        found = task.indices(of, rows, place)[1]
        if found and not told:
            found = [f"{of}: some row has no label, or -1 for none (which, is private); leave such rows out"]
        problems += found
    if len(names) == 1 and not problems:
        of = names[0] if told else "the same"
        problems = [f"{where}: every label is {of}; --task classification needs two classes or more"]
    if problems:
        raise InputError(problems)
    return task


def unshared_classes(source: Source, task: Task, *, told: bool = True) -> list[str]:
    """Lines on how labels are taken, and that name the classes that a split has no row of.

    told: whether they may tell of the rows of train.
    """
    if not task.label_names:
        return [task.doubt] if task.doubt else []
    train, test = (set(task.labels(rows).tolist()) for rows in (source.train, source.test))
    name = f"--data {source.name}"
    return unshared(name, source.test_split, task.label_names, train, test, told=told)


class Encoded(NamedTuple):
    """Rows as examples. seen: of each example. owner: (examples,) the row that each is of, ascending; a row whose text
    has no room is none's. rows: how many there were."""

    examples: Examples
    seen: Seen
    owner: npt.NDArray[np.int64]
    rows: int

    @property
    def left_out(self) -> int:
        """Rows that are no examples."""
        return self.rows - len(np.unique(self.owner))


def encode(task: Task, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Examples:
    """The rows as token sequences, in the same order, each of 1 to `max_length` tokens; see `encode_rows`."""
    return encode_rows(task, rows, tokenizer, max_length).examples


def encode_rows(
    task: Task,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    style: Style | None = None,
    *,
    place: Place | None = None,
    several: bool = True,
    hidden: bool = False,
) -> Encoded:
    """The rows as examples, in their order, each of 1 to `max_length` tokens (None: however long).

    With labels: the tokenizer's own form with its special tokens; `segments` where it tells the sentences of a pair
    apart. A text of no tokens becomes one EOS. Language models: as `encode_language` has it.

    style: how a conversation is written out. place: where a row stands, for messages (default: its number). several:
    whether a row may be several examples; else it is the last of them. hidden: whether messages may tell nothing of
    single rows.

    Raises InputError for a `max_length` without room for text, for invalid labels, and for rows that are no examples.
    """
    # The shortest example of a language model is a token and its target; of others, a token a sentence.
    least = len(task.columns) if task.headed else 2
    if task.headed:
        least += tokenizer.num_special_tokens_to_add(pair=len(task.columns) == 2)
    if max_length is not None and max_length < least:
        raise InputError(f"--max-length {max_length}: no room for text; this task and tokenizer need {least} or more")
    texts = [rows[column][:] for column in task.columns]
    if not task.headed:
        columns = dict(zip(task.columns, texts, strict=True))
        found = encode_language(columns, tokenizer, style or Style(), max_length, place or _numbered, hidden=hidden)
        return _for_language(found, texts, tokenizer, several=several)
    return _for_head(task, rows, texts, tokenizer, max_length)


def _numbered(row: int) -> str:
    return f"row {row + 1}"


def _for_head(
    task: Task,
    rows: datasets.Dataset,
    texts: list[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> Encoded:
    """Single sentences or pairs of them, in the tokenizer's own form."""
    segments: list[list[int]] | None = None
    tokens: list[list[int]] = []
    cut, empty = [0] * len(rows), [False] * len(rows)
    if len(rows):  # tokenizers fail on an empty batch
        limits = {"truncation": True, "max_length": max_length} if max_length is not None else {"verbose": False}
        encoded = tokenizer(*texts, **limits)
        empty = [not ids for ids in encoded["input_ids"]]
        tokens = [ids or [filler(tokenizer)] for ids in encoded["input_ids"]]
        if len(texts) == 2:
            segments = encoded.get("token_type_ids")
        full = [row for row, ids in enumerate(tokens) if len(ids) == max_length]
        if full and max_length is not None:
            whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False)["input_ids"]
            cut = np.bincount(full, [len(ids) - max_length for ids in whole], len(rows)).astype(int).tolist()
    beside = None if segments is None else np.fromiter(chain.from_iterable(segments), np.int8)
    examples = _flat(tokens, task.labels(rows), segments=beside)
    return Encoded(examples, look(tokens, cut, empty, texts, tokenizer), np.arange(len(rows)), len(rows))


def _flat(tokens: list[list[int]], labels: Labels, **beside: Any) -> Examples:
    from fedlotr.training.examples import Examples

    flat = np.fromiter(chain.from_iterable(tokens), np.int32)
    return Examples(flat, np.cumsum([0, *map(len, tokens)], dtype=np.int64), labels, **beside)


def filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands for a text of no tokens: EOS, or another special token."""
    special = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    return next((token for token in special if isinstance(token, int)), 0)


def _for_language(
    found: Written, texts: list[list[str]], tokenizer: PreTrainedTokenizerBase, *, several: bool
) -> Encoded:
    """Texts, questions and conversations, of which `found` was made."""
    owner = np.array(found.owner, np.int64)
    kept = np.arange(len(owner))
    if not several and len(owner):
        kept = np.flatnonzero(np.append(owner[1:] != owner[:-1], True))
    owner = owner[kept]
    tokens, targets = [found.tokens[row] for row in kept], [found.targets[row] for row in kept]
    starts = [learnt.index(True) for learnt in targets]
    gaps = any(not all(learnt[start:]) for learnt, start in zip(targets, starts, strict=True))
    mask = np.fromiter(chain.from_iterable(targets), np.bool_) if gaps else None
    examples = _flat(tokens, np.array(starts, np.int64), causal=True, targets=mask)
    first = np.append(True, owner[1:] != owner[:-1])[: len(owner)]  # what a row loses is counted once
    lost = [np.where(first, np.array(cut, np.int64)[owner], 0) for cut in (found.prompt_cut, found.answer_cut)]
    rows = [[column[row] for row in owner] for column in texts]
    seen = look(tokens, (lost[0] + lost[1]).tolist(), [False] * len(owner), rows, tokenizer)
    return Encoded(examples, replace(seen, answers=lost[1]), owner, len(texts[0]))
