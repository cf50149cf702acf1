"""What a user must be told of a run while it goes on: one line on the console, in log.txt and in summary.json."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_log = logging.getLogger("fedlotr.said")
MOST = 200
"""Different lines that summary.json keeps; log.txt has all."""


def say(text: str) -> None:
    """Tell the user of the run that is going on; where there is none, it is a warning of the logger like any other."""
    _log.warning("%s", text)


class Heard(logging.Handler):
    """What has been said in a run, each line once, in order; `show` gets it as it is said."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, and show it."""
        line = record.getMessage()
        if line not in self.lines and len(self.lines) < MOST:
            self.lines.append(line)
        self._show(line)

    def before(self, lines: Sequence[str]) -> None:
        """What the part of the run that is resumed now had said; it comes first."""
        self.lines[:] = list(dict.fromkeys([*lines, *self.lines]))[:MOST]


@contextmanager
def keeping() -> Iterator[list[str]]:
    """Keep what is said, from here to the end of the block, for whoever will say it once there is a run.

    Nobody else hears it meanwhile: no handler, nor the logger's own standard error.
    """
    kept: dict[str, None] = {}

    def keep(record: logging.LogRecord) -> bool:
        kept[record.getMessage()] = None
        lines[:] = kept
        return False

    lines: list[str] = []
    _log.addFilter(keep)
    try:
        yield lines
    finally:
        _log.removeFilter(keep)


@contextmanager
def hearing(show: Callable[[str], None]) -> Iterator[Heard]:
    """Gather what is said, from here to the end of the block."""
    handler = Heard(show)
    _log.addHandler(handler)
    try:
        yield handler
    finally:
        _log.removeHandler(handler)
