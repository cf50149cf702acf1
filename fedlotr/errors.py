"""What can go wrong in a way that a user can mend, and the words that help them do it."""

import difflib
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

SHOWN = 100
"""Characters of a value that a message repeats; of a path, three times as many."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, SHOWN, SHOWN, SHOWN


class FedlotrError(Exception):
    """Base of the errors that end a run with one clear message instead of a traceback (exit code 1)."""


class InputError(FedlotrError):
    """The configuration or the input is wrong: every problem found, each one line a user can act on (exit code 2)."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["InputError"], tuple[list[str]]]:
        return InputError, (self.problems,)


def script(main: Callable[[], None]) -> NoReturn:
    """Run a benchmark or an experiment to its end: what it lacks is said in one line each, with exit code 2."""
    try:
        main()
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


def closest(given: object, choices: Iterable[str]) -> str | None:
    """The choice that a misspelt name was most likely meant to be, if any is near."""
    return next(iter(difflib.get_close_matches(str(given), list(choices), n=1, cutoff=0.5)), None)


def nearest(given: object, choices: Iterable[str]) -> str:
    """A hint for a misspelt name: ", did you mean 'fed-sb'?" or, where nothing is near, the list of choices."""
    names = sorted(choices)
    close = closest(given, names)
    return f", did you mean '{close}'?" if close else f"; choose one of: {', '.join(names)}"


def shorten(value: object) -> str:
    """A value on one line, as YAML would show it: repeated in a message it must not drown what is said of it."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    most = 3 * SHOWN if isinstance(value, Path) else SHOWN
    text = str(value) if isinstance(value, str | Path | float) else written(value)
    text = visible(text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


def harmless(text: str, most: int) -> str:
    """What others say, to be shown in a terminal or a log: control characters escaped, and at most so many characters.

    Lines stay lines, and all but the first are indented, so that none can pass for a line of ours.
    """
    first, *further = text[:most].splitlines() or [""]
    lines = [visible(first), *(f"  {visible(line)}" for line in further)]
    return "\n".join(lines) + (f"… ({len(text):,} characters)" if len(text) > most else "")


def visible(line: str) -> str:
    """A line with what cannot be printed, such as a terminal's codes, marks of direction and line breaks, escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)


def written(value: object) -> str:
    """As Python writes it, shortened."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not write out whole numbers of more than 4300 digits
        return "a number of thousands of digits"
