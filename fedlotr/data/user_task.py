"""A task of the caller's own: from a row to its texts and label, and from a model's results to a metric."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from fedlotr.config.own import own_name
from fedlotr.config.plain import plain, scalar
from fedlotr.data.canonical import Written, checked
from fedlotr.data.labels import MAX_CLASSES, ROWS_SHOWN
from fedlotr.data.sources import Source, source_of
from fedlotr.data.tasks import Task
from fedlotr.data.turns import RowError
from fedlotr.errors import FedlotrError, InputError, nearest
from fedlotr.models.kinds import BESIDE, TASK_KINDS

if TYPE_CHECKING:
    import datasets

    from fedlotr.evaluation.results import Results

TAKEN = frozenset(
    {*BESIDE, "aggregation_error", "broadcast_error", "bytes_down", "bytes_up", "clients", "epsilon"}
    | {"over_groups", "score_by", "standard_errors"}
    | {name for kind in TASK_KINDS.values() for name in kind.metrics}
    | {"evaluate_seconds", "failed", "simulated_seconds", "simulated_seconds_median_client", "simulated_slowest_client"}
    | {"clipped", "failures", "loss", "round", "train_loss", "train_seconds", "transport_error"}
    | {"update_norm_largest", "update_norm_median"}
    | {"bytes_in_vain", "faults", "staleness_mean", "under_way", "used", "virtual_seconds"}
)
"""Names that mean something else in a row of metrics.jsonl."""
COLUMNS = ("text", "text_a", "text_b", "prompt", "answer", "messages", "label")
"""What the built-in tasks read; a task of one's own writes them."""


class MetricError(FedlotrError):
    """A metric of the caller's own raised, or gave no number; the message names the task and the metric."""


class OwnTask:
    """Derive from this and write `encode`; the rest has a default.

        class Stars(OwnTask):
            labels = ("bad", "good")
            metric_name = "macro_f1"

            def encode(self, row):
                return row["review"], int(row["stars"] > 3)

            def metric(self, results):
                return f1_score(results.labels, results.predictions, average="macro")

    labels: the classes by name, in the order of their indices; none for a language model.
    metric_name: what `metric` is called in metrics.jsonl, summary.json and on the display, beside accuracy or
    perplexity; None where there is none. higher_is_better: which of two of its values is the better one.

    All of it runs on the server: workers get tokens and give back results, so the class needs to be nowhere else.
    """

    labels: Sequence[str] = ()
    metric_name: str | None = None
    higher_is_better: bool = True

    def encode(self, row: Mapping[str, Any]) -> Any:
        """What is learnt from a row of the data.

        A classifier: (text, label), where a text may be a pair (first, second) and a label is an index or a name.
        A language model: the text, a pair (prompt, answer), or a list of messages, such as
        [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}].
        """
        raise NotImplementedError

    def metric(self, results: Results) -> float:
        """The metric of all test rows, where there is a `metric_name`. A value that is not finite counts as none."""
        raise NotImplementedError


def labels_of(task: OwnTask) -> tuple[str, ...]:
    """Its classes, whatever sequence they are in; none where they are no sequence."""
    given = plain(task.labels)
    return tuple(map(plain, given)) if isinstance(given, Sequence) and not isinstance(given, str) else ()


def task_name(task: OwnTask) -> str:
    """own:HASH, of the class, what it says of itself and its code, as far as Python knows where that is."""
    kind = type(task)
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        code = ""
    values = {key: scalar(value) for key, value in vars(task).items()}
    known = {key: value for key, value in values.items() if isinstance(value, str | int | float | bool | None)}
    about = [kind.__qualname__, list(labels_of(task)), task.metric_name, bool(task.higher_is_better), known, code]
    return own_name(hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest())


def check_task(task: object) -> OwnTask:
    """Raises InputError, with all that is wrong, for what is no task."""
    if not isinstance(task, OwnTask):
        got = f"the class {task.__name__}" if isinstance(task, type) else f"an object of the type {type(task).__name__}"
        raise InputError(
            f"task: expected an object of a class derived from fedlotr.OwnTask, such as task=Stars(); got {got}"
        )
    kind, name, problems = type(task), task.metric_name, []
    labels = labels_of(task)
    some = not isinstance(plain(task.labels), Sequence) or isinstance(task.labels, str)
    if some or not all(isinstance(label, str) for label in labels):
        problems.append(f"labels are {task.labels!r}; expected names of classes, such as ('bad', 'good')")
    elif len(labels) == 1 or len(set(labels)) < len(labels):
        problems.append("expected two different labels or more; or none, for a language model")
    elif len(labels) > MAX_CLASSES:
        problems.append(f"it has {len(labels)} labels; expected {MAX_CLASSES} or fewer")
    if kind.encode is OwnTask.encode:
        problems.append("it has no method encode(row)")
    if (name is not None) != (kind.metric is not OwnTask.metric):
        problems.append("metric_name and the method metric(results) belong together; give both or neither")
    if name is not None and (not isinstance(name, str) or not name.isidentifier() or name in TAKEN):
        problems.append(f"metric_name {name!r} is taken or no plain name; choose another, such as macro_f1")
    if problems:
        raise InputError([f"task {kind.__name__}: {problem}" for problem in problems])
    return task


def apply_task(task: OwnTask, source: Source) -> tuple[Source, Task]:
    """The source with the columns that the built-in tasks read, made by `encode`, and the task over them.

    Raises InputError for rows that `encode` fails on or makes no example of.
    """
    made = {
        split: _encoded(task, source, split, rows) for split, rows in (("train", source.train), ("test", source.test))
    }
    forms = {tuple(columns) for columns in made.values()}
    if len(forms) > 1:
        raise InputError(f"task {type(task).__name__}: encode makes single texts of one split and pairs of the other")
    (columns,) = forms
    others = {
        split: {name: rows[name][:] for name in rows.column_names if name not in COLUMNS and name not in source.nested}
        for split, rows in (("train", source.train), ("test", source.test))
    }
    encoded = source_of(
        source.name,
        {**others["train"], **made["train"]},
        {**others["test"], **made["test"]},
        source.test_split,
        labels_of(task) or None,
        source.drawn,
    )
    texts = tuple(column for column in columns if column != "label")
    kind = "classification" if labels_of(task) else "causal-lm"
    known = {
        name: getattr(source, name) for name in ("trained", "unread", "beside", "notes", "train_places", "test_places")
    }
    return replace(encoded, **known), Task(kind, texts, labels_of(task))  # type: ignore[arg-type]


def _whole(row: dict[str, Any], nested: Sequence[str]) -> dict[str, Any]:
    """A row whose lists and objects are these again."""
    return {name: json.loads(v) if name in nested and v is not None else v for name, v in row.items()}


def _encoded(task: OwnTask, source: Source, split: str, rows: datasets.Dataset) -> dict[str, list[Any]]:
    """The rows of a split as columns."""
    made: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, row in enumerate(rows):
        try:
            example = _example(task, task.encode(_whole(row, source.nested)))
            if made and example.keys() != made[0].keys():
                raise ValueError("it is a pair and others are not, or the other way round")
            made.append(example)
        except Exception as error:
            said = str(error) if type(error) in (ValueError, RowError) else f"{type(error).__name__}: {error}"
            problems.append(f"task {type(task).__name__}: encode, {source.place(split, number)}: {said}")
    if problems:
        more = [f"task {type(task).__name__}: {len(problems) - ROWS_SHOWN} more rows of {split} like these"]
        raise InputError(problems[:ROWS_SHOWN] + (more if len(problems) > ROWS_SHOWN else []))
    return {name: [example[name] for example in made] for name in made[0]}


def _example(task: OwnTask, given: Any) -> dict[str, Any]:
    """The columns of one row. Raises ValueError for what is no example of the task."""
    labels = labels_of(task)
    if not labels:
        texts = _texts(given, ("prompt", "answer")) or _conversation(given)
        return texts if texts is not None else _wrong(given, "a text, a pair (prompt, answer) or a list of messages")
    if not isinstance(given, tuple | list) or len(given) != 2:
        _wrong(given, "(text, label)")
    text, label = given[0], scalar(given[1])
    texts = _texts(text, ("text_a", "text_b"))
    if texts is None:
        _wrong(text, "a text or a pair of texts before the label")
    if isinstance(label, str):
        if label not in labels:
            raise ValueError(f"the label {label!r} is none of its labels{nearest(label, labels)}")
        return {**texts, "label": labels.index(label)}
    if isinstance(label, bool) and len(labels) == 2:  # no and yes, in that order
        return {**texts, "label": int(label)}
    if type(label) is not int or not 0 <= label < len(labels):
        _wrong(label, f"a label from 0 to {len(labels) - 1}, or its name")
    return {**texts, "label": label}


def _texts(given: Any, pair: tuple[str, str]) -> dict[str, Any] | None:
    given = scalar(given)
    if isinstance(given, str):
        return {"text": given}
    if isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(text, str) for text in given):
        return dict(zip(pair, map(plain, given), strict=True))
    return None


def _conversation(given: Any) -> dict[str, Any] | None:
    if not isinstance(given, tuple | list) or not given or not all(isinstance(turn, Mapping) for turn in given):
        return None
    written = checked(list(given))
    if not isinstance(written, Written):
        raise ValueError("it gave messages of which none is an assistant's that says something")
    return {"messages": written.messages}


def _wrong(given: Any, expected: str) -> NoReturn:
    raise ValueError(f"it gave {repr(given)[:60]}; expected {expected}")


def measure(task: OwnTask, results: Results) -> dict[str, float | None]:
    """The task's metric by its name, None where it is not finite; nothing where the task has none.

    Raises MetricError where it raises or gives no number.
    """
    if task.metric_name is None:
        return {}
    where = f"task {type(task).__name__}, metric {task.metric_name}"
    try:
        value = float(task.metric(results))
    except Exception as error:
        raise MetricError(f"{where}: {type(error).__name__}: {error}") from error
    return {task.metric_name: value if math.isfinite(value) else None}
