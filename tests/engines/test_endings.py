"""Whatever ends a command, it says so in one line, cleans up, and returns the code that a shell expects."""

import contextlib
import errno
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from fedlotr import Callbacks, RoundEvent, SimulationConfig, cli, run_simulation
from fedlotr.commands.door import NO_MEMORY
from fedlotr.engines import own_ray
from fedlotr.engines.endings import LAST_STRAW, exit_code, heeded, held_back, in_words, listening, told
from tests import forks
from tests.engines.test_head_start import ray_processes
from tests.run.test_simulation import flags, wait_for_round

HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}


@pytest.fixture(autouse=True)
def nobody_listens() -> Iterator[None]:
    """As in a program that does nothing about signals, whatever the tests are started by."""
    before = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    yield
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS, "as it was"
    for number, handler in before.items():
        signal.signal(number, handler)


def tell(number: int, seconds: float = 0.0) -> None:
    """Send this process a signal, at once or later."""
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start() if seconds else signal.raise_signal(number)


# --- in a process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGTERM, "ended by SIGTERM", 143),
        (signal.SIGHUP, "ended by SIGHUP", 129),
    ],
)
def test_each_signal_is_one_exception_and_a_second_one_leaves_the_clean_up_alone(
    number: int, words: str, code: int
) -> None:
    cleaned = False
    with listening() as outermost, listening() as inner:
        assert (outermost, inner, told()) == (True, False, None)
        with pytest.raises(KeyboardInterrupt):
            try:
                tell(number)
            finally:
                time.sleep(0.6)  # or it would count as the same word
                tell(signal.SIGTERM)
                cleaned = True
        assert cleaned and (in_words(heeded()), exit_code(told())) == (words, code)
        time.sleep(0.7)  # it is not raised again
    assert told() is None


def in_a_finaliser() -> None:
    class Told:
        def __del__(self) -> None:
            tell(signal.SIGHUP)

    thing = Told()
    del thing  # Python drops what is raised in there
    gc.collect()


def in_a_library() -> None:
    try:
        tell(signal.SIGTERM)
        importlib.import_module("fedlotr.nothing")
    except:  # noqa: E722
        pass


def as_something_else() -> None:
    with contextlib.suppress(RuntimeError):
        try:
            tell(signal.SIGTERM)
        except BaseException as error:
            raise RuntimeError("the import failed") from error


@pytest.mark.parametrize("lose", [in_a_finaliser, in_a_library, as_something_else])
def test_an_exception_that_is_lost_comes_again_but_not_while_all_is_cleaned_up(
    lose: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = False
    with listening(), pytest.raises(KeyboardInterrupt):
        lose()
        try:
            time.sleep(10)
            for _ in range(10**9):
                pass
        finally:
            time.sleep(1.2)
            cleaned = True
    assert cleaned and capsys.readouterr().err == ""


def test_a_signal_is_held_back_while_ray_starts_whatever_handler_ray_puts_in() -> None:
    seen = []
    with listening(), pytest.raises(KeyboardInterrupt):
        with held_back():
            tell(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *_: seen.append("Ray's"))
            seen.append("started")
        seen.append("never reached")
    assert seen == ["started"]


def test_a_signal_that_is_ignored_or_somebody_elses_stays_so() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    with listening():
        tell(signal.SIGHUP)
        with held_back():
            tell(signal.SIGHUP)
            tell(signal.SIGTERM)
            assert not seen
        assert (told(), seen) == (None, [signal.SIGTERM])
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def test_a_program_that_is_told_to_end_during_its_run_ends_as_it_would_have_after_the_run_has_cleaned_up(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tells(Callbacks):
        def on_round(self, event: RoundEvent) -> None:
            assert event.round == 1, "the run goes on"
            os.kill(os.getpid(), signal.SIGTERM)

    options: dict[str, Any] = {"model": str(tiny_bert), "data": str(animals), "clients": 3, "rounds": 3}
    options |= {"engine": "local", "threads": 1, "dtype": "float32", "rank": 4, "public_examples": 8}
    came: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", came.append)  # by now the program's own handler would see it
    with pytest.raises(KeyboardInterrupt):
        run_simulation(SimulationConfig(**options, out=tmp_path / "run"), callbacks=Tells())
    assert came == [signal.SIGTERM] and not (tmp_path / "run" / ".work").exists()


def test_a_process_that_a_library_forks_is_ended_as_any_other(capfd: pytest.CaptureFixture[str]) -> None:
    with listening():
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert told() is None
        with pytest.raises(KeyboardInterrupt):
            tell(signal.SIGTERM)
    assert capfd.readouterr().err == ""


# --- a command --------------------------------------------------------------------------------------------------------

COMMAND = """
import sys, time
from fedlotr.commands.door import through

def command():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(5)
        print("cleaned up", flush=True)

sys.exit(through(lambda: through(command)))
"""


def started(*words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(("number", "times"), [(signal.SIGHUP, 1), (signal.SIGTERM, 2), (signal.SIGTERM, LAST_STRAW)])
def test_a_command_ends_in_one_line_and_the_last_straw_kills_it(number: int, times: int) -> None:
    process = started("-c", COMMAND)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(times):
        process.send_signal(number)
        process.send_signal(number)  # as `timeout` does, to the process and to its group: one word
        if times > 1:
            time.sleep(1)
    out, err = process.communicate(timeout=30)
    if times == LAST_STRAW:
        assert (out, process.returncode) == ("", -number)
    else:
        assert (out, process.returncode) == ("cleaned up\n", 128 + number)
        assert err.splitlines()[-1] == f"ended by {signal.Signals(number).name}" and "Traceback" not in err


AFTERWARDS = """
import os, sys, time
from fedlotr.commands.door import through

def command():
    print("ready", flush=True)
    time.sleep(60)

def over():
    os.write(1, b"over\\n")
    time.sleep(5)

class Slow:
    sleep, write = time.sleep, os.write

    def __del__(self):
        self.write(1, b"over\\n")
        self.sleep(5)

code = through(command, to_the_end=True)
late = Slow() if sys.argv[1:] else over()
sys.exit(code)
"""


@pytest.mark.parametrize(("words", "more"), [([], 1), ([], LAST_STRAW - 1), (["late"], 1)])
def test_a_signal_that_comes_again_while_the_interpreter_goes_changes_no_exit_code(words: list[str], more: int) -> None:
    process = started("-c", AFTERWARDS, *words)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "over\n"
    for _ in range(more):
        time.sleep(0.8)  # or it would count as the same word
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == (143 if more == 1 else -signal.SIGTERM)


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which `fedlotr` is the command."""
    start = "import sys; from fedlotr.cli import main; sys.exit(main())"
    line = f"set -o pipefail; fedlotr() {{ '{sys.executable}' -c '{start}' \"$@\"; }}; {line}"
    environment = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.parametrize(
    ("line", "code", "out", "error"),
    [
        ("fedlotr ls methods | true", 141, "", ""),
        ("fedlotr ls methods > /dev/full", 1, "", "error: standard output cannot be written (No space left on device)"),
        ("fedlotr ls methods <&- >&- 2>&-", 0, "", ""),
        ("fedlotr ls nonsense 2> /dev/full", 2, "", ""),
        (
            "mkdir gone; cd gone; rmdir ../gone; fedlotr ls methods",
            2,
            "",
            "error: the current folder is gone: go to one",
        ),
        ("PYTHONIOENCODING=ascii:strict fedlotr ls methods | grep -c fed-sb", 0, "1", ""),
        ("PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C fedlotr ls methods | grep -c fed-sb", 0, "1", ""),
    ],
)
def test_whatever_its_streams_and_its_folder_are_a_command_does_not_crash(
    line: str, code: int, out: str, error: str, tmp_path: Path
) -> None:
    done = shell(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == out and done.stderr.startswith(error)
    assert len(done.stderr.splitlines()) == bool(error)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), ImportError("x.so: failed to map segment")],
    ids=lambda error: type(error).__name__,
)
def test_a_process_that_gets_no_memory_says_so_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("fedlotr.commands.simulate.early_workers", fail)
    monkeypatch.setattr("fedlotr.commands.ls.KINDS", {"methods": fail})
    for words in (["simulate", "--quiet"], ["ls", "methods"]):
        assert cli.main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {NO_MEMORY}")


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    found = {"model": str(tiny_bert), "data": str(animals), "clients": 3, "rounds": 2000, "rank": 4, "out": "run"}
    return {**found, "public_examples": 8, "dtype": "float32", "eval_every": 2000}


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a path that is short enough for Ray."""
    with tempfile.TemporaryDirectory(prefix="f", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def forked(options: dict[str, Any], folder: Path, **environment: str) -> forks.Fork:
    """As `run`, with all libraries loaded before it begins, and so without a head start of workers."""
    folder.mkdir(exist_ok=True)
    return forks.server(*forks.RUN).start(forks.SIMULATE, *flags(options), cwd=folder, **environment)


def run(options: dict[str, Any], folder: Path, **environment: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return started(
        *("-m", "fedlotr.simulate", *flags(options)),
        cwd=folder,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in HANDLERS],
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.serial
def test_a_local_run_that_is_told_to_end_leaves_nothing_and_goes_on(
    number: int, options: dict[str, Any], tmp_path: Path
) -> None:
    process = forked({**options, "engine": "local", "threads": 1}, tmp_path)
    wait_for_round(tmp_path / "run", 2, process)  # the first is then told of, too
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    last = err.splitlines()[-1]
    assert last.startswith(f"ended by {signal.Signals(number).name}; round") and last.endswith("--resume goes on")
    assert not (tmp_path / "run" / ".work").exists()


@pytest.mark.slow
@pytest.mark.serial
def test_a_ray_run_ends_cleanly_whenever_it_is_told_to(options: dict[str, Any], tmp_path: Path, sockets: Path) -> None:
    """While Ray starts, while the run prepares, where it waits for workers, and in a round; there twice."""
    moments = ("*/session_*/sockets/raylet*", "config.yaml", ".work/*/train.safetensors", "ledger/*")
    for at, moment in enumerate(moments):
        folder = tmp_path / str(at)
        begin = run if at < 3 else forked
        process = begin({**options, "workers": 1}, folder, RAY_TMPDIR=str(sockets))
        while not list((folder / "run" if at else sockets).glob(moment)):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        if at == len(moments) - 1:  # and again, while Ray stops; where it has by then, nobody is told
            time.sleep(0.7)
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=180)
        assert process.returncode == 143, (moment, err)
        last = [line for line in err.splitlines() if not line.startswith("ending already")][-1]
        assert last.startswith("ended by SIGTERM"), (moment, err)
        assert not (folder / "run" / ".work").exists(), moment
        assert (ray_processes(folder), list(sockets.iterdir())) == ([], []), moment


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
@pytest.mark.serial
def test_a_run_whose_ray_dies_ends_in_one_line(
    name: str, options: dict[str, Any], tmp_path: Path, sockets: Path
) -> None:
    process = forked({**options, "workers": 1}, tmp_path, RAY_TMPDIR=str(sockets))
    wait_for_round(tmp_path / "run", 1, process)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if child.name().startswith("ray::Worker")]
    assert {os.getpriority(os.PRIO_PROCESS, child.pid) for child in workers} == {os.nice(0)}, "as nice as the command"
    next(child for child in children if child.name() == name).kill()
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith(f"error: Ray's {name} (") and "--resume goes on" in last and "Traceback" not in err
    assert not (tmp_path / "run" / ".work").exists() and list((tmp_path / "run" / "checkpoints").glob("*.json"))
    assert (ray_processes(tmp_path), list(sockets.iterdir())) == ([], [])


@pytest.mark.parametrize("name", ["long" * 20, "ä", "missing"])
def test_rays_sockets_lie_where_their_paths_are_short_enough(
    name: str, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = sockets / name
    if name != "missing":
        temporary.mkdir()
    monkeypatch.setattr(own_ray.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = own_ray.new_folder()
    folder.rmdir()
    assert folder.parent == Path("/tmp") and len(f"{folder}{own_ray.SESSION}") <= 107
    monkeypatch.setenv("RAY_TMPDIR", str(sockets))
    folder = own_ray.new_folder()
    assert folder.parent == sockets, "a user's own choice wins"
