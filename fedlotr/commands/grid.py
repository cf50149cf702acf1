"""The door of `fedlotr grid GRID.yaml [--out FOLDER]`: many runs one after another, and one table of them."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedlotr.commands.door import FAILED, refuse, through
from fedlotr.commands.simulate import DONE
from fedlotr.engines.endings import exit_code, heeded, in_words
from fedlotr.errors import FedlotrError, InputError, visible
from fedlotr.files import write_atomically
from fedlotr.reporting.console import FORMS
from fedlotr.reporting.escaping import lines as lines_of
from fedlotr.reporting.fitting import show_table
from fedlotr.reporting.grid_table import Line, as_csv, as_markdown, cells, failures, spending

if TYPE_CHECKING:
    from fedlotr.grid.file import Grid, Run
    from fedlotr.grid.runs import Summary
    from fedlotr.grid.tuning import Choice

DESCRIPTION = """Run every configuration of a grid, one after another, and write table.md and table.csv.

GRID.yaml has base (options of every run), axes (a list of values per option: each combination of them), rows (a list
of option sets; each meets each combination of the axes, and what it says wins) and seeds. All of it is checked before
the first run starts. Given again, the command goes on: a finished run is not run again, one that was interrupted is
resumed, one that failed is tried again, new rows are added, and another configuration of a run that is there is
refused. Exit code: 0 where all runs are finished, 1 where some failed, 2 for mistakes, 130 when interrupted,
143 and 129 when ended by SIGTERM and SIGHUP."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a grid; everything for people goes to standard error, the closing table to standard output."""
    return through(lambda: _grid(argv), to_the_end=argv is None)


def _grid(argv: Sequence[str] | None) -> int:
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
        return refuse(error.problems)
    except FedlotrError as error:
        print(f"error: {lines_of(str(error))}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        number = heeded()
        print(f"{in_words(number)}; the same command goes on with what is in {out}", file=sys.stderr)
        return exit_code(number)


def _run(file: Path, out: Path, *, in_process: bool, quiet: bool) -> int:
    # Here, not above: they load torch and Flower, and --help should not wait for them.
    from fedlotr.grid.file import read_grid
    from fedlotr.grid.runs import check_runs, differences
    from fedlotr.grid.tuning import choose, decided

    grid = read_grid(file, out)
    count = len(grid.trials) + len(grid.runs)
    with _Display(count, quiet=quiet) as display:
        display.say(f"checking {count} runs of {file}")
        check_runs(grid, out)
        work = _Work(grid, out, in_process, display)
        work.find_finished()
        work.carry_out(grid.trials, 1)
        work.choices = {row.name: choose(grid, row, work.done, work.failed) for row in grid.rows}
        for note in [note for choice in work.choices.values() for note in choice.notes]:
            display.say(note)
        work.grid = decided(grid, work.choices)
        if problems := differences(work.grid.runs, out):  # a run that is there has a value that is now not the best
            raise InputError(problems)
        work.carry_out(work.grid.runs, len(grid.trials) + 1)
        work.write()
    lines = work.lines()
    if not quiet:
        _print(lines)
    for note in spending([run for line in lines for run in [*line.finished.values(), *line.trials]]):
        display.say(note)
    for note in failures(lines):
        print(f"error: {visible(note)}", file=sys.stderr)
    display.say(f"{out / 'table.md'}, {out / 'table.csv'}")
    return FAILED if failures(lines) else DONE


@dataclass
class _Work:
    """What is done of a grid so far: the summary of each finished run, why others failed, what trials chose."""

    grid: "Grid"
    out: Path
    in_process: bool
    display: "_Display"
    done: "dict[str, Summary]" = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    choices: "Mapping[str, Choice]" = field(default_factory=dict)

    def find_finished(self) -> None:
        """What earlier calls have left, and the first tables."""
        from fedlotr.grid.runs import Folder

        for run in [*self.grid.trials, *self.grid.runs]:
            if (summary := Folder.of(run, self.out).summary()) is not None:
                self.done[run.name] = summary
        if self.done:
            self.display.say(f"{len(self.done)} of them are finished already")
        self.write()

    def carry_out(self, runs: "Sequence[Run]", first: int) -> None:
        """Run those that are not finished, and write the tables after each. first: the number of the first."""
        from fedlotr.grid.runs import RunFailedError, carry_out

        for number, run in enumerate(runs, start=first):
            self.display.begin(number, run)
            if run.name in self.done:
                continue
            try:
                if run.open:
                    raise RunFailedError(f"no {' and '.join(sorted(run.open))} could be chosen: every trial failed")
                self.done[run.name] = carry_out(run, self.out, in_process=self.in_process, watch=self.display.rounds)
                self.display.finished(self.done[run.name])
            except RunFailedError as error:
                self.failed[run.name] = " ".join(str(error).split())
                self.display.failed(self.failed[run.name])
            self.write()

    def lines(self) -> list[Line]:
        """Row by row, in the file's order."""
        lines = []
        for row in self.grid.rows:
            runs = [run for run in self.grid.runs if run.row is row]
            choice = self.choices.get(row.name)
            lines.append(
                Line(
                    row.name,
                    row.options,
                    len(runs),
                    {run.seed: self.done[run.name] for run in runs if run.name in self.done},
                    {run.seed: self.failed[run.name] for run in runs if run.name in self.failed},
                    (choice.values if choice else None) or {},
                    choice.notes if choice else (),
                    [self.done[run.name] for run in self.grid.trials if run.row is row and run.name in self.done],
                )
            )
        return lines

    def write(self) -> None:
        """table.md and table.csv. Raises FedlotrError where they cannot be written."""
        lines = self.lines()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / "table.md", as_markdown(lines))
            write_atomically(self.out / "table.csv", as_csv(lines))
        except OSError as error:
            reason = f"the tables cannot be written to {self.out} ({error.strerror}); mend that and go on"
            raise FedlotrError(reason) from error


def _print(lines: Sequence[Line]) -> None:
    if not sys.stdout.isatty():
        print(as_markdown(lines), end="")
        return
    head, *body = cells(lines)
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    show_table(console, head, body, right=range(1, len(head)))


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
        self._out.print(lines_of(text), style="dim")

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
        forms = {**FORMS, "loss": "{:.4f}"}
        results = [f"{name} {form.format(final[name])}" for name, form in forms.items() if final.get(name) is not None]
        told = summary["timing"]["seconds_total"] is not None  # it would tell how many hidden clients came
        seconds = [f"{time.monotonic() - self._began:.1f} s"] if told else []
        self._line([*results, *seconds])

    def failed(self, reason: str) -> None:
        self._line([f"FAILED: {reason}"])

    def _line(self, parts: Sequence[str]) -> None:
        width = len(str(self._runs))
        self._out.print("  ".join([f"run {self._number:{width}}/{self._runs}", self._name, *map(visible, parts)]))


if __name__ == "__main__":
    sys.exit(main())
