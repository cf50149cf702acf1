"""The page of `fedlotr watch`: a run as it goes on, by what lies in its folder alone.

Of hidden clients it tells what a report tells: no bytes, nothing of how long a round takes, and not the log, which has
the time of every line.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedlotr.errors import InputError
from fedlotr.reporting.documents import under
from fedlotr.reporting.page import Figure, Script, Section, Table, render
from fedlotr.reporting.report import failed, in_a_line, learning, notes_of
from fedlotr.reporting.run_record import RunRecord, points, read_run

try:
    from fcntl import LOCK_NB, LOCK_SH, flock
except ImportError:  # where there is no such lock, nothing tells whether a process is at it
    flock = None  # type: ignore[assignment]

EVERY = 3
"""Seconds between two looks: a round takes at least about as long."""
TAIL = 2**18
"""Bytes of the log's end that are looked at."""
LINES = 12
"""Of it that are shown."""
SAID = re.compile(r"^\S+ \S+ WARNING fedlotr\.said: (.*)$")
RESUMED = re.compile(r"^\S+ \S+ INFO fedlotr: resumed after round (\d+)$")
STARTED = re.compile(r"^\S+ \S+ INFO fedlotr: engine ")
WRITTEN = ("log.txt", "metrics.jsonl", "config.yaml", "facts.json", "summary.json", "checkpoints", "ledger")


@dataclass(frozen=True)
class Moment:
    """running: whether a process holds the run's log, as a run does from its start to its end, however that comes; None
    where nothing tells. written: when something was last written there, in seconds since 1970; None: nothing was. log:
    the lines at its end. safe: the last round that there is a checkpoint of, 0 for none.
    """

    running: bool | None
    written: float | None
    log: list[str]
    safe: int

    @property
    def resumed(self) -> int | None:
        """After which round the run's last start went on; None where it began anew."""
        found = None
        for line in self.log:
            found = None if STARTED.match(line) else found
            if after := RESUMED.match(line):
                found = int(after[1])
        return found

    @property
    def said(self) -> list[str]:
        """The run's warnings, each once."""
        return list(dict.fromkeys(found[1] for line in self.log if (found := SAID.match(line))))


def moment_of(folder: Path) -> Moment:
    """How things stand in the folder of a run, or of one that is to be."""
    times = []
    for name in WRITTEN:
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    stems = [path.stem.removeprefix("round-") for path in (folder / "checkpoints").glob("round-*.json")]
    safe = max((int(stem) for stem in stems if stem.isdecimal()), default=0)
    log = folder / "log.txt"
    return Moment(_held(log), max(times, default=None), _tail(log), safe)


def live_page(folder: Path) -> str:
    """The page as of now; what cannot be read is said on it."""
    moment, script = moment_of(folder), Script("live.js", EVERY)
    now = time.strftime("%H:%M:%S")
    name = folder.resolve().name
    if not (folder / "config.yaml").is_file():
        begun = "A run is starting here." if moment.running else "Nothing is here yet: waiting for a run to begin."
        said = begun if folder.is_dir() else "The folder is gone: waiting for one to be there again."
        return render(name, f"As of {now}.", [Section(said)], script=script)
    try:
        run = read_run(folder)
    except InputError as error:  # perhaps a file is being written at this moment
        return render(name, f"As of {now}.", [], warning=" ".join(error.problems), script=script)
    when = "" if moment.written is None or run.hides_clients else f"; last written {_ago(moment.written)}"
    sections = [_state(run, moment), learning(run), *_said(run, moment), failed(run), *_log(run, moment)]
    return render(
        name, f"{in_a_line(run)}. As of {now}{when}.", sections, warning=" ".join(notes_of(run)), script=script
    )


def state_of(run: RunRecord, moment: Moment) -> str:
    """What the run is doing, in a sentence or two."""
    rounds, wanted = len(run.rows), run.config.get("rounds")
    if run.finished and not moment.running:
        return f"Finished: {rounds} of {wanted} rounds."
    if run.finished:
        return f"Finishing: {rounds} of {wanted} rounds are over."
    after = "" if moment.resumed is None else f", resumed after round {moment.resumed}"
    if moment.running:
        return f"Going on{after}: {rounds} of {wanted} rounds are over."
    if run.summary and run.summary["rounds"] == rounds:
        return f"Ended early, by itself: {rounds} of {wanted} rounds; the warnings say why."
    safe = f"{moment.safe} of {wanted} rounds are safe"
    if moment.running is None:
        return f"Not finished: {safe}. Whether a process is at it cannot be told here."
    return f"Not running: it was killed, or ended with an error. {safe}; --resume goes on."


def _held(log: Path) -> bool | None:
    """Whether a process holds the lock of the log; it is given back at once where it is free."""
    if flock is None:
        return None
    try:
        with log.open("rb") as file:
            flock(file, LOCK_SH | LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:  # a file system that has no locks, or a log that is not ours to read
        return None
    return False


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > TAIL else lines


def _ago(written: float) -> str:
    """When, and how long ago that is."""
    return f"{time.strftime('%H:%M:%S', time.localtime(written))}, {max(0.0, time.time() - written):,.0f} s before"


def _state(run: RunRecord, moment: Moment) -> Section:
    done, wanted = len(run.rows), run.config.get("rounds")
    rows: list[tuple[str, Any]] = [("rounds that are over", done), ("rounds in all", wanted)]
    rows.append(("last round with a checkpoint", moment.safe or None))
    for title, row in (("last", run.last), ("best", run.best)):
        if row is not None and run.metric is not None:
            rows.append((f"{run.metric}, {title} (round {row['round']})", under(row, run.metric)))
    if run.last is not None:
        rows.append((f"loss, as tested, last (round {run.last['round']})", run.last.get("loss")))
    if run.tells_bytes:
        rows.append(("bytes on the wire so far", run.bytes_so_far[-1] if run.rows else 0))
    if spent := points(run.rows, "epsilon"):
        rows.append(("epsilon spent", spent[-1][1]))
    if run.virtual:
        rows.append(("virtual seconds", run.virtual_seconds[-1]))
    if not run.hides_clients and run.rows:
        times = [value for key in ("train_seconds", "evaluate_seconds") for _, value in points(run.rows, key)]
        each = sum(times) / done
        rows.append(("seconds a round, training and evaluation, mean", each))
        if isinstance(wanted, int) and wanted > done:
            rows.append(("seconds left, at that pace", each * (wanted - done)))
    bar = Markup("")
    if isinstance(wanted, int):
        bar = Markup('<progress max="{}" value="{}" aria-label="rounds that are over"></progress>').format(wanted, done)
    figure = Figure("now", "How far it is", bar, Table(["what", "value"], rows), open=True, wide=True)
    return Section("Now", [figure], state_of(run, moment))


def _said(run: RunRecord, moment: Moment) -> list[Section]:
    """What a user is told of a run; hidden clients are in none of it."""
    said = list(dict.fromkeys([*run.summary.get("warnings", ()), *moment.said]))
    if not said:
        return []
    table = Table(["warning"], [[line] for line in said])
    return [Section("Warnings", [Figure("warnings", "What the run warned of", table=table, open=True, wide=True)])]


def _log(run: RunRecord, moment: Moment) -> list[Section]:
    if run.hides_clients or not moment.log:
        return []
    last = "\n".join(moment.log[-LINES:])
    return [Section("Log", [Figure("log", "log.txt", texts=[("its last lines", last)], wide=True)])]
