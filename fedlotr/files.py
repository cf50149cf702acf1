"""Writing files so that a crash, or a full disk, leaves the old one or the new one; and JSON that all can read."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GGUF = ".gguf"
"""How the name of a file ends that is a whole model, as llama.cpp keeps them."""


def finite(value: Any) -> Any:
    """The value with None for each number in it that is not finite: JSON has no NaN, and most readers take none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def as_json(value: Any, **options: Any) -> str:
    """Valid JSON, whatever the value holds: `finite` of it. options: of `json.dumps`."""
    return json.dumps(finite(value), allow_nan=False, **options)


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace a file: a reader, or a crash, sees the old one or the new one; what could not be written is removed.

    mode: its permissions, less the process's umask.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
