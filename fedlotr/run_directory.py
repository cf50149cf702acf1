"""The run directory: what a run leaves on disk, each file written whole or not at all."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

log = logging.getLogger("fedlotr")

Array = npt.NDArray[Any]

KEPT_CHECKPOINTS = 2
"""The last one, and the one before in case that is damaged."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file: a reader, or a crash, sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@dataclass(frozen=True)
class Checkpoint:
    """What is on disk after a round: arrays by name, and the rest as JSON."""

    round: int
    arrays: dict[str, Array]
    extra: dict[str, Any]


class RunDirectory:
    """Paths of a run and how they are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / ".work"
        self.ledger = path / "ledger"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.log = path / "log.txt"

    @classmethod
    def create(cls, out: Path | None, name: str) -> "RunDirectory":
        """`out`, or without it the first free `runs/NAME`, `runs/NAME-2`, ..."""
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return cls(out)
        number = 1
        while True:
            path = Path("runs") / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
                return cls(path)
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
        for old in sorted(self.checkpoints.glob("round-*.json"))[:-KEPT_CHECKPOINTS]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; a damaged one is passed over, and said in the log."""
        for path in sorted(self.checkpoints.glob("round-*.json"), reverse=True):
            try:
                extra = json.loads(path.read_text(encoding="utf-8"))
                content = path.with_suffix(".safetensors").read_bytes()
                if hashlib.sha256(content).hexdigest() != extra["sha256"]:
                    raise ValueError("its checksum is wrong")
                return Checkpoint(int(extra["round"]), load(content), extra)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                log.warning("checkpoint %s is damaged and passed over: %s", path.name, error)
        return None

    def forget_after(self, server_round: int) -> list[dict[str, Any]]:
        """Drop what a later, unfinished round has left; the rows of metrics.jsonl up to this round."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines[:server_round]]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        for folder, pattern in ((self.ledger, "round-*.parquet"), (self.checkpoints, "round-*.*")):
            for file in folder.glob(pattern):
                if int(file.name[6:11]) > server_round:
                    file.unlink()
        return rows

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def remove_work(self) -> None:
        """Remove the workers' files: tokenised data has no business outliving the run."""
        shutil.rmtree(self.work, ignore_errors=True)
