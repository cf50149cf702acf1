"""A run in somebody's program leaves it as it was: generators, threads, environment, handlers, libraries' settings."""

import contextlib
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
import numpy as np
import pytest
import torch
import transformers

from fedlotr import Callbacks, RoundEvent, SimulationConfig, run_simulation
from fedlotr.errors import InputError
from fedlotr.run.callbacks import CallbackError
from tests.conftest import ROOT

ALONE = "FEDLOTR_TEST_ALONE"
"""In the environment of a test that has a process of its own."""


def world() -> dict[str, Any]:
    """What a run could change, by name; of a module that it loads itself, nothing is known before."""
    loggers = [logging.root, *map(logging.getLogger, ("fedlotr", "flwr", "transformers", "datasets", "absl"))]
    return {
        "random": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch's settings": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        ),
        "environment": dict(os.environ),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "folder": os.getcwd(),
        "numpy's errors": np.geterr(),
        "loggers": [(x.name, x.level, list(x.handlers), x.propagate, x.disabled) for x in loggers],
        "bars": (
            transformers.utils.logging.is_progress_bar_enabled(),
            datasets.are_progress_bars_disabled(),
            huggingface_hub.utils.are_progress_bars_disabled(),
        ),
    }


class Raises(Callbacks):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_round(self, event: RoundEvent) -> None:
        raise self.error


@pytest.fixture
def options(tiny_bert: Path, animals: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 3,
        "rounds": 2,
        "rank": 4,
        "public_examples": 8,
        "threads": 1 if torch.get_num_threads() > 1 else 2,
        "dtype": "float32",
        "out": tmp_path / "run",
        "quiet": True,
    }


@pytest.fixture
def unusual() -> Any:
    """Settings that differ from every default, so that a default put in their place is seen."""
    with contextlib.ExitStack() as stack:
        stack.callback(transformers.utils.logging.set_verbosity, transformers.utils.logging.get_verbosity())
        stack.callback(datasets.enable_progress_bars)
        stack.callback(gc.set_threshold, *gc.get_threshold())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(np.errstate(under="warn"))
        transformers.utils.logging.set_verbosity_info()
        transformers.utils.logging.enable_progress_bar()
        datasets.disable_progress_bars()
        warnings.simplefilter("ignore", BytesWarning)
        gc.set_threshold(777, 11, 12)
        yield


@pytest.mark.serial
@pytest.mark.parametrize(
    ("engine", "ends"),
    [
        ("local", None),
        ("local", ValueError("no")),
        ("local", KeyboardInterrupt()),
        ("local", "refused"),
        pytest.param("ray", None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_callers_world_is_as_it_was_however_a_run_ends(
    engine: str, ends: Any, options: dict[str, Any], unusual: None
) -> None:
    options |= {"engine": engine, "workers": 1 if engine == "ray" else None}
    if engine == "ray" and ALONE not in os.environ:  # other tests may have had Ray in this process
        node = f"{__file__}::test_the_callers_world_is_as_it_was_however_a_run_ends[ray-None]"
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {ALONE: "1"}
        words = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", node]
        done = subprocess.run(words, env=own, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return
    before = world()
    if ends is None:
        run_simulation(SimulationConfig(**options))
    elif ends == "refused":
        with pytest.raises(InputError):
            run_simulation(SimulationConfig(**{**options, "rank": 1000}))
    else:
        with pytest.raises((CallbackError, KeyboardInterrupt)):
            run_simulation(SimulationConfig(**options), callbacks=Raises(ends))
    after = world()
    assert {name for name in before if before[name] != after[name]} == set()


def test_what_is_drawn_between_and_within_runs_differs(options: dict[str, Any], tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    def draw() -> None:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))

    class Draws(Callbacks):
        def on_round(self, event: RoundEvent) -> None:
            draw()

    results = []
    for number in range(2):
        draw()
        config = SimulationConfig(**{**options, "engine": "local", "out": tmp_path / str(number)})
        results.append(run_simulation(config, callbacks=Draws()).summary["trained_sha256"])
    draw()
    assert len(drawn) == 7 and all(len(set(draws)) == 7 for draws in zip(*drawn, strict=True))
    assert results[0] == results[1], "what a caller draws is nothing to a run"
    torch.manual_seed(5)
    random.seed(5)
    expected = random.random(), float(torch.rand(1))
    torch.manual_seed(5)
    random.seed(5)
    run_simulation(SimulationConfig(**{**options, "engine": "local", "out": tmp_path / "seeded"}))
    assert (random.random(), float(torch.rand(1))) == expected, "a caller's seeds are a caller's"


def test_importing_the_engines_leaves_the_environment_alone() -> None:
    look = (
        "import os, fedlotr; before = dict(os.environ)\n"
        "import fedlotr.engines.ray\n"
        "print({name for name in os.environ if name.startswith('RAY_')}, before == dict(os.environ))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "set() True\n"
