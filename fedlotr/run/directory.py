"""The run directory: what a run leaves on disk, each file written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlotr.communication.ledger import part_path
from fedlotr.errors import FedlotrError, InputError
from fedlotr.files import as_json, finite, write_atomically
from fedlotr.flower.workplace import work_folder
from fedlotr.reporting.documents import Arrival, ClientScore, Facts, MetricsRow, Summary
from fedlotr.said import say

log = logging.getLogger("fedlotr")

Array = npt.NDArray[Any]

KEPT_CHECKPOINTS = 2
"""The last one, and the one before in case that is damaged."""
FORMAT = 2
"""Of the checkpoints; another number is another version's."""
DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError)
"""What reading a checkpoint raises that is not whole."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def _round_of(path: Path) -> int | None:
    """5 for round-00005.json; None for a file of another name, which is not ours."""
    found = re.match(r"round-(\d{5,})\.", path.name)
    return int(found[1]) if found else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    """Of what a JSON object says, however it is laid out."""
    return _sha256(json.dumps(record, sort_keys=True).encode())


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[Callable[[], bool]]:
    """Whether a folder is still the one that it was at the start; held open, it can have no double."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and does not remove one in use
        yield folder.is_dir
        return

    def stands() -> bool:
        try:
            return os.path.samestat(folder.stat(), os.fstat(held))
        except OSError:
            return False

    try:
        yield stands
    finally:
        os.close(held)


@dataclass(frozen=True)
class Checkpoint:
    """What is on disk after a round: arrays by name, the rows of metrics.jsonl, the ledger's files by their SHA-256.

    extra: the rest, as JSON.
    """

    round: int
    arrays: dict[str, Array]
    metrics: list[MetricsRow]
    ledger: list[str]
    extra: dict[str, Any]


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    if lines:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(as_json(line) + "\n" for line in lines)


class RunDirectory:
    """Paths of a run and how they are written."""

    def __init__(self, path: Path, start: str | None = None) -> None:
        """start: what this start of the run is called (default: a name that is no other's)."""
        self.path = path
        self.work = work_folder(path, start or uuid.uuid4().hex)
        self.ledger = path / "ledger"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"
        self.arrivals = path / "arrivals.jsonl"
        self.scores = path / "client_scores.jsonl"
        self.saved = 0
        """The last round that is safe on disk."""

    @classmethod
    def create(cls, out: Path | None, name: str, start: str | None = None) -> "RunDirectory":
        """`out`, or without it the first free `runs/NAME`, `runs/NAME-2`, ..."""
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return cls(out, start)
        number = 1
        while True:
            path = Path("runs") / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
                return cls(path, start)
            except FileExistsError:
                number += 1

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn what comes of a full disk, or of a folder that is gone, into one clear FedlotrError."""
        with _watched(self.path) as stands:
            try:
                yield
            except InputError:
                raise
            except Exception as error:
                if not stands():
                    raise FedlotrError(
                        f"the output folder {self.path} was removed or replaced while the run was going on, "
                        "and its rounds with it: start the run again"
                    ) from error
                if (trouble := self._trouble(error)) is None:
                    raise
                raise FedlotrError(trouble) from error

    def _trouble(self, error: Exception) -> str | None:
        """In a user's words, what kept a file of this folder from being written; None for any other error."""
        full = (isinstance(error, OSError) and error.errno in FULL) or (
            isinstance(error, SafetensorError) and "No space left" in str(error)
        )
        reason, mend = "the disk is full", "make room"
        if not full:
            where = error.filename if isinstance(error, OSError) else None
            if not isinstance(where, str) or not Path(where).absolute().is_relative_to(self.path.absolute()):
                return None
            reason, mend = f"cannot read or write {where} ({error.strerror})", "mend that"  # type: ignore[attr-defined]
        if not self.saved:
            if any(self.checkpoints.glob("round-*.json")):  # a run that was to be resumed, and has not got that far
                return f"{reason}; the rounds in {self.path} are as they were: {mend}, and go on with --resume"
            return f"{reason}; no round is on disk in {self.path} yet: {mend}, and start the run again"
        finished = "round 1 is" if self.saved == 1 else f"rounds 1 to {self.saved} are"
        return f"{reason}; {finished} safe in {self.path}: {mend}, and go on with --resume"

    def adapter_of(self, client: int) -> Path:
        """The folder of one client's adapter, where each has its own."""
        return self.path / "adapters" / f"client-{client:05d}"

    def adapter_after(self, server_round: int) -> Path:
        """The folder of the adapter as it was after a round, where such are written."""
        return self.path / "adapters" / f"round-{server_round:05d}"

    def open_round_folders(self) -> None:
        """Make the folders that rounds write to; should they vanish later, that is an error and not made good."""
        self.ledger.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)

    def append_metrics(self, row: MetricsRow) -> None:
        """One more line of metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(as_json(row) + "\n")

    def append_arrivals(self, arrivals: Sequence[Arrival]) -> None:
        """Further lines of arrivals.jsonl, which is there in virtual time alone."""
        _append(self.arrivals, arrivals)

    def append_client_scores(self, scores: Sequence[ClientScore]) -> None:
        """Further lines of client_scores.jsonl, which is there where clients hold rows back."""
        _append(self.scores, scores)

    def client_scores(self, number: int) -> list[ClientScore]:
        """Those after a round."""
        if not self.scores.is_file():
            return []
        lines = map(json.loads, self.scores.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line["round"] == number]

    def _cut(self, path: Path, *, all_of_it: bool = False) -> None:
        """Without the lines of rounds that do not count, and one that was cut off."""
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["round"] <= self.saved]
            if all_of_it or kept != lines:
                write_atomically(path, "" if all_of_it else "".join(kept))

    def write_checkpoint(
        self,
        server_round: int,
        arrays: Mapping[str, Array],
        metrics: Sequence[MetricsRow],
        ledger: Sequence[str],
        extra: Mapping[str, Any],
        keep: Collection[int] = (),
    ) -> None:
        """`round-00005.safetensors` and then `.json`, which makes it valid; older ones than the last two go.

        metrics: all rows so far. ledger: the SHA-256 of every round's file. keep: rounds whose checkpoint stays.
        """
        stem = self.checkpoints / f"round-{server_round:05d}"
        content = save(dict(arrays))
        write_atomically(stem.with_suffix(".safetensors"), content)
        record: dict[str, Any] = {
            "format": FORMAT,
            "round": server_round,
            "arrays_sha256": _sha256(content),
            **extra,
            "ledger": list(ledger),
            "metrics": list(metrics),
        }
        record = finite(record)
        write_atomically(stem.with_suffix(".json"), as_json({"sha256": _digest(record), **record}) + "\n")
        self.saved = server_round
        for old in self.checkpoints.glob("round-*.json"):
            number = _round_of(old)
            if number is not None and number <= server_round - KEPT_CHECKPOINTS and number not in keep:
                old.unlink()
                old.with_suffix(".safetensors").unlink(missing_ok=True)

    def obstacles(self) -> Iterator[str]:
        """Folders where the run writes files, and the other way round, each as one line."""
        for folder in (self.ledger, self.checkpoints, self.adapter):
            if folder.exists() and not folder.is_dir():
                yield f"--resume: {folder} is a file, expected a folder: move it away"
        files = [self.metrics, self.arrivals, self.scores, self.path / "config.yaml", self.path / "summary.json"]
        files += [file for folder in (self.ledger, self.checkpoints) for file in folder.glob("round-*")]
        for file in files:
            if file.is_dir() and (file.parent == self.path or _round_of(file)):
                yield f"--resume: {file} is a folder, expected a file: move it away"

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, with its ledger, or None where no round was finished yet.

        A damaged one is passed over, and said. Raises InputError where none is whole.
        """
        problems = []
        # Arrays without their JSON are left by a run killed in its first round; in any later one, damage.
        names = {path.stem for path in self.checkpoints.glob("round-*.json")}
        names |= {path.stem for path in self.checkpoints.glob("round-*.safetensors") if (_round_of(path) or 0) > 1}
        paths = [self.checkpoints / f"{name}.json" for name in names]
        for path in sorted((path for path in paths if _round_of(path)), key=lambda path: -(_round_of(path) or 0)):
            try:
                return self._read_checkpoint(path)
            except DAMAGE as error:
                problems.append(f"{path.name}: {error}")
                say(f"checkpoint {path.name} is damaged and passed over: {error}")
        if problems:
            raise InputError(
                f"--resume: no checkpoint in {self.checkpoints} is whole ({'; '.join(problems)}); "
                "bring back what is damaged from a copy, or start a new run with another --out"
            )
        return None

    def whole_checkpoint(self, server_round: int) -> Checkpoint | None:
        """That of a round; None where it is not kept, or is damaged."""
        try:
            return self._read_checkpoint(self.checkpoints / f"round-{server_round:05d}.json")
        except DAMAGE:
            return None

    def rounds(self) -> list[int]:
        """The rounds that a checkpoint is kept of."""
        return sorted(number for path in self.checkpoints.glob("round-*.json") if (number := _round_of(path)))

    def checkpoint_of(self, server_round: int, option: str = "--resume-round") -> Checkpoint:
        """The checkpoint of a round, with its ledger. Raises InputError where there is none that is whole.

        option: that names the round.
        """
        kept = [number for number in self.rounds() if number != server_round]
        others = f"choose one of {', '.join(map(str, kept))}" if kept else f"there is no other; leave {option} out"
        path = self.checkpoints / f"round-{server_round:05d}.json"
        if not path.exists():
            raise InputError(f"{option} {server_round}: no checkpoint of that round is kept; {others}")
        try:
            return self._read_checkpoint(path)
        except DAMAGE as error:
            raise InputError(f"{option} {server_round}: {path.name} is damaged ({error}); {others}") from error

    def drop_results(self) -> None:
        """Drop what a run left that was finished: it is of rounds that do not count any more."""
        for file in (self.path / "summary.json", self.path / "report.html"):
            file.unlink(missing_ok=True)
        for folder in (self.adapter, *(self.path / "adapters").glob("client-*")):
            if folder.is_dir():
                shutil.rmtree(folder)

    def peek(self) -> dict[str, Any] | None:
        """What the newest checkpoint says besides its arrays; None where there is none that can be read."""
        for path in sorted(self.checkpoints.glob("round-*.json"), key=lambda path: -(_round_of(path) or 0)):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(found, dict) and found.pop("sha256", None) == _digest(found):
                    return found
            except (OSError, ValueError, RecursionError):
                continue
        return None

    def _read_checkpoint(self, path: Path) -> Checkpoint:
        """Raises one of many errors for a checkpoint that is not whole."""
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.pop("sha256", None) != _digest(found):
            raise ValueError("its checksum is wrong")
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']}, expected {FORMAT}: another version of fedlotr wrote it")
        if found["round"] != _round_of(path):
            raise ValueError(f"it is that of round {found['round']}")
        content = path.with_suffix(".safetensors").read_bytes()
        if _sha256(content) != found["arrays_sha256"]:
            raise ValueError(f"the checksum of {path.stem}.safetensors is wrong")
        for number, wanted in enumerate(found["ledger"], start=1):
            part = part_path(self.ledger, number)
            if not part.is_file():
                raise ValueError(f"{part.parent.name}/{part.name} is missing")
            if _sha256(part.read_bytes()) != wanted:
                raise ValueError(f"the checksum of {part.parent.name}/{part.name} is wrong")
        return Checkpoint(found["round"], load(content), found["metrics"], found["ledger"], found)

    def go_back_to(self, checkpoint: Checkpoint | None) -> None:
        """Drop what a later, unfinished round has left; metrics.jsonl is again as the checkpoint has it."""
        self.saved = 0 if checkpoint is None else checkpoint.round
        lines = "".join(as_json(row) + "\n" for row in (checkpoint.metrics if checkpoint else [])).encode()
        if not self.metrics.exists() or self.metrics.read_bytes() != lines:
            write_atomically(self.metrics, lines)
        self._cut(self.arrivals)
        self._cut(self.scores, all_of_it=checkpoint is None)
        for folder in (self.checkpoints, self.ledger):  # a checkpoint without its ledger would count as damaged
            for file in folder.glob("round-*"):
                if (_round_of(file) or 0) > self.saved and file.is_file():
                    file.unlink()
        for folder in (self.path / "adapters").glob("round-*"):
            if folder.name[6:].isdigit() and int(folder.name[6:]) > self.saved:
                shutil.rmtree(folder)
        for file in (self.path / "eval").glob("*-round-*.json"):  # what `fedlotr eval` has found of such a round
            if (of := file.stem.rpartition("-")[2]).isdigit() and int(of) > self.saved:
                file.unlink()

    def write_summary(self, summary: Summary) -> None:
        """summary.json."""
        write_atomically(self.path / "summary.json", as_json(summary, indent=1) + "\n")

    def write_facts(self, facts: Facts) -> None:
        """facts.json."""
        write_atomically(self.path / "facts.json", as_json(facts) + "\n")

    def remove_work(self) -> None:
        """Remove the workers' files: tokenised data has no business outliving the run."""
        shutil.rmtree(self.path / ".work", ignore_errors=True)
