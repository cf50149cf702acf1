"""Being told to end: Ctrl-C, SIGTERM and SIGHUP each raise one KeyboardInterrupt, held back where it would do harm."""

import _imp
import _thread
import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

log = logging.getLogger("fedlotr")

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LAST_STRAW = 3
"""Who has said it so often is not waiting for an orderly end: the process dies at once."""
ONE_WORD_SECONDS = 0.5
"""Signals closer together are one: `timeout` and a closing terminal send theirs to the process and to its group."""
AGAIN_SECONDS = 0.5
"""After which the exception is raised again where it was lost."""
SECOND = b"ending already, and cleaning up; a third signal ends at once, and leaves processes and files behind\n"


class _Words:
    """How often a process has been told, and by which signal first."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.count = 0
        self._last = 0.0

    def hear(self, number: int) -> int:
        """How often it was said, this time included. Does not return where that was enough."""
        now = time.monotonic()
        if self.first is None or now - self._last > ONE_WORD_SECONDS:
            self.count += 1
        self.first, self._last = self.first or number, now
        if self.count >= LAST_STRAW:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return self.count


class _Listener:
    """The one that listens in this process, where one does."""

    words: _Words | None = None
    raised = False
    reminding = False
    heeded = False


def _told(number: int, _: FrameType | None) -> None:
    words = _Listener.words or _Words()
    if _Listener.reminding:
        _Listener.reminding = False
        if not _Listener.heeded and not _under_way():
            raise KeyboardInterrupt
        return
    _disarm()
    count = words.hear(number)
    if not _Listener.raised:
        # Of this type, since libraries let it through: Ray drops a SystemExit that is raised while it waits.
        _Listener.raised = True
        _thread.start_new_thread(_remind, (words, number))
        raise KeyboardInterrupt
    if count == LAST_STRAW - 1 and number == words.first:  # a closing terminal says it in two ways
        with contextlib.suppress(OSError):  # whoever said it may have closed standard error
            os.write(2, SECOND)


def _in_a_child() -> None:
    """A process that a library forks, as lm-eval does for its pools, has nothing to clean up: it ends as any other."""
    for number in SIGNALS:
        if signal.getsignal(number) is _told:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _Listener.words = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)


def _disarm() -> None:
    """Where the handler of Ray's C++ was first, which calls ours, it has set an alarm that aborts this process."""
    if hasattr(signal, "alarm") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:
        signal.alarm(0)


def _under_way() -> bool:
    """Whether the main thread cleans up, or explains, for the sake of a KeyboardInterrupt."""
    found: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error = found[1] if isinstance(found, tuple) else found  # the exception alone from Python 3.12 on
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _remind(words: _Words, number: int) -> None:
    """Call `_told` in the main thread again where what it raised was lost: in a library's `except:`, or a finaliser."""
    while True:
        time.sleep(AGAIN_SECONDS)
        if _Listener.words is not words or _Listener.heeded:
            return
        if not _under_way():
            _Listener.reminding = True
            _thread.interrupt_main(signal.Signals(number))


def let_imports_go_on() -> None:
    """Release Python's import lock where this thread, which imports nothing, holds it.

    A KeyboardInterrupt that comes after the lock is taken and before what would release it leaves it so (`importlib`'s
    `_get_module_lock`), and every other thread then waits at its next import, for good.
    """
    with contextlib.suppress(RuntimeError):  # it does not hold it
        while True:
            _imp.release_lock()


@contextlib.contextmanager
def listening(to_the_end: bool = False) -> Iterator[bool]:
    """In the block each of `SIGNALS` that nobody else listens to raises one KeyboardInterrupt in the main thread.

    Further ones leave the clean-up alone, until `LAST_STRAW`; `to_the_end` of the process, where it was told to end:
    the interpreter takes a while to go, and a signal that met the system's handler then would change the exit code. A
    signal that is ignored (nohup) stays so. True where this is the outermost such block of the process; False there,
    and in another thread, changes nothing.
    """
    if threading.current_thread() is not threading.main_thread() or _Listener.words is not None:
        yield False
        return
    free = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in free}
    hook = sys.unraisablehook
    _Listener.words, _Listener.raised, _Listener.heeded, _Listener.reminding = _Words(), False, False, False
    last = contextlib.ExitStack()
    if to_the_end:
        atexit.register(last.close)  # before what libraries register, and so carried out after it
    try:
        sys.unraisablehook = _without_interrupts(hook)
        for number in before:
            signal.signal(number, _told)
        yield True
    finally:
        words, _Listener.words = _Listener.words, None
        ends = to_the_end and words.first is not None
        for number, handler in before.items():
            signal.signal(number, (lambda said, _: words.hear(said) and None) if ends else handler)
            if ends:  # the interpreter puts back the system's handlers, but of those that are ignored
                last.callback(signal.signal, number, signal.SIG_IGN)
        sys.unraisablehook = hook


def _without_interrupts(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """What is raised in a finaliser Python drops, and says so; an interrupt will come again."""

    def quiet(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook(dropped)

    return quiet


def told() -> int | None:
    """Which signal told this process to end, in the block of `listening`; None: none did."""
    return None if _Listener.words is None else _Listener.words.first


def heeded() -> int | None:
    """As `told`, from whoever has caught the KeyboardInterrupt and ends the process now: it is not raised again."""
    _Listener.heeded = True
    return told()


def exit_code(number: int | None) -> int:
    """As a shell has it; of a KeyboardInterrupt without a signal, that of Ctrl-C."""
    return 128 + (number or signal.SIGINT)


def in_words(number: int | None) -> str:
    """What happened, for the line that says so."""
    return "interrupted" if number in (None, signal.SIGINT) else f"ended by {signal.Signals(number).name}"


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals take effect at the end of the block, which would leave something behind if it were cut short.

    They then meet the handlers that were there before, whatever a library has put in their place meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, and only there can their handlers be changed
        return
    words = _Words()
    heard: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        if _Listener.reminding:
            _Listener.reminding = False
            return
        _disarm()
        words.hear(number)
        if not heard:
            log.warning("%s: ending as soon as what leaves something behind is over", in_words(number))
        heard.append(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in ours:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(heard):
            signal.raise_signal(number)
