"""The rows of metrics.jsonl in other people's tools: TensorBoard, MLflow, Weights & Biases.

They are given the very rows that are on disk, once a round is safe there, and nothing else: a series is a number of
these rows over the rounds. Each tool is tried before the run, within seconds, and then told by a thread of its own,
which no round waits for. A run that is resumed first brings each tool to the rows that count. A tool that fails is
named to the user and left alone from then on; the run goes on, and a resumed run gives it what it missed.
"""

import json
import logging
import os
import queue
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Protocol

from typing_extensions import override

from fedlotr.errors import SHOWN
from fedlotr.files import write_atomically
from fedlotr.reporting.callbacks import Callbacks, RoundEvent, TrainedEvent
from fedlotr.said import say

Row = Mapping[str, Any]

PROJECT = "fedlotr"
"""The experiment in MLflow, and the project in Weights & Biases (where their own variables do not say another)."""
TRIAL_SECONDS = 10.0
"""That a server may take to answer before the run."""
LAST_SECONDS, INTERRUPTED_SECONDS = 60.0, 5.0
"""That a tool may take after the last round for what it has not been told yet; a silent server fails sooner."""
WAITING = 1000
"""Rows that wait for a tool at most."""
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""By default a request that nobody answers takes MLflow four minutes, or sixteen."""
LONGEST_PARAMETER = 500
"""Characters of a value that MLflow takes."""


class MetricLogger(Protocol):
    """One tool, for one run: its folder, and its configuration, flat."""

    def __init__(self, folder: Path, options: Row) -> None: ...

    @staticmethod
    def trouble(out: Path | None) -> str | None:
        """Why it could not be told of a run in this folder (None: a new one), or None; nothing is left there."""

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

    @staticmethod
    def trouble(out: Path | None) -> str | None:
        """See `MetricLogger`."""
        folder = (out or Path()) / "tensorboard"
        if not os.path.lexists(folder):
            return None
        if not folder.is_dir():
            return f"{folder} is a file, expected a folder; move it away"
        trouble = _unwritable(folder)
        return None if trouble is None else f"{trouble}; mend that"

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
    """A run of MLflow, where MLFLOW_TRACKING_URI says (MLflow's default: mlflow.db in this folder).

    Its experiment is `fedlotr`, or what MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID name; MLFLOW_RUN_ID names a run
    that is there. RUN/mlflow.json remembers which one it is, for a resumed run. Rounds that it has are not sent again.
    """

    def __init__(self, folder: Path, options: Row) -> None:
        self._folder, self._options, self._id = folder, options, ""
        self._client: Any = None

    @staticmethod
    def trouble(out: Path | None) -> str | None:
        """See `MetricLogger`."""
        import mlflow

        goes_on = out is not None and (out / "mlflow.json").is_file()
        named = None if goes_on else os.environ.get("MLFLOW_RUN_ID")
        uri = mlflow.get_tracking_uri()
        kept, mend = _kept_in(uri), "set MLFLOW_TRACKING_URI"
        if kept is not None and not kept.exists() and not (named or os.environ.get("MLFLOW_EXPERIMENT_ID")):
            trouble = _unwritable(next(folder for folder in kept.absolute().parents if folder.exists()))
            return None if trouble is None else f"{trouble}; {mend}"  # else it will be made there
        where = f"{'the server at' if uri.startswith('http') else 'the store'} {_without_secrets(uri)}"
        seconds = TRIAL_SECONDS if kept is None else LAST_SECONDS

        def ask() -> tuple[Any, Any]:
            client = mlflow.MlflowClient()
            return _experiment_of(client), client.get_run(named) if named else None

        try:
            experiment, run = _within(seconds, ask)
        except TimeoutError:
            return f"{where} does not answer in {seconds:.0f} s; start it, or {mend}"
        except Exception as error:
            return f"{where} cannot be used ({_reason(error)}); mend that, or {mend}"
        if run is not None and run.info.lifecycle_stage == "deleted":
            return f"the run {named} that MLFLOW_RUN_ID names is deleted in {where}; name another"
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            return (
                f"the experiment {experiment.name} is deleted in {where}; restore it (mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}), or name another by MLFLOW_EXPERIMENT_NAME"
            )
        return None

    def begin(self, rows: Sequence[Row]) -> None:
        """See `MetricLogger`."""
        import mlflow

        self._client = mlflow.MlflowClient()
        told, note = 0, self._folder / "mlflow.json"
        try:
            self._id = json.loads(note.read_text(encoding="utf-8"))["run_id"]
            series = self._client.get_run(self._id).data.metrics
            steps = [point.step for name in series for point in self._client.get_metric_history(self._id, name)]
            told = max(steps, default=0)
            self._client.set_terminated(self._id, "RUNNING")
            if (named := os.environ.get("MLFLOW_RUN_ID", self._id)) != self._id:
                say(f"--mlflow goes on in the run {self._id}, where it began, and not in MLFLOW_RUN_ID's {named}")
        except (OSError, ValueError, KeyError, mlflow.exceptions.MlflowException):  # none yet, or in another store
            told = self._start()
            uri = _without_secrets(mlflow.get_tracking_uri())
            write_atomically(note, json.dumps({"tracking_uri": uri, "run_id": self._id}) + "\n")
        for row in rows:
            if row["round"] > told:
                self.round(row)

    def _start(self) -> int:
        """A new run, or the one that MLFLOW_RUN_ID names; the last round that it has."""
        import mlflow
        from mlflow.entities import Param

        values = {key: str(value)[:LONGEST_PARAMETER] for key, value in self._options.items()}
        named = os.environ.get("MLFLOW_RUN_ID")
        if named:
            self._id = named
            self._client.set_terminated(named, "RUNNING")
        else:
            found = _experiment_of(self._client)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self._id = self._client.create_run(experiment, run_name=self._folder.resolve().name).info.run_id
        try:
            self._client.log_batch(self._id, params=[Param(key, value) for key, value in values.items()])
        except mlflow.exceptions.MlflowException as error:
            if not named:
                raise
            say(f"--mlflow: the run {named} has parameters of its own, so it gets none ({_reason(error)})")
        return 0

    def round(self, row: Row) -> None:
        """See `MetricLogger`."""
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
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb, and its other variables mean what they say.

    RUN/wandb.json remembers its id, so that a resumed run goes on in the same one.
    """

    def __init__(self, folder: Path, options: Row) -> None:
        self._folder, self._options = folder, options
        self._run: Any = None

    @staticmethod
    def trouble(out: Path | None) -> str | None:
        """See `MetricLogger`."""
        import wandb

        offline = "WANDB_MODE=offline keeps the run here"
        if wandb.setup().settings.mode not in ("online", "shared"):
            return None
        try:
            # Without asking, which would wait; and it asks the server whether the key is good.
            if not _within(TRIAL_SECONDS, lambda: wandb.login(prompt=False)):
                return f"nobody is logged in; run 'wandb login', set WANDB_API_KEY, or {offline}"
        except TimeoutError:
            return f"the server does not answer in {TRIAL_SECONDS:.0f} s; {offline}"
        except Exception as error:
            return f"the server cannot be used ({_reason(error)}); {offline}"
        return None

    def begin(self, rows: Sequence[Row]) -> None:
        """See `MetricLogger`."""
        import wandb

        note = self._folder / "wandb.json"
        try:
            name = str(json.loads(note.read_text(encoding="utf-8"))["id"])
        except (OSError, ValueError, KeyError):
            name = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
            write_atomically(note, json.dumps({"id": name}) + "\n")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=os.environ.get("WANDB_NAME", self._folder.resolve().name),
            dir=os.environ.get("WANDB_DIR", str(self._folder)),
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


LOGGERS: dict[str, tuple[str, type[MetricLogger]]] = {
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


def unusable(wanted: Sequence[str], out: Path | None) -> Iterator[str]:
    """Loggers whose packages are here and that cannot be told of a run in this folder, each one line; takes seconds."""
    for option in wanted:
        package, kind = LOGGERS[option]
        if find_spec(package) is not None:
            with _patience({**MLFLOW_PATIENCE, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}):
                trouble = kind.trouble(out)
            if trouble is not None:
                yield f"--{option}: {trouble}, or leave --{option} out"


class Loggers(Callbacks):
    """The loggers of a run. None of them can stop it, or hold it up."""

    def __init__(self, made: Mapping[str, MetricLogger]) -> None:
        self._told = [_Teller(option, logger) for option, logger in made.items()]

    def begin(self, rows: Sequence[Row]) -> None:
        """See `MetricLogger`."""
        known = list(rows)
        self._each(lambda logger: logger.begin(known))

    @override
    def on_round(self, event: RoundEvent) -> None:
        self._each(lambda logger: logger.round(event.metrics))

    @override
    def on_trained(self, event: TrainedEvent) -> None:
        self._settle(LAST_SECONDS)

    def _settle(self, seconds: float) -> None:
        """Wait until all is told, so long at most."""
        until = time.monotonic() + seconds
        for teller in self._told:
            teller.settle(until, seconds)

    def close(self, status: str) -> None:
        """See `MetricLogger`."""
        self._each(lambda logger: logger.close(status))
        self._settle(INTERRUPTED_SECONDS if status == "interrupted" else LAST_SECONDS)
        for teller in self._told:
            teller.end()

    def _each(self, call: Callable[[MetricLogger], None]) -> None:
        for teller in self._told:
            teller.add(call)


class _Teller:
    """Calls a logger, one thing after another, in a thread that ends with the process whatever it waits for."""

    def __init__(self, option: str, logger: MetricLogger) -> None:
        self._option, self._logger, self._given_up, self._giving_up = option, logger, False, Lock()
        self._calls: queue.Queue[Callable[[MetricLogger], None] | None] = queue.Queue()
        Thread(target=self._work, name=f"fedlotr {option}", daemon=True).start()

    def add(self, call: Callable[[MetricLogger], None]) -> None:
        """Have it called soon, after all that was added before."""
        if self._given_up:
            return
        if self._calls.qsize() < WAITING:
            self._calls.put(call)
        else:
            self._give_up(f"{WAITING} rows wait for it")

    def end(self) -> None:
        """Nothing is added any more: the thread ends once what it waits for, if anything, has returned."""
        self._calls.put(None)

    def settle(self, until: float, seconds: float) -> None:
        """Wait for the calls added so far; who has not got through them by then (time.monotonic) is left alone."""
        while not self._given_up and self._calls.unfinished_tasks:
            if time.monotonic() > until:
                self._give_up(f"it has not taken the last of {self._calls.unfinished_tasks} in {seconds:.0f} s")
            time.sleep(0.01)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                if not self._given_up:
                    call(self._logger)
            except Exception as error:
                self._give_up(_reason(error))
            finally:
                self._calls.task_done()

    def _give_up(self, reason: str) -> None:
        with self._giving_up:
            if not self._given_up:
                # First said: who sees that it is given up may end the run, whose summary has what was said till then.
                say(f"--{self._option} is left alone from here on ({reason}); --resume goes on with it")
                self._given_up = True


@contextmanager
def open_loggers(wanted: Sequence[str], folder: Path, options: Row, rows: Sequence[Row]) -> Iterator[Loggers]:
    """The loggers of these options, closed with how the run ended.

    options: the run's configuration, flat. rows: of the rounds that are finished already.
    """
    with ExitStack() as stack:
        if "mlflow" in wanted:
            stack.enter_context(_patience(MLFLOW_PATIENCE))
        loggers = Loggers({option: LOGGERS[option][1](folder, options) for option in wanted})
        status = "failed"
        try:
            loggers.begin(rows)
            yield loggers
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            loggers.close(status)


@contextmanager
def _patience(wanted: Mapping[str, str]) -> Iterator[None]:
    """MLflow gives up within seconds, where the user has not said otherwise, and urllib3 is quiet about each try."""
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    tries = logging.getLogger("urllib3.connectionpool")
    level = tries.level
    os.environ.update(ours)
    tries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tries.setLevel(level)
        for name in ours:
            os.environ.pop(name, None)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns or raises; TimeoutError where it takes longer, and it is then left to itself."""
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:
            answers.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return found


def _experiment_of(client: Any) -> Any:
    """The experiment that MLflow's own variables name, or ours; None where that is still to be made."""
    name, number = os.environ.get("MLFLOW_EXPERIMENT_NAME"), os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not number:
        return client.get_experiment_by_name(name or PROJECT)
    found = client.get_experiment(number)
    if name and found.name != name:
        raise ValueError(f"MLFLOW_EXPERIMENT_ID {number} is {found.name}, and MLFLOW_EXPERIMENT_NAME says {name}")
    return found


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written there, or None: the only test that also holds for root and for read-only mounts."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return None
    except OSError as error:
        return f"cannot write in {folder} ({error.strerror})"


def _kept_in(uri: str) -> Path | None:
    """The file of an SQLite store; None of any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


SECRETS = re.compile(r"(?<=://)[^\s/?#]*@|(?<=password=)[^\s&'\")]+")
"""Of an address: user and password, which go into no message and no file."""


def _without_secrets(text: str) -> str:
    return SECRETS.sub("", text)


def _reason(error: Exception) -> str:
    """In a line: what an error says, or what it says at its root."""
    text = _without_secrets(" ".join(str(error).split()))
    root = re.search(r"\[Errno -?\d+\] ([^'\"<>()]+)", text)
    if root is None:
        root = re.search(r"Caused by \w+\([\"']?(.*?)[\"']?\)+$", text)
    text = root[1].rstrip(" :") if root else text
    shown = text if len(text) <= 3 * SHOWN else f"{text[: 3 * SHOWN]}…"
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
