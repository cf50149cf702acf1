"""A grid of runs: one file, one table; checked as a whole, resumed, and not taken down by a run that fails."""

import csv
import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlotr import cli
from tests import forks
from tests.support import read_run

ROOT = Path(__file__).resolve().parents[2]
FAST = {
    "clients": 4,
    "sample": 2,
    "rounds": 2,
    "max_examples": 8,
    "rank": 2,
    "public_examples": 16,
    "engine": "local",
    "threads": 1,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def base(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """Options of runs that take half a second."""
    return {**FAST, "model": str(tiny_bert), "data": str(animals)}


def write(folder: Path, **parts: object) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(parts, sort_keys=False), encoding="utf-8")
    return path


def table(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "table.csv", newline="", encoding="utf-8") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def done(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished grid: two methods, two seeds."""
    folder = tmp_path_factory.mktemp("grid")
    file = write(folder, base=base, axes={"method": ["lotr", "lora"]}, seeds=[0, 1])
    assert cli.main(["grid", str(file), "--out", str(folder / "out"), "--in-process", "--quiet"]) == 0
    return folder


def test_the_table_is_what_the_runs_summaries_say(done: Path) -> None:
    rows = table(done / "out")
    assert list(rows) == ["lotr", "lora"]
    for method, row in rows.items():
        runs = [read_run(done / "out" / method / f"seed-{seed}")[0] for seed in (0, 1)]
        assert [(run["method"], run["seed"]) for run in runs] == [(method, 0), (method, 1)]
        for name in ("accuracy", "loss"):
            values = [run["final"][name] for run in runs]
            assert float(row[f"{name}_mean"]) == pytest.approx(sum(values) / 2)
            assert float(row[f"{name}_std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        traffic = runs[0]["communication"]
        assert int(row["upload_bytes"]) == traffic["upload_payload_bytes_per_client_round"]
        assert int(row["download_bytes"]) == traffic["download_payload_bytes_per_client_round"]
        assert int(row["one_off_bytes"]) == traffic["one_off_bytes_per_client"]
        assert 4 * int(row["trained_numbers"]) == traffic["upload_payload_bytes_per_client_round"]
        assert float(row["certificate"]) == max(run["aggregation_error_max"] for run in runs)
        assert float(row["seconds"]) == statistics.median(run["timing"]["seconds_total"] for run in runs)
        assert (row["seeds"], row["planned"], row["failed"]) == ("2", "2", "")
    markdown = (done / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    assert markdown[0].startswith("| row | seeds | accuracy | loss | trained | up | down | one-off | certificate")
    assert len(markdown) == 4 and "±" in markdown[2]


def test_a_finished_run_is_not_run_again_and_new_rows_are_added(
    done: Path, base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "out").rglob("summary.json")}
    file = write(done, base=base, axes={"method": ["lotr", "lora", "head"]}, seeds=[0, 1])
    assert cli.main(["grid", str(file), "--out", str(done / "out"), "--in-process"]) == 0
    printed = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "4 of them are finished already" in printed.err and "run 5/6  head/seed-0" in printed.err
    assert printed.out == (done / "out" / "table.md").read_text(encoding="utf-8"), "a pipe gets the table alone"
    assert list(table(done / "out")) == ["lotr", "lora", "head"]


def test_a_grid_whose_files_have_moved_goes_on_where_they_are_the_same(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def run(model: Path, rows: Path, *methods: str) -> int:
        given = {**base, "rounds": 1, "model": str(model), "data": str(rows)}
        file = write(tmp_path, base=given, axes={"method": list(methods)}, seeds=[0])
        return cli.main(["grid", str(file), "--out", str(out), "--in-process", "--quiet"])

    assert run(Path(base["model"]), Path(base["data"]), "lotr") == 0
    model = shutil.copytree(base["model"], tmp_path / "elsewhere" / "bert")
    rows = shutil.copytree(base["data"], tmp_path / "elsewhere" / "rows")
    (out / "lotr" / "seed-0" / "summary.json").rename(tmp_path / "kept")  # a run that was not finished goes on too
    assert run(model, rows, "lotr", "head") == 0
    assert str(model) in (out / "lotr" / "seed-0.yaml").read_text(encoding="utf-8")
    kept, again = (json.loads(path.read_text()) for path in (tmp_path / "kept", out / "lotr/seed-0/summary.json"))
    assert again["trained_sha256"] == kept["trained_sha256"]
    assert any("the content is the same" in line for line in again["warnings"])

    third = shutil.copytree(model, tmp_path / "third")
    content = bytearray((third / "model.safetensors").read_bytes())
    content[-2] ^= 4
    (third / "model.safetensors").write_bytes(content)
    capsys.readouterr()
    assert run(third, rows, "lotr", "head") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("its weights differ" in line for line in errors)
    for began in (base["model"], model):
        assert any(f"--model {third}: the run in {out} was begun with {began}, and" in line for line in errors)


def test_another_configuration_of_a_run_that_is_there_is_refused_with_the_difference(
    done: Path, base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "out" / "table.csv").read_bytes()
    file = write(
        done, base={**base, "rounds": 3, "workers": None}, rows=[{"method": "lotr", "lr": 0.5, "name": "lotr"}]
    )
    assert cli.main(["grid", str(file), "--out", str(done / "out"), "--in-process"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "rounds: 3" in errors[0] and "have 2" in errors[0] and "another --out" in errors[0]
    assert "lr: 0.5" in errors[1] and "have none" in errors[1]
    assert (done / "out" / "table.csv").read_bytes() == before


def test_all_mistakes_of_all_configurations_are_reported_before_anything_runs(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def errors(**parts: object) -> str:
        assert cli.main(["grid", str(write(tmp_path, **parts)), "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    said = errors(base={"seed": 3, "out": "x"}, axes={"rank": 8, "tie": [1, 1]}, rows=[3], seeds=[-1], row=[])
    for wanted in (
        "row in",
        "did you mean 'rows'",
        "seed in base: seeds are listed under 'seeds'",
        "out in base",
        "rank in axes: 8: expected a list",
        "a value stands there twice",
        "row 1: 3: expected options",
        "seeds: [-1]: expected",
    ):
        assert wanted in said
    rows: list[dict[str, Any]] = [{"metod": "lora"}, {"method": "lorra"}, {"method": "lotr"}]
    said = errors(base={**base, "rounds": 0}, rows=rows)
    assert said.count("rounds: 0") == 1, "what is wrong everywhere is told once, and without the rows"
    assert "did you mean 'method'? (in metod-lora)" in said and "did you mean 'lora'? (in lorra)" in said
    said = errors(
        base=base, rows=[{"method": "lotr"}, {"method": "lotr", "rank": 99}, {"method": "lotr", "targets": "x"}]
    )
    assert "--rank 99: above the width" in said and "(in lotr_rank-99)" in said and "--targets x" in said
    said = errors(base=base, rows=[{"method": "lotr"}, {"method": "lotr"}])
    assert "two rows lotr say the same" in said


def test_a_row_meets_every_point_of_the_axes_and_wins_over_them(base: dict[str, Any], tmp_path: Path) -> None:
    from fedlotr.grid.file import read_grid

    rows = [{"method": "lora", "local-steps": 3}, {"method": "lotr", "rank": 3, "name": "ours"}]
    file = write(tmp_path, base={**base, "local_epochs": 2}, axes={"rank": [2, 4], "batch_size": [4]}, rows=rows)
    found = {run.name: run.config for run in read_grid(file, tmp_path / "out").runs}
    assert list(found) == [
        "lora_local_steps-3_rank-2_batch_size-4/seed-0",
        "lora_local_steps-3_rank-4_batch_size-4/seed-0",
        "ours_batch_size-4/seed-0",
    ]
    assert [(c.method, c.rank, c.local_epochs, c.local_steps) for c in found.values()] == [
        ("lora", 2, None, 3),
        ("lora", 4, None, 3),
        ("lotr", 3, 2, None),
    ]


def test_rates_are_chosen_by_trials_on_rows_held_out_of_train_and_never_on_test(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"method": "lotr"}, {"method": "lora", "lr": 0.004, "name": "lora"}]
    parts = {"base": base, "rows": rows, "tune": {"lr": [1e-6, 0.05], "seeds": [0, 1]}, "seeds": [3]}
    words = ["grid", str(write(tmp_path, **parts)), "--out", str(tmp_path / "out"), "--in-process"]
    assert cli.main(words) == 0
    trials = {
        lr: [read_run(tmp_path / "out" / "lotr" / f"tune_lr-{lr}" / f"seed-{seed}")[0] for seed in (0, 1)]
        for lr in ("1e-06", "0.05")
    }
    assert {run["test_split"] for runs in trials.values() for run in runs} == {"a seeded tenth of train, held out"}
    worth = {
        lr: (sum(run["final"]["accuracy"] for run in runs), -sum(run["final"]["loss"] for run in runs))
        for lr, runs in trials.items()
    }
    best = max(worth, key=lambda lr: worth[lr])
    (final,) = (tmp_path / "out" / "lotr").glob("seed-3/config.yaml")
    assert f"lr: {float(best)}" in final.read_text(encoding="utf-8")
    assert read_run(final.parent)[0]["test_split"] == "test"
    found = table(tmp_path / "out")
    assert float(found["lotr"]["chosen_lr"]) == float(best)
    assert found["lora"]["chosen_lr"] == "" and not list((tmp_path / "out" / "lora").glob("tune*")), "it says its rate"
    chosen = f"lotr: lr {float(best)} chosen of 2 tried on a seeded tenth of train, held out"
    assert chosen in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "6 of them are finished already" in capsys.readouterr().err
    # Rates that make another one the best: the runs that are there had a value of their own.
    parts["tune"] = {"lr": [1e-6 if best == "0.05" else 0.05]}
    code = cli.main(["grid", str(write(tmp_path, **parts)), *words[2:]])
    said = capsys.readouterr().err
    assert code == 2 and f"have {float(best)}" in said and "lr:" in said


def test_what_the_runs_are_tested_on_is_not_tuned_on(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(tune: object) -> str:
        assert cli.main(["grid", str(write(tmp_path, base=base, tune=tune)), "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "tune on test: the runs are tested on these rows; choose held-out" in refused({"lr": [0.1], "on": "test"})
    assert "--eval-split validatio" in refused({"lr": [0.1], "on": "validation"})
    assert "lr in tune: 0.1: expected a list" in refused({"lr": 0.1})
    assert "seeds in tune" in refused({"lr": [0.1], "seeds": []}) and "on in tune" in refused({"lr": [0.1], "on": 3})
    assert "tune: expected what is tried" in refused({}) and "tune: 3: expected" in refused(3)
    assert "did you mean 'lr'" in refused({"lrr": [0.1]})


FAILING = """
from fedlotr.flower import Strategy, weighted_mean
import pathlib

class Failing(Strategy):
    def combine(self, updates, server_round):
        if server_round == 2 and not pathlib.Path({flag!r}).exists():
            raise RuntimeError("not yet")
        return weighted_mean(updates)
"""


def test_a_failed_run_is_named_takes_no_other_down_and_is_resumed_on_the_next_call(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "flag"
    (tmp_path / "failing.py").write_text(FAILING.format(flag=str(flag)), encoding="utf-8")
    rows = [{"method": "lotr", "strategy": f"{tmp_path}/failing.py:Failing", "name": "failing"}, {"method": "lotr"}]
    words = ["grid", str(write(tmp_path, base=base, rows=rows)), "--out", str(tmp_path / "out"), "--in-process"]
    assert cli.main(words) == 1
    assert "not yet" in capsys.readouterr().err
    found = table(tmp_path / "out")
    assert "not yet" in found["failing"]["failed"] and found["failing"]["seeds"] == "0"
    assert found["lotr"]["seeds"] == "1"
    assert "FAILED" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    flag.touch()
    assert cli.main(words) == 0
    assert "resumed after round 1" in (tmp_path / "out" / "failing" / "seed-0" / "log.txt").read_text(encoding="utf-8")
    assert table(tmp_path / "out")["failing"]["failed"] == ""


def start(words: list[str]) -> forks.Fork:
    program = "import sys; from fedlotr.commands.grid import main; sys.exit(main())"
    return forks.server(*forks.RUN).start(program, *words, cwd=ROOT, OMP_NUM_THREADS="1")


def until(rounds: int, folder: Path) -> None:
    """Wait until a run has finished so many rounds."""
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / f"round-{rounds:05d}.json").exists():
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.serial
def test_a_killed_run_is_named_ctrl_c_stops_the_grid_and_the_next_call_goes_on(
    base: dict[str, Any], tmp_path: Path
) -> None:
    long = {**base, "rounds": 60, "eval_every": 60}
    out, file = tmp_path / "out", write(tmp_path, base=long, axes={"method": ["head", "lotr"]})
    grid = start([str(file), "--out", str(out)])
    until(2, out / "head" / "seed-0")
    os.kill(child_of(grid.pid), signal.SIGKILL)
    until(2, out / "lotr" / "seed-0")
    grid.send_signal(signal.SIGINT)
    _, said = grid.communicate(timeout=120)
    assert grid.returncode == 130, said
    assert "head/seed-0  FAILED: killed by SIGKILL" in said and "interrupted" in said
    assert "killed by SIGKILL" in table(out)["head"]["failed"]
    for method in ("head", "lotr"):
        assert not (out / method / "seed-0" / "summary.json").exists()
        assert not (out / method / "seed-0" / ".work").exists() or method == "head", "the interrupted run ended itself"
    assert cli.main(["grid", str(file), "--out", str(out), "--in-process", "--quiet"]) == 0
    for method in ("head", "lotr"):
        assert "resumed after round" in (out / method / "seed-0" / "log.txt").read_text(encoding="utf-8")
        assert json.loads((out / method / "seed-0" / "summary.json").read_text(encoding="utf-8"))["rounds"] == 60


@pytest.mark.slow
@pytest.mark.serial
def test_a_run_does_not_outlive_its_grid(base: dict[str, Any], tmp_path: Path) -> None:
    out, file = tmp_path / "out", write(tmp_path, base={**base, "rounds": 5000, "eval_every": 5000, "method": "head"})
    grid = start([str(file), "--out", str(out)])
    until(1, out / "head" / "seed-0")
    child = child_of(grid.pid)
    grid.send_signal(signal.SIGKILL)
    grid.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def child_of(pid: int) -> int:
    import psutil

    return next(
        child.pid for child in psutil.Process(pid).children() if "fedlotr.commands.supervised" in child.cmdline()
    )
