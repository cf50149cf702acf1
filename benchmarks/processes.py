"""Which processes a contestant has, what they have computed, and held at most; nothing where there is no /proc."""

import os
from pathlib import Path

PROC = Path("/proc")


def descendants(pid: int) -> list[Path]:
    """The folders in /proc of a process and of all that it, or one of these, has started and that still live."""
    found = []
    for folder in PROC.glob("[0-9]*"):
        try:
            if pid in _line(int(folder.name)):
                found.append(folder)
        except OSError:  # it has ended
            continue
    return found


def _line(pid: int) -> list[int]:
    """A process, its parent, that one's parent, and so on."""
    line = [pid]
    while line[-1] > 1:
        line.append(int(_status(PROC / str(line[-1]), "PPid:")))
    return line


def peak_bytes(folder: Path) -> int:
    """The most that a process has held so far; 0 for one that has ended."""
    try:
        return int(_status(folder, "VmHWM:")) * 1024
    except (OSError, IndexError):
        return 0


def cpu_seconds(pid: int) -> float:
    """What a process, and all that it or one of these has started and that still live, have computed so far."""
    return sum(map(_computed, descendants(pid)))


def _computed(folder: Path) -> float:
    try:
        after_name = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")  # as user, and in the kernel


def is_worker(folder: Path) -> bool:
    """Whether it is a worker of our Ray engine."""
    try:
        return (folder / "cmdline").read_bytes().startswith(b"ray::Worker")
    except OSError:
        return False


def _status(folder: Path, key: str) -> str:
    return (folder / "status").read_text(encoding="utf-8").partition(key)[2].split()[0]
