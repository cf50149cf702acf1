"""What the doors of all commands have in common: how one ends, whatever its streams, its folder and its signals are."""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from fedlotr.engines.endings import exit_code, heeded, in_words, listening
from fedlotr.errors import visible

FAILED, BAD_INPUT = 1, 2
PIPE_CLOSED = 128 + getattr(signal, "SIGPIPE", 13)
"""The exit code of a command whose reader has gone, as a shell has it: `fedlotr ls methods | head -1`."""


NO_MEMORY = "there is not enough memory for this process, or a limit keeps it from more (ulimit -v, a control group)"
WITHOUT_MEMORY = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "can't start new thread")
"""What the loader, the system, torch and Python say, in errors of several kinds."""


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is that this process got no memory."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if any(words in str(error).lower() for words in WITHOUT_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Display:
    """Standard error, which a command goes on without: a reader that has gone is no reason to lose a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_inside = False


def through(command: Callable[[], int], to_the_end: bool = False) -> int:
    """Carry out a command and return its exit code; what ends it from outside is one line.

    A signal: 128 and its number. Standard output that cannot be written: `PIPE_CLOSED`, without a word, where its
    reader has gone, else 1. No memory: 1. A current folder that is gone: 2. A door within a door adds nothing.
    `to_the_end`: the process ends with the command, and a signal that ended it may come again until it has.
    """
    global _inside
    if _inside:
        return command()
    _inside = True
    try:
        with _streams(), listening(to_the_end):
            return _ended(command)
    finally:
        _inside = False


def _ended(command: Callable[[], int]) -> int:
    try:
        try:
            os.getcwd()
        except OSError:
            return _say("error: the current folder is gone: go to one that is there (cd), and try again", BAD_INPUT)
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        number = heeded()
        return _say(in_words(number), exit_code(number))
    except (MemoryError, ImportError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        return _say(f"error: {NO_MEMORY}", FAILED)
    except OSError as error:
        if lacks_memory(error):
            return _say(f"error: {NO_MEMORY}", FAILED)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            raise  # standard output is well: it is something else
        _silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        return _say(f"error: standard output cannot be written ({error.strerror})", FAILED)


def refuse(problems: Sequence[str], stream: TextIO | None = None) -> int:
    """Say what is wrong on standard error, or there, in a line each, and return BAD_INPUT."""
    for problem in problems:
        line = visible(
            " ".join(problem.splitlines())
        )  # a library's words may have several lines, or a terminal's codes
        print(f"error: {line}", file=stream or sys.stderr, flush=True)
    return BAD_INPUT


def fail(error: Exception) -> int:
    """Say in a line what went wrong, and return FAILED."""
    return _say(f"error: {visible(' '.join(str(error).split()))}", FAILED)


def note(line: str) -> None:
    """Say something beside what a command is for, on standard error."""
    print(f"note: {visible(line)}", file=sys.stderr)


def whole_number(least: int) -> Callable[[str], int]:
    """What reads a word of a command line that is a whole number from `least` on, for `argparse`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {least} on")
        return int(text)

    return read


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Streams that take any text, are there though they were closed, and do not end a run as standard error breaks."""
    for number in (0, 1, 2):  # else the first file that is opened becomes one of them
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = (open(os.devnull, "w", encoding="utf-8") if stream is None else stream for stream in before)  # noqa: SIM115
    fussy = [
        (stream, stream.errors)
        for stream in (out, err)
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape")
    ]
    for stream, _ in fussy:
        stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = out, _Display(err)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            err.flush()
        sys.stdout, sys.stderr = before
        for stream, errors in fussy:
            stream.reconfigure(errors=errors)


def _silence(stream: Any) -> None:
    """From now on nothing that is written there fails: what is left in its buffer would, when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream of a caller's own has no number
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
