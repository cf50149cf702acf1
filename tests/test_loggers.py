"""TensorBoard, MLflow and Weights & Biases are told the rows of metrics.jsonl: all of them, once, and nothing else."""

import json
import logging
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlotr import simulate as door
from fedlotr.reporting.loggers import LOGGERS, MLflow, numbers
from tests.support import read_run
from tests.test_simulation import flags, small

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


def test_a_logger_that_fails_stops_nothing_and_is_named(
    small: dict[str, Any], mlflow_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: MLflow, row: Any) -> None:
        if row["round"] == 2:
            raise ConnectionError("the server is gone")
        told(self, row)

    told, out = MLflow.round, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MLflow, "round", fail)
        assert run(small, out, "--mlflow") == 0
    assert "--mlflow is left alone from here on (ConnectionError: the server is gone)" in (out / "log.txt").read_text()
    assert set(told_to_mlflow(out)["loss"]) == {1}
    assert run(small, out, "--mlflow", "--rounds", "3", "--resume") == 0
    assert told_to_mlflow(out) == promised(out)


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
