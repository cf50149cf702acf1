"""Benchmarks, experiments and recipes, each in a bare clone: it runs, or says in a line what it lacks.

Benchmarks run in their smallest form, so that what they use of ours cannot move without being noticed.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlotr import cli
from fedlotr.config.configuration import load

ROOT = Path(__file__).parents[1]

SMALL_JOB = ["--clients", "2", "--examples", "4", "--rounds", "1", "--length", "16", "--workers", "1", "--matmul", "64"]
SMALL_RUN = ["--max-examples", "4", "--sample", "2", "--eval-examples", "8"]
SMALLEST = {
    "flower_peft": [*SMALL_JOB, "--accuracy", "--test", "8", "--sides", "flower+peft cached", "lora"],
    "scaling": [*SMALL_JOB, "--only", "workers"],
    "engine": ["--clients", "8", "--bytes", "2000", "--rounds", "1", "--workers", "1", "--only", "speed"],
    "startup": ["--repeats", "0", "--workers", "1", "--options", *SMALL_RUN],
    "privacy": ["--batch", "2", "--length", "8", "--ranks", "4", "--repeats", "1"],
    "prefix": ["--clients", "2", "--examples", "4", "--length", "8", "--blocks", "0", "--repeats", "1"],
    "gpu": ["--device", "cpu", "--small"],
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
    "leakage": (["--model", "../shared/models/stories260k", "--data", "d"], "--model ../shared/models/stories260k: no"),
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
    assert json.loads(figures.read_text(encoding="utf-8"))


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


@pytest.mark.parametrize("name", [name for name, text in RECIPES.items() if "# fedlotr grid " not in text])
def test_a_recipe_of_one_run_is_a_configuration(name: str) -> None:
    assert f"python -m fedlotr.simulate experiments/{name}.yaml" in RECIPES[name].splitlines()[0]
    assert load([str(ROOT / "experiments" / f"{name}.yaml")]).data == "pydoc-chat"


@pytest.mark.parametrize("name", [name for name, text in RECIPES.items() if "# fedlotr grid " in text])
def test_a_recipe_says_what_a_bare_clone_lacks(
    name: str, bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bare)
    assert cli.main(["grid", f"experiments/{name}.yaml", "--in-process", "--out", f"runs/{name}"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert 1 <= len(said) <= 2, "one line for a thing that is lacking, not one for a row"
    assert all("no such" in line and ("../shared/" in line or "runs/snli" in line) for line in said)
    assert not (bare / "runs" / name).exists(), "nothing is begun"


def test_every_experiment_is_tried() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "experiments").glob("*.py")}
    assert {name for name, text in texts.items() if '"__main__"' in text} == set(SCRIPTS)
    for name in texts.keys() - set(SCRIPTS):
        assert any(f"from {name} import" in texts[script] for script in SCRIPTS), f"{name}: no experiment uses it"


def test_every_benchmark_is_run() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    commands = {name for name, text in texts.items() if '"--json"' in text or "parser(__doc__)" in text}
    assert commands - {"side_by_side"} == set(SMALLEST)
