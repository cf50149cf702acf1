"""A Ray of our own: how it starts, where it keeps its sockets, whether it lives, and how nothing is left of it."""

import atexit
import contextlib
import ctypes
import functools
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlotr.engines.endings import held_back
from fedlotr.errors import FedlotrError, InputError

NICENESS = "RAY_worker_niceness"
VARIABLES = {
    # Every port stays on the loopback interface ("1" where several machines form a cluster).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers see the devices that the driver sees.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's default is 15, so that a workstation stays pleasant; beside other work a run then got a tenth of the
    # processor and said nothing. Workers are the run: they are as nice as whoever starts it (`nice fedlotr ...`).
    NICENESS: "0",
}
"""What Ray, as it is imported and as it starts, reads of the environment; a user's own choice wins."""


@contextlib.contextmanager
def variables() -> Iterator[None]:
    """Have `VARIABLES` in the environment, for Ray and the processes that it starts in the block, and nobody else."""
    before = dict(os.environ)
    os.environ.update({**VARIABLES, **before})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():  # Ray adds some of its own
            del os.environ[name]


with variables():
    import ray
    from ray._private.services import psutil  # Ray's own

OBJECT_STORE_BYTES = 256 * 2**20  # holds the jobs in flight and their replies; what is larger goes to disk
SOCKET_BYTES = 107  # that a path of a socket may have on Linux; Ray looks for minutes where it has more
SESSION = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.1"
"""What Ray puts behind the folder that it is given, at its longest."""
PREFIX = "fedlotr-ray-"
ELSEWHERE = ("/tmp", "/dev/shm", "/var/tmp")
"""Where there is room for sockets where the folder for temporary files is none, or has too long a name."""
VITAL = ("raylet", "gcs_server")
"""Without either of these no worker is heard of again; Ray itself waits for the first one for ever."""
CLEARING_SECONDS = 2.0
"""How long processes that are ending may go on writing to the folder that is removed."""


def worker_niceness() -> int:
    """What is added to this process's niceness in a worker of a Ray that is started here."""
    try:
        return int(os.environ.get(NICENESS, VARIABLES[NICENESS]))
    except ValueError:  # Ray, which reads it too, ends with it
        return 0


@dataclass(frozen=True)
class OwnRay:
    """One that this process has started. folder: its own, with sockets and logs; None: it has joined a cluster."""

    folder: Path | None

    def check(self) -> None:
        """Raises FedlotrError where one of the processes without which nothing goes on is dead."""
        if dead := self._dead():
            raise FedlotrError(
                f"Ray's {dead} died, as processes do where memory runs out or somebody kills them: no worker can be "
                "reached without it. --resume goes on with the finished rounds"
            )

    def lives(self) -> bool:
        """Whether a worker can be reached through it."""
        return self._dead() is None

    def stop(self) -> None:
        """End Ray's processes, and remove what they have left; once is enough."""
        if not self.lives():
            _kill_all()
        with _handler_of(signal.SIGTERM):  # Ray puts back the system's, and a second signal would end the clean-up
            ray.shutdown()
        atexit.unregister(self.stop)
        if self.folder is not None:
            _remove(self.folder)

    def _dead(self) -> str | None:
        node = ray._private.worker._global_node
        if self.folder is None or node is None:
            return None
        return next((f"{kind} ({process.pid})" for kind, process in node.dead_processes() if kind in VITAL), None)


def start_ray(workers: int, address: str | None = None) -> OwnRay | None:
    """Start Ray on this machine with room for so many workers, or join the cluster at an address.

    None where this process is in one already. Raises InputError where no cluster answers.
    """
    if ray.is_initialized():
        return None
    start: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = OwnRay(new_folder() if address is None else None)
    atexit.register(own.stop)  # whatever happens between here and whoever is to stop it
    if own.folder is None:
        start |= {"address": address}
    else:
        start |= {"address": "local", "num_cpus": workers, "object_store_memory": OBJECT_STORE_BYTES}
        start |= {"include_dashboard": False, "_temp_dir": str(own.folder)}
    try:
        with held_back(), _handler_of(signal.SIGTERM), variables(), _few_processes(own):
            ray.init(**start)
    except (OSError, ValueError, RuntimeError) as error:
        own.stop()
        reason = str(error).partition("\n")[0]
        if address is None:
            raise FedlotrError(
                f"Ray cannot start here ({reason}): 'fedlotr doctor' may say why; --engine local needs no Ray"
            ) from error
        raise InputError(f"--ray-address {address}: no Ray cluster can be joined there ({reason})") from error
    except BaseException:
        own.stop()
        raise
    # Ray prints the death of a worker to stdout, and has no public switch; ours is a line in the log.
    ray._private.worker._worker_logs_enabled = False
    return own


@contextlib.contextmanager
def _few_processes(own: OwnRay) -> Iterator[None]:
    """A Ray of our own starts without what scales clusters, sends logs to the driver and answers a dashboard.

    Nobody asks these here, and to import their libraries takes two seconds of CPU time while workers do the same.
    """
    parameters: Any = ray._private.parameter
    node: Any = ray._private.node.Node
    before = parameters.RayParams, node.start_api_server
    if own.folder is not None:
        parameters.RayParams = functools.partial(before[0], no_monitor=True, include_log_monitor=False)
        node.start_api_server = lambda self, **_: setattr(self, "_webui_url", "")
    try:
        yield
    finally:
        parameters.RayParams, node.start_api_server = before


def _kill_all() -> None:
    """End Ray's processes at once: they, and this process, would look for the one that died for a minute.

    What the raylet has started would outlive it where the other server is dead.
    """
    node: Any = ray._private.worker._global_node
    below: list[Any] = []
    for process in node.all_processes.get("raylet", []):
        with contextlib.suppress(psutil.Error):
            below += psutil.Process(process.process.pid).children(recursive=True)
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    for child in below:
        with contextlib.suppress(psutil.Error):
            child.kill()


def end_worker(actor: Any) -> None:
    """End an actor, whatever it does."""
    with contextlib.suppress(Exception):  # it may be dead already, or Ray gone
        ray.kill(actor)


def new_folder() -> Path:
    """A new folder for Ray's sockets and logs, with a path that is short enough. Raises FedlotrError."""
    chosen = os.environ.get("RAY_TMPDIR")
    for place in [*([chosen] if chosen else []), _temporary(), *ELSEWHERE]:
        if not place.isascii() or len(f"{place}/{PREFIX}12345678{SESSION}") > SOCKET_BYTES:
            continue
        with contextlib.suppress(OSError):  # the next one may do
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    most = SOCKET_BYTES - len(f"/{PREFIX}12345678{SESSION}")
    raise FedlotrError(
        f"no folder for Ray's sockets: set RAY_TMPDIR to one that can be written to, with a path of at most "
        f"{most} plain letters, or give --engine local"
    )


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # none can be written to
        return ELSEWHERE[0]


def _remove(folder: Path) -> None:
    """Remove a folder into which processes that are ending may still write for a moment."""
    end = time.monotonic() + CLEARING_SECONDS
    while folder.exists():
        last = time.monotonic() > end
        shutil.rmtree(folder, ignore_errors=True)
        if last:
            return
        if folder.exists():
            time.sleep(0.05)


@contextlib.contextmanager
def _handler_of(number: int) -> Iterator[None]:
    """The C library keeps the handler that it has: Ray's C++ puts one of its own there, from any thread.

    Told to end, that one dumps its stack and ends the process, with nothing cleaned up. So it is replaced at once.
    """
    put, get = ctypes.pythonapi.PyOS_setsig, ctypes.pythonapi.PyOS_getsig
    put.restype = get.restype = ctypes.c_void_p
    put.argtypes, get.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_int]
    before, over = get(number), threading.Event()

    def keep() -> None:
        while not over.wait(0.002):
            if get(number) != before:
                put(number, before)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        put(number, before)
