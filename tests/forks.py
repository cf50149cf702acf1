"""Processes that have their libraries already: forked from one that has only imported them.

A process of its own costs seconds of importing torch. A fork of one that has it costs next to nothing, and is a process
all the same: with a folder, an environment, streams, signals and an end of its own.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIMULATE = "import sys; from fedlotr.commands.simulate import main; sys.exit(main())"
"""`python -m fedlotr.simulate`, with the words that follow."""

RUN = ("fedlotr.run.simulation", "fedlotr.flower.client_app", "transformers.models.bert.modeling_bert", "tests.support")
"""What a run loads."""
PLAIN = ("torch", "peft", "transformers")
"""What nobody needs us for."""


HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
"""Of a process that a terminal starts; in a shell's background job, tests and all that they start ignore SIGINT."""


class Server:
    """A process that has imported these modules, and its forks."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", *modules],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.folder = tempfile.TemporaryDirectory(prefix="forks-")
        self._codes: dict[int, int] = {}
        self._heard = b""

    def run(self, program: str, *words: object, cwd: Path, **env: str) -> "subprocess.CompletedProcess[str]":
        """A program from its start to its end, as by `python -c`."""
        process = self.start(program, *words, cwd=cwd, **env)
        code = process.wait()
        return subprocess.CompletedProcess([*map(str, words)], code, *process.said())

    def start(self, program: str, *words: object, cwd: Path, **env: str) -> "Fork":
        """A program that runs beside the test."""
        return Fork(self, program, *words, cwd=cwd, env=env)

    def fork(self, job: dict[str, Any]) -> int:
        """The process that does a job."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        while "begun" not in (told := self._hear(300)):
            assert told, "the server of forks does not answer"
        return told["begun"]

    def ended(self, pid: int, seconds: float) -> int | None:
        """The exit code of a fork, None where it is still at work after so long."""
        until = time.monotonic() + seconds
        while pid not in self._codes:
            if not self._hear(max(0.0, until - time.monotonic())):
                return None
        return self._codes[pid]

    def _hear(self, seconds: float) -> dict[str, int]:
        """What the server says next, nothing where it is silent for so long."""
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return {}
            more = os.read(self._process.stdout.fileno(), 4096)
            assert more, "the server of forks has ended"
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        told: dict[str, int] = json.loads(line)
        if "ended" in told:
            self._codes[told["ended"]] = told["code"]
        return told

    def close(self) -> None:
        """No more forks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self.folder.cleanup()


class Fork:
    """A process that runs a program as `python -c` does; what one asks of it is as of `subprocess.Popen`."""

    def __init__(self, server: Server, program: str, *words: object, cwd: Path, env: Mapping[str, str]) -> None:
        folder = Path(tempfile.mkdtemp(dir=server.folder.name))
        self._server, self._streams = server, [folder / "out", folder / "err"]
        job = {"program": program, "words": [*map(str, words)], "cwd": str(cwd), "env": {**os.environ, **env}}
        self.pid = server.fork({**job, "streams": [*map(str, self._streams)]})

    def poll(self) -> int | None:
        """The exit code, negative that of a signal; None while it runs."""
        return self._server.ended(self.pid, 0)

    def wait(self, timeout: float = 300) -> int:
        """The exit code, once there is one."""
        code = self._server.ended(self.pid, timeout)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout, *self.said())
        return code

    @property
    def returncode(self) -> int | None:
        """As `poll`."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """To it alone; it leads a process group of its own. Nothing where it has ended, as Popen has it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has written, once it has ended."""
        self.wait(timeout)
        return self.said()

    def said(self) -> tuple[str, str]:
        """What it has written to standard output and to standard error so far."""
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in self._streams)
        return out, err


@functools.cache
def server(*modules: str) -> Server:
    """One for all tests of a process that want the same."""
    found = Server(*modules)
    atexit.register(found.close)
    return found


# --- in the server ----------------------------------------------------------------------------------------------------


def next_job() -> dict[str, Any]:
    """In the server: wait for jobs and tell of their ends, for ever. In each fork: its job."""
    heard, children = b"", set[int]()
    while True:
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.remove(pid)
                say(ended=pid, code=os.waitstatus_to_exitcode(status))
        if not select.select([0], [], [], 0.01 if children else None)[0]:
            continue
        more = os.read(0, 65536)
        if not more:
            os._exit(0)
        heard += more
        while b"\n" in heard:
            line, _, heard = heard.partition(b"\n")
            pid = os.fork()
            if not pid:
                job: dict[str, Any] = json.loads(line)
                return job
            children.add(pid)
            say(begun=pid)


def say(**what: int) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def become(job: dict[str, Any]) -> None:
    """Take on a job's folder, environment, words and streams, in a session of its own, deaf to no signal."""
    os.setsid()
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = ["-c", *job["words"]]
    sys.path[0] = ""
    for at, name in enumerate([os.devnull, *job["streams"]]):
        file = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(file, at)
        os.close(file)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the tests, which then end this
    for module in sys.argv[1:]:
        importlib.import_module(module)
    asked = next_job()
    become(asked)
    exec(compile(asked["program"], "<string>", "exec"), {"__name__": "__main__"})
