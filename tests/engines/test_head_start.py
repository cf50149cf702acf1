"""Workers start while the command loads and checks: sooner than a run, and gone where there is none."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedlotr.commands import simulate
from fedlotr.config.configuration import load
from tests.support import Simulate


def ray_processes(folder: Path) -> list[int]:
    """Those that a command in a folder has left: Ray's own and its workers have the folder of whoever started them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_it_waits_for_neither_torch_nor_transformers() -> None:
    look = "import fedlotr.simulate, fedlotr.engines.head_start, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "datasets"} & set(found.stdout.split())


@pytest.mark.parametrize("other", [{}, {"engine": "local"}, {"ray_address": "here:1"}, {"resume": True}], ids=str)
def test_it_is_only_for_new_runs_on_a_ray_of_their_own(
    other: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[object, ...]] = []
    monkeypatch.setattr("fedlotr.engines.head_start.HeadStart", lambda *given: begun.append(given))
    monkeypatch.delitem(sys.modules, "fedlotr.run.simulation", raising=False)
    simulate.early_workers(load(["--workers=3"]).model_copy(update=other))
    assert begun == ([] if other else [("fedlotr.flower.client_app:app", 3, 1)])


@pytest.mark.slow
@pytest.mark.serial
def test_a_run_whose_check_fails_says_so_and_leaves_no_process(command: Simulate, tmp_path: Path) -> None:
    done = command("--rank=100000", "--workers=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: --rank 100000: above the width" in done.stderr.splitlines()[-1]
    assert ray_processes(tmp_path) == []


def heeds(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal: until the command has its own, Python's answers or none."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 3.5])
@pytest.mark.serial
def test_ctrl_c_while_it_starts_leaves_no_process(seconds: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlotr.simulate", "--workers=1"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while not heeds(process.pid, signal.SIGTERM):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted before the first round was finished"
    assert ray_processes(tmp_path) == []


LEFT_LOCKED = """
import _imp, sys, threading
from fedlotr.engines import head_start

locked = threading.Event()

def start(workers):
    locked.wait()
    import mailbox

sys.modules.pop("mailbox", None)
head_start.start_ray = start
begun = head_start.HeadStart("app", 1)
_imp.acquire_lock()  # as an import leaves it that a KeyboardInterrupt met at the wrong moment
locked.set()
begun.close()
assert "mailbox" in sys.modules
"""


def test_an_import_that_was_interrupted_with_its_lock_keeps_no_start_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_LOCKED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.serial
def test_a_run_that_is_told_to_end_cleans_up(animals: Path, tiny_bert: Path, tmp_path: Path) -> None:
    words = f"--data {animals} --model {tiny_bert} --clients 3 --rounds 2000 --public-examples 8"
    words += " --workers 1 --out run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlotr.simulate", *words.split()],
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while not list(tmp_path.glob("run/.work/*/train.safetensors")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert not (tmp_path / "run" / ".work").exists(), "it holds the clients' examples"
    assert ray_processes(tmp_path) == []


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted before the first round was finished"),
        (ImportError("no ray"), simulate.FAILED, "error: ImportError: no ray"),
    ],
    ids=["ctrl-c", "no Ray"],
)
def test_what_happens_as_workers_start_is_told_like_the_rest(
    raised: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise raised

    monkeypatch.setattr("fedlotr.commands.simulate.early_workers", fail)
    assert simulate.main(["--quiet"]) == code
    assert line in capsys.readouterr().err.splitlines()


@pytest.mark.serial
def test_a_run_uses_the_workers_that_were_there(
    command: Simulate, animals: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    words = f"--data {animals} --model {tiny_bert} --clients 3 --rounds 1 --public-examples 8 --workers 1 --json"
    done = command(*words.split(), "--quiet")
    assert done.returncode == 0, done.stderr
    timing = json.loads(done.stdout)["timing"]
    assert (timing["workers"], timing["worker_restarts"], timing["base_model_loads"]) == (1, 0, 2)
    assert ray_processes(tmp_path) == []
