"""log.txt of a run: one process at a time writes it, and a disk that is full does not disturb the run."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from fedlotr.errors import InputError
from fedlotr.reporting.escaping import lines

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # where there is no such lock, two processes in one folder are the user's affair
    flock = None  # type: ignore[assignment]


class _LogFile(logging.FileHandler):
    """Lines that cannot be written are lost: what goes wrong with the disk, the run itself says in one line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()

    def claim(self) -> bool:
        """False where another process writes this file; it is free again when that has ended, however it did.

        Who only looks whether it is written, as `fedlotr watch` does, holds it for a moment.
        """
        stream = self.stream
        if flock is None or stream is None:
            return True
        for wait in (0.05, 0.1, 0.2, None):
            try:
                flock(stream, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                if wait is None:
                    return False
                time.sleep(wait)
            except OSError:  # a file system that has no locks
                break
            else:
                break
        return True


class _Plain(logging.Formatter):
    """Lines as they are, with what cannot be printed escaped: a log is read at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return lines(super().format(record))


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write the project's log lines of this run to its file. Raises InputError where another run is writing it."""
    handler = _LogFile(path, encoding="utf-8")
    if not handler.claim():
        handler.close()
        raise InputError(f"--out {path.parent}: another process is running there; wait for its end, or end it")
    handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("fedlotr")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()
