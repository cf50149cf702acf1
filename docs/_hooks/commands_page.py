"""The page of commands: what `fedlotr COMMAND --help` says."""

import contextlib
import io
import os
from collections.abc import Iterator

from docs_text import GENERATED

from fedlotr.cli import COMMANDS

_OPENING = """# Commands

`fedlotr COMMAND --help` prints what follows. `python -m fedlotr.simulate` is `fedlotr simulate`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | it could not be done: a run ended, a file could not be written, memory was not enough |
| 2 | the words were wrong: every mistake is on standard error, each in one line |
| 129, 130, 143 | told to end by SIGHUP, Ctrl-C or SIGTERM; rounds that were finished are safe |
| 141 | whoever read standard output has gone |

Results go to standard output, progress and warnings to standard error. `fedlotr --version` says the version.
"""
WIDTH = "80"
"""Columns of the text, as many as a page has room for."""


def commands_page() -> str:
    """As Markdown."""
    parts = [GENERATED, _OPENING]
    for name, (run, purpose) in COMMANDS.items():
        parts.append(f"## `fedlotr {name}` {{ #{name} }}\n\n{purpose[0].upper()}{purpose[1:]}.\n")
        if name == "simulate":
            parts.append("Its options are a page of their own: [Options](options.md).\n")
            continue
        with _wide(), contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            run(["--help"])
        parts.append(f"```text\n{said.getvalue().rstrip()}\n```\n")
    return "\n".join(parts)


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Have argparse wrap at the same column everywhere."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
