"""The console script `fedlotr`: one word chooses what to do, the rest belongs to it."""

import sys
from collections.abc import Callable, Sequence

from fedlotr import __version__
from fedlotr.commands import compare, cost, doctor, eval, export, grid, ls, report, simulate, watch
from fedlotr.commands.door import through
from fedlotr.errors import nearest

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "simulate": (simulate.main, "fine-tune a model with a federation of simulated clients"),
    "grid": (grid.main, "run a grid of configurations and seeds, and make one table of them"),
    "doctor": (doctor.main, "say whether a run would start on this machine, and what it will need"),
    "cost": (cost.main, "the bill of a model before any run: bytes of every method and strategy"),
    "compare": (compare.main, "put runs side by side: metric, bytes, what differs"),
    "report": (report.main, "make the report of a run again, also of one that is not finished"),
    "watch": (watch.main, "show a run on a page while it goes on"),
    "export": (export.main, "hand a run's model on: adapter, merged weights, model card, the hub"),
    "eval": (eval.main, "score a run's language model by EleutherAI's harness"),
    "ls": (ls.main, "list the methods, strategies, forms of rows or fleets there are: fedlotr ls methods"),
}
"""What each command runs, with the words after it, and what it is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 for an unknown command."""
    words = sys.argv[1:] if argv is None else list(argv)
    return through(lambda: _command(words), to_the_end=argv is None)


def _command(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"fedlotr {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"error: {words[0]}: not a command{nearest(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    run, _ = COMMANDS[words[0]]
    return run(words[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        ["usage: fedlotr COMMAND [options]", "       fedlotr COMMAND --help", "       fedlotr --version", "", *lines]
    )
