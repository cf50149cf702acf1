"""What can go wrong in a way that a user can mend, and the words that help them do it."""

import difflib
from collections.abc import Iterable, Sequence


class FedlotrError(Exception):
    """Base of the errors that end a run with one clear message instead of a traceback (exit code 1)."""


class InputError(FedlotrError):
    """The configuration or the input is wrong: every problem found, each one line a user can act on (exit code 2)."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["InputError"], tuple[list[str]]]:
        return InputError, (self.problems,)


def closest(given: object, choices: Iterable[str]) -> str | None:
    """The choice that a misspelt name was most likely meant to be, if any is near."""
    return next(iter(difflib.get_close_matches(str(given), list(choices), n=1, cutoff=0.5)), None)


def nearest(given: object, choices: Iterable[str]) -> str:
    """A hint for a misspelt name: ", did you mean 'fed-sb'?" or, where nothing is near, the list of choices."""
    names = sorted(choices)
    close = closest(given, names)
    return f", did you mean '{close}'?" if close else f"; choose one of: {', '.join(names)}"
