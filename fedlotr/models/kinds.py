"""THE table of tasks: what a model is trained for, and what such a model is judged by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a model is judged by.

    text: for people. form: how a value is written. higher_is_better: which of two is the better one. of: what the
    function is given (`evaluation.marks`): the test rows with what the model predicts, each row's choices with their
    likelihoods, or what it says to each row's prompt. function: `module:function`, a number a row whose mean is the
    metric or, where it is not of single rows (`whole`), a number in all; nothing where `Scores` has it from sums.
    """

    text: str
    form: str = "{:.4f}"
    higher_is_better: bool = True
    of: Literal["rows", "choices", "answers"] = "rows"
    function: str = ""
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """What a model is trained for.

    text: for people. headed: whether a head reads the model out, one row of numbers a text; else the model goes on with
    it, token by token. scale: whether labels are numbers on a scale, and no classes. unit: of its loss. over: what the
    loss of a test is a mean over. metrics: by name, the decisive one first; `Scores` has a property of each. further:
    those that are computed where `--score` names them.
    """

    text: str
    headed: bool
    scale: bool = False
    unit: str = "nats"
    over: str = "examples"
    metrics: Mapping[str, Metric]
    further: Mapping[str, Metric]

    @property
    def scores(self) -> dict[str, Metric]:
        """All that `--score` may name."""
        return {**self.metrics, **self.further}


_OURS = "fedlotr.evaluation.scorers:"

TASK_KINDS: dict[str, TaskKind] = {
    "classification": TaskKind(
        text="which class a text, or a pair of texts, is of",
        headed=True,
        metrics={"accuracy": Metric(text="share of the rows whose class is predicted", function=_OURS + "accuracy")},
        further={
            "macro_f1": Metric(text="F1, the mean over the classes", function=_OURS + "macro_f1", whole=True),
            "matthews": Metric(text="Matthews' correlation", function=_OURS + "matthews", whole=True),
        },
    ),
    "regression": TaskKind(
        text="which number on a scale a text, or a pair of texts, has",
        headed=True,
        scale=True,
        unit="squared units of the labels",
        metrics={
            "rmse": Metric(
                text="root of the mean squared error",
                higher_is_better=False,
                function=_OURS + "rmse",
                whole=True,
            ),
            "pearson": Metric(text="Pearson's correlation", function=_OURS + "pearson", whole=True),
        },
        further={"spearman": Metric(text="Spearman's rank correlation", function=_OURS + "spearman", whole=True)},
    ),
    "causal-lm": TaskKind(
        text="how a text goes on",
        headed=False,
        over="target tokens",
        metrics={
            "perplexity": Metric(
                text="exp of the loss a target token",
                form="{:.2f}",
                higher_is_better=False,
                function=_OURS + "perplexity",
                whole=True,
            )
        },
        further={
            "choice": Metric(
                text="share of the rows whose right choice is the likeliest (lm-eval's acc)",
                of="choices",
                function=_OURS + "choice",
            ),
            "choice_norm": Metric(
                text="the same by likelihood a character (lm-eval's acc_norm)",
                of="choices",
                function=_OURS + "choice_norm",
            ),
            "exact_match": Metric(
                text="share of the answers that equal the row's, as --extract takes both",
                of="answers",
                function=_OURS + "exact_match",
            ),
            "rouge_l": Metric(text="ROUGE-L of what is said, its F-measure", of="answers", function=_OURS + "rouge_l"),
            "chrf": Metric(
                text="chrF of what is said, of all rows, 0 to 100",
                form="{:.2f}",
                of="answers",
                function=_OURS + "chrf",
                whole=True,
            ),
        },
    ),
}
"""Name -> task."""

METRICS: dict[str, Metric] = {name: metric for task in TASK_KINDS.values() for name, metric in task.scores.items()}
"""The metrics of all tasks."""
ATTACK_SUCCESS = "attack_success"
BESIDE = {
    ATTACK_SUCCESS: Metric(
        text="share of the test rows of other classes that a backdoor's trigger makes the target's",
        higher_is_better=False,
    )
}
"""What no task is judged by, but runs with hostile clients are."""
DECISIVE = tuple(next(iter(task.metrics)) for task in TASK_KINDS.values())
"""The first of each task."""


def decisive(task: str) -> str:
    """The metric that says which of two models for a task is the better one."""
    return next(iter(TASK_KINDS[task].metrics))
