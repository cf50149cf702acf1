"""Writing files so that a crash, or a full disk, leaves the old one or the new one."""

import contextlib
import os
from pathlib import Path


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
