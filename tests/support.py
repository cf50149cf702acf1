"""Plain functions and types that several tests use."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Simulate = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs `python -m fedlotr.simulate` with the given words."""


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """summary.json and the rows of metrics.jsonl."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return summary, [json.loads(line) for line in lines]
