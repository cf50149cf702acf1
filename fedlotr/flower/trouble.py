"""What is said, and what ends a round, where clients fail, stand out, or are too few for their strategy."""

import logging
from collections.abc import Mapping, Sequence

from flwr.app import Message
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.errors import FedlotrError
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Reply
from fedlotr.flower.norms import Norms, Watch, look_at
from fedlotr.flower.replies import Failure, first_line
from fedlotr.flower.traits import traits_of
from fedlotr.said import say

log = logging.getLogger("fedlotr")

SHOWN_KINDS, SHOWN_REASON = 8, 300
"""Of failures in an error: how many kinds, and characters of each one's reason."""


class TooManyFailuresError(FedlotrError):
    """More of a round's clients failed than the run allows; the last good state is on disk."""


def weigh_failures(
    federation: Federation,
    number: int,
    watch: Watch,
    failures: Mapping[int, Failure],
    replies: Sequence[Message],
    good: Sequence[Reply],
    excused: int = 0,
) -> None:
    """Log who failed. Raises TooManyFailuresError where more did than the run allows.

    excused: clients of whom nothing is used, and who have not failed.
    """
    asked = len(good) + len(failures) + excused
    for client, failure in failures.items():
        log.warning("round %d: client %d failed and is left out: %s", number, client, failure.reason)
    if federation.guard.hides_clients:
        # One that failed counts as one that changed nothing: stopping for it would tell of it. All of several: that is
        # the program's fault, and no client's data.
        if asked > 1 and len(replies) == asked and all(reply.has_error() for reply in replies):
            raise TooManyFailuresError(
                f"round {number}: all clients failed, which is the program's fault; log.txt has their reasons"
            )
    elif not (good or excused) or len(failures) > federation.max_failed * asked:
        raise TooManyFailuresError(
            f"round {number}: {len(failures)} of {asked} clients failed (--max-failed {federation.max_failed}); "
            f"{_some(failures)}{_likely_cause(number, failures, asked, watch)}"
        )


def look(
    watch: Watch,
    strategy: FlowerStrategy,
    federation: Federation,
    number: int,
    good: Sequence[Reply],
    asked: int,
    norms: Norms,
) -> None:
    """Say what stands out of a round's clients, and where its strategy has too few of them."""
    if federation.guard.hides_clients:
        _tell_of_one(watch, strategy)
    elif federation.watched:
        look_at(watch, number, good, norms)
        _tell_of_few(watch, number, strategy, len(good), asked)


def _some(failures: Mapping[int, Failure]) -> str:
    """The first of each kind, in one line."""
    first: dict[str, str] = {}
    for client, failure in failures.items():
        first.setdefault(failure.kind, f"client {client}: {first_line(failure.reason)[:SHOWN_REASON]}")
    shown = list(first.values())[:SHOWN_KINDS]
    more = [f"and {len(first) - len(shown)} more kinds"] if len(first) > len(shown) else []
    return "; ".join(shown + more) or "no client was asked"


def _likely_cause(number: int, failures: Mapping[int, Failure], asked: int, watch: Watch) -> str:
    """Where most clients come to numbers that are not finite: that it is the model they were sent, and no fault of
    theirs; and the way back."""
    lost = sum(failure.not_finite for failure in failures.values())
    if number == 1 or 2 * lost <= asked:
        return ""
    text = (
        f"; {lost} of them came to numbers that are not finite, so the likely cause is not they but the model that "
        f"round {number - 1} published"
    )
    if watch.first is None:
        return f"{text}: by a learning rate too high, or by a harmful update"
    since = f"round {watch.first}" if watch.first == watch.last else f"rounds {watch.first} to {watch.last}"
    back = f"go back with --resume --resume-round {watch.first - 1}" if watch.first > 1 else "start a new run"
    return f"{text}, with updates far outside in it since {since}: {back}, and with --max-update-norm"


def _tell_of_few(watch: Watch, number: int, strategy: FlowerStrategy, left: int, asked: int) -> None:
    """Say where a round has fewer clients than its strategy needs: by failures, or who has no privacy budget left."""
    needed = traits_of(strategy).fewest()
    if needed is None or left >= needed.clients:
        return
    text = (
        f"round {number}: of {asked} clients {left} are left for {type(strategy).__name__}, which needs "
        f"{needed.clients}: {needed.why}"
    )
    if watch.once("few"):
        say(text)
    else:
        log.warning("%s", text)


def _tell_of_one(watch: Watch, strategy: FlowerStrategy) -> None:
    """Say where a strategy that compares clients is shown one noised mean of them all."""
    if traits_of(strategy).fewest() is not None and watch.once("one"):
        say(
            f"{type(strategy).__name__} compares clients, and where they are hidden it sees their noised mean alone: "
            "what it publishes is that mean, and --clip-norm is all that bounds a client"
        )
