"""The run directory: what a run leaves on disk, each file written whole or not at all."""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlotr.errors import InputError
from fedlotr.files import write_atomically
from fedlotr.flower.workplace import work_folder

log = logging.getLogger("fedlotr")

Array = npt.NDArray[Any]

KEPT_CHECKPOINTS = 2
"""The last one, and the one before in case that is damaged."""


def _round_of(path: Path) -> int:
    """5 for round-00005.json."""
    return int(path.name.split(".")[0].removeprefix("round-"))


@dataclass(frozen=True)
class Checkpoint:
    """What is on disk after a round: arrays by name, and the rest as JSON."""

    round: int
    arrays: dict[str, Array]
    extra: dict[str, Any]


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

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One more line of metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_checkpoint(self, server_round: int, arrays: Mapping[str, Array], extra: Mapping[str, Any]) -> None:
        """`round-00005.safetensors` and then `.json`, which makes it valid; older ones than the last two go."""
        self.checkpoints.mkdir(exist_ok=True)
        stem = self.checkpoints / f"round-{server_round:05d}"
        content = save(dict(arrays))
        write_atomically(stem.with_suffix(".safetensors"), content)
        record = {"round": server_round, "sha256": hashlib.sha256(content).hexdigest(), **extra}
        write_atomically(stem.with_suffix(".json"), json.dumps(record, indent=1))
        for old in self.checkpoints.glob("round-*.json"):
            if _round_of(old) <= server_round - KEPT_CHECKPOINTS:
                old.unlink()
                old.with_suffix(".safetensors").unlink(missing_ok=True)

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None where there is none yet.

        A damaged one is passed over, and said in the log. Raises InputError where all are damaged.
        """
        paths = sorted(self.checkpoints.glob("round-*.json"), reverse=True)
        for path in paths:
            try:
                extra = json.loads(path.read_text(encoding="utf-8"))
                content = path.with_suffix(".safetensors").read_bytes()
                if hashlib.sha256(content).hexdigest() != extra["sha256"]:
                    raise ValueError("its checksum is wrong")
                return Checkpoint(int(extra["round"]), load(content), extra)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                log.warning("checkpoint %s is damaged and passed over: %s", path.name, error)
        if paths:
            raise InputError(
                f"--resume: every checkpoint in {self.checkpoints} is damaged; start a new run with another --out"
            )
        return None

    def forget_after(self, server_round: int) -> list[dict[str, Any]]:
        """Drop what a later, unfinished round has left; the rows of metrics.jsonl up to this round."""
        path = self.path / "metrics.jsonl"
        rows: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break  # the line that was being written when the run was killed
            if row["round"] <= server_round:
                rows.append(row)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        for folder, pattern in ((self.ledger, "round-*.parquet"), (self.checkpoints, "round-*.*")):
            for file in folder.glob(pattern):
                if _round_of(file) > server_round:
                    file.unlink()
        return rows

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def remove_work(self) -> None:
        """Remove the workers' files: tokenised data has no business outliving the run."""
        shutil.rmtree(self.path / ".work", ignore_errors=True)
