"""The door of `fedlotr compare RUN RUN …`: runs side by side, as a page, as Markdown or as CSV."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlotr.commands.door import refuse
from fedlotr.errors import InputError, visible


def main(argv: Sequence[str]) -> int:
    """Compare runs; exit code 0, 1 where the page cannot be written, or 2 for what is no run."""
    parser = argparse.ArgumentParser(
        prog="fedlotr compare",
        description="Put runs side by side: what each came to and cost, what differs, and the Pareto frontier.",
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="folders of runs, or a folder that holds runs"
    )
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="write a page that opens offline")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--markdown", action="store_true", help="print Markdown (also into a pipe, if nothing else is asked for)"
    )
    form.add_argument("--csv", action="store_true", help="print CSV, a line a run")
    try:
        given = parser.parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    # Here, not above: it loads pyarrow.
    from fedlotr.files import write_atomically
    from fedlotr.reporting.comparison import as_csv, as_markdown, as_page, compare, show_tables

    try:
        found = compare(given.runs)
    except InputError as error:
        return refuse(error.problems)
    for warning in found.warnings:
        print(f"note: {visible(warning)}", file=sys.stderr)
    if given.out is not None:
        try:
            write_atomically(given.out, as_page(found))
        except OSError as error:
            print(f"error: the page cannot be written to {error.filename}: {error.strerror}", file=sys.stderr)
            return 1
    if given.csv:
        print(as_csv(found), end="")
    elif given.markdown or (given.out is None and not sys.stdout.isatty()):
        print(as_markdown(found), end="")
    elif given.out is None:
        from rich.console import Console

        show_tables(found, Console(highlight=False, markup=False, emoji=False))
    if given.out is not None:
        print(given.out, file=sys.stderr)
    return 0
