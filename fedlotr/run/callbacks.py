"""The audience of a run. Rounds are told once they are safe on disk: whatever a callback does, no round is lost."""

import copy
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType

from fedlotr.errors import FedlotrError, InputError
from fedlotr.flower.round import Round
from fedlotr.reporting.callbacks import Callbacks, ClientEvent, EvaluateEvent, Event, RoundEvent
from fedlotr.reporting.documents import Evaluation
from fedlotr.run.world import callers_generators


class CallbackError(FedlotrError):
    """A callback raised; the message names it, its method and the round. All rounds up to that one are on disk."""


class Audience:
    """All whom a run tells: those that belong to it, in order, and after them the caller's."""

    def __init__(self, own: Iterable[Callbacks], callbacks: Callbacks | Iterable[Callbacks] = ()) -> None:
        """Raises InputError for what is no `Callbacks`."""
        self.own = list(own)
        self.callbacks = [callbacks] if isinstance(callbacks, Callbacks) else _listed(callbacks)

    def tell(self, *events: Event) -> None:
        """Tell each of these. Raises CallbackError where a caller's callback raises."""
        for callback in self.own:
            for event in events:
                getattr(callback, event.hook)(event)
        for event in events:
            for callback in self.callbacks:
                try:
                    with callers_generators():
                        getattr(callback, event.hook)(event)
                except Exception as error:
                    where = f"callback {type(callback).__name__}.{event.hook}, round {event.round}"
                    raise CallbackError(f"{where}: {type(error).__name__}: {error}") from error


def evaluated(server_round: int, metrics: Evaluation) -> EvaluateEvent:
    """What is told of an evaluation."""
    return EvaluateEvent(server_round, MappingProxyType(dict(metrics)))


def finished(done: Round, evaluation: Evaluation | None, run_dir: Path) -> list[Event]:
    """What is told of a round that is on disk: its clients by number, its evaluation, itself."""
    number = done.metrics["round"]
    clients = [
        ClientEvent(number, client, int(said["num-examples"]), float(said["weight"]), said.get("loss"))
        for client, said in done.replies.items()
    ]
    clients += [
        ClientEvent(number, client, failure=failure.kind, reason=failure.reason)
        for client, failure in done.failures.items()
    ]
    return [
        *sorted(clients, key=lambda event: event.client),
        *([] if evaluation is None else [evaluated(number, evaluation)]),
        RoundEvent(number, MappingProxyType(copy.deepcopy(done.metrics)), run_dir),
    ]


def _listed(callbacks: object) -> list[Callbacks]:
    listed: list[Callbacks] = []
    for thing in callbacks if isinstance(callbacks, Iterable) else [callbacks]:
        if not isinstance(thing, Callbacks):
            name = thing.__name__ if isinstance(thing, type) else type(thing).__name__
            got = f"the class {name}" if isinstance(thing, type) else f"one of the type {name}"
            raise InputError(f"callbacks: expected objects of classes derived from fedlotr.Callbacks, got {got}")
        listed.append(thing)
    return listed
