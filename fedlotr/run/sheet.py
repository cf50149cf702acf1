"""What the test rows are scored by beside their loss: their groups, their choices, the prompts that are answered."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import OwnTask, Source, Task, measure
from fedlotr.data.candidates import Asked, Choices, asked_of, encode_choices, encode_prompts
from fedlotr.data.layouts import words_of
from fedlotr.errors import InputError, nearest
from fedlotr.evaluation.marks import Chosen, Marks, Said, mean_and_error, whole_and_error
from fedlotr.evaluation.results import Evaluated
from fedlotr.evaluation.scorers import check_library, extract_of
from fedlotr.evaluation.spreads import spread_of
from fedlotr.flower.scoring import TRIGGERED
from fedlotr.models.kinds import METRICS, TASK_KINDS, Metric
from fedlotr.reporting.documents import OverGroups
from fedlotr.run.examples import style_of
from fedlotr.streams import generator
from fedlotr.training.examples import Examples
from fedlotr.training.packing import Rows


@dataclass(frozen=True)
class Sheet:
    """What a run's test rows are scored by.

    metrics: by name, as `--score` says. examples: (examples,) the row of the test split that each test example is of;
    rows: these, each once. groups: of every row of the split what `--score-by` names; None where it does not.
    questions: of each of `rows`, where choices or answers are scored. choices, prompts: as they are evaluated;
    triggered: test rows with a backdoor's trigger.
    """

    metrics: Mapping[str, Metric]
    examples: Rows
    rows: Rows
    groups: Sequence[str] | None = None
    questions: Sequence[Asked] = ()
    choices: Choices | None = None
    prompts: Examples | None = None
    triggered: Examples | None = None

    @property
    def further(self) -> dict[str, Examples]:
        """What is evaluated beside the test rows, by name."""
        found = {} if self.choices is None else {"choices": self.choices.examples}
        beside = {"prompts": self.prompts, TRIGGERED: self.triggered}
        return found | {name: examples for name, examples in beside.items() if examples is not None}


def sheet_of(
    config: SimulationConfig,
    task: Task,
    source: Source,
    examples: Rows,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
) -> Sheet:
    """Raises InputError for metrics that the task has not, or that need what is not there.

    examples: the row of the test split that each test example is of. positions: that the model has, if that is known.
    """
    rows = np.unique(examples)
    kind = TASK_KINDS[task.kind]
    problems = [
        f"--score {name}: a task of the kind {task.kind} has the metrics {', '.join(kind.scores)}; choose of these"
        for name in config.scores
        if name not in kind.scores
    ]
    columns = source.test.column_names
    if config.score_by is not None and config.score_by not in columns:
        problems.append(
            f"--score-by {config.score_by}: {source.test_split} has no such column{nearest(config.score_by, columns)}; "
            f"there are {', '.join(columns)}"
        )
    if problems:
        raise InputError(problems)
    for name in config.scores:
        check_library(name)
    extract_of(config.extract)
    groups = None if config.score_by is None else [str(value) for value in source.test[config.score_by][:]]
    names = config.scores or (tuple(kind.metrics) if groups is not None else ())
    sheet = Sheet({name: METRICS[name] for name in names}, examples, rows, groups)
    wanted = {metric.of for metric in sheet.metrics.values()} - {"rows"}
    if not wanted:
        return sheet
    asked = [] if "text" in task.columns else _asked(task, source, rows)
    if not asked or None in asked:
        name = next(name for name, metric in sheet.metrics.items() if metric.of != "rows")
        raise InputError(
            f"--score {name}: it is of answers, and {'the rows are plain texts' if not asked else 'some row has none'};"
            " give rows with a prompt and an answer, or a conversation that ends in one"
        )
    questions = [one for one in asked if one is not None]
    style, place = style_of(config), partial(source.place, "test")
    choices = prompts = None
    limit = positions if config.max_length == "auto" else config.longest
    if "choices" in wanted:
        given = tuple(part.strip() for part in (config.choices or "").split(",") if part.strip())
        choices = encode_choices(questions, tokenizer, style, limit, given, lambda at: place(int(rows[at])))
    if "answers" in wanted:
        room = None if positions is None else max(1, positions - min(config.generate_tokens, positions // 2))
        prompts = encode_prompts(questions, tokenizer, style, min((one for one in (limit, room) if one), default=None))
    return replace(sheet, questions=questions, choices=choices, prompts=prompts)


def chosen_on_test(config: SimulationConfig, source: Source) -> str | None:
    """What is to be said where rounds are chosen by the rows that they are then judged by."""
    asked = [*(["--keep best"] if config.keep == "best" else []), *(["--stop-after"] if config.stop_after else [])]
    words = words_of(source.test_split)
    if not asked or source.drawn or words & {"validation", "valid", "val", "dev"}:
        return None
    return (
        f"{' and '.join(asked)}: the round is chosen by its score on {source.test_split}, which flatters that score; "
        "--eval-split held-out chooses by a tenth of train"
    )


def _asked(task: Task, source: Source, rows: Rows) -> list[Asked | None]:
    chosen = source.test.select(rows)
    return asked_of({name: chosen[name][:] for name in task.columns})


def measurer(
    config: SimulationConfig, sheet: Sheet, own: OwnTask | None, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Evaluated], dict[str, Any]] | None:
    """What computes a run's further metrics; None where there are none."""
    if not sheet.metrics and (own is None or own.metric_name is None):
        return None
    return partial(_measured, config, sheet, own, tokenizer)


def _measured(
    config: SimulationConfig,
    sheet: Sheet,
    own: OwnTask | None,
    tokenizer: PreTrainedTokenizerBase,
    evaluated: Evaluated,
) -> dict[str, Any]:
    """The metrics by name, their `standard_errors` and, of each group, all of that (`score_by`), and their spread."""
    results = replace(evaluated.results, rows=sheet.examples)
    marks: dict[str, Marks] = {"rows": results}
    owners = {"rows": sheet.examples, "choices": sheet.rows, "answers": sheet.rows}
    if sheet.choices is not None and evaluated.choices is not None:
        right = np.array(sheet.choices.right, np.int64)
        marks["choices"] = Chosen.of(evaluated.choices.losses, sheet.choices.texts, right)
    if evaluated.answers is not None:
        said = [
            _until(str(tokenizer.decode(list(ids), skip_special_tokens=True)), config.stop) for ids in evaluated.answers
        ]
        wanted = [question.answer for question in sheet.questions]
        marks["answers"] = Said.of(wanted, said, extract_of(config.extract))
        results = replace(results, said=[said[at] for at in np.searchsorted(sheet.rows, sheet.examples)])
    found: dict[str, Any] = {} if own is None else measure(own, results)
    whole = _scored(sheet.metrics, marks, config.seed)
    if not sheet.metrics:
        return found
    found |= {name: value for name, (value, _) in whole.items()}
    found["standard_errors"] = {name: error for name, (_, error) in whole.items()}
    if sheet.groups is not None:
        found["score_by"] = {}
        of = np.array(sheet.groups)
        for group in sorted({sheet.groups[row] for row in sheet.rows}):
            taken = {kind: some.take(np.flatnonzero(of[owners[kind]] == group)) for kind, some in marks.items()}
            each = _scored(sheet.metrics, taken, config.seed)
            found["score_by"][group] = {
                "rows": int((of[sheet.rows] == group).sum()),
                **{name: value for name, (value, _) in each.items()},
                "standard_errors": {name: error for name, (_, error) in each.items()},
            }
        found["over_groups"] = _over(list(found["score_by"].values()), sheet.metrics)
    return found


def _over(groups: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, OverGroups]:
    """Each metric over the groups in which it is defined."""
    defined = {name: [group[name] for group in groups if group[name] is not None] for name in names}
    return {name: {"groups": len(each), **spread_of(name, each)} for name, each in defined.items() if each}


def _scored(
    metrics: Mapping[str, Metric], marks: Mapping[str, Marks], seed: int
) -> dict[str, tuple[float | None, float | None]]:
    """Each metric and its standard error."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for name, metric in metrics.items():
        module, _, function = metric.function.partition(":")
        score = getattr(importlib.import_module(module), function)
        if metric.whole:
            found[name] = whole_and_error(marks[metric.of], score, generator(seed, "bootstrap"))
        else:
            found[name] = mean_and_error(score(marks[metric.of]))
    return found


def _until(text: str, stop: str | None) -> str:
    """What stands before the text that ends it."""
    return text if not stop else text.partition(stop)[0]
