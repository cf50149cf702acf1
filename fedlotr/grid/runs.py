"""The runs of a grid on disk: which are done, whether the grid may go on there, and carrying out those that are left.

OUT/ROW/seed-0.yaml is a run's configuration, as it was planned, and OUT/ROW/seed-0/ the run's own folder.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from fedlotr.config.configuration import SimulationConfig, dump_yaml, flag_of
from fedlotr.data import Source
from fedlotr.data.splits import HELD_OUT
from fedlotr.errors import FedlotrError, InputError, shorten
from fedlotr.grid.file import Grid, Run, together
from fedlotr.privacy.ledger import known_again
from fedlotr.reporting.callbacks import Callbacks, RoundEvent
from fedlotr.reporting.documents import Summary
from fedlotr.run.checking import columns_of, read_source
from fedlotr.run.contents import Content
from fedlotr.run.directory import RunDirectory
from fedlotr.run.resumption import (
    BY_CONTENT,
    MAY_CHANGE,
    ROWS,
    as_kept,
    begun_with,
    by_content,
    compare_contents,
    contents_in,
)
from fedlotr.run.simulation import check_all, run_simulation
from fedlotr.said import keeping

LEFT_BEFORE_A_START = {"log.txt", ".work"}
"""What a run that was killed before it had its configuration may have left; nothing of it is worth keeping."""
POLL_SECONDS = 1.0
"""Between two looks at how far a run is."""
STOP_SECONDS = 120.0
"""That an interrupted run may take to end by itself: it finishes what it is writing, and stops its workers."""

Watch = Callable[[int], None]
"""Told how many rounds the run that is going on has finished."""


class RunFailedError(Exception):
    """A run ended without a summary; the text says why, in one line."""


@dataclass(frozen=True)
class Folder:
    """Where a run of the grid lies."""

    path: Path

    @classmethod
    def of(cls, run: Run, out: Path) -> "Folder":
        """The folder of a run in a grid's."""
        return cls(out / run.name)

    @property
    def plan(self) -> Path:
        """The configuration that was planned, beside the folder: a run begins in an empty one."""
        return self.path.with_name(f"{self.path.name}.yaml")

    def summary(self) -> Summary | None:
        """Of a finished run; None for any other. Raises InputError where the file is no summary."""
        path = self.path / "summary.json"
        if not path.is_file():
            return None
        try:
            found: Summary = json.loads(path.read_text(encoding="utf-8"))
            if not {"final", "communication", "timing"} <= set(found):
                raise ValueError("it lacks what a summary has")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read ({error}); remove {self.path} to run it again") from error
        return found

    def is_of(self, summary: Summary, sha256: str) -> bool:
        """Whether a finished run was of these data; where it hides them, its last checkpoint and its key tell."""
        if (told := summary.get("data_sha256")) is not None:
            return bool(told == sha256)
        checkpoint = RunDirectory(self.path).last_checkpoint()
        return checkpoint is not None and checkpoint.extra["data_sha256"] == known_again(self.path, sha256)

    def finished_rounds(self) -> int:
        """Rounds in metrics.jsonl."""
        try:
            return (self.path / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0


def check_runs(grid: Grid, out: Path) -> None:
    """Look at the data, the model and the strategy of every row, and at what lies in `out` already.

    Raises InputError with every mistake, and with every difference between a run that is there and the grid.
    """
    runs = [*grid.trials, *grid.runs]
    problems = differences(runs, out)
    mistakes: list[tuple[str, str]] = []
    sources: dict[tuple[Any, ...], Source] = {}
    looked_at: set[tuple[Any, ...]] = set()
    contents: dict[str, Mapping[str, Content]] = {}
    for run in runs:
        config = run.config
        key = _data_of(run)
        # Another seed, or another value that is tried, makes no difference to a row's model; a seed may do so to how
        # the examples are dealt.
        row = (run.row.name, config.eval_data, config.eval_split)
        deal = (*key, config.partition, config.clients, config.max_examples, config.public_examples)
        if {row, deal} <= looked_at:
            continue
        looked_at |= {row, deal}
        try:
            with keeping():  # each run says it by itself
                if key not in sources:
                    sources[key] = read_source(config)
                checked, _ = check_all(config, source=sources[key])
            contents[run.row.name] = checked.contents
        except InputError as error:
            mistakes += [(run.row.name, problem) for problem in error.problems]
    problems += together(mistakes, {row.name for row in grid.rows})
    found = {key: source.sha256 for key, source in sources.items()}
    problems += _other_data(runs, out, found) + _other_contents(runs, out, contents, found)
    tested_on = {found.get(_data_of(run)) for run in grid.runs}
    problems += [
        f"tune on {on}: the runs are tested on these rows; choose {HELD_OUT}, or another split"
        for on in dict.fromkeys(
            str(run.config.eval_split) for run in grid.trials if found.get(_data_of(run)) in tested_on - {None}
        )
    ]
    if problems:
        raise InputError(problems)


def _data_of(run: Run) -> tuple[Any, ...]:
    """What the rows of train and test depend on."""
    config = run.config
    tested_on = config.eval_data, config.eval_split
    return config.data, *tested_on, columns_of(config), config.seed


def differences(runs: Sequence[Run], out: Path) -> list[str]:
    """How the configurations of runs that are there differ from the grid's, a line an option; open ones apart."""
    found: list[tuple[str, str]] = []
    problems = []
    for run in runs:
        folder = Folder.of(run, out)
        if not folder.plan.is_file():
            continue
        try:
            before = begun_with(yaml.safe_load(folder.plan.read_text(encoding="utf-8")))
            folder.summary()
        except InputError as error:
            problems += error.problems
            continue
        except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            problems.append(f"{folder.plan}: cannot be read ({reason}); remove it with {folder.path} to run it again")
            continue
        for name in SimulationConfig.model_fields:
            was, now = getattr(before, name), getattr(run.config, name)
            if name not in MAY_CHANGE | run.open and was != now and not by_content(name, was, now):
                advice = f"runs in {out} have {shorten(was)}; give the grid another --out, or the row another name"
                found.append((run.name, f"{name}: {shorten(now)}, and {advice}"))
    return problems + together(found, {run.name for run in runs})


def _other_data(runs: Sequence[Run], out: Path, sha256: Mapping[tuple[Any, ...], str]) -> list[str]:
    """Which finished runs are not of the data as they are now."""
    found = []
    for run in runs:
        now = sha256.get(_data_of(run))
        summary = Folder.of(run, out).summary() if now is not None else None
        if summary is not None and now is not None and not Folder.of(run, out).is_of(summary, now):
            given = shorten(run.config.data)
            found.append((run.name, f"data: {given}: its content is not what runs in {out} had; give another --out"))
    return together(found, {run.name for run in runs})


def _other_contents(
    runs: Sequence[Run], out: Path, contents: Mapping[str, Mapping[str, Content]], sha256: Mapping[tuple[Any, ...], str]
) -> list[str]:
    """Which runs that are there were begun with another content than what the grid names now, where paths differ."""
    found = []
    for run in runs:
        extra = RunDirectory(Folder.of(run, out).path).peek()
        rows = sha256.get(_data_of(run))
        if extra is None or rows is None or run.row.name not in contents:
            continue
        begun = begun_with(extra["configuration"])
        now = dict(contents[run.row.name])
        now |= {name: {"rows": rows} for name in ROWS if name in now}
        now = as_kept(now, run.config, Folder.of(run, out).path)
        moved = {name for name in BY_CONTENT if getattr(begun, name) != getattr(run.config, name)}
        others, _ = compare_contents(begun, contents_in(extra), run.config.model_copy(update={"out": out}), now)
        found += [(run.name, text) for text in others if any(text.startswith(flag_of(name)) for name in moved)]
    return together(found, {run.name for run in runs})


def _has_moved(run: Run, plan: Path) -> bool:
    """Whether a plan names things by other paths than the grid does now, which checked that they are the same."""
    before = begun_with(yaml.safe_load(plan.read_text(encoding="utf-8")))
    return any(getattr(before, name) != getattr(run.config, name) for name in BY_CONTENT)


def carry_out(run: Run, out: Path, *, in_process: bool, watch: Watch) -> Summary:
    """Start a run, or go on with it, and wait for its end.

    in_process: here, and not in a process of its own. Raises RunFailedError where it fails, however it does;
    KeyboardInterrupt once an interrupted run has ended.
    """
    folder = Folder.of(run, out)
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    if not folder.plan.is_file() or _has_moved(run, folder.plan):
        dump_yaml(run.config, folder.plan)
    there = {entry.name for entry in folder.path.iterdir()} if folder.path.is_dir() else set()
    if there <= LEFT_BEFORE_A_START:
        shutil.rmtree(folder.path, ignore_errors=True)
        there = set()
    resume = bool(there)
    if in_process:
        reason = _run_here(run.config.model_copy(update={"out": folder.path, "resume": resume, "quiet": True}), watch)
    else:
        reason = _run_apart(folder, resume, watch)
    summary = folder.summary()
    if summary is None:  # what has its summary is finished, however its process ended after that
        raise RunFailedError(reason or f"it ended without {folder.path / 'summary.json'}")
    return summary


class _Watching(Callbacks):
    """Tells on how far the run is."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @override
    def on_round(self, event: RoundEvent) -> None:
        self._watch(event.round)


def _run_here(config: SimulationConfig, watch: Watch) -> str:
    """Why it failed; nothing where it did not."""
    try:
        run_simulation(config, callbacks=_Watching(watch))
    except InputError as error:
        return "; ".join(error.problems)
    except FedlotrError as error:
        return str(error)
    except Exception as error:  # of a strategy of someone else's, for one: it must not take the other runs with it
        return f"{type(error).__name__}: {error}"
    return ""


def _run_apart(folder: Folder, resume: bool, watch: Watch) -> str:
    """In a process that ends by itself when this one does, as its standard input then ends. Why it failed."""
    words = [str(folder.plan), "--out", str(folder.path), "--quiet", *(["--resume"] if resume else [])]
    with (
        open(folder.plan.with_suffix(".err"), "w+b") as errors,
        # Ctrl-C reaches a whole session: this process hands it on, so that the run is interrupted once.
        subprocess.Popen(
            [sys.executable, "-m", "fedlotr.commands.supervised", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        ) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                watch(folder.finished_rounds())
        except BaseException:
            _stop(process)
            raise
        errors.seek(0)
        said = errors.read().decode(errors="replace").splitlines()
    return _reason(process.returncode, said) if process.returncode else ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a run and wait for it; one that does not end is killed, and loses no finished round by that."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    if process.poll() is None:
        process.kill()


def _reason(code: int, said: Sequence[str]) -> str:
    """Why a process ended with this code, by what it said last."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}"
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    last = next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")
    return "; ".join(errors) or last
