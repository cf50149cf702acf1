"""The engines' promises: equal replies in order from all; failures stay with their culprit; nothing is left behind."""

import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlotr.engines import CohortRule, LocalGrid, RayGrid, node_of, partition_of
from fedlotr.engines.base import Engine
from fedlotr.engines.broadcast import Broadcast, size
from fedlotr.engines.clients import Job
from fedlotr.errors import FedlotrError, InputError

pytestmark = pytest.mark.serial
CLIENTS = 12


def by_four(partitions: Sequence[int]) -> list[list[int]]:
    return [list(partitions[i : i + 4]) for i in range(0, len(partitions), 4)]


def broadcast(partitions: Sequence[int], kind: str = "train", /, **config: int | str) -> list[Message]:
    """Messages that share one content, as a strategy's do; the config tells the echo app whom to let fail, and how."""
    arrays = ArrayRecord({"core": Array(np.arange(6, dtype=np.float32).reshape(2, 3))})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(dict(config))})
    return [Message(content, node_of(partition), kind) for partition in partitions]


def partitions_of(replies: Sequence[Message]) -> list[int]:
    return [partition_of(reply.metadata.src_node_id) for reply in replies]


def failed(replies: Sequence[Message]) -> list[int]:
    return partitions_of([reply for reply in replies if reply.has_error()])


def metric(reply: Message, name: str) -> int:
    return int(str(reply.content.metric_records["metrics"][name]))


def contents(replies: Sequence[Message]) -> list[tuple[int, int, bytes]]:
    """What must not depend on the engine: who, in a cohort of how many, and the bytes of the array."""
    return [
        (p, metric(reply, "cohort"), reply.content.array_records["arrays"]["core"].data)
        for p, reply in zip(partitions_of(replies), replies, strict=True)
        if reply.has_content()
    ]


def calls(grid: Engine) -> dict[int, int]:
    """How often a client was called, by its state: the echo app counts in those of odd partitions."""
    return {p: int(str(state.metric_records["calls"]["calls"])) for p, state in grid.client_states.items()}


def local(cohorts: CohortRule | None = None, clients: int = CLIENTS, app: str = "echo_app:app") -> LocalGrid:
    return LocalGrid(app, clients, run_config={}, cohorts=cohorts)


def a_ray_grid(workers: int, cohorts: CohortRule | None = by_four, app: str = "echo_app:app") -> RayGrid:
    return RayGrid(app, CLIENTS, run_config={}, cohorts=cohorts, workers=workers)


@pytest.fixture(scope="module")
def ray_grid(ray_session: None) -> Iterator[RayGrid]:
    with a_ray_grid(2) as grid:
        yield grid


@pytest.fixture(params=["local", "ray"])
def grid(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn, with cohorts of four."""
    return request.getfixturevalue("ray_grid") if request.param == "ray" else local(by_four)


# --- replies ----------------------------------------------------------------------------------------------------------


def test_replies_come_in_node_order_whatever_the_order_of_the_messages(grid: Engine) -> None:
    partitions = list(range(CLIENTS))
    ordered = contents(grid.send_and_receive(broadcast(partitions)))
    random.Random(0).shuffle(partitions)
    assert contents(grid.send_and_receive(broadcast(partitions))) == ordered
    assert [p for p, _, _ in ordered] == list(range(CLIENTS))


def test_each_client_answers_its_own_message(grid: Engine) -> None:
    replies = grid.send_and_receive(broadcast([2, 7]))
    for partition, reply in zip([2, 7], replies, strict=True):
        expected = np.arange(6, dtype=np.float32).reshape(2, 3) + partition
        np.testing.assert_array_equal(reply.content.array_records["arrays"]["core"].numpy(), expected)


def test_push_returns_ids_in_the_order_given_and_each_reply_is_pulled_once(grid: Engine) -> None:
    messages = broadcast([9, 1, 5])
    ids = grid.push_messages(messages)
    assert ids == [message.metadata.message_id for message in messages]
    replies: dict[str, Message] = {}
    while len(replies) < 3:
        replies |= {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(ids)}
    assert partitions_of([replies[message_id] for message_id in ids]) == [9, 1, 5]
    assert grid.pull_messages(ids) == []


def test_no_two_starts_of_an_engine_name_messages_alike() -> None:
    first, second = (local().push_messages(broadcast(range(5))) for _ in range(2))
    assert not set(first) & set(second), "else a reply of before a restart would answer a message of after it"


def test_ready_replies_can_be_pulled_while_others_are_not() -> None:
    grid = local(by_four)
    ids = grid.push_messages(broadcast(range(CLIENTS)))
    assert [len(grid.pull_messages(ids)) for _ in range(4)] == [4, 4, 4, 0]


def test_train_messages_are_cut_into_cohorts_and_others_are_not(grid: Engine) -> None:
    assert {metric(reply, "cohort") for reply in grid.send_and_receive(broadcast(range(8)))} == {4}
    assert {metric(reply, "cohort") for reply in grid.send_and_receive(broadcast(range(8), "evaluate"))} == {0}


def test_a_client_app_without_cohorts_is_called_once_a_message() -> None:
    replies = local(by_four, app="echo_app:plain").send_and_receive(broadcast(range(5), fail=3))
    assert failed(replies) == [3]
    assert contents(replies) == contents(local().send_and_receive(broadcast([0, 1, 2, 4])))


def test_a_client_cannot_change_what_the_others_and_the_server_see(grid: Engine) -> None:
    messages = broadcast(range(8))  # the echo app writes to the config, and raises where another did
    assert failed(grid.send_and_receive(messages)) == []
    assert "touched" not in messages[0].content.config_records["config"]


def test_state_is_kept_for_those_clients_that_have_one() -> None:
    grid = local(by_four)
    for _ in range(2):
        grid.send_and_receive(broadcast(range(4)))
    grid.send_and_receive(broadcast(range(4), fail=1))  # one fails: its state stays as it was
    assert calls(grid) == {1: 2, 3: 3}


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_no_reply(ray_grid: RayGrid, workers: int) -> None:
    expected = contents(local(by_four).send_and_receive(broadcast(range(CLIENTS))))
    assert contents(ray_grid.send_and_receive(broadcast(range(CLIENTS)))) == expected
    with a_ray_grid(workers) as grid:
        for _ in range(2):
            assert contents(grid.send_and_receive(broadcast(range(CLIENTS)))) == expected
        assert calls(grid) == dict.fromkeys(range(1, CLIENTS, 2), 2)


def with_arrays(messages: list[Message], numbers: int) -> list[Message]:
    """The same messages around an array of so many numbers, an object of its own for each, all equal."""
    for message in messages:
        own = ArrayRecord({"core": Array(np.arange(numbers, dtype=np.float32))})
        message.content = RecordDict({**message.content, "arrays": own})
    return messages


def last_numbers(replies: Sequence[Message]) -> list[float]:
    return [float(reply.content.array_records["arrays"]["core"].numpy()[-1]) for reply in replies]


def test_equal_arrays_go_to_each_worker_once_in_training_and_in_evaluation(ray_session: None) -> None:
    numbers = 2**12
    with a_ray_grid(2, cohorts=None) as grid:
        grid.warm_up()
        once = size(with_arrays(broadcast([0]), numbers)[0].content["arrays"])
        sent = []
        for kind in ("evaluate", "train", "train"):
            replies = grid.send_and_receive(with_arrays(broadcast(range(CLIENTS), kind), numbers))
            assert last_numbers(replies) == [numbers - 1 + partition for partition in range(CLIENTS)]
            sent.append(grid.broadcast.sent_bytes)
        assert sent[-1] in (once, 2 * once), "one worker may have been quick enough to do all"
        replies = grid.send_and_receive(with_arrays(broadcast(range(CLIENTS)), numbers + 1))
        assert last_numbers(replies) == [numbers + partition for partition in range(CLIENTS)]


def test_what_is_stored_for_workers_is_what_messages_have_in_common() -> None:
    stored: list[object] = []
    shared = Broadcast(lambda record: stored.append(record) or len(stored))  # type: ignore[func-returns-value]
    large = with_arrays(broadcast(range(4)), 2**12)
    large[3].content["arrays"] = ArrayRecord({"core": Array(np.ones(2**12, np.float32))})  # one client's alone
    small = broadcast(range(4, 6))
    jobs = [Job(tuple(large[:2])), Job(tuple(large[2:])), Job(tuple(small))]
    shared.pushed(jobs)
    parcels = [shared.parcel(job, "worker 1") for job in jobs]
    assert len(stored) == 1 and [len(parcel.fresh) for parcel in parcels] == [1, 0, 0]
    assert [len(parcel.places) for parcel in parcels] == [2, 1, 0]
    assert [sorted(message.content) for message in parcels[1].job.messages] == [["config"], ["arrays", "config"]]
    assert all("arrays" in message.content for message in large), "the senders' messages stay whole"
    assert shared.parcel(jobs[1], "worker 2").references == [1] and len(stored) == 1
    shared.forget("worker 2")
    assert shared.parcel(jobs[1], "worker 2").references == [1], "another worker in its place has nothing yet"
    shared.pushed(jobs[2:])
    assert not shared.parcel(jobs[2], "worker 1").keep, "what nobody sends any more is dropped"


def test_workers_compute_with_the_threads_asked_for(ray_session: None) -> None:
    pytest.importorskip("threadpoolctl", reason="threadpoolctl tells how many threads a library uses")
    with RayGrid("echo_app:app", CLIENTS, run_config={}, workers=1, threads=2) as grid:
        (reply,) = grid.send_and_receive([Message(RecordDict(), node_of(0), "query")])
    pools = reply.content.config_records["pools"]
    assert pools and set(pools.values()) == {min(2, os.cpu_count() or 1)}


def test_a_sleeping_client_costs_nothing() -> None:
    tracemalloc.start()
    grid = local(clients=1_000_000)
    replies = grid.send_and_receive(broadcast([999_999]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert partitions_of(replies) == [999_999] and len(grid.get_node_ids()) == 1_000_000
    assert list(grid.client_states) == [999_999]
    assert peak < 1_000_000, "about a byte a client: something is allocated for those that sleep"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_message_to_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="no node 112: expected 100 to 111"):
        local().push_messages(broadcast([CLIENTS]))


@pytest.mark.parametrize("cut", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]])
def test_a_cohort_rule_that_loses_repeats_or_invents_a_client_is_refused(cut: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        local(lambda partitions: cut).push_messages(broadcast([0, 1, 2]))


def test_two_train_messages_to_one_client_in_one_push_are_refused() -> None:
    with pytest.raises(ValueError, match="two train messages"):
        local().push_messages(broadcast([3, 3]))


@pytest.mark.parametrize("app", ["echo_app", "echo_app:ap", "nowhere:app", "echo_app:not_an_app"])
def test_a_reference_that_is_no_client_app_is_refused_by_name(app: str) -> None:
    with pytest.raises(InputError, match=repr(app)):
        local(app=app)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fail", "exit"])
def test_only_the_client_that_raises_fails_though_its_cohort_shares_a_call(grid: Engine, how: str) -> None:
    replies = grid.send_and_receive(broadcast(range(CLIENTS), **{how: 5}))
    assert failed(replies) == [5]
    assert partitions_of(replies) == list(range(CLIENTS))
    sizes = [metric(reply, "cohort") for reply in replies if reply.has_content()]
    assert sizes == [4] * 4 + [1] * 3 + [4] * 4  # only the culprit's cohort was taken apart


def test_an_error_reply_says_what_was_raised_and_where(grid: Engine) -> None:
    (reply,) = grid.send_and_receive(broadcast([5], "evaluate", fail=5))
    assert reply.error.code == 2
    first, *traceback = (reply.error.reason or "").splitlines()
    assert first == "ValueError: client 5 is unwell"
    assert any("echo_app.py" in line and "misbehave" in line for line in traceback)


def test_a_cohort_taken_apart_is_logged(grid: Engine, caplog: pytest.LogCaptureFixture) -> None:
    grid.send_and_receive(broadcast(range(4), fail=2))
    assert "train of clients 0, 1, 2, 3 failed together" in caplog.text


def test_a_job_whose_worker_is_killed_is_repeated(ray_grid: RayGrid, tmp_path: Path) -> None:
    ray_grid.warm_up()
    before = ray_grid.restarts
    replies = ray_grid.send_and_receive(broadcast(range(CLIENTS), die_once=6, flag=str(tmp_path / "flag")))
    assert ray_grid.restarts == before + 1
    assert contents(replies) == contents(local(by_four).send_and_receive(broadcast(range(CLIENTS))))


def test_all_workers_killed_while_they_are_idle_are_all_replaced(ray_grid: RayGrid) -> None:
    def wide() -> list[Message]:
        return with_arrays(broadcast(range(CLIENTS)), 2**12)  # enough to be sent to each worker once

    replies = ray_grid.send_and_receive(wide())
    ray_grid.warm_up()
    (first, *_), before = replies, ray_grid.restarts
    pids = {metric(first, "pid")}
    while len(pids) < ray_grid.workers:
        pids |= {metric(reply, "pid") for reply in ray_grid.send_and_receive(wide())}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert contents(ray_grid.send_and_receive(wide())) == contents(replies)
    assert ray_grid.restarts == before + ray_grid.workers


def test_a_client_that_always_kills_its_worker_is_the_only_one_to_fail(ray_grid: RayGrid) -> None:
    replies = ray_grid.send_and_receive(broadcast(range(8), die=2))
    assert failed(replies) == [2]
    assert partitions_of(replies) == list(range(8))
    assert "died" in str(replies[2].error.reason)


def test_a_client_that_takes_too_long_is_given_up_and_its_worker_replaced(ray_grid: RayGrid) -> None:
    ray_grid.warm_up()
    before = ray_grid.restarts
    replies = ray_grid.send_and_receive(broadcast([0, 1, 4], "evaluate", sleep=4), timeout=2)
    assert partitions_of(replies) == [0, 1] and ray_grid.restarts == before + 1
    assert partitions_of(ray_grid.send_and_receive(broadcast(range(CLIENTS)))) == list(range(CLIENTS))


def test_what_was_given_up_is_never_executed() -> None:
    grid = local()
    assert grid.send_and_receive(broadcast(range(4)), timeout=0) == []
    ids = grid.push_messages(broadcast([1]))
    assert partitions_of(grid.pull_messages(ids)) == [1]  # a pull executes one job: none is left of the others


def test_workers_that_cannot_load_the_app_end_the_run_with_the_reason(ray_session: None) -> None:
    with a_ray_grid(1, app="nowhere:app") as grid:
        for _ in range(2):  # it stays refused: nobody waits for ever
            with pytest.raises(FedlotrError, match="nowhere"):
                grid.send_and_receive(broadcast([0]))


def test_an_app_of_somebody_elses_finds_every_library(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is loaded without what it does not use (`fedlotr.libraries`)."""
    (tmp_path / "their_app.py").write_text("import scipy.special, flwr.clientapp\napp = flwr.clientapp.ClientApp()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with a_ray_grid(1, app="their_app:app") as grid:
        grid.warm_up()


def test_a_closed_ray_grid_says_so_instead_of_waiting(ray_session: None) -> None:
    grid = a_ray_grid(1)
    grid.close()
    grid.close()
    with pytest.raises(FedlotrError, match="closed"):
        grid.send_and_receive(broadcast([0]))


# --- what is left behind ----------------------------------------------------------------------------------------------

ALONE = """
import sys, psutil
mode, *sys.path[:0] = sys.argv[1:]  # what only the driver knows, its workers must be told
from fedlotr.engines import RayGrid
from fedlotr.engines.own_ray import ray
from tests.engines.test_engines import broadcast, contents

grid = RayGrid("echo_app:app", 4, run_config={}, workers=2)
started = ray._private.worker._global_node.all_processes
with grid:
    replies = grid.send_and_receive(broadcast(range(4), die_once=1, flag="flag"))
    print([reply.has_content() for reply in replies], flush=True)
    if mode == "finish":
        print(*sorted(started))
    if mode == "interrupt":
        print("children", *[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        grid.send_and_receive(broadcast(range(4), sleep=1))
print([child.cmdline() for child in psutil.Process().children(recursive=True) if child.status() != "zombie"])
"""


def is_alive(pid: int) -> bool:
    """A zombie is dead; who reaps it, and when, is the system's affair."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def start_alone(mode: str, folder: Path) -> subprocess.Popen[str]:
    """A program of its own that owns its Ray, in a process group of its own, as a terminal would start it."""
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", ALONE, mode, str(root), str(root / "tests")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=folder,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and so would everything that this test starts in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_close_leaves_no_process_and_no_noise_and_ray_has_started_only_what_is_needed(tmp_path: Path) -> None:
    process = start_alone("finish", tmp_path)
    out, err = process.communicate(timeout=120)
    assert (out.splitlines(), process.returncode) == (["[True, True, True, True]", "gcs_server raylet", "[]"], 0)
    (line,) = err.splitlines()  # the log's own line on the worker that died; Ray's many are not shown
    assert line.startswith("a worker died during train of client 1") and line.endswith("restart 1")


def test_ctrl_c_in_a_round_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "flag").touch()
    process = start_alone("interrupt", tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "[True, True, True, True]\n"
    children = [int(pid) for pid in process.stdout.readline().split()[1:]]
    assert len(children) > 4  # two workers, and Ray's own
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    _, err = process.communicate(timeout=20)
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert err.count("Traceback") == 1 and "KeyboardInterrupt" in err  # the driver's own, none of a worker's
    assert [pid for pid in children if is_alive(pid)] == []
