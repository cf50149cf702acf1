"""A task of the caller's own: `encode` makes the examples, its metric is reported by its own name."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fedlotr import OwnTask, SimulationConfig, run_simulation, simulate
from fedlotr.data import Names, apply_task, load_source
from fedlotr.data.user_task import TAKEN, MetricError
from fedlotr.errors import InputError
from fedlotr.evaluation.results import Results
from fedlotr.reporting.documents import InVirtualTime
from tests.data.test_own_data import small
from tests.support import read_run

REVIEWS = [
    {"review": f"{('awful food', 'lovely food')[at % 2]} at number {at}", "stars": (1, 5)[at % 2], "shop": f"s{at % 3}"}
    for at in range(60)
]


class Stars(OwnTask):
    labels = ("bad", "good")
    metric_name = "macro_f1"

    def __init__(self, least: int = 4) -> None:
        self.least = least

    def encode(self, row: Mapping[str, Any]) -> tuple[str, int]:
        return row["review"], int(row["stars"] >= self.least)

    def metric(self, results: Results) -> float:
        return macro_f1(results.labels, results.predictions)


class Answers(OwnTask):
    metric_name = "token_accuracy"

    def encode(self, row: Mapping[str, Any]) -> tuple[str, str]:
        return f"Stars for: {row['review']}", "★" * row["stars"]

    def metric(self, results: Results) -> float:
        return float(results.correct.sum() / results.targets.sum())


def macro_f1(labels: Any, predictions: Any) -> float:
    scores = []
    for kind in np.unique(labels):
        right = int(((labels == kind) & (predictions == kind)).sum())
        scores.append(2 * right / int((labels == kind).sum() + (predictions == kind).sum()))
    return float(np.mean(scores))


def config(model: Path, out: Path, **fields: Any) -> SimulationConfig:
    # All that a row of metrics.jsonl can have.
    every_key = {"broadcast_codec": "bfloat16", "link": "4g", "max_update_norm": 1e6}
    shops = {"rounds": 2, "partition": "natural:shop", "clients": 3, "sample": 3}
    return small(model, out, **{**shops, **every_key, **fields})


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("task") / "run"
    run_simulation(config(tiny_bert, out), data={"train": REVIEWS}, task=Stars())
    return out


def test_its_examples_are_those_of_the_same_texts_and_labels_given_plainly(
    run: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    rows = [{"text": row["review"], "label": int(row["stars"] > 3), "shop": row["shop"]} for row in REVIEWS]
    plain = run_simulation(config(tiny_bert, tmp_path / "plain"), data={"train": rows})
    summary, metrics = read_run(run)
    assert summary["trained_sha256"] == plain.summary["trained_sha256"]
    assert [row["accuracy"] for row in metrics] == [row["accuracy"] for row in plain.history]
    of_other_runs = {"attack_success", "perplexity", "pearson", "rmse", "standard_errors", "score_by", "over_groups"}
    of_other_runs |= {*InVirtualTime.__annotations__, "faults"}
    assert set(metrics[0]) - {"macro_f1"} == TAKEN - of_other_runs, "no metric may take one of these names"


def test_its_metric_stands_under_its_own_name_everywhere(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedlotr.reporting.console import Console

    seen: list[Results] = []

    class Watched(Stars):
        def metric(self, results: Results) -> float:
            seen.append(results)
            return super().metric(results)

    data = {"train": REVIEWS, "test": REVIEWS * 5}  # three shards
    given = config(tiny_bert, tmp_path / "run", eval_examples=0)
    result = run_simulation(given, data=data, task=Watched(), console=Console())
    second, shown = seen[2], capsys.readouterr().err
    assert [len(results.labels) for results in seen] == [300] * 3
    np.testing.assert_array_equal(second.labels, [int(row["stars"] > 3) for row in data["test"]])
    assert np.mean(second.labels == second.predictions) == result.accuracy and second.correct.mean() == result.accuracy
    assert second.losses.mean() == pytest.approx(result.loss, rel=1e-12)
    values = [macro_f1(results.labels, results.predictions) for results in seen]
    assert result.summary["initial"]["macro_f1"] == values[0]
    assert [row["macro_f1"] for row in result.history] == values[1:]
    assert result.summary["metric"] == "macro_f1" and result.metric == result.summary["final"]["macro_f1"] == values[2]
    assert result.summary["best"]["macro_f1"] == max(values[1:])
    assert f"macro_f1 {values[2]:.4f}  accuracy {result.accuracy:.4f}" in shown and "macro_f1, best" in shown


def test_a_language_models_metric_counts_its_target_tokens(stories: Path, tmp_path: Path) -> None:
    given = config(stories, tmp_path / "run", rounds=1, max_length=48)
    result = run_simulation(given, data={"train": REVIEWS}, task=Answers())
    assert 0 <= result.summary["final"]["token_accuracy"] <= 1
    assert result.summary["final"]["perplexity"] == pytest.approx(math.exp(result.loss))


def test_a_language_models_row_may_be_a_conversation(stories: Path, tmp_path: Path) -> None:
    def turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": row["review"]},
            {"role": "assistant", "content": "★" * row["stars"]},
        ]

    given = config(stories, tmp_path / "run", rounds=1, max_length=64)
    result = run_simulation(given, data={"train": REVIEWS}, task=task(turns, labels=()))
    assert math.isfinite(result.loss) and "Be brief." in (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")


def test_resume_goes_on_with_the_same_task_only(run: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = config(tiny_bert, run, rounds=3, resume=True)
    with pytest.raises(InputError, match=r"--task auto: the run in .* was begun with own:\w+, the caller's own"):
        rows = [{"text": row["review"], "label": 0, "shop": row["shop"]} for row in REVIEWS[:-1]]
        run_simulation(more, data={"train": [*rows, {**rows[0], "label": 1}]})
    with pytest.raises(InputError, match=r"--task own:\w+: the run in .* was begun with own:\w+, the caller's own"):
        run_simulation(more, data={"train": REVIEWS}, task=Stars(least=2))
    assert simulate.main([str(run / "config.yaml"), "--out", str(run), "--resume"]) == simulate.BAD_INPUT
    assert "this run used the caller's own task; pass run_simulation(task=...)" in capsys.readouterr().err
    assert run_simulation(more, data={"train": REVIEWS}, task=Stars()).summary["rounds"] == 3


def test_a_metric_that_is_not_defined_is_left_open_and_one_that_raises_names_itself(
    tiny_bert: Path, tmp_path: Path
) -> None:
    class Undefined(Stars):
        def metric(self, results: Results) -> float:
            return math.nan

    class Broken(Stars):
        def metric(self, results: Results) -> float:
            raise ZeroDivisionError("no rows")

    given = config(tiny_bert, tmp_path / "run", rounds=1)
    result = run_simulation(given, data={"train": REVIEWS}, task=Undefined())
    assert result.metric is None and result.summary["best"]["macro_f1"] is None
    with pytest.raises(MetricError, match="task Broken, metric macro_f1: ZeroDivisionError: no rows"):
        run_simulation(given.model_copy(update={"out": tmp_path / "2"}), data={"train": REVIEWS}, task=Broken())


def test_a_row_that_nothing_was_noted_of_is_an_error_and_no_zero() -> None:
    whole, half = Results.empty(2), Results.empty(2)
    whole.put(np.array([1, 0]), targets=1, losses=[0.5, 0.25], predictions=[3, 4])
    assert Results.joined([whole.arrays()] * 2).predictions.tolist() == [4, 3, 4, 3]
    half.put(np.array([1]), targets=1)
    with pytest.raises(ValueError, match="no result for 1 of 4 test rows"):
        Results.joined([whole.arrays(), half.arrays()])


def task(encode: Any = None, **attributes: Any) -> OwnTask:
    methods = {"encode": lambda self, row: encode(row)} if encode else {}
    kind: type[OwnTask] = type("Mine", (OwnTask,), {"labels": ("bad", "good"), **methods, **attributes})
    return kind()


def text_only(row: Mapping[str, Any]) -> Any:
    return row["review"]


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "class": (Stars, ["such as task=Stars(); got the class Stars"]),
    "no encode": (task(), ["no method encode(row)"]),
    "one label": (task(text_only, labels=("a",)), ["two different labels or more"]),
    "text of labels": (task(text_only, labels="ab"), ["labels are 'ab'; expected names of classes"]),
    "metric without name": (task(text_only, metric=lambda self, results: 1.0), ["give both or neither"]),
    "taken name": (
        task(text_only, metric=lambda self, results: 1.0, metric_name="loss"),
        ["metric_name 'loss' is taken"],
    ),
    "no label": (task(text_only), ["encode, data['train'], row ", ": it gave", "expected (text, label)"]),
    "bad label": (task(lambda row: (row["review"], "godo")), ["the label 'godo' is none", "did you mean 'good'?"]),
    "index": (task(lambda row: (row["review"], 2)), ["it gave 2; expected a label from 0 to 1"]),
    "raises": (
        task(lambda row: row["reviw"]),
        ["encode, data['train'], row ", ": KeyError: 'reviw'", "more rows of train like"],
    ),
    "now and then": (
        task(lambda row: (row["review"], 0) if row["stars"] > 3 else ((row["review"], ""), 0)),
        ["it is a pair and others are not"],
    ),
    "no text": (task(lambda row: 3, labels=()), ["it gave 3; expected a text, a pair (prompt, answer) or a list"]),
    "no answer": (
        task(lambda row: [{"role": "user", "content": row["review"]}], labels=()),
        ["it gave messages of which none is an assistant's that says something"],
    ),
    "no role": (
        task(lambda row: [{"role": "who", "content": row["review"]}], labels=()),
        ["row ", ": 'messages', message 1 is by 'who', which is no role that is known"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_task_is_refused_with_what_is_missing(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    given, parts = REFUSED[kind]
    with pytest.raises(InputError) as refused:
        run_simulation(config(tiny_bert, tmp_path / "run"), data={"train": REVIEWS}, task=given)
    problems = "\n".join(refused.value.problems)
    assert all(part in problems for part in parts), problems
    assert not (tmp_path / "run").exists()


def test_columns_cannot_be_named_beside_a_task_that_reads_the_rows(tiny_bert: Path, tmp_path: Path) -> None:
    given = config(tiny_bert, tmp_path / "run", text_column="review")
    with pytest.raises(InputError, match="text_column: the task given to run_simulation reads the rows itself"):
        run_simulation(given, data={"train": REVIEWS}, task=Stars())


class Chat(OwnTask):
    """What was asked and answered first of a list of turns; the label from an object beside it."""

    labels = ("short", "long")

    def encode(self, row: Mapping[str, Any]) -> Any:
        asked, answered = row["messages"][:2]
        assert isinstance(row["about"], dict) and row["about"]["tags"] == ["a", "b"]
        return (asked["content"], answered["content"]), row["about"]["length"]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "Python", "Dataset"])
@pytest.mark.parametrize("text", [True, False])
def test_lists_and_objects_reach_encode(form: str, text: bool, tmp_path: Path) -> None:
    def row(n: int) -> dict[str, Any]:
        turns = [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]
        told = {"messages": turns, "about": {"length": ("short", "long")[n % 2], "tags": ["a", "b"]}}
        return {**told, "text": f"t {n}"} if text else told

    rows = [row(n) for n in range(20)]
    if form == "jsonl":
        (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows), encoding="utf-8")
    elif form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    data: Any = {"Python": {"train": rows}, "Dataset": {"train": datasets.Dataset.from_list(rows)}}.get(form, tmp_path)
    given = str(data) if data is tmp_path else data
    source, found = apply_task(Chat(), load_source(given, names=Names(nested=True)))
    assert found.columns == ("text_a", "text_b") and source.train[0]["text_a"] == "q " + source.train[0]["text_b"][2:]
    assert "messages" not in source.train.column_names and len(source.train) == 18
    plain = load_source(given)  # a task of ours reads the chat alone
    assert plain.train.column_names == [*(["text"] if text else []), "messages"] and plain.nested == ()
    assert plain.read_by(("messages",)).left_out == ({"text": "text"} if text else {}) | {"about": "an object"}


@pytest.mark.parametrize("called", ["labels", "label"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_several_labels_a_row_are_refused_and_make_no_language_model(called: str, form: str, tmp_path: Path) -> None:
    rows = [{"text": f"t {n}", called: ["toxic"] * (n % 3)} for n in range(20)]
    if form == "jsonl":
        (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=f"'{called}' is a list; expected a class index or name.*--task causal-lm"):
        load_source(str(tmp_path))
    assert load_source(str(tmp_path), names=Names(causal=True)).train.column_names == ["text"]
