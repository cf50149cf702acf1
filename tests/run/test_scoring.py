"""What `--score` says of a run's test rows: as an independent computation has it, on any number of workers."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlotr import OwnTask, SimulationConfig, cli, run_simulation
from fedlotr.errors import InputError
from fedlotr.reporting.report import write_report
from fedlotr.simulate import main
from tests.evaluation.test_generation import plainly
from tests.run.test_simulation import flags
from tests.support import Simulate, read_run

ANSWERS = ("cat", "dog", "ball")
NAMED = r"^\s*(cat|dog|ball)"


def rows_of(numbers: range) -> list[dict[str, str]]:
    """Which answer is right nothing tells: a model that learns them is right in about half of the rows."""
    draw = np.random.default_rng(numbers[0])
    return [
        {
            "kind": ("who", "what")[number % 2],
            "prompt": f"Who is there, {number}?\n\nAnswer format: {'/'.join(ANSWERS)}",
            "answer": ANSWERS[draw.choice(3, p=(0.55, 0.3, 0.15))],
        }
        for number in numbers
    ]


@pytest.fixture
def options(stories: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of seconds."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, numbers in (("train", range(120)), ("test", range(200, 224))):
        text = "".join(json.dumps(row) + "\n" for row in rows_of(numbers))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return {
        **{"model": str(stories), "data": str(folder), "partition": "iid", "max_length": "auto", "dtype": "float32"},
        **{
            "clients": 2,
            "sample": 2,
            "rounds": 2,
            "rank": 4,
            "method": "lora",
            "lr": 0.02,
            "local_epochs": 4,
            "samples": 0,
        },
        **{"engine": "local", "threads": 1, "public_examples": 2, "eval_every": 2},
    }


def test_choices_and_answers_are_those_of_an_independent_computation(
    options: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    scored = {"score": "choice,choice_norm,exact_match", "score_by": "kind", "generate_tokens": 8, "extract": NAMED}
    result = run_simulation(SimulationConfig(**options, **scored, out=out))
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), out / "adapter").eval()
    right, normed, equal = [], [], []
    rows = rows_of(range(200, 224))
    for row in rows:
        context = tokenizer(row["prompt"])["input_ids"]
        scores = []
        for one in ANSWERS:
            ids = tokenizer(f"{row['prompt']}\n{one}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        at = ANSWERS.index(row["answer"])
        right.append(int(np.argmax(scores)) == at)
        normed.append(int(np.argmax([score / len(one) for score, one in zip(scores, ANSWERS, strict=True)])) == at)
        said = tokenizer.decode(plainly(model, context, 8, [2]), skip_special_tokens=True)
        equal.append(re.findall(NAMED, said)[:1] == [row["answer"]])
    final = result.summary["final"]
    assert (final["choice"], final["choice_norm"]) == (np.mean(right), np.mean(normed))
    assert final["exact_match"] == np.mean(equal)
    assert 0.2 < final["exact_match"] < 0.8, "0 = 0 shows nothing"
    errors = result.summary["standard_errors"]
    assert errors is not None
    assert errors["choice"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(24))
    by = result.summary["score_by"]
    assert by is not None and list(by) == ["what", "who"]
    for kind, numbers in (("who", slice(0, 24, 2)), ("what", slice(1, 24, 2))):
        group: dict[str, Any] = dict(by[kind])
        assert group["rows"] == 12
        assert group["choice"] == np.mean(right[numbers])
        assert group["exact_match"] == np.mean(equal[numbers])
    assert result.summary["metric"] == "choice"
    assert "'kind'" not in result.summary["splits"], "a column that scores are told by is read"
    page = write_report(out).read_text(encoding="utf-8")
    assert all(told in page for told in ("Metrics of the test rows", "before the first round", "who", "exact_match"))


def test_scores_are_told_by_the_client_that_test_rows_name(
    options: dict[str, Any], simulate: Simulate, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = {"partition": "natural:kind", "score": "choice,exact_match", "score_by": "kind", "extract": NAMED}
    ran = simulate("--out", str(out), *flags({**options, **given, "generate_tokens": 8, "rounds": 1}))
    summary = read_run(out)[0]
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    assert sorted(held["client"] for held in facts["partition"]) == list(summary["score_by"]) == ["what", "who"]
    page = write_report(out).read_text(encoding="utf-8")
    for name, over in summary["over_groups"].items():
        each = [group[name] for group in summary["score_by"].values()]
        assert over == {"groups": 2, "mean": np.mean(each), "spread": np.std(each), "worst_tenth": min(each)}
        told = f"{np.mean(each):.4f}, standard deviation {np.std(each):.4f}, worst tenth {min(each):.4f}"
        assert f"{name} over 2 groups, each of which counts the same: mean {told}" in page
    assert list(summary["over_groups"]) == ["choice", "exact_match"]
    assert summary["over_groups"]["exact_match"]["spread"] > 0, "clients are alike: nothing is shown"
    assert "exact_match over 2 groups" in ran.stderr


def test_a_text_ends_an_answer_where_it_is_made(options: dict[str, Any], stories: Path, tmp_path: Path) -> None:
    from fedlotr.run import sheet

    measured, tokenizer, seen = sheet._measured, AutoTokenizer.from_pretrained(stories), {}
    for stop in (None, "o"):

        def watched(*words: Any) -> Any:
            seen[stop] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in words[-1].answers]  # noqa: B023
            return measured(*words)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sheet, "_measured", watched)
            scored = {"score": "rouge_l", "generate_tokens": 12, "stop": stop, "rounds": 1}
            run_simulation(SimulationConfig(**{**options, **scored}, out=tmp_path / f"run {stop}"))
    assert sum("o" in text for text in seen[None]) > 6, "nothing to end"
    for ended, whole in zip(seen["o"], seen[None], strict=True):
        head, stop, rest = ended.partition("o")
        assert whole.startswith(ended) and (stop or ended == whole)
        assert len(tokenizer(rest)["input_ids"]) < 3, "tokens behind the one that makes the text"
        assert head == whole.partition("o")[0]


def test_two_workers_score_as_one_process(options: dict[str, Any], simulate: Simulate, tmp_path: Path) -> None:
    scored = {"score": "rouge_l,exact_match,choice,perplexity", "score_by": "kind", "generate_tokens": 8}
    scored |= {"temperature": 0.8}
    found = []
    for name, engine in (("local", {}), ("ray", {"engine": "ray", "workers": 2})):
        simulate("--out", str(tmp_path / name), *flags({**options, **scored, **engine}))
        found.append(read_run(tmp_path / name)[0]["score_by"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"score": "acuracy"}, r"'acuracy' is no metric, did you mean 'accuracy'\?"),
        ({"score": "matthews"}, "--score matthews: a task of the kind causal-lm has the metrics perplexity, choice, "),
        ({"score": "choice", "choices": "yes,no"}, r"24 of 24 test rows, the first .*, have the answer"),
        ({"score": "choice", "score_by": "kinds"}, r"--score-by kinds: test has no such column, did you mean 'kind'\?"),
        ({"score": "exact_match", "extract": "("}, r"--extract \(: neither one of all, last-number"),
        ({"choices": "a,b"}, "--choices .*: it says what --score choice chooses from"),
        ({"extract": "letter"}, "--extract .*: it is about answers that are generated and scored"),
        ({"score": "choice", "method": "fedsa-lora"}, "scored by the task's own metric, on rows of their own"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    options: dict[str, Any], given: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "run"), *flags({**options, **given})]) == 2
    assert re.search(told, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_plain_texts_have_no_answers(options: dict[str, Any], tmp_path: Path) -> None:
    data = {"train": [{"text": "Tim has a cat."}] * 20, "test": [{"text": "Tim has a dog."}] * 4}
    given = {key: value for key, value in options.items() if key != "data"}
    with pytest.raises(InputError, match="--score exact_match: it is of answers, and the rows are plain texts"):
        run_simulation(SimulationConfig(**given, score="exact_match", out=tmp_path / "run"), data=data)


def test_a_task_of_ones_own_gets_row_numbers_and_what_was_said(options: dict[str, Any], tmp_path: Path) -> None:
    seen: list[Any] = []

    class Mine(OwnTask):
        metric_name = "length"

        def encode(self, row: Any) -> Any:
            return row["prompt"], row["answer"]

        def metric(self, results: Any) -> float:
            seen.append((results.rows.tolist(), list(results.said)))
            return float(np.mean([len(said) for said in results.said]))

    given = {key: value for key, value in options.items() if key != "data"} | {"rounds": 1, "eval_examples": 5}
    data = {"train": rows_of(range(60)), "test": rows_of(range(200, 224))}
    config = SimulationConfig(**given, score="exact_match", generate_tokens=4, out=tmp_path / "run")
    result = run_simulation(config, data=data, task=Mine())
    assert result.summary["metric"] == "length"
    rows, said = seen[-1]
    assert rows == sorted(rows) and len(rows) == len(said) == 5 and max(rows) < 24
    assert any(said)
    assert result.summary["final"]["exact_match"] is not None


LABELLED = {
    "classification": ("macro_f1,matthews,accuracy", lambda n: ("bad", "good")[n % 3 == 0]),
    "regression": ("spearman,pearson", lambda n: n % 7 / 2),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_classes_and_scales_are_scored_by_libraries(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    score, label = LABELLED[kind]
    seen: list[Any] = []
    data = {
        split: [{"text": f"the {('cat', 'dog', 'big')[n % 3]} {n % 7} has it", "label": label(n)} for n in numbers]
        for split, numbers in (("train", range(60)), ("test", range(60, 90)))
    }
    given = {"clients": 2, "rounds": 1, "rank": 4, "engine": "local", "threads": 1, "public_examples": 20}
    config = SimulationConfig(**given, model=str(tiny_bert), task=kind, score=score, out=tmp_path / "run")
    from fedlotr.run import sheet

    measured = sheet._measured

    def watched(*words: Any) -> Any:
        seen.append(words[-1].results)
        return measured(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheet, "_measured", watched)
        final = run_simulation(config, data=data).summary["final"]
    rows = seen[-1]
    if kind == "classification":
        assert final["macro_f1"] == f1_score(rows.labels, rows.predictions, average="macro", zero_division=0)
        assert final["matthews"] == matthews_corrcoef(rows.labels, rows.predictions)
        assert final["accuracy"] == np.mean(rows.labels == rows.predictions)
    else:
        assert sorted(rows.labels.tolist()) == pytest.approx(sorted(label(n) for n in range(60, 90)), abs=1e-5)
        assert final["spearman"] == pytest.approx(spearmanr(rows.labels, rows.predictions).statistic)
        assert final["rmse"] == pytest.approx(np.sqrt(np.mean((rows.labels - rows.predictions) ** 2)), rel=1e-4)


def test_the_metrics_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "metrics", "--json"]) == 0
    listed = {row["metric"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["matthews"]["for"] == "classification"
    assert listed["perplexity"]["better"] == "lower"
