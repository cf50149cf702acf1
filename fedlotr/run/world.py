"""The world of whoever calls: generators, threads, environment, handlers, libraries' settings, all as they were."""

import contextlib
import functools
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np

from fedlotr.engines.endings import heeded, listening

P = ParamSpec("P")
R = TypeVar("R")


def leaving_no_trace(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates what may be called from anybody's program: afterwards that is as it was, however the call ends.

    In the call SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, unless somebody listens to them already;
    once all is cleaned up, they come again, to whatever they would have met.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        told_by = None
        try:
            with unchanged(), listening() as outermost:
                try:
                    return function(*args, **kwargs)
                finally:
                    told_by = heeded() if outermost else None
        except BaseException:
            if told_by not in (None, signal.SIGINT):
                signal.raise_signal(told_by)
            raise

    return wrapped


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Put back, at the end of the block, what libraries and a run change for the whole process."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(_own_generators())
        for keep in (_torch, _interpreter, _loggers, _bars, _signals, _environment):
            for put_back in keep():
                stack.callback(put_back)
        yield


@contextlib.contextmanager
def callers_generators() -> Iterator[None]:
    """In a run: the block, which is code of the caller's, draws from the caller's generators, and moves them on."""
    if not _callers:
        yield
        return
    ours = _generators()
    _put_generators(_callers[-1])
    try:
        yield
    finally:
        _callers[-1] = _generators()
        _put_generators(ours)


@contextlib.contextmanager
def _own_generators() -> Iterator[None]:
    _callers.append(_generators())
    try:
        yield
    finally:
        _put_generators(_callers.pop())


_callers: list[dict[str, Any]] = []
"""The states of the callers' generators while runs go on; a callback may start a run too."""


def _generators() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state()}
    if torch := sys.modules.get("torch"):
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _put_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "torch" in states:
        sys.modules["torch"].set_rng_state(states["torch"])
    if "cuda" in states:
        sys.modules["torch"].cuda.set_rng_state_all(states["cuda"])


PutBack = Iterator[Callable[[], object]]


def _torch() -> PutBack:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    from fedlotr.models.precision import put_back_algorithms

    yield functools.partial(torch.set_num_threads, torch.get_num_threads())
    yield functools.partial(torch.set_default_dtype, torch.get_default_dtype())
    yield functools.partial(torch.set_grad_enabled, torch.is_grad_enabled())
    if torch.get_float32_matmul_precision() != "highest":
        yield functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    yield functools.partial(
        put_back_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _interpreter() -> PutBack:
    yield functools.partial(setattr, sys, "excepthook", sys.excepthook)
    yield functools.partial(setattr, sys, "unraisablehook", sys.unraisablehook)
    yield functools.partial(setattr, threading, "excepthook", threading.excepthook)
    yield functools.partial(sys.path.__setitem__, slice(None), list(sys.path))
    yield functools.partial(gc.set_threshold, *gc.get_threshold())
    yield gc.enable if gc.isenabled() else gc.disable
    yield functools.partial(np.seterr, **np.geterr())
    with contextlib.suppress(OSError):  # a folder that is gone cannot be gone back to
        yield functools.partial(_go_back, os.getcwd())


def _go_back(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.chdir(folder)


def _loggers() -> PutBack:
    """Level, handlers and the rest of each logger that there is; transformers' and datasets' verbosity are levels."""
    there = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for logger in [logging.root, *there]:
        known = (logger.level, list(logger.handlers), logger.propagate, logger.disabled)
        yield functools.partial(_put_logger_back, logger, *known)


def _put_logger_back(
    logger: logging.Logger, level: int, handlers: list[logging.Handler], propagate: bool, disabled: bool
) -> None:
    if logger.level != level:
        logger.setLevel(level)
    if logger.handlers != handlers:
        logger.handlers[:] = handlers
    logger.propagate, logger.disabled = propagate, disabled


SWITCHES = (
    ("datasets.utils.tqdm", "are_progress_bars_disabled", "disable_progress_bars", "enable_progress_bars"),
    ("huggingface_hub.utils.tqdm", "are_progress_bars_disabled", "disable_progress_bars", "enable_progress_bars"),
    # Kept last, so put back first: it turns the hub's bars too.
    ("transformers.utils.logging", "is_progress_bar_enabled", "enable_progress_bar", "disable_progress_bar"),
)
"""Of progress bars: a module, its question, and what makes the answer yes and no."""


def _bars() -> PutBack:
    for module, question, yes, no in SWITCHES:
        library: Any = sys.modules.get(module)
        if library is not None:
            ask = getattr(library, question)
            yield functools.partial(_put_switch_back, ask, ask(), getattr(library, yes if ask() else no))


def _put_switch_back(ask: Callable[[], bool], before: bool, turn: Callable[[], object]) -> None:
    if ask() != before:
        turn()


def _signals() -> PutBack:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in signal.valid_signals():
        if (handler := signal.getsignal(number)) is not None:  # else it was not set from Python
            yield functools.partial(_put_handler_back, number, handler)


def _put_handler_back(number: int, handler: Any) -> None:
    if signal.getsignal(number) is not handler:
        signal.signal(number, handler)


def _environment() -> PutBack:
    yield functools.partial(_put_environment_back, dict(os.environ))


def _put_environment_back(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
