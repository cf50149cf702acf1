"""The door of `fedlotr grid GRID.yaml [--out FOLDER]`: many runs one after another, and one table of them."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedlotr.errors import FedlotrError, InputError
from fedlotr.files import write_atomically
from fedlotr.reporting.console import METRICS
from fedlotr.reporting.grid_table import Line, as_csv, as_markdown, cells, failures
from fedlotr.simulate import BAD_INPUT, DONE, FAILED, INTERRUPTED

if TYPE_CHECKING:
    from fedlotr.grid_file import Grid, Run
    from fedlotr.grid_runs import Summary

DESCRIPTION = """Run every configuration of a grid, one after another, and write table.md and table.csv.

GRID.yaml has base (options of every run), axes (a list of values per option: each combination of them), rows (a list
of option sets; each meets each combination of the axes, and what it says wins) and seeds. All of it is checked before
the first run starts. Given again, the command goes on: a finished run is not run again, one that was interrupted is
resumed, one that failed is tried again, new rows are added, and another configuration of a run that is there is
refused. Exit code: 0 where all runs are finished, 1 where some failed, 2 for mistakes, 130 when interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a grid; everything for people goes to standard error, the closing table to standard output."""
    parser = argparse.ArgumentParser(
        prog="fedlotr grid", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", metavar="GRID.yaml", type=Path)
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="where runs and tables go (default: runs/ and the file's name)"
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="run all in this process, not each in one of its own: sooner begun, but what kills one ends all",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    try:
        given = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    except SystemExit as end:
        return int(end.code or 0)
    out = given.out or Path("runs") / given.grid.stem
    try:
        return _run(given.grid, out, in_process=given.in_process, quiet=given.quiet)
    except InputError as error:
        for problem in error.problems:
            print(f"error: {' '.join(problem.splitlines())}", file=sys.stderr)
        return BAD_INPUT
    except FedlotrError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with what is in {out}", file=sys.stderr)
        return INTERRUPTED


def _run(file: Path, out: Path, *, in_process: bool, quiet: bool) -> int:
    # Here, not above: they load torch and Flower, and --help should not wait for them.
    from fedlotr.grid_file import read_grid
    from fedlotr.grid_runs import Folder, RunFailedError, carry_out, check_runs

    grid = read_grid(file, out)
    with _Display(len(grid.runs), quiet=quiet) as display:
        display.say(f"checking {len(grid.runs)} runs of {file}")
        check_runs(grid, out)
        finished: dict[str, Summary] = {}
        for run in grid.runs:
            if (summary := Folder.of(run, out).summary()) is not None:
                finished[run.name] = summary
        if finished:
            display.say(f"{len(finished)} of them are finished already")
        failed: dict[str, str] = {}
        _write(_lines(grid, finished, failed), out)
        for number, run in enumerate(grid.runs, start=1):
            display.begin(number, run)
            if run.name in finished:
                continue
            try:
                finished[run.name] = carry_out(run, out, in_process=in_process, watch=display.rounds)
                display.finished(finished[run.name])
            except RunFailedError as error:
                failed[run.name] = " ".join(str(error).split())
                display.failed(failed[run.name])
            _write(_lines(grid, finished, failed), out)
    lines = _lines(grid, finished, failed)
    if not quiet:
        _print(lines)
    for note in failures(lines):
        print(f"error: {note}", file=sys.stderr)
    display.say(f"{out / 'table.md'}, {out / 'table.csv'}")
    return FAILED if failed else DONE


def _lines(grid: "Grid", finished: "dict[str, Summary]", failed: dict[str, str]) -> list[Line]:
    """Row by row, in the file's order."""
    lines = []
    for row in grid.rows:
        runs = [run for run in grid.runs if run.row is row]
        lines.append(
            Line(
                row.name,
                row.options,
                len(runs),
                {run.seed: finished[run.name] for run in runs if run.name in finished},
                {run.seed: failed[run.name] for run in runs if run.name in failed},
            )
        )
    return lines


def _write(lines: Sequence[Line], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "table.md", as_markdown(lines))
        write_atomically(out / "table.csv", as_csv(lines))
    except OSError as error:
        raise FedlotrError(f"the tables cannot be written to {out} ({error.strerror}); mend that and go on") from error


def _print(lines: Sequence[Line]) -> None:
    if not sys.stdout.isatty():
        print(as_markdown(lines), end="")
        return
    head, *body = cells(lines)
    table = Table()
    for at, title in enumerate(head):
        table.add_column(title, justify="right" if at else "left", overflow="fold")
    for row in body:
        table.add_row(*row)
    rich.console.Console(highlight=False, markup=False, emoji=False).print(table)


class _Display:
    """A line a run on standard error, and on a terminal a progress bar under them."""

    def __init__(self, runs: int, *, quiet: bool, stream: TextIO | None = None) -> None:
        self._runs, self._name, self._all_rounds, self._began = runs, "", 0, 0.0
        self._out = rich.console.Console(
            file=stream or sys.stderr, quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn())
        bar = self._out.is_terminal and not quiet
        self._progress = Progress(*columns, console=self._out, transient=True, disable=not bar)
        self._task = self._progress.add_task("", total=runs, now="")

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._out.print(text, style="dim")

    def begin(self, number: int, run: "Run") -> None:
        """The run that is next; what came before it is done with."""
        self._name, self._all_rounds, self._began = run.name, run.config.rounds, time.monotonic()
        self._number = number
        self._progress.update(self._task, completed=number - 1, now=self._name)

    def rounds(self, finished: int) -> None:
        """How far it is."""
        self._progress.update(self._task, now=f"{self._name}, round {finished}/{self._all_rounds}")

    def finished(self, summary: "Summary") -> None:
        final = summary["final"]
        results = [f"{name} {form.format(final[name])}" for name, form in METRICS.items() if name in final]
        self._line([*results, f"loss {final['loss']:.4f}", f"{time.monotonic() - self._began:.1f} s"])

    def failed(self, reason: str) -> None:
        self._line([f"FAILED: {reason}"])

    def _line(self, parts: Sequence[str]) -> None:
        width = len(str(self._runs))
        self._out.print("  ".join([f"run {self._number:{width}}/{self._runs}", self._name, *parts]))


if __name__ == "__main__":
    sys.exit(main())
