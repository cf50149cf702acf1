"""The door of `fedlotr watch RUN`: a page on this machine that shows a run as it goes on."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fedlotr.commands.door import refuse
from fedlotr.errors import shorten

LOOPBACK = "127.0.0.1"
PATIENCE = 10
"""Seconds that a connection may take to say what it wants."""


class Watch(ThreadingHTTPServer):
    """Serves one page, made anew each time it is asked for, to this machine alone."""

    daemon_threads = True

    def __init__(self, page: Callable[[], str], port: int = 0) -> None:
        super().__init__((LOOPBACK, port), _Answer)
        self.page = page
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    @property
    def address(self) -> str:
        """Of its page."""
        return f"http://{LOOPBACK}:{self.server_port}/"


class _Answer(BaseHTTPRequestHandler):
    server: Watch
    timeout = PATIENCE
    server_version, sys_version = "fedlotr", ""

    def do_GET(self) -> None:
        """The page, or why there is none."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """The same without a body."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        code, kind, text = HTTPStatus.OK, "html", ""
        if self.headers.get("Host") not in self.server.hosts:  # a name of others' that is made to lead here
            code, kind, text = HTTPStatus.FORBIDDEN, "plain", f"this page is {self.server.address} alone\n"
        elif self.path.partition("?")[0] != "/":
            code, kind, text = HTTPStatus.NOT_FOUND, "plain", f"there is one page here, {self.server.address}\n"
        else:
            text = self.server.page()
        content = text.encode(errors="replace")
        with suppress(ConnectionError):  # who asked has gone
            self.send_response(code)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content if body else b"")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a look at the page is no news."""


def main(argv: Sequence[str]) -> int:
    """Show a run on a page until it is interrupted; exit code 130 then, or 2 where there is nothing to show."""
    parser = argparse.ArgumentParser(
        prog="fedlotr watch",
        description="Show a run as it goes on, on a page of this machine, which anybody on it can read; prints its "
        "address. It reads the run's folder alone, and goes on over a kill and --resume. Ctrl-C ends it.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, perhaps empty yet")
    parser.add_argument("--port", type=_port, default=0, help="on 127.0.0.1 (default: one that is free)")
    try:
        given = parser.parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    if not given.run.is_dir():
        what = "is a file" if given.run.exists() else "there is no such folder"
        return refuse([f"{shorten(given.run)}: {what}; give the folder of a run, such as runs/NAME"])
    # Here, not above: it loads pyarrow.
    from fedlotr.reporting.live import live_page

    try:
        server = Watch(lambda: live_page(given.run), given.port)
    except OSError as error:
        return refuse([f"--port {given.port}: {error.strerror}; choose another, or leave it out"])
    with server:
        print(server.address, flush=True)
        server.serve_forever()
    raise AssertionError("it is served until it is interrupted")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0 to 65535")
    return int(text)
