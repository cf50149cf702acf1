"""THE table of tasks: what a model is trained for, and what such a model is judged by."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """form: how a value is written. higher_is_better: which of two is the better one."""

    form: str
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """What a model is trained for.

    text: for people. headed: whether a head reads the model out, one row of numbers a text; else the model goes on with
    it, token by token. scale: whether labels are numbers on a scale, and no classes. unit: of its loss. over: what the
    loss of a test is a mean over. metrics: by name, the decisive one first; `Scores` has a property of each.
    """

    text: str
    headed: bool
    scale: bool = False
    unit: str = "nats"
    over: str = "examples"
    metrics: Mapping[str, Metric]


TASK_KINDS: dict[str, TaskKind] = {
    "classification": TaskKind(
        text="which class a text, or a pair of texts, is of",
        headed=True,
        metrics={"accuracy": Metric(form="{:.4f}")},
    ),
    "regression": TaskKind(
        text="which number on a scale a text, or a pair of texts, has",
        headed=True,
        scale=True,
        unit="squared units of the labels",
        metrics={"rmse": Metric(form="{:.4f}", higher_is_better=False), "pearson": Metric(form="{:.4f}")},
    ),
    "causal-lm": TaskKind(
        text="how a text goes on",
        headed=False,
        over="target tokens",
        metrics={"perplexity": Metric(form="{:.2f}", higher_is_better=False)},
    ),
}
"""Name -> task."""

METRICS: dict[str, Metric] = {name: metric for task in TASK_KINDS.values() for name, metric in task.metrics.items()}
"""The metrics of all tasks."""
DECISIVE = tuple(next(iter(task.metrics)) for task in TASK_KINDS.values())
"""The first of each task."""


def decisive(task: str) -> str:
    """The metric that says which of two models for a task is the better one."""
    return next(iter(TASK_KINDS[task].metrics))
