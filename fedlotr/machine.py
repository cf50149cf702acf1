"""What this machine has for a run: cores, memory, disk, packages, a network; read without loading anything heavy."""

import os
import shutil
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

RUNS = Path("runs")
"""Where runs lie unless a folder is named."""
SHARED_MEMORY = Path("/dev/shm")
"""Where Ray keeps messages on Linux."""
HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
"""How long the model hub may take to answer, the look-up of its name included."""
NOTICEABLE_SECONDS = 1.0
"""A shorter wait is not worth a word."""
MANY_TIMES = 3.0
"""Seconds to a second of computing, from which on the machine is busy with other things."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Cores:
    """present: of the machine. allowed: those this process may use. quota: what its control group grants, or None."""

    present: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """How many processes can compute at full speed."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota)))


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system does not tell. limit: of the control group."""

    total: int | None
    available: int | None
    limit: int | None

    @property
    def usable(self) -> int | None:
        """What all processes of a run may take together."""
        known = [size for size in (self.available or self.total, self.limit) if size is not None]
        return min(known) if known else None


@dataclass(frozen=True)
class Package:
    """A package that this project needs: the range it was tested with, and the version here (None: missing)."""

    name: str
    wanted: str
    found: str | None
    fits: bool


def cores(root: Path = Path("/")) -> Cores:
    """The cores of this process. root: where /proc and /sys lie."""
    present = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    quotas = []
    for group in _groups(root, "cpu"):
        words = _read(group / "cpu.max").split() or [
            _read(group / "cpu.cfs_quota_us"),
            _read(group / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return Cores(present, allowed, min(quotas, default=None))


def load() -> float | None:
    """How many processes wanted a core in the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def niceness() -> int:
    """Of this process: 0 has its share of the cores, 19 what others leave; 0 where there is no such thing."""
    return os.nice(0) if hasattr(os, "nice") else 0


def kept_waiting(seconds: float, computed: float) -> bool:
    """Whether a process that had work for so many seconds, and computed in so few of them, was kept from the cores."""
    return seconds >= NOTICEABLE_SECONDS and seconds >= MANY_TIMES * computed


def memory(root: Path = Path("/")) -> Memory:
    """The memory of this machine and of this process's control group."""
    lines = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
    total = kilobytes["MemTotal"] * 1024 if "MemTotal" in kilobytes else _total_memory()
    available = kilobytes["MemAvailable"] * 1024 if "MemAvailable" in kilobytes else None
    limits = []
    for group in _groups(root, "memory"):
        text = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        if text.isdecimal() and (total is None or int(text) < total):  # without a limit: "max", or a huge number
            limits.append(int(text))
    return Memory(total, available, min(limits, default=None))


def resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not tell."""
    words = _read(Path("/proc/self/statm")).split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 else 0


def free_bytes(folder: Path) -> int | None:
    """Free space where a folder lies; None where that cannot be told."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def packages(project: str = "fedlotr") -> list[Package] | None:
    """What the installed project says that it needs, without its extras; None where it is not installed."""
    try:
        needs = [Requirement(text) for text in requires(project) or []]
    except PackageNotFoundError:
        return None
    found = []
    for need in needs:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            here: str | None = version(need.name)
        except PackageNotFoundError:
            here = None
        fits = here is not None and need.specifier.contains(here, prereleases=True)
        found.append(Package(need.name, str(need.specifier) or "any version", here, fits))
    return found


def has_loopback() -> bool:
    """Whether processes of this machine can talk to each other over 127.0.0.1, as Ray's do."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(HUB_SECONDS)
            with socket.create_connection(server.getsockname(), timeout=HUB_SECONDS):
                server.accept()[0].close()
        return True
    except OSError:
        return False


def offline_variable() -> str | None:
    """The environment variable that keeps the hub's library from the network, if one is set."""
    return next((name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def hub_problem() -> tuple[str, str | None]:
    """The hub's address, and why it cannot be reached from here, or None; within `HUB_SECONDS`."""
    address = os.environ.get("HF_ENDPOINT") or HUB
    answers: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS):
                answers.append(None)
        except urllib.error.HTTPError:
            answers.append(None)  # it answered
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    # In a thread, since nothing else bounds the look-up of a name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    return address, answers[0] if answers else f"no answer within {HUB_SECONDS:g} seconds"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and those above it, of either version of control groups."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" or controller in names.split(","):
            top = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
            group = top / path.strip("/")
            found += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
