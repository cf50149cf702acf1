"""The run directory: what a run leaves on disk, each file written whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

KEPT_CHECKPOINTS = 2
"""The last one, and the one before in case that is damaged."""


def write_atomically(path: Path, content: str) -> None:
    """Replace a text file: a reader, or a crash, sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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

    def write_checkpoint(self, server_round: int, arrays: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """`round-00005.safetensors` and then `.json`, which makes it valid; older ones than the last two go."""
        self.checkpoints.mkdir(exist_ok=True)
        stem = self.checkpoints / f"round-{server_round:05d}"
        partial = stem.with_suffix(".partial")
        save_file(dict(arrays), partial)
        partial.replace(stem.with_suffix(".safetensors"))
        write_atomically(stem.with_suffix(".json"), json.dumps({"round": server_round, **extra}, indent=1))
        for old in sorted(self.checkpoints.glob("round-*.json"))[:-KEPT_CHECKPOINTS]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def read_checkpoint(self, server_round: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays and the rest of one checkpoint."""
        stem = self.checkpoints / f"round-{server_round:05d}"
        extra = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        return load_file(stem.with_suffix(".safetensors")), extra

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def remove_work(self) -> None:
        """Remove the workers' files: tokenised data has no business outliving the run."""
        shutil.rmtree(self.work, ignore_errors=True)
