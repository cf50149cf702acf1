"""`fedlotr doctor`: it foretells what a run then reports, and refuses what a run refuses, in the same words."""

import http.server
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from fedlotr import SimulationConfig, cli, machine
from fedlotr.adapters.methods import METHODS
from fedlotr.commands import doctor, simulate
from fedlotr.communication.ledger import read_ledger
from fedlotr.communication.wire_form import Coding
from fedlotr.cost import stand_in
from fedlotr.cost.architectures import read_architecture
from fedlotr.cost.billing import bills
from fedlotr.errors import InputError
from fedlotr.run import processes
from tests.support import read_run

GB = 10**9


@pytest.fixture
def words(tmp_path: Path, tiny_bert: Path, animals: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run that takes seconds."""
    monkeypatch.chdir(tmp_path)
    options = "--clients 5 --sample 0.4 --rounds 3 --rank 4 --public-examples 16 --max-length 16 --partition iid"
    options += " --max-examples 9 --engine local --threads 1 --dtype float32 --eval-every 3"
    return [f"--model={tiny_bert}", f"--data={animals}", *options.split()]


def examined(given: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, the report, and what stands on standard error."""
    code = doctor.main([*given, "--json"])
    output = capsys.readouterr()
    return code, json.loads(output.out), output.err


def finding(report: dict[str, Any], name: str) -> dict[str, str]:
    return next(found for found in report["findings"] if found["name"] == name)


@pytest.mark.parametrize("method", [*METHODS, "lora --strategy=flora", "lora --strategy=fedex-lora"])
def test_what_is_foretold_is_what_the_run_reports(
    method: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, "--method", *method.split(), "--out", str(tmp_path / "run")]
    code, report, errors = examined(given, capsys)
    assert (code, errors, report["would_start"]) == (0, "", True)
    assert not (tmp_path / "run").exists()
    needs = report["needs"]

    assert simulate.main([*given, "--quiet"]) == 0
    summary, rows = read_run(tmp_path / "run")
    traffic, ledger = summary["communication"], read_ledger(tmp_path / "run" / "ledger")
    assert needs["upload_bytes"] == traffic["upload_payload_bytes_per_client_round"]
    assert needs["download_bytes"] == pytest.approx(traffic["download_payload_bytes_per_client_round"], rel=1e-12)
    assert needs["one_off_bytes"] == traffic["one_off_bytes_per_client"]
    assert needs["participants"] == len({entry.client for entry in ledger})
    payload = sum(entry.payload_bytes for entry in ledger if entry.kind != "control")
    assert needs["total_bytes"] == payload
    saved = load_file(tmp_path / "run/checkpoints/round-00003.safetensors")
    sent = sum(array.size for name, array in saved.items() if name.startswith("base_model."))
    trained = needs["trained_adapter"] + needs["trained_head"]
    assert trained == summary["trained_numbers"] >= sent
    assert trained == sent or METHODS[method.split()[0]].personal, "what stays with a client is in its own state"
    held = 7 if METHODS[method.split()[0]].personal else 9  # two are kept for the client's own score
    assert needs["examples_a_round"] == 2 * held * 2, "two clients of nine examples, two local epochs"
    assert [row["clients"] for row in rows] == [2, 2, 2]

    capsys.readouterr()
    assert examined([*given, "--resume", "--rounds", "4"], capsys)[0] == 0
    code, report, errors = examined([*given, "--resume", "--seed", "9"], capsys)
    assert code == 2
    assert errors.startswith("error: --seed 9: the run in")
    assert simulate.main([*given, "--resume", "--seed", "9", "--quiet"]) == 2
    assert capsys.readouterr().err == errors


def test_a_language_model_is_foretold_too(
    words: list[str], stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, f"--model={stories}", "--task=causal-lm", "--method=lotr", "--out", str(tmp_path / "run")]
    code, report, _ = examined(given, capsys)
    assert code == 0
    assert simulate.main([*given, "--quiet"]) == 0
    traffic = read_run(tmp_path / "run")[0]["communication"]
    assert report["needs"]["upload_bytes"] == traffic["upload_payload_bytes_per_client_round"]
    assert report["needs"]["one_off_bytes"] == traffic["one_off_bytes_per_client"] == 40


def test_a_model_that_cost_names_is_foretold_from_its_dimensions_alone(
    words: list[str], stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "resolve_model", lambda model: stories)  # whose tokenizer is at hand
    name, rank = "qwen-2.5-0.5b", 16
    given = [*words, f"--model={name}", "--task=causal-lm", "--method=fed-sb", f"--rank={rank}", "--dtype=bfloat16"]
    code, report, errors = examined(given, capsys)
    needs, architecture = report["needs"], read_architecture(name, None, 2, "all-linear")
    bill = bills(architecture, ["fed-sb"], (rank, rank), 2, 3, Coding(basis_codec="int2"))[0][0].bill
    assert needs["upload_bytes"] == needs["download_bytes"] == bill.round_up
    assert needs["one_off_bytes"] == bill.one_off
    assert needs["parameters"] == architecture.parameters + needs["trained_adapter"]
    assert needs["weights_bytes"] == 2 * needs["parameters"] < needs["process_bytes"]
    # It is no model that a run could start with, and says so.
    assert (code, report["would_start"], errors.count("\n")) == (2, False, 1)
    assert "a run takes --model Qwen/Qwen2.5-0.5B" in errors
    assert finding(report, "by dimensions")["status"] == "problem"


def test_what_stands_for_a_model_takes_no_room_and_counts_tokens_as_the_model_could(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "resolve_model", lambda model: stories)
    with stand_in.stand_in("llama-3.2-1b") as folder:
        weights = (folder / "model.safetensors").stat()
        assert weights.st_size > 2 * GB and weights.st_blocks * 512 < 10**6
    assert not folder.exists()


def test_a_tokenizer_is_cut_to_the_tokens_that_a_model_has(stories: Path, tmp_path: Path) -> None:
    text = "Once upon a time, there was a little girl."
    whole = AutoTokenizer.from_pretrained(stories)
    stand_in.write_tokenizer(whole, 400, tmp_path)
    cut = AutoTokenizer.from_pretrained(tmp_path)
    ids = cut(text)["input_ids"]
    assert max(whole(text)["input_ids"]) >= 400 > max(ids)
    assert cut.decode(ids, skip_special_tokens=True).replace("▁", " ").strip() == text


def test_a_model_whose_tokens_cannot_be_counted_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(model: str) -> Path:
        raise InputError(f"--model {model}: no such folder")

    monkeypatch.setattr(stand_in, "resolve_model", nowhere)
    assert doctor.main([*words, "--model=mistral-7b", "--task=causal-lm"]) == 2
    counted = "tokens for mistral-7b are counted by smollm2-135m's"
    assert capsys.readouterr().err == f"error: {counted}: --model smollm2-135m: no such folder\n"


@pytest.mark.parametrize(
    "mistakes",
    [
        ["--method", "fedsb", "--rank", "0"],
        ["--rank", "99", "--strategy-arg", "beta=1", "--max-length", "999"],
        ["--data", "gone", "--rank", "99", "--cleints", "5"],
        ["gone.yaml"],
        ["--engine", "flower"],
    ],
)
def test_it_refuses_what_a_run_refuses_in_the_same_words(
    mistakes: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate.main([*words, *mistakes, "--quiet"]) == 2
    expected = capsys.readouterr().err
    code, report, errors = examined([*words, *mistakes], capsys)
    assert (code, errors, report["needs"]) == (2, expected, None)
    assert [f"error: {problem}" for problem in report["problems"]] == expected.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_cannot_hold_the_run_is_a_problem_and_a_tight_one_a_warning(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(GB, GB, 10_000))
    monkeypatch.setattr(machine, "free_bytes", lambda _: 1000)
    code, _, errors = examined(words, capsys)
    assert code == 2
    assert "error: memory needed: the weights alone are" in errors
    assert "error: files: the run writes about" in errors

    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(GB, 10**8, None))
    monkeypatch.setattr(machine, "free_bytes", lambda _: 10**8)
    monkeypatch.setattr(machine, "cores", lambda: machine.Cores(8, 8, 1.5))
    code, report, errors = examined([*words, "--threads", "2"], capsys)
    assert (code, errors) == (0, "")
    names = ("memory needed", "disk", "processes")
    assert [finding(report, name)["status"] for name in names] == ["warning"] * 3
    assert finding(report, "cores")["text"].endswith("grants the time of 1.5: 1 used")


def test_packages_are_held_against_the_ranges_that_were_tested(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(package.fits for package in machine.packages() or [])
    assert machine.packages("no-such-project") is None
    needs = ["torch>=2", "flwr<1", "no-such-package>=3", "pytest<1; extra == 'dev'"]
    monkeypatch.setattr(machine, "requires", lambda _: needs)
    code, report, errors = examined(words, capsys)
    assert code == 2
    assert errors == "error: no-such-package: not installed; pip install 'no-such-package>=3'\n"
    assert finding(report, "flwr")["status"] == "warning"
    assert "torch" in finding(report, "packages")["text"]


def test_a_piped_report_is_a_line_a_finding_and_quiet_prints_none(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(words) == 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "a run would start"
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    assert doctor.main([*words, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: fedlotr doctor")
    assert "--clients" in text
    assert "fedlotr.simulate" not in text
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().out


def test_limits_of_control_groups_are_read_of_both_versions(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    write("proc/self/cgroup", "0::/box/inner\n")
    write("sys/fs/cgroup/box/inner/cpu.max", "max 100000")
    write("sys/fs/cgroup/box/cpu.max", "150000 100000")
    write("sys/fs/cgroup/box/memory.max", "2000000000")
    write("sys/fs/cgroup/box/inner/memory.max", "max")
    assert machine.memory(tmp_path) == machine.Memory(8_192_000_000, 6_144_000_000, 2_000_000_000)
    assert machine.memory(tmp_path).usable == 2_000_000_000
    assert machine.cores(tmp_path).quota == 1.5
    assert machine.cores(tmp_path).usable == 1

    write("proc/self/cgroup", "4:memory:/old\n3:cpu,cpuacct:/old\n")
    write("sys/fs/cgroup/memory/old/memory.limit_in_bytes", "9223372036854771712")
    write("sys/fs/cgroup/cpu/old/cpu.cfs_quota_us", "50000")
    write("sys/fs/cgroup/cpu/old/cpu.cfs_period_us", "100000")
    assert machine.memory(tmp_path).limit is None
    assert machine.cores(tmp_path).quota == 0.5


def test_the_hub_is_asked_within_bounds_and_never_fatal(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert "HF_HUB_OFFLINE" in finding(examined(words, capsys)[1], "model hub")["text"]
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to all
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert machine.hub_problem()[1] is None
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(machine, "HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert machine.hub_problem()[1] is not None
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    code, report, _ = examined(words, capsys)
    assert (code, finding(report, "model hub")["status"]) == (0, "warning")


@pytest.mark.parametrize(
    ("load", "own", "added", "statuses"),
    [(0.5, 0, None, ("ok", "ok")), (7.25, 0, None, ("warning", "ok")), (0.5, 3, "4", ("ok", "warning"))],
)
def test_other_work_and_the_niceness_of_workers_are_told(
    load: float,
    own: int,
    added: str | None,
    statuses: tuple[str, str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: machine.Cores(8, 4, None))
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(machine.os, "nice", lambda _: own)
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    if added is not None:
        monkeypatch.setenv("RAY_worker_niceness", added)
    code, report, _ = examined(words, capsys)
    found = finding(report, "load"), finding(report, "niceness")
    assert (code, tuple(line["status"] for line in found)) == (0, statuses)
    assert found[0]["text"].startswith(f"{load:.1f} on 4 cores")
    assert found[1]["text"].startswith(f"{own + int(added or 0)} of workers, {own} of this process")


@pytest.mark.parametrize(
    ("quota", "engine", "expected"), [(None, "local", 6), (2.5, "local", 2), (0.2, "local", 1), (2.5, "ray", 1)]
)
def test_threads_are_what_the_process_may_use_and_never_follow_the_load(
    quota: float | None, engine: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "cores", lambda: machine.Cores(64, 6, quota))
    found = []
    for load in (0.0, 500.0):
        monkeypatch.setattr(machine.os, "getloadavg", lambda load=load: (load,) * 3)
        found.append(processes.threads_of(SimulationConfig(engine=engine)))
    assert found == [expected] * 2
    assert processes.workers_of(SimulationConfig(engine="ray")) == (6 if quota is None else max(1, int(quota)))


@pytest.mark.parametrize("fleet", ["even", "institutions"])
def test_who_is_asked_in_virtual_time_is_foretold_where_it_can_be(
    fleet: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, "--fleet", fleet, "--out", str(tmp_path / "run")]
    code, report, errors = examined(given, capsys)
    assert (code, errors) == (0, "") and not report["needs"]["whole_rounds"]
    assert "whole rounds" not in finding(report, "virtual time")["text"]
    assert simulate.main([*given, "--quiet"]) == 0
    _, rows = read_run(tmp_path / "run")
    ledger = read_ledger(tmp_path / "run" / "ledger")
    needs = report["needs"]
    assert [row["clients"] for row in rows] == [needs["asked"]] * 3
    assert needs["participants"] == len({entry.client for entry in ledger})
    assert needs["total_bytes"] == sum(entry.payload_bytes for entry in ledger if entry.kind != "control")
    assert finding(report, "a round")["text"].startswith(f"{needs['asked']} clients in ")


@pytest.mark.parametrize(
    ("mode", "asked"),
    [
        ("--fleet phones", 2),
        ("--fleet edge", 2),
        ("--mode async --buffer 1", 1),
        ("--mode over-select --over-select 1.9", 4),
        ("--fleet edge --mode deadline --deadline 9", 2),
    ],
)
def test_where_nobody_knows_who_will_be_there_the_bill_says_that_it_is_of_whole_rounds(
    mode: str, asked: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, report, errors = examined([*words, *mode.split()], capsys)
    assert (code, errors) == (0, "") and report["needs"]["asked"] == asked
    said = finding(report, "virtual time")["text"]
    assert f"the bill is of whole rounds, of {asked} clients that all answer" in said
    assert ("--fleet" not in mode) or mode.split()[1] in said


def test_a_wrong_fleet_is_refused_as_a_run_refuses_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = examined([*words, "--fleet", "phnes"], capsys)
    assert code == 2 and "did you mean 'phones'" in errors


def test_a_bill_before_any_run_takes_no_fleet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", "--model", "mistral-7b", "--fleet", "phones"]) == 2
    assert "unrecognized arguments: --fleet phones" in capsys.readouterr().err
