"""TensorBoard, MLflow and Weights & Biases are told the rows of metrics.jsonl: all of them, once, and nothing else."""

import http.server
import json
import logging
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedlotr import Callbacks, RoundEvent, SimulationConfig, run_simulation
from fedlotr.commands import simulate as door
from fedlotr.reporting import loggers
from fedlotr.reporting.loggers import LOGGERS, MLflow, TensorBoard, numbers
from fedlotr.said import say
from tests.run.test_simulation import flags, small
from tests.support import read_run

__all__ = ["small"]  # the fixture
Series = dict[str, dict[int, float]]


def promised(run: Path) -> Series:
    """What metrics.jsonl says: series -> round -> value."""
    found: Series = {}
    for row in read_run(run)[1]:
        for name, value in numbers(row):
            found.setdefault(name, {})[row["round"]] = value
    assert {"loss", "accuracy", "bytes_up", "aggregation_error", "train_seconds"} <= set(found)
    return found


def told_to_tensorboard(run: Path) -> Series:
    """Every point that is in the event files, each once."""
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: Series = {}
    for file in sorted((run / "tensorboard").glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" or value.tag in found:
                    points = found.setdefault(value.tag, {})
                    assert event.step not in points, f"{value.tag} of round {event.step} is there twice"
                    points[event.step] = float(make_ndarray(value.tensor))
    return found


def told_to_mlflow(run: Path) -> Series:
    from mlflow import MlflowClient

    client = MlflowClient()
    run_id = json.loads((run / "mlflow.json").read_text(encoding="utf-8"))["run_id"]
    found: Series = {}
    for name in client.get_run(run_id).data.metrics:
        points = client.get_metric_history(run_id, name)
        found[name] = {point.step: point.value for point in points}
        assert len(points) == len(found[name]), f"{name} has a round twice"
    return found


def told_to_wandb(kept: Path) -> Series:
    """Its file is a log of protocol buffers as LevelDB keeps one: blocks of 32 KiB, records in pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = kept.read_bytes(), 7, b""
    found: Series = {}
    while at + 7 <= len(content):
        if (rest := -at % 32768) < 7:
            at += rest
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # neither all of a record nor its last piece
            continue
        record = Record()
        record.ParseFromString(whole)
        whole = b""
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in values.items():
            if not name.startswith("_"):  # its own: step, time
                found.setdefault(name, {})[int(values["_step"])] = value
    return found


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(None)
    yield


def run(small: dict[str, Any], out: Path, *more: str) -> int:
    return door.main([*flags(small), "--method", "lora", "--out", str(out), "--quiet", *more])


def test_tensorboard_has_the_series_of_metrics_jsonl_also_after_a_resume(small: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    out = tmp_path / "run"
    assert run(small, out, "--tensorboard") == 0
    assert told_to_tensorboard(out) == promised(out)
    assert run(small, out, "--tensorboard", "--rounds", "3", "--resume") == 0
    assert told_to_tensorboard(out) == promised(out) and len(promised(out)["loss"]) == 3


def test_mlflow_has_the_series_of_metrics_jsonl_and_catches_up(
    small: dict[str, Any], mlflow_store: None, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    out = tmp_path / "run"
    assert run(small, out, "--mlflow") == 0
    assert told_to_mlflow(out) == promised(out)
    about = MlflowClient().get_run(json.loads((out / "mlflow.json").read_text(encoding="utf-8"))["run_id"])
    assert about.info.status == "FINISHED" and about.data.params["method"] == "lora"
    assert run(small, out, "--rounds", "3", "--resume") == 0  # MLflow is not told of round 3 ...
    assert run(small, out, "--mlflow", "--rounds", "4", "--resume") == 0  # ... before it is told of round 4
    assert told_to_mlflow(out) == promised(out) and len(promised(out)["loss"]) == 4


def test_a_logger_that_fails_stops_nothing_and_is_named_where_the_user_looks(
    small: dict[str, Any],
    mlflow_store: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: MLflow, row: Any) -> None:
        if row["round"] == 2:
            raise ConnectionError("http://me:secret@tracker:5000/api is gone")
        told(self, row)

    told, out = MLflow.round, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MLflow, "round", fail)
        assert door.main([*flags(small), "--method", "lora", "--out", str(out), "--mlflow"]) == 0
    line = "--mlflow is left alone from here on (ConnectionError: http://tracker:5000/api is gone); --resume goes on"
    assert f"warning: {line}" in capsys.readouterr().err and line in (out / "log.txt").read_text(encoding="utf-8")
    assert any(said.startswith(line) for said in read_run(out)[0]["warnings"])
    assert set(told_to_mlflow(out)["loss"]) == {1}
    assert run(small, out, "--mlflow", "--rounds", "3", "--resume") == 0
    assert told_to_mlflow(out) == promised(out)


def test_a_run_that_sees_a_logger_given_up_has_heard_why(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may be between giving up and saying so, just when the last round is done and the summary is due."""
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")

    def fail(self: TensorBoard, row: Any) -> None:
        raise ConnectionError("gone")

    def slowly(line: str) -> None:
        time.sleep(1)
        say(line)

    monkeypatch.setattr(TensorBoard, "round", fail)
    monkeypatch.setattr(loggers, "say", slowly)
    config = SimulationConfig(**small, method="lora", out=tmp_path / "run", tensorboard=True)
    assert any("--tensorboard is left alone" in line for line in run_simulation(config).summary["warnings"])


def test_no_round_waits_for_a_logger(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool takes nothing before the last round is on disk: who waited for it would wait for ever."""
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    over, told, seen = threading.Event(), TensorBoard.round, []

    class Last(Callbacks):
        def on_round(self, event: RoundEvent) -> None:
            if event.round == small["rounds"]:
                over.set()

    def slow(self: TensorBoard, row: Any) -> None:
        seen.append(over.wait(60))
        told(self, row)

    monkeypatch.setattr(TensorBoard, "round", slow)
    config = SimulationConfig(**small, method="lora", out=tmp_path / "run", tensorboard=True)
    warnings = run_simulation(config, callbacks=Last()).summary["warnings"]
    assert not [line for line in warnings if "tensorboard" in line]
    left = [thread for thread in threading.enumerate() if thread.name == "fedlotr tensorboard"]
    for thread in left:
        thread.join(60)
    assert not any(thread.is_alive() for thread in left)
    assert seen == [True, True] and told_to_tensorboard(tmp_path / "run") == promised(tmp_path / "run")


@contextmanager
def server(answers: Callable[[str], tuple[int, dict[str, Any]] | None]) -> Iterator[str]:
    """The address, with a password, of an HTTP server that gives a path its answer, or (None) none at all."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers(self.path)
            if answer is None:
                done.wait(60)
                return
            content = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *words: Any) -> None:
            pass

    done = threading.Event()
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://me:secret@127.0.0.1:{listening.server_port}"
    finally:
        done.set()
        listening.shutdown()
        listening.server_close()


NOT_YET = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is no such experiment"}
FORBIDDEN = 403, {"error_code": "PERMISSION_DENIED", "message": "not for you"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [(None, "does not answer in 1 s"), (FORBIDDEN, "cannot be used (RestException: PERMISSION_DENIED")],
)
def test_a_server_that_is_of_no_use_is_refused_before_the_run(
    answer: Any,
    said: str,
    small: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    monkeypatch.setattr("fedlotr.reporting.loggers.TRIAL_SECONDS", 1.0)
    before = dict(os.environ)
    with server(lambda path: answer) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        mlflow.set_tracking_uri(None)
        assert run(small, tmp_path / "run", "--mlflow") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --mlflow: the server at http://127.0.0.1:") and said in line
    assert "secret" not in line and "MLFLOW_TRACKING_URI" in line and "leave --mlflow out" in line
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert dict(os.environ) == before


@pytest.mark.parametrize("answer", [None, (500, {"error_code": "INTERNAL_ERROR", "message": "out of order"})])
def test_a_server_that_dies_after_its_trial_costs_no_round(
    answer: Any,
    small: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    asked: list[str] = []

    def answers(path: str) -> Any:
        asked.append(path)
        return NOT_YET if len(asked) == 1 else answer

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # a user's own choice is kept
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server(answers) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        mlflow.set_tracking_uri(None)
        assert door.main([*flags(small), "--method", "lora", "--out", str(tmp_path / "run"), "--mlflow"]) == 0
    told = capsys.readouterr().err
    (line,) = (said for said in read_run(tmp_path / "run")[0]["warnings"] if "--mlflow" in said)
    assert line.startswith("--mlflow is left alone from here on (") and f"warning: {line}" in told
    assert "secret" not in told and len(read_run(tmp_path / "run")[1]) == small["rounds"] and len(asked) > 1


def test_mlflows_own_variables_are_kept_to(
    small: dict[str, Any],
    mlflow_store: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sweep")
    assert run(small, tmp_path / "one", "--mlflow", "--rounds", "1") == 0
    number = client.get_experiment_by_name("sweep").experiment_id
    (found,) = client.search_runs([number])
    assert client.get_experiment_by_name("fedlotr") is None and found.info.run_name == "one"

    mine = client.create_run(number).info.run_id
    client.log_param(mine, "rank", "mine")
    monkeypatch.setenv("MLFLOW_RUN_ID", mine)
    assert run(small, tmp_path / "two", "--mlflow", "--rounds", "1") == 0
    assert json.loads((tmp_path / "two" / "mlflow.json").read_text(encoding="utf-8"))["run_id"] == mine
    assert "has parameters of its own" in " ".join(read_run(tmp_path / "two")[0]["warnings"])
    assert run(small, tmp_path / "one", "--mlflow", "--rounds", "2", "--resume") == 0  # in its own run, and says so
    assert told_to_mlflow(tmp_path / "one") == promised(tmp_path / "one")
    assert told_to_mlflow(tmp_path / "two") == promised(tmp_path / "two")
    assert f"and not in MLFLOW_RUN_ID's {mine}" in " ".join(read_run(tmp_path / "one")[0]["warnings"])

    client.delete_run(mine)
    client.delete_experiment(number)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sweep")
    capsys.readouterr()
    assert run(small, tmp_path / "three", "--mlflow") == 2
    assert f"the run {mine} that MLFLOW_RUN_ID names is deleted" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert run(small, tmp_path / "three", "--mlflow") == 2
    assert f"mlflow experiments restore --experiment-id {number}" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_a_folder_that_is_none_is_refused_before_a_run_goes_on(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    out = tmp_path / "run"
    assert run(small, out, "--rounds", "1") == 0
    (out / "tensorboard").write_text("", encoding="utf-8")
    assert run(small, out, "--tensorboard", "--resume") == 2
    assert f"--tensorboard: {out / 'tensorboard'} is a file, expected a folder" in capsys.readouterr().err


def test_weights_and_biases_keeps_a_run_offline(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    assert run(small, out, "--wandb") == 0
    (kept,) = out.glob("wandb/offline-run-*/run-*.wandb")
    assert told_to_wandb(kept) == promised(out)
    assert json.loads((out / "wandb.json").read_text(encoding="utf-8"))["id"] in kept.name


@pytest.mark.parametrize("option", LOGGERS)
def test_a_logger_whose_package_is_missing_is_refused_at_once(
    option: str,
    small: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedlotr.reporting.loggers.find_spec", lambda package: None)
    assert run(small, tmp_path / "run", f"--{option}") == 2
    said = capsys.readouterr().err
    assert f"--{option}: the package {option} is not installed" in said and f"fedlotr[{option}]" in said
    assert not (tmp_path / "run").exists()


def test_a_run_says_the_same_with_and_without_loggers(small: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    assert run(small, tmp_path / "with", "--tensorboard") == run(small, tmp_path / "without") == 0
    config = [(tmp_path / name / "config.yaml").read_text(encoding="utf-8") for name in ("with", "without")]
    assert config[0] == config[1], "who is told is no part of what is run"
    hashes = [read_run(tmp_path / name)[0]["trained_sha256"] for name in ("with", "without")]
    assert hashes[0] == hashes[1]
    shutil.rmtree(tmp_path / "with" / "tensorboard")
