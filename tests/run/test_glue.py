"""GLUE's nine tasks, as their files look: each is read, trained and scored by the metric that GLUE scores it by."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fedlotr import SimulationConfig, run_simulation
from fedlotr.data import Names, load_source
from fedlotr.simulate import main

CAT, DOG = "the cat sat on the ball", "a big dog has it"
SENTENCE = {"sentence": (CAT, DOG)}
PAIR = {"sentence1": (CAT, DOG), "sentence2": (DOG, CAT)}
TASKS: dict[str, tuple[dict[str, tuple[str, str]], tuple[Any, ...], str]] = {
    "cola": (SENTENCE, (0, 1), "matthews"),
    "sst2": (SENTENCE, (0, 1), "accuracy"),
    "mrpc": (PAIR, (0, 1), "macro_f1"),
    "qqp": ({"question1": (CAT, DOG), "question2": (DOG, CAT)}, (0, 1), "macro_f1"),
    "stsb": (PAIR, (0.5, 3.25), "spearman"),
    "mnli": ({"premise": (CAT, DOG), "hypothesis": (DOG, CAT)}, (0, 1, 2), "accuracy"),
    "qnli": ({"question": (CAT, DOG), "sentence": (DOG, CAT)}, (0, 1), "accuracy"),
    "rte": (PAIR, (0, 1), "accuracy"),
    "wnli": (PAIR, (0, 1), "accuracy"),
}
"""Task -> its columns of texts, its labels, the metric."""


def rows_of(name: str, numbers: range) -> list[dict[str, Any]]:
    columns, labels, _ = TASKS[name]
    return [
        {
            **{column: f"{texts[number % 2]} {number % 5}" for column, texts in columns.items()},
            "label": labels[number % len(labels)],
            "idx": number,
        }
        for number in numbers
    ]


def as_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_read_trained_and_scored(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    write, kind = (as_tsv, "tsv") if name in ("cola", "stsb", "mnli") else (as_jsonl, "jsonl")
    data = tmp_path / name
    data.mkdir()
    write(data / f"train.{kind}", rows_of(name, range(60)))
    write(data / f"validation.{kind}", rows_of(name, range(60, 84)))
    metric = TASKS[name][2]
    given = {"clients": 2, "rounds": 1, "rank": 4, "engine": "local", "threads": 1, "public_examples": 12}
    config = SimulationConfig(**given, model=str(tiny_bert), data=str(data), score=metric, out=tmp_path / "run")
    summary = run_simulation(config).summary
    assert summary["metric"] == metric
    assert summary["final"][metric] is not None
    assert summary["texts"]["words"]
    errors = summary["standard_errors"]
    assert errors is not None and errors[metric] is not None


def test_it_is_said_which_columns_are_the_texts(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_jsonl(tmp_path / "rows.jsonl", [{**row, "note": DOG} for row in rows_of("mnli", range(60))])
    words = ["--data", str(tmp_path / "rows.jsonl"), "--model", str(tiny_bert), "--clients", "2", "--rounds", "1"]
    words += ["--engine", "local", "--threads", "1", "--rank", "4", "--public-examples", "12"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    assert "read as pair + label: premise + hypothesis" in told


def test_texts_of_the_tasks_own_names_come_first() -> None:
    rows = [{"sentence": CAT, "text": f"{DOG} {number}", "label": number % 2} for number in range(20)]
    source = load_source({"train": rows}, seed=0, names=Names())
    assert set(source.train["text"][:]) <= {row["text"] for row in rows}
