"""The rows of metrics.jsonl in other people's tools: TensorBoard, MLflow, Weights & Biases.

They are given the very rows that are on disk, once a round is safe there, and nothing else: a series is a number of
these rows over the rounds. A run that is resumed first brings each tool to the rows that count. A tool that fails is
named in the log and left alone from then on; the run goes on, and a resumed run gives it what it missed.
"""

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedlotr.files import write_atomically

log = logging.getLogger("fedlotr")

Row = Mapping[str, Any]

PROJECT = "fedlotr"
"""The experiment in MLflow, and the project in Weights & Biases (where WANDB_PROJECT does not say another)."""
LONGEST_PARAMETER = 500
"""Characters of a value that MLflow takes."""


class MetricLogger(Protocol):
    """One tool, for one run."""

    def begin(self, rows: Sequence[Row]) -> None:
        """The rounds that are finished already: afterwards the tool has these and no others."""

    def round(self, row: Row) -> None:
        """One more."""

    def close(self, status: str) -> None:
        """finished, failed or interrupted."""


def numbers(row: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(series, value) of a row: its numbers, those of a mapping as `mapping/name`; the round and failures are none."""
    for key, value in row.items():
        if isinstance(value, Mapping) and key != "failures":
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "round":
            yield f"{prefix}{key}", float(value)


class TensorBoard:
    """Event files in RUN/tensorboard, in double precision; written anew when a run is resumed."""

    def __init__(self, folder: Path, options: Row) -> None:
        self._folder, self._options, self._writer = folder / "tensorboard", options, None

    def begin(self, rows: Sequence[Row]) -> None:
        """See `MetricLogger`."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(exist_ok=True)
        for old in self._folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer: Any = SummaryWriter(str(self._folder))
        self._writer = writer
        writer.add_text("configuration", "\n".join(f"    {key}: {value}" for key, value in self._options.items()))
        for row in rows:
            self.round(row)
        writer.flush()

    def round(self, row: Row) -> None:
        """See `MetricLogger`."""
        writer: Any = self._writer
        for name, value in numbers(row):
            writer.add_scalar(name, value, row["round"], new_style=True, double_precision=True)
        writer.flush()

    def close(self, status: str) -> None:
        """See `MetricLogger`."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run of the experiment `fedlotr`, where MLFLOW_TRACKING_URI says (MLflow's default: mlflow.db in this folder).

    RUN/mlflow.json remembers which one it is. Rounds that it has are not sent again.
    """

    def __init__(self, folder: Path, options: Row) -> None:
        self._folder, self._options, self._id = folder, options, ""
        self._client: Any = None

    def begin(self, rows: Sequence[Row]) -> None:
        """See `MetricLogger`."""
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient()
        told, note = 0, self._folder / "mlflow.json"
        try:
            self._id = json.loads(note.read_text(encoding="utf-8"))["run_id"]
            told = max((point.step for point in self._client.get_metric_history(self._id, "bytes_up")), default=0)
            self._client.set_terminated(self._id, "RUNNING")
        except (OSError, ValueError, KeyError, mlflow.exceptions.MlflowException):  # none yet, or in another store
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
            self._id, told = self._client.create_run(experiment, run_name=self._folder.resolve().name).info.run_id, 0
            values = {key: str(value)[:LONGEST_PARAMETER] for key, value in self._options.items()}
            self._client.log_batch(self._id, params=[Param(key, value) for key, value in values.items()])
            write_atomically(note, json.dumps({"tracking_uri": mlflow.get_tracking_uri(), "run_id": self._id}) + "\n")
        for row in rows:
            if row["round"] > told:
                self.round(row)

    def round(self, row: Row) -> None:
        """See `MetricLogger`."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, value, now, row["round"]) for name, value in numbers(row)]
        self._client.log_batch(self._id, metrics=points)

    def close(self, status: str) -> None:
        """See `MetricLogger`."""
        if self._id:
            known = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
            self._client.set_terminated(self._id, known[status])


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb, and WANDB_PROJECT names another project.

    RUN/wandb.json remembers its id, so that a resumed run goes on in the same one.
    """

    def __init__(self, folder: Path, options: Row) -> None:
        self._folder, self._options = folder, options
        self._run: Any = None

    def begin(self, rows: Sequence[Row]) -> None:
        """See `MetricLogger`."""
        import wandb

        note = self._folder / "wandb.json"
        try:
            name = str(json.loads(note.read_text(encoding="utf-8"))["id"])
        except (OSError, ValueError, KeyError):
            name = uuid.uuid4().hex[:12]
            write_atomically(note, json.dumps({"id": name}) + "\n")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=self._folder.resolve().name,
            dir=str(self._folder),
            config=dict(self._options),
            resume="allow",
        )
        for row in rows:
            if row["round"] >= self._run.step:  # what it is to be given next
                self.round(row)

    def round(self, row: Row) -> None:
        """See `MetricLogger`."""
        self._run.log(dict(numbers(row)), step=row["round"])

    def close(self, status: str) -> None:
        """See `MetricLogger`."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "finished" else 1)


LOGGERS: dict[str, tuple[str, Callable[[Path, Row], MetricLogger]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WandB),
}
"""Option -> the package it needs, which is also the extra that brings it, and what makes the logger of a run."""


def missing_packages(wanted: Sequence[str]) -> Iterator[str]:
    """Loggers that cannot work here, each one line."""
    for option in wanted:
        package, _ = LOGGERS[option]
        if find_spec(package) is None:
            yield (
                f"--{option}: the package {package} is not installed; install it (pip install 'fedlotr[{option}]'), "
                f"or leave --{option} out"
            )


class Loggers:
    """The loggers of a run. None of them can stop it."""

    def __init__(self, made: Mapping[str, MetricLogger]) -> None:
        self._made = dict(made)

    def begin(self, rows: Sequence[Row]) -> None:
        """See `MetricLogger`."""
        self._each(lambda logger: logger.begin(rows))

    def round(self, row: Row) -> None:
        """See `MetricLogger`."""
        self._each(lambda logger: logger.round(row))

    def close(self, status: str) -> None:
        """See `MetricLogger`."""
        self._each(lambda logger: logger.close(status))

    def _each(self, call: Callable[[MetricLogger], None]) -> None:
        for option, logger in list(self._made.items()):
            try:
                call(logger)
            except Exception as error:
                del self._made[option]
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                log.warning("--%s is left alone from here on (%s); --resume goes on with it", option, reason)


@contextmanager
def open_loggers(wanted: Sequence[str], folder: Path, options: Row) -> Iterator[Loggers]:
    """The loggers of these options, closed with how the run ended. options: the run's configuration, flat."""
    loggers = Loggers({option: LOGGERS[option][1](folder, options) for option in wanted})
    status = "failed"
    try:
        yield loggers
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        loggers.close(status)
