"""The door of `fedlotr report RUN`: makes a run's report.html again, from its directory alone."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlotr.commands.door import refuse
from fedlotr.errors import InputError, visible


def main(argv: Sequence[str]) -> int:
    """Write the report of a run, finished or not, and print its path; exit code 0, 1 if it cannot be written, or 2."""
    parser = argparse.ArgumentParser(
        prog="fedlotr report", description="Make the report of a run again, also of one that is not finished."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, such as runs/NAME")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write it (default: RUN/report.html)")
    try:
        given = parser.parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    # Here, not above: it loads pyarrow.
    from fedlotr.reporting.report import write_report

    try:
        path = write_report(given.run, given.out, lambda note: print(f"note: {visible(note)}", file=sys.stderr))
    except InputError as error:
        return refuse(error.problems)
    except OSError as error:
        print(f"error: the report cannot be written to {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(path)
    return 0
