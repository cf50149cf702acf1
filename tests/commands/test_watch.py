"""`fedlotr watch`: a page that follows a run over a kill and its resumption, to this machine alone."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fedlotr import cli
from fedlotr.commands.watch import Watch
from fedlotr.reporting.live import live_page
from tests import forks
from tests.reporting.test_compare import made
from tests.reporting.test_report import EVIL, Page

COMMAND = "import sys; from fedlotr.cli import main; sys.exit(main())"
"""`fedlotr`, with the words that follow."""
GATED = """
import os, time
from pathlib import Path
from fedlotr.strategies.exact_average import ExactAverage


class Gated(ExactAverage):
    def combine(self, updates, server_round):
        while server_round > 1 and not Path(os.environ["GATE"]).exists():
            time.sleep(0.05)
        return super().combine(updates, server_round)
"""
"""From round 2 on it waits until it is let through."""
PATIENCE = 300
"""Seconds, on a machine that is busy with much else."""


def asked(address: str, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str]:
    """What a server answers: code and body."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def until(look: Callable[[], str], *words: str) -> str:
    """The page, once it has all these words."""
    end = time.monotonic() + PATIENCE
    while not all(word in (page := look()) for word in words):
        assert time.monotonic() < end, f"never {words}: {re.sub('<[^>]+>', ' ', page)[-3000:]}"
        time.sleep(0.2)
    return page


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a page about a folder."""
    with Watch(lambda: live_page(folder)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def watching(folder: Path, cwd: Path) -> Iterator["tuple[subprocess.Popen[str], str]"]:
    """`fedlotr watch` as a process, and its address."""
    words = [sys.executable, "-c", COMMAND, "watch", str(folder)]
    handlers: Any = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=cwd, preexec_fn=handlers, **streams)  # type: ignore[call-overload]
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.serial
def test_a_run_that_is_killed_and_resumed_is_followed(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(GATED, encoding="utf-8")
    gate, run = tmp_path / "gate", tmp_path / "run"
    run.mkdir()
    line = "--clients 3 --sample 2 --rounds 3 --rank 2 --engine local --threads 1 --dtype float32 --max-examples 4"
    words = [*line.split(), "--model", tiny_bert, "--data", animals, "--strategy", f"{tmp_path}/gated.py:Gated"]
    words += ["--partition", "iid", "--public-examples", 8, "--quiet", "--out", run]
    with watching(run, tmp_path) as (process, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)

        def look() -> str:
            return asked(address)[1]

        assert "Nothing is here yet: waiting for a run to begin." in look()
        first = forks.server(*forks.RUN).start(forks.SIMULATE, *words, cwd=tmp_path, GATE=str(gate))
        page = until(look, "Going on: 1 of 3 rounds are over.", "round 1: {")  # its log comes last
        assert Page(page).facts("now")["last round with a checkpoint"] == 1 and 'http-equiv="refresh"' in page
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        page = until(look, "Not running: it was killed, or ended with an error. 1 of 3 rounds are safe")
        assert "--resume" in page
        again = forks.server(*forks.RUN).start(forks.SIMULATE, *words, "--resume", cwd=tmp_path, GATE=str(gate))
        until(look, "Going on, resumed after round 1: 1 of 3 rounds are over.")
        gate.touch()
        assert again.wait() == 0, again.said()
        shown = Page(until(look, "Finished: 3 of 3 rounds."))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["loss"] for row in shown.rows("loss")] == [row["loss"] for row in rows]
        assert shown.facts("now")["bytes on the wire so far"] == sum(r["bytes_up"] + r["bytes_down"] for r in rows)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and (out, err) == ("", "interrupted\n")


def test_only_this_machine_by_its_own_name_is_answered_and_only_to_look(tmp_path: Path) -> None:
    run = made(tmp_path / EVIL.replace("/", "∕"), 0.7, 100, strategy=EVIL)
    with served(run) as address:
        port = address.rstrip("/").rpartition(":")[2]
        code, page = asked(address)
        assert code == 200 and EVIL not in page and page.count("<script") == 1
        assert asked(address, "/?again")[0] == 200 and asked(address, method="HEAD") == (200, "")
        assert asked(address, Host=f"localhost:{port}")[0] == 200
        for host in (f"elsewhere.example:{port}", "127.0.0.1", f"127.0.0.1.elsewhere.example:{port}", ""):
            code, said = asked(address, Host=host)
            assert code == 403 and "html" not in said
        for path in ("/config.yaml", "/../config.yaml", "/%2e%2e/config.yaml", "/etc/passwd"):
            assert asked(address, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert asked(address, method=method)[0] == 501
        for other in {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1"}:
            with pytest.raises(OSError):
                socket.create_connection((other, int(port)), timeout=5)


def test_its_script_is_known_by_its_hash_and_asks_nobody_else(tmp_path: Path) -> None:
    page = live_page(made(tmp_path / "run", 0.7, 100))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    plain = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    assert re.fullmatch(plain + r"script-src 'sha256-[\w+/=]{44}'; connect-src 'self'", policy)
    assert "http:" not in page and "https:" not in page


def test_what_goes_on_is_told_from_what_does_not_by_the_lock_of_the_log(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="there are no such locks here")
    run = made(tmp_path / "run", 0.7, 100)
    summary = run / "summary.json"
    assert "Finished: 2 of 2 rounds." in live_page(run)
    known = json.loads(summary.read_text(encoding="utf-8"))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("rounds: 2", "rounds: 4"))
    assert "Ended early, by itself: 2 of 4 rounds" in live_page(run)
    summary.unlink()
    assert "Not running: it was killed, or ended with an error. 0 of 4 rounds are safe" in live_page(run)
    with open(run / "log.txt", "a", encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "Going on: 2 of 4 rounds are over." in live_page(run)
        summary.write_text(json.dumps({**known, "rounds": 4}), encoding="utf-8")
        assert "Going on: 2 of 4" in live_page(run), "a summary of other rounds counts for nothing"
    assert "Not running" in live_page(run)


def test_of_hidden_clients_neither_bytes_nor_seconds_nor_the_log_is_shown(tmp_path: Path) -> None:
    run = made(tmp_path / "run", 0.7, 100, privacy="client", epsilon=3.0)
    at = "2026-01-01 12:34:56,789 WARNING"
    log = f"{at} fedlotr: round 1: client 3 failed and is left out: no\n{at} fedlotr.said: a word for all\n"
    (run / "log.txt").write_text(log, encoding="utf-8")
    page = live_page(run)
    assert "client 3" not in page and "12:34:56" not in page and "last written" not in page
    told = Page(page)
    assert told.tables["warnings"][1:] == [["a word for all"]]
    assert not any("seconds" in what or "bytes" in what for what in told.facts("now"))
    assert set(told.tables) == {"now", "metric", "loss", "warnings"}
    assert told.facts("now")["epsilon spent"] == 3.0


def test_what_is_damaged_is_said_on_the_page(tmp_path: Path) -> None:
    run = made(tmp_path / "run", 0.7, 100)
    (run / "summary.json").write_text("[1", encoding="utf-8")
    assert "summary.json cannot be read" in live_page(run)
    for file in (run / "config.yaml", run / "summary.json", run / "metrics.jsonl"):
        file.unlink()
    assert "waiting for a run to begin" in live_page(run)
    assert "The folder is gone" in live_page(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "there is no such folder"),
        (["file"], "is a file"),
        ([".", "--port", "70000"], "expected a whole number from 0 to 65535"),
        ([".", "--port", "{taken}"], "choose another, or leave it out"),
    ],
)
def test_what_cannot_be_watched_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        assert cli.main(["watch", *(word.format(taken=taken) for word in words)]) == 2
    assert said in capsys.readouterr().err
