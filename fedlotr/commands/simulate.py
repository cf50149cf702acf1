"""`fedlotr simulate [CONFIG.yaml] [options]`: from words to a run to an exit code."""

import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedlotr.commands.door import BAD_INPUT, FAILED, NO_MEMORY, lacks_memory, refuse, through
from fedlotr.config.configuration import ConfigurationError, SimulationConfig, load, options
from fedlotr.engines.endings import exit_code, heeded, in_words, told
from fedlotr.errors import FedlotrError, InputError
from fedlotr.files import as_json
from fedlotr.libraries import loading_for_good
from fedlotr.reporting.console import Console
from fedlotr.reporting.escaping import lines
from fedlotr.run.processes import CLIENT_APP, threads_of, workers_of
from fedlotr.said import keeping

if TYPE_CHECKING:
    from fedlotr.engines.head_start import HeadStart

DONE = 0
"""The exit code; others are FAILED and BAD_INPUT, and those of `fedlotr.engines.endings`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one simulation; everything for people goes to standard error, `--json`'s object to standard output.

    Returns the exit code: 0 done, 1 failed while running, 2 bad configuration or input, 130 interrupted, 143 and 129
    ended by SIGTERM and SIGHUP.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return through(lambda: _simulate(words), to_the_end=argv is None)


def _simulate(words: Sequence[str]) -> int:
    if "-h" in words or "--help" in words:
        print(options().format_help(), end="")
        return DONE
    try:
        config = load(words)
    except ConfigurationError as error:
        refuse(error.problems)
        return _refuse_further(error)
    with Console(quiet=config.quiet) as console, ExitStack() as early:  # what is said is said before workers end
        try:
            head_start = early.enter_context(early_workers(config))
            # Here, not above: it loads torch and Flower, and mistakes and --help should not wait for them.
            with loading_for_good():
                from fedlotr.run.simulation import run_simulation

            result = run_simulation(config, console=console, head_start=head_start)
        except (Exception, KeyboardInterrupt) as error:
            console.close()
            if told() is not None or isinstance(error, KeyboardInterrupt):  # a library may have made another of it
                number = heeded()
                print(f"{in_words(number)}{_finished(console.finished_rounds, console.run_dir)}", file=sys.stderr)
                return exit_code(number)
            if isinstance(error, InputError):
                return refuse(error.problems)
            _explain(error, console.run_dir)
            return FAILED
    if config.json_output:
        print(as_json(result.summary))
    return DONE


def early_workers(config: SimulationConfig) -> "AbstractContextManager[HeadStart | None]":
    """Let workers start while this process loads a run's libraries and checks, if it has not loaded them already.

    Not in a cluster, whose workers others may want; nor for a run that goes on, whose files say how many threads;
    nor on GPUs, which torch would have to count.
    """
    elsewhere = config.engine != "ray" or config.ray_address or config.device != "cpu"
    if elsewhere or config.resume or "fedlotr.run.simulation" in sys.modules:
        return nullcontext()
    from fedlotr.engines.head_start import HeadStart

    return HeadStart(CLIENT_APP, workers_of(config), threads_of(config))


def _refuse_further(known: ConfigurationError) -> int:
    """After the mistakes in the words those that data, model and strategy show, which take seconds to load."""
    if known.wrong >= {"data", "model", "strategy_arg"}:
        return BAD_INPUT
    # What breaks otherwise says little: it is not the configuration that the user meant.
    with suppress(Exception, KeyboardInterrupt):
        from fedlotr.run.simulation import check_all

        try:
            with keeping():
                check_all(known.config, known.wrong)
        except InputError as error:
            refuse(error.problems)
    return BAD_INPUT


def _finished(finished: int, run_dir: Path | None) -> str:
    if finished == 0 or run_dir is None:
        return " before the first round was finished"
    rounds = "round 1 is" if finished == 1 else f"rounds 1 to {finished} are"
    return f"; {rounds} in {run_dir}; --resume goes on"


def _explain(error: Exception, run_dir: Path | None) -> None:
    """One clear line; the traceback goes to the run's log, or after the line where there is no run yet."""
    known = isinstance(error, FedlotrError)
    said = lines(str(error) if known else f"{type(error).__name__}: {error}")
    if not known and lacks_memory(error):
        known, said = True, NO_MEMORY
    story = "".join(traceback.format_exception(error))
    log = run_dir / "log.txt" if run_dir is not None else None
    if log is not None and _append(log, story):
        print(f"error: {said} (the whole story: {log})", file=sys.stderr)
    else:
        print(f"error: {said}", file=sys.stderr)
        if not known:
            print(story, end="", file=sys.stderr)


def _append(path: Path, text: str) -> bool:
    """Whether there was a folder, and room on the disk."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return False
    return True
