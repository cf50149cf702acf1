"""A run holds what it has: over kills, damage, full disks and faulty clients, to the same bytes or a clear word."""

import asyncio
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from fedlotr import SimulationConfig, run_simulation
from fedlotr.communication.ledger import part_path, read_ledger
from fedlotr.engines import LocalGrid, node_of
from fedlotr.errors import FedlotrError, InputError
from fedlotr.flower.serialize import NotPlainError, pack, unpack
from fedlotr.flower.state import load_strategy_state, save_strategy
from fedlotr.run.checking import check
from fedlotr.run.directory import Checkpoint, RunDirectory
from fedlotr.run.resumption import continue_from
from fedlotr.simulate import main
from tests import faulty_app, forks
from tests.run.test_simulation import assert_same_results, flags, timeless, tree
from tests.support import Simulate, read_run

SEED = int(os.environ.get("DURABILITY_SEED", "20261125"))
FAULTY = "tests.faulty_app:app"


@pytest.fixture(scope="session")
def tiny(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """A run whose rounds take a tenth of a second."""
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 6,
        "sample": 3,
        "rounds": 3,
        "rank": 4,
        "public_examples": 16,
        "method": "lotr",
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
    }


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs get clients that may fail."""
    monkeypatch.setattr("fedlotr.run.simulation.CLIENT_APP", FAULTY)
    faulty_app.SENT.clear()


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8")


# --- what a checkpoint holds ------------------------------------------------------------------------------------------


def same(found: Any, wanted: Any) -> bool:
    """Equal, of the same type, and to the bit; also within containers."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, np.ndarray):
        return (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple | deque):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted)


@pytest.mark.parametrize(
    "value",
    [
        [None, True, 3, 0.1, float("inf"), "ä\ud800"],
        (1, [2, {"three": (4,)}], {}),
        {1: "one", (2, 3): "pair", "s": {4, 5}, frozenset({6}): b"\x00\xff"},
        np.float32(0.1),
        [np.int64(2**62), np.bool_(True), 2**200, 1 + 2j],
        np.arange(6, dtype=">i4").reshape(2, 3).T,
        np.array(3.5),
        np.zeros((0, 4), np.float16),
        np.array([1 + 2j, 3]),
        np.array(["one", "zwölf"]),
        np.array(["2026-01-01"], "datetime64[D]"),
        deque([1, 2, 3], maxlen=3),
        OrderedDict(b=1, a=2),
        defaultdict(list, {"a": [np.ones(2)]}),
        Counter("banana"),
        torch.tensor([[0.1, 2.0]], dtype=torch.bfloat16),
        torch.tensor(3, dtype=torch.int64),
    ],
    ids=str,
)
def test_a_value_in_a_checkpoint_comes_back_as_it_was(value: Any, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    text = json.dumps(pack(value, arrays, "x"))
    save_file(arrays, tmp_path / "x.safetensors")
    assert same(unpack(json.loads(text), load_file(tmp_path / "x.safetensors")), value)


def test_records_come_back_as_they_were() -> None:
    records = RecordDict(
        {
            "a": ArrayRecord({"b": Array(np.float16([[1, 2]])), "s": Array(np.array(2.0)), "a": Array(np.zeros(0))}),
            "m": MetricRecord({"n": 1, "x": 0.1, "l": [1.0, 2.0]}),
            "c": ConfigRecord({"t": "text", "b": b"\xff", "flag": True, "l": ["x"]}),
        }
    )
    arrays: dict[str, Any] = {}
    again = unpack(json.loads(json.dumps(pack(records, arrays, "x"))), arrays)
    assert again == records and list(again["a"]) == ["b", "s", "a"]
    assert {name: a.data for name, a in again["a"].items()} == {name: a.data for name, a in records["a"].items()}


@pytest.mark.parametrize(
    ("made", "draw"),
    [
        (lambda: np.random.default_rng(1), lambda g: g.normal(size=3).tolist()),
        (lambda: np.random.Generator(np.random.MT19937(1)), lambda g: g.integers(9, size=9).tolist()),
        (lambda: np.random.RandomState(1), lambda g: g.normal(size=3).tolist()),
        (lambda: random.Random(1), lambda g: [g.gauss(0, 1) for _ in range(3)]),
        (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(3, generator=g).tolist()),
    ],
)
def test_a_random_generator_goes_on_where_it_was(made: Callable[[], Any], draw: Callable[[Any], list[float]]) -> None:
    generator, arrays = made(), {}
    draw(generator)
    text = json.dumps(pack(generator, arrays, "x"))
    assert draw(unpack(json.loads(text), arrays)) == draw(generator) != draw(made())


class Own(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("value", [print, object(), Own(), np.array([None]), {"deep": [object()]}])
def test_what_would_not_come_back_the_same_is_refused_by_its_type(value: Any) -> None:
    with pytest.raises(NotPlainError, match="cannot be part of a checkpoint"):
        pack(value, {}, "x")


class Hoarder(FedAdam):
    """With a state of kinds that a plain JSON lacks, and a thing that no checkpoint can keep."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: set[int] = set()
        self.stream = np.random.default_rng(0)
        self.noise: deque[Any] = deque(maxlen=2)
        self.handle: Any = object()
        self.inner = FedAdam()

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.seen.add(server_round)
        self.noise.append(np.float32(self.stream.normal()))
        self.inner.tau = float(server_round)
        return super().aggregate_train(server_round, replies)


def test_a_strategys_whole_state_is_kept_and_what_is_not_is_named() -> None:
    strategy = Hoarder()
    strategy.seen, strategy.inner.tau = {3, 5}, 0.25
    strategy.noise.extend([np.float32(1), np.float32(2), np.float32(3)])
    strategy.stream.normal()
    packed, arrays, left_out = save_strategy(strategy)
    assert list(left_out) == ["handle"] and "a object cannot" in left_out["handle"]
    again = Hoarder()
    load_strategy_state(again, json.loads(json.dumps(packed)), arrays)
    assert (again.seen, again.noise, again.inner.tau) == (strategy.seen, strategy.noise, 0.25)
    assert type(again.noise[0]) is np.float32 and again.noise.maxlen == 2
    assert again.stream.normal() == strategy.stream.normal()


def test_clients_go_on_with_their_own_state(
    tiny: dict[str, Any], faulty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATEFUL", "yes")
    config = SimulationConfig(**{**tiny, "strategy": f"{__file__}:Hoarder", "lr_schedule": "constant"})
    run_simulation(config.model_copy(update={"out": tmp_path / "whole"}))
    cut = config.model_copy(update={"out": tmp_path / "cut", "rounds": 2})
    run_simulation(cut)
    for file in ("round-00002.json", "round-00002.safetensors"):
        assert (tmp_path / "cut" / "checkpoints" / file).read_bytes()
    run_simulation(cut.model_copy(update={"rounds": 3, "resume": True}))
    assert_same_results(tmp_path / "cut", tmp_path / "whole")
    checkpoint = RunDirectory(tmp_path / "cut").last_checkpoint()
    assert checkpoint is not None
    asked = {client for number, client, *_ in faulty_app.SENT if number <= 3}
    assert checkpoint.extra["clients"] == sorted(asked), "and none for those never asked"
    told = log_of(tmp_path / "whole").count("Hoarder.handle is not in the checkpoints (a object cannot be part")
    assert told == 1, "once a run, not once a round"


# --- faults -----------------------------------------------------------------------------------------------------------

KINDS = {
    4: ("bases", "other bases", "it trained between other bases"),
    7: ("raises", "ArithmeticError", "ArithmeticError: client 7 is out of cheese"),
    12: ("nan", "not finite", "has values that are not finite"),
    23: ("shape", "wrong shape", "expected float32"),
    31: ("dtype", "wrong dtype", "is float64"),
}


def test_of_fifty_clients_those_that_fail_are_left_out_and_the_rest_are_averaged_exactly(
    tiny: dict[str, Any],
    faulty: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAULTS", " ".join(f"{client}:{what}" for client, (what, *_) in KINDS.items()))
    options = {**tiny, "clients": 50, "sample": 1.0, "rounds": 2, "partition": "iid", "weights": "examples"}
    assert main([*flags(options), "--out", str(tmp_path / "run")]) == 0
    summary, rows = read_run(tmp_path / "run")
    shown, log = capsys.readouterr().err, log_of(tmp_path / "run")
    for row in rows:
        assert (row["clients"], row["failed"]) == (50, 5)
        assert row["failures"] == {str(client): kind for client, (_, kind, _) in KINDS.items()}
        assert row["aggregation_error"] < 1e-6
    assert summary["failed_clients"] == 10
    assert summary["failures"] == {kind: {str(client): 2} for client, (_, kind, _) in KINDS.items()}
    for client, (_, kind, reason) in KINDS.items():
        for number in (1, 2):
            line = next(x for x in log.splitlines() if f"round {number}: client {client} failed and is left out" in x)
            assert reason in line
        closing = next(line for line in shown.splitlines() if f"  {kind} " in line)
        assert f"client {client} (2 rounds)" in closing
    assert "5 FAILED" in shown and "Traceback" not in shown

    # By hand: the mean of what the other 45 sent.
    for number in (1, 2):
        good = [(weight, sent) for r, client, weight, sent in faulty_app.SENT if r == number and client not in KINDS]
        assert len(good) == 45
        total = sum(weight for weight, _ in good)
        trained = load_file(tmp_path / "run" / "checkpoints" / f"round-0000{number}.safetensors")
        for name, array in trained.items():
            mean = sum(weight / total * sent[name].astype(np.float64) for weight, sent in good)
            np.testing.assert_allclose(array, mean, rtol=1e-6, atol=1e-9)

    entries = read_ledger(tmp_path / "run" / "ledger")
    healthy = next(e.payload_bytes for e in entries if e.kind == "update" and e.client == 0)
    for number in (1, 2):
        of_round = [entry for entry in entries if entry.round == number]
        assert {e.client for e in of_round if e.kind == "broadcast"} == set(range(50)), "it crossed to all"
        sent = {e.client: e.payload_bytes for e in of_round if e.kind == "update"}
        assert set(sent) == set(range(50)) - {7}, "who raised sent nothing; what was refused had crossed all the same"
        assert sent[12] == healthy and sent[23] < healthy < sent[31]
        based = {entry.client for entry in of_round if entry.kind == "basis"}
        assert based == (set(range(50)) if number == 1 else set(KINDS)), "who failed is sent the bases again"
        assert sum(e.wire_bytes for e in of_round if e.direction == "up") == rows[number - 1]["bytes_up"]


def test_too_many_failures_end_the_run_with_the_last_good_round_on_disk(
    tiny: dict[str, Any],
    faulty: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {**tiny, "sample": 6, "max_failed": 0.5}
    run_simulation(SimulationConfig(**options, out=tmp_path / "whole"))
    monkeypatch.setenv("FAULTS", "0:raises:2 1:nan:2 2:nan:2 3:shape:2")
    words = [*flags(options), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line][-1]
    assert error.startswith("error: round 2: 4 of 6 clients failed (--max-failed 0.5); client 0: ArithmeticError: ")
    assert "client 1: " in error and "client 3: " in error and "client 2: " not in error, "the first of each kind"
    assert all(f"round 2: client {client} failed" in log_of(tmp_path / "run") for client in range(4))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "round-00001.json",
        "round-00001.safetensors",
    ]
    monkeypatch.delenv("FAULTS")
    assert main([*words, "--resume"]) == 0
    assert_same_results(tmp_path / "run", tmp_path / "whole")


def test_whatever_a_client_raises_is_a_failure_like_any_other() -> None:
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise ValueError("no")

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        raise [UnspeakableError, asyncio.CancelledError][int(context.node_config["partition-id"])]

    grid = LocalGrid(app, 2, run_config={})
    first, second = grid.send_and_receive([Message(RecordDict(), node_of(client), "train") for client in (0, 1)])
    assert str(first.error.reason).startswith("UnspeakableError: (its text cannot be shown)")
    assert str(second.error.reason).startswith("CancelledError")


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def rows_in(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["exact-average", "flwr.serverapp.strategy:FedAdam"])
@pytest.mark.serial
def test_ten_kills_at_random_moments_change_nothing(strategy: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    options = {**tiny, "rounds": 14, "strategy": strategy, "codec": "float32"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    stream = random.Random(f"{SEED} {strategy}")
    print(f"DURABILITY_SEED={SEED}")
    seconds = [
        row["train_seconds"] + row["evaluate_seconds"]
        for row in run_simulation(SimulationConfig(**options, out=whole)).history
    ]

    for kill in range(10):
        # Never so far that the run could be over; at first, and wherever it is ahead, in the midst of its preparation.
        at_least, wait = (kill * 3) // 4, stream.uniform(0, 2 * float(np.median(seconds)))
        resume = ["--resume"] if (killed / "config.yaml").exists() else []
        words = [*flags(options), "--out", str(killed), *resume]
        process = forks.server(*forks.RUN).start(forks.SIMULATE, *words, cwd=tmp_path)
        deadline = time.monotonic() + 60
        while rows_in(killed) < at_least or not (killed / "config.yaml").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.said()
            time.sleep(0.002)
        time.sleep(wait)
        assert process.poll() is None, "the run was over before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        print(
            f"kill {kill + 1}: {rows_in(killed)} rows, {len(list(killed.glob('checkpoints/*')))} files of checkpoints"
        )

    assert not (killed / "summary.json").exists()
    run_simulation(SimulationConfig(**options, out=killed, resume=True))
    assert_same_results(killed, whole)
    assert not list(killed.rglob("*.partial")) and not (killed / ".work").exists()


def workers_of(driver: int) -> list[psutil.Process]:
    """The Ray workers below a process: those at work first."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            words = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if words.startswith("ray::Worker"):
            found.append(("execute" not in words, child.pid, child))
    return [child for *_, child in sorted(found, key=lambda item: item[:2])]


@pytest.mark.slow
@pytest.mark.serial
def test_a_worker_killed_in_every_round_and_all_at_once_change_nothing(tiny: dict[str, Any], tmp_path: Path) -> None:
    options = {**tiny, "clients": 8, "sample": 8, "cohort": 2, "rounds": 4, "local_epochs": 15, "codec": "float32"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_simulation(SimulationConfig(**options, out=whole))
    words = [*flags({**options, "engine": "ray"}), "--workers", "2", "--out", str(run)]
    kills = []

    def working(server_round: int) -> list[psutil.Process]:
        """The workers once one is at work in this round."""
        while True:  # a look at all processes is work, and the workers need the cores: hence the pause
            assert process.poll() is None, process.said()
            begun = (run / "log.txt").exists() and "before the first round" in log_of(run)
            found = workers_of(process.pid) if begun and rows_in(run) >= server_round - 1 else []
            if any("execute" in " ".join(worker.cmdline()) for worker in found):
                assert rows_in(run) == server_round - 1, "the round was over before a worker could be killed"
                return found
            time.sleep(0.1)

    process = forks.server(*forks.RUN).start(forks.SIMULATE, *words, cwd=tmp_path)
    for number in (1, 2, 3):
        working(number)[0].kill()
        kills.append(1)
    working(4)
    os.kill(process.pid, signal.SIGSTOP)  # the round waits until those that died have been replaced
    deadline = time.monotonic() + 120
    while len(living := workers_of(process.pid)) < 2:
        assert time.monotonic() < deadline, "a worker that died was not replaced"
        time.sleep(0.1)
    for worker in living:
        worker.kill()
    os.kill(process.pid, signal.SIGCONT)
    kills.append(len(living))
    assert process.wait() == 0, process.said()
    (summary, rows), (expected, expected_rows) = read_run(run), read_run(whole)
    assert summary["trained_sha256"] == expected["trained_sha256"]
    assert timeless(rows) == timeless(expected_rows) and [row["failed"] for row in rows] == [0] * 4
    assert read_ledger(run / "ledger") == read_ledger(whole / "ledger")
    stories = re.split(r"round \d: \{", log_of(run).partition("before the first round")[2])[:4]
    restarts = [story.count("a worker died during") for story in stories]
    assert all(seen >= killed for seen, killed in zip(restarts, kills, strict=True)), (restarts, kills)
    assert summary["timing"]["worker_restarts"] >= sum(kills) == 3 + 2


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of three rounds, and what another run of another seed has left, to be swapped in."""
    folder = tmp_path_factory.mktemp("finished")
    run_simulation(SimulationConfig(**tiny, out=folder / "run"))
    run_simulation(SimulationConfig(**{**tiny, "seed": 1}, out=folder / "other"))
    return folder


def mutate(run: Path, other: Path, stream: random.Random) -> str:
    """Damage one thing as disks, crashes and people do; what was done."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix not in (".txt", ".md"))
    saved = [path for path in files if path.parent.name == "checkpoints"]
    path = stream.choice(saved if stream.random() < 0.7 else files)
    content = path.read_bytes()
    kind = stream.choice(["flip", "cut", "swap", "edit", "lose", "grow", "foreign", "folder", "zero"])
    if kind == "flip":
        at = stream.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << stream.randrange(8)]) + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[: stream.randrange(len(content))])
    elif kind == "swap":
        mate = stream.choice([file for file in files if file.suffix == path.suffix])
        path.write_bytes(mate.read_bytes())
        mate.write_bytes(content)
    elif kind == "edit":  # a digit of a text, or of a header
        digits = [at for at, byte in enumerate(content) if 48 <= byte < 58]
        at = stream.choice(digits or [0])
        path.write_bytes(content[:at] + str(stream.randrange(10)).encode() + content[at + 1 :])
    elif kind == "lose":
        path.unlink()
    elif kind == "grow":
        path.write_bytes(content + stream.choice([b"\n", b"}", b"\x00" * 9, content[:50]]))
    elif kind == "foreign":
        path.write_bytes((other / path.relative_to(run)).read_bytes())
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "zero":
        path.write_bytes(bytes(len(content)))
    return f"{kind} {path.relative_to(run)}"


@pytest.mark.slow
def test_five_hundred_damaged_runs_go_on_from_what_is_whole_or_are_refused(
    tiny: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    config = SimulationConfig(**tiny, out=finished / "run")
    resolved = SimulationConfig(**{**tiny, **saved_values(finished / "run"), "out": finished / "run"})
    contents = check(resolved).contents
    wanted: dict[int, Checkpoint] = {}
    for number in (3, 2):
        shutil.copytree(finished / "run", tmp_path / "good", ignore=shutil.ignore_patterns(f"round-0000{number + 1}.*"))
        found = continue_from(RunDirectory(tmp_path / "good"), resolved, contents)
        assert found is not None and found.round == number
        wanted[number] = found
        shutil.rmtree(tmp_path / "good")
    outcomes: Counter[str] = Counter()
    run = tmp_path / "run"
    for case in range(500):
        stream = random.Random(f"{SEED} {case}")
        shutil.copytree(finished / "run", run, ignore=shutil.ignore_patterns("log.txt", "adapter"))
        what = " and ".join(mutate(run, finished / "other", stream) for _ in range(stream.choice([1, 1, 1, 2, 4])))
        before = tree(run)
        directory = RunDirectory(run)
        try:
            found = continue_from(directory, resolved.model_copy(update={"out": run}), contents)
        except InputError as error:
            assert tree(run) == before, f"{case}: {what}: who is refused leaves no trace"
            assert "--" in str(error), f"{case}: {what}: {error}"
            outcomes["refused"] += 1
        else:
            directory.go_back_to(found)
            number = 0 if found is None else found.round
            outcomes[f"on from round {number}"] += 1
            assert found is None or as_bytes(found) == as_bytes(wanted[number]), f"{case}: {what}"
            kept = {path: content for path, content in tree(run).items() if "metrics.jsonl" not in path}
            assert kept.items() <= before.items(), f"{case}: {what}: nothing is changed"
            for done in range(1, number + 1):
                part = part_path(run / "ledger", done)
                assert part.read_bytes() == part_path(finished / "run" / "ledger", done).read_bytes(), what
            lines = (run / "metrics.jsonl").read_bytes().splitlines()
            assert lines == (finished / "run" / "metrics.jsonl").read_bytes().splitlines()[:number], what
        shutil.rmtree(run)
    print(f"DURABILITY_SEED={SEED}", dict(outcomes), config.out)
    assert min(outcomes["refused"], outcomes["on from round 2"], outcomes["on from round 3"]) >= 25, outcomes


def saved_values(run: Path) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return values


def as_bytes(checkpoint: Checkpoint) -> tuple[Any, ...]:
    arrays = {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in checkpoint.arrays.items()}
    return checkpoint.round, arrays, checkpoint.metrics, checkpoint.ledger, checkpoint.extra


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damaged", "passed_over"),
    [
        (["checkpoints/round-00003.json"], "round-00003.json is damaged"),
        (["ledger/round-00003.parquet", "metrics.jsonl"], "the checksum of ledger/round-00003.parquet is wrong"),
        (["metrics.jsonl", "summary.json", "adapter/adapter_config.json"], ""),
    ],
)
def test_a_run_with_a_damaged_file_is_resumed_to_the_same_bytes(
    damaged: list[str], passed_over: str, tiny: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    for name in damaged:
        damage(tmp_path / "run" / name)
    (tmp_path / "run" / "checkpoints" / "round-final.json").write_text("a user's own", encoding="utf-8")
    assert main([*flags(tiny), "--out", str(tmp_path / "run"), "--resume", "--quiet"]) == 0
    assert passed_over in log_of(tmp_path / "run")
    assert_same_results(tmp_path / "run", finished / "run")
    assert (tmp_path / "run" / "checkpoints" / "round-final.json").read_text(encoding="utf-8") == "a user's own"


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (["checkpoints/round-00002.json", "checkpoints/round-00003.safetensors"], "no checkpoint in"),
        (["ledger/round-00001.parquet"], "the checksum of ledger/round-00001.parquet is wrong"),
        (["config.yaml"], "--resume"),
    ],
)
def test_a_run_that_cannot_be_mended_is_refused_and_left_as_it_is(
    damaged: list[str],
    said: str,
    tiny: dict[str, Any],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    for name in damaged:
        damage(tmp_path / "run" / name)
    if "config.yaml" in damaged:
        (tmp_path / "run" / "config.yaml").write_bytes(b"rounds: [\x00")
    before = tree(tmp_path / "run")
    assert main([*flags(tiny), "--out", str(tmp_path / "run"), "--resume", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error and "another --out" in error and "Traceback" not in error
    assert tree(tmp_path / "run") == before


def test_an_edited_configuration_is_refused_though_config_yaml_agrees(
    tiny: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("batch_size: ", "batch_size: 1"), encoding="utf-8")
    assert main([str(path), "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused(tiny: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="there are no such locks here")
    shutil.copytree(finished / "run", tmp_path / "run")
    with open(tmp_path / "run" / "log.txt", "a", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is running there"):
            run_simulation(SimulationConfig(**tiny, out=tmp_path / "run", resume=True))
    run_simulation(SimulationConfig(**tiny, out=tmp_path / "run", resume=True))


# --- other disks ------------------------------------------------------------------------------------------------------

FOLLOWING = """
from fedlotr.flower import Strategy, weighted_mean

class Following(Strategy):
    def combine(self, updates, server_round):
        return weighted_mean(updates)
"""


@pytest.fixture(scope="module")
def elsewhere(tiny_bert: Path, animals: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with all that a run is made of and the run itself, of two rounds; its options, with paths from there."""
    disk = tmp_path_factory.mktemp("disk") / "old"
    shutil.copytree(tiny_bert, disk / "bert")
    shutil.copytree(animals, disk / "animals")
    (disk / "known.jsonl").write_bytes((animals / "test.jsonl").read_bytes())
    (disk / "mine.py").write_text(FOLLOWING, encoding="utf-8")
    options = {"model": "bert", "data": "animals", "public-data": "known.jsonl", "strategy": "mine.py:Following"}
    more = {"clients": 3, "sample": 2, "rounds": 2, "rank": 4, "method": "lotr", "engine": "local", "threads": 1}
    assert main([*flags(at(disk, options)), *flags(more), f"--out={disk / 'run'}", "--quiet"]) == 0
    return disk, options


def at(disk: Path, options: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{disk}/{value}" for name, value in options.items()}


def moved(elsewhere: tuple[Path, dict[str, Any]], to: Path) -> dict[str, Any]:
    """Everything on another disk, the run with its last round undone; the options with the new paths."""
    shutil.copytree(elsewhere[0], to)
    for file in (to / "run" / "checkpoints").glob("round-00002.*"):
        file.unlink()
    return at(to, elsewhere[1])


def go_on(run: Path, *words: str) -> int:
    return main([str(run / "config.yaml"), f"--out={run}", "--resume", *words])


def test_a_run_goes_on_to_the_same_bytes_with_all_it_is_made_of_elsewhere(
    elsewhere: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, options = elsewhere
    new = moved(elsewhere, tmp_path / "new")
    bert = tmp_path / "new" / "bert"
    whole = load_torch(bert / "model.safetensors")
    for number, names in enumerate((sorted(whole)[::2], sorted(whole)[1::2])):  # the weights in files of other sizes
        save_torch(
            {name: whole[name] for name in names},
            tmp_path / "new" / "bert" / f"part-{number}.safetensors",
            {"format": "pt"},
        )
    index = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(whole))}
    content = json.dumps({"metadata": {}, "weight_map": index})
    (bert / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    (bert / "model.safetensors").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "new" / "animals")
    new["data"] = str(tmp_path / "link")
    run = tmp_path / "new" / "run"
    assert go_on(run, *flags(new)) == 0
    told = capsys.readouterr().err
    summary = read_run(run)[0]
    assert summary["trained_sha256"] == read_run(disk / "run")[0]["trained_sha256"]
    for name, path in new.items():
        line = f"--{name} {path}: the run was begun with {disk / options[name]}; the content is the same"
        assert f"warning: {line}" in told and line in summary["warnings"]
    kept = (run / "config.yaml").read_text(encoding="utf-8")
    assert all(path in kept for path in new.values()) and str(disk) not in kept
    assert str(bert) in (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert go_on(run, "--quiet") == 0  # from now on it is at home there


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def one_more(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{{ messages }}", encoding="utf-8")


def other_word(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace("cat", "cow", 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "option", "said"),
    [
        (("bert/model.safetensors", one_bit), "model", "its weights differ"),
        (
            ("bert/additional_chat_templates/tool_use.jinja", one_more),
            "model",
            "its additional_chat_templates/tool_use",
        ),
        (("animals/test.jsonl", other_word), "data", "its rows differ"),
        (("known.jsonl", other_word), "public-data", "its rows differ"),
        (("mine.py", lambda path: path.write_text(f"{FOLLOWING}\n", encoding="utf-8")), "strategy", "its code differs"),
        (("bert", shutil.rmtree), "model", "no such folder; where it has moved, say so (--model PATH)"),
        (("mine.py", Path.unlink), "strategy", "no such file; where it has moved, say so (--strategy PATH)"),
    ],
)
def test_another_content_elsewhere_is_refused_with_what_would_do(
    changed: tuple[str, Callable[[Path], object]],
    option: str,
    said: str,
    elsewhere: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk, options = elsewhere
    new = moved(elsewhere, tmp_path / "new")
    changed[1](tmp_path / "new" / changed[0])
    before = tree(tmp_path / "new" / "run")
    assert go_on(tmp_path / "new" / "run", *flags(new)) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"--{option} {new[option]}: " in line and said in line
    assert "--resume takes" in line
    assert ("no such" in line) != (f"begun with {disk / options[option]}, and" in line)
    assert tree(tmp_path / "new" / "run") == before


def test_a_checkpoint_that_kept_no_hash_of_the_model_goes_on_and_says_so(
    elsewhere: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    new, run = moved(elsewhere, tmp_path / "new"), tmp_path / "new" / "run"
    path = run / "checkpoints" / "round-00001.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["sha256"], record["contents"]
    sha256 = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": sha256, **record}), encoding="utf-8")
    assert go_on(run, *flags(new), "--quiet") == 0
    summary = read_run(run)[0]
    assert [line.partition(" ")[0] for line in summary["warnings"] if "not compared" in line] == [
        "--model",
        "--public-data",
        "--strategy",
    ]


# --- disks ------------------------------------------------------------------------------------------------------------

MISCHIEF = """
import logging
import os
from pathlib import Path

from fedlotr.flower import Strategy, weighted_mean


class Mischief(Strategy):
    averages = True

    def combine(self, updates, server_round):
        what, _, rest = os.environ.get("MISCHIEF", "").partition(" ")
        if server_round == 2 and what == "fill":
            path, _, pages = rest.rpartition(" ")
            with open(path, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)) == 4096:
                        pass
                except OSError:
                    pass
                file.truncate(os.path.getsize(path) - 4096 * int(pages))
            if pages == "0":  # nor is there room for the log
                logging.getLogger("fedlotr").warning("much to say: %s", "x" * 9000)
        if server_round == 2 and what == "move":
            Path(rest).rename(rest + "-elsewhere")
        return weighted_mean(updates)
"""
"""In round 2: fill the disk but for so many pages, or take the output folder away."""


@pytest.fixture
def mischief(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "mischief.py").write_text(MISCHIEF, encoding="utf-8")
    return {**tiny, "strategy": f"{tmp_path}/mischief.py:Mischief"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_loses_no_round(
    mischief: dict[str, Any],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_simulation(SimulationConfig(**mischief, out=tmp_path / "whole"))
    saved = set()
    for pages in (0, 1, 3, 5, 8, 11):  # room for ever more of what a round writes
        run, filler = small_disk / f"run-{pages}", small_disk / "filler"
        words = [*flags(mischief), "--out", str(run)]
        monkeypatch.setenv("MISCHIEF", f"fill {filler} {pages}")
        capsys.readouterr()
        assert main(words) == 1, f"with {pages} pages"
        shown = capsys.readouterr().err
        assert "Traceback" not in shown and "Logging error" not in shown
        (error,) = [line for line in shown.splitlines() if line.startswith("error")]
        last = RunDirectory(run).last_checkpoint()
        assert last is not None
        saved.add(last.round)
        finished = "round 1 is" if last.round == 1 else f"rounds 1 to {last.round} are"
        assert f"the disk is full; {finished} safe in {run}: make room, and go on with --resume" in error
        monkeypatch.delenv("MISCHIEF")
        before = tree(run)
        assert main([*words, "--resume"]) in (1, 2), "there is no room yet"
        shown = capsys.readouterr().err
        assert "Traceback" not in shown and "Logging error" not in shown
        assert "start the run again" not in shown and "error: " in shown
        assert tree(run).items() >= {p: c for p, c in before.items() if "/checkpoints/" in p}.items()
        filler.unlink()
        assert main([*words, "--resume", "--quiet"]) == 0
        assert_same_results(run, tmp_path / "whole")
        shutil.rmtree(run)
    assert 1 in saved and len(saved) > 1, "the disk was full at several moments"


def test_an_output_folder_that_is_taken_away_ends_the_run_in_one_line_and_is_not_made_again(
    mischief: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_simulation(SimulationConfig(**mischief, out=tmp_path / "whole"))
    run = tmp_path / "run"
    words = [*flags(mischief), "--out", str(run)]
    monkeypatch.setenv("MISCHIEF", f"move {run}")
    capsys.readouterr()
    assert main(words) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    (error,) = [line for line in shown.splitlines() if line.startswith("error")]
    assert f"the output folder {run} was removed or replaced while the run was going on" in error
    assert not run.exists()
    monkeypatch.delenv("MISCHIEF")
    (tmp_path / "run-elsewhere").rename(run)
    assert main([*words, "--resume", "--quiet"]) == 0
    assert_same_results(run, tmp_path / "whole")


def test_an_output_folder_that_is_replaced_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(FedlotrError, match="was removed or replaced"), directory.explaining():
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        directory.append_metrics({})
        directory.write_checkpoint(1, {}, [], [], {})
    assert [path.name for path in (tmp_path / "run").iterdir()] in ([], ["metrics.jsonl"])


def test_the_command_line_says_it_in_one_line_too(mischief: dict[str, Any], simulate: Simulate, tmp_path: Path) -> None:
    done = simulate(*flags(mischief), "--out", tmp_path / "run", MISCHIEF=f"move {tmp_path / 'run'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the output folder")
