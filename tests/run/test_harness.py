"""`fedlotr eval` scores a run's own model by EleutherAI's harness: with local tasks, from checkpoints too, offline."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlotr import SimulationConfig, cli, run_simulation

QUESTIONS = [
    {"question": f"Lily saw a {word}. It was", "choices": [" big.", " blue and zig.", " the."], "gold": at % 3}
    for at, word in enumerate(["cat", "dog", "ball", "bird", "fish", "tree"] * 4)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def run(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("examined")
    (place / "data").mkdir()
    for split, first in (("train", 0), ("test", 100)):
        rows = [{"prompt": f"Lily saw a ball. It was {n}", "answer": "blue and zig."} for n in range(first, first + 48)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    options: dict[str, Any] = {"model": str(stories), "data": str(place / "data"), "clients": 2, "sample": 2}
    options |= {
        "rounds": 2,
        "rank": 8,
        "method": "lora",
        "lr": 0.02,
        "engine": "local",
        "threads": 1,
        "samples": 0,
        "public_examples": 0,
    }
    run_simulation(SimulationConfig(**options, dtype="float32", partition="iid", quiet=True, out=place / "run"))
    return place / "run"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of one's own."""
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    (folder / "seen.yaml").write_text(TASK.format(name="seen", data=data), encoding="utf-8")
    return folder


def examined(run: Path, *words: object) -> int:
    return cli.main(["eval", str(run), *map(str, words)])


def likelihoods(model: Any, stories: Path) -> list[list[float]]:
    """The log-likelihood of each choice, by torch alone; the harness tokenises a question and its choice together."""
    tokenizer: Any = AutoTokenizer.from_pretrained(stories)
    found = []
    for row in QUESTIONS:
        asked, each = row["question"], []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids = torch.tensor(tokenizer(asked + choice)["input_ids"])
            begin = len(tokenizer(asked)["input_ids"])
            with torch.no_grad():
                logs = model(ids[None]).logits[0].log_softmax(-1)
            each.append(float(sum(logs[at - 1, ids[at]] for at in range(begin, len(ids)))))
        found.append(each)
    return found


def right(found: list[list[float]]) -> float:
    hits = [each.index(max(each)) == row["gold"] for each, row in zip(found, QUESTIONS, strict=True)]
    return sum(hits) / len(hits)


def test_a_local_task_scores_the_runs_model_as_torch_does(
    run: Path, tasks: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(stories).eval()
    wanted = {0: right(likelihoods(plain, stories))}
    trained = PeftModel.from_pretrained(plain, run / "adapter").eval()
    wanted[2] = right(likelihoods(trained, stories))
    assert wanted[0] != wanted[2] and 0 < wanted[2] < 1, "the two models can be told apart, and neither is all right"
    for number, words in ((0, ["--round", 0]), (2, [])):
        assert examined(run, "--tasks", "seen", "--include", tasks, *words) == 0
        told = json.loads((run / "eval" / f"seen-round-{number}.json").read_text(encoding="utf-8"))
        assert told["round"] == number and told["n-samples"]["seen"] == {"original": 24, "effective": 24}
        acc = told["results"]["seen"]["acc,none"]
        error = math.sqrt(wanted[number] * (1 - wanted[number]) / (24 - 1))
        assert acc == pytest.approx(wanted[number]) and told["results"]["seen"]["acc_stderr,none"] == pytest.approx(
            error
        )
        head, line = capsys.readouterr().out.splitlines()
        assert head.split() == ["task", "metric", "value", "±", "standard", "error", "questions"]
        assert line.split() == ["seen", "acc", f"{acc:.4f}", f"{error:.4f}", "24"]


def test_a_checkpoint_and_a_task_file_are_taken(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {}
    for number in (1, 2):
        assert examined(run, "--tasks", tasks / "seen.yaml", "--round", number, "--limit", 12) == 0
        told = json.loads((run / "eval" / f"seen-round-{number}.json").read_text(encoding="utf-8"))
        assert told["n-samples"]["seen"]["effective"] == told["settings"]["limit"] == 12
        results[number] = told["results"]["seen"]["acc,none"]
    assert examined(run, "--tasks", tasks / "seen.yaml", "--limit", 12) == 0  # the last, from adapter/
    last = json.loads((run / "eval" / "seen-round-2.json").read_text(encoding="utf-8"))
    assert last["results"]["seen"]["acc,none"] == results[2]


def test_what_cannot_be_scored_is_one_line(
    run: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(code: int, *words: object) -> str:
        assert examined(*words) == code  # type: ignore[arg-type]
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    assert "did you mean 'hellaswag'" in said(2, run, "--tasks", "hellaswagg")
    assert "no such file" in said(2, run, "--tasks", tmp_path / "none.yaml")
    assert "no such folder" in said(2, run, "--tasks", "seen", "--include", tmp_path / "none")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "cannot be fetched" in said(1, run, "--tasks", "hellaswag")
    assert "no chat template" in said(2, run, "--tasks", tasks / "seen.yaml", "--apply-chat-template")
    assert "no task is named" in said(2, run, "--tasks", ",")
    (tasks / "seen.yaml").write_text("task: seen\ndataset_path: json\noutput_type: nothing\n", encoding="utf-8")
    assert "cannot be loaded" in said(2, run, "--tasks", tasks / "seen.yaml")


def test_without_the_harness_it_says_what_to_install(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.evaluator", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert examined(run, "--tasks", "any") == 2
    assert "pip install 'fedlotr[eval]'" in capsys.readouterr().err


def test_a_classifier_is_not_asked(animals: Path, tiny_bert: Path, tasks: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_bert), "data": str(animals), "clients": 2, "sample": 2, "rounds": 1}
    options |= {
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
        "method": "head",
        "quiet": True,
        "public_examples": 8,
    }
    run_simulation(SimulationConfig(**options, out=tmp_path / "run"))
    assert examined(tmp_path / "run", "--tasks", "seen") == 2
