"""Callbacks in Python: a caller's code that is told of each client, each evaluation and each finished round.

They are called once a round is safe on disk, in the order of the clients: whatever a callback does, no round is lost.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedlotr.errors import FedlotrError, InputError
from fedlotr.flower.round import Round
from fedlotr.run.world import callers_generators


class CallbackError(FedlotrError):
    """A callback raised; the message names it, its method and the round. All rounds up to that one are on disk."""


@dataclass(frozen=True)
class ClientEvent:
    """A client's part in a round.

    examples: it holds so many. weight: of its update in the mean, before division. loss: its mean training loss.
    failure: why it was left out, in a word, with the reason; then the other three are None.
    Where examples are hidden there is no loss, and where whole clients are, no event tells that one took part.
    """

    round: int
    client: int
    examples: int | None = None
    weight: float | None = None
    loss: float | None = None
    failure: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class EvaluateEvent:
    """The model after a round (0: before the first) on the test rows. metrics: loss among them, by name."""

    round: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class RoundEvent:
    """A round that is on disk. metrics: its row of metrics.jsonl. run_dir: where the run is kept."""

    round: int
    metrics: Mapping[str, Any]
    run_dir: Path

    def __repr__(self) -> str:
        return f"RoundEvent(round={self.round}, {len(self.metrics)} metrics, run_dir={str(self.run_dir)!r})"


class Callbacks:
    """Derive from this and write the methods you need; what they return is not looked at."""

    def on_client(self, event: ClientEvent) -> None:
        """After each round, for each of its clients in the order of their numbers; of hidden clients for none."""

    def on_evaluate(self, event: EvaluateEvent) -> None:
        """Before the first round, and after each round that was evaluated."""

    def on_round(self, event: RoundEvent) -> None:
        """After each round, last."""


class Audience:
    """All the callbacks of a run."""

    def __init__(self, callbacks: Callbacks | Iterable[Callbacks] = ()) -> None:
        """Raises InputError for what is no `Callbacks`."""
        self.callbacks = [callbacks] if isinstance(callbacks, Callbacks) else _listed(callbacks)

    def evaluated(self, server_round: int, metrics: Mapping[str, float | None]) -> None:
        """Tell of an evaluation."""
        event = EvaluateEvent(server_round, MappingProxyType(dict(metrics)))
        self._tell("on_evaluate", server_round, lambda callback: callback.on_evaluate(event))

    def finished(self, done: Round, evaluation: Mapping[str, float | None] | None, run_dir: Path) -> None:
        """Tell of a round that is on disk: its clients, its evaluation, itself."""
        number = int(done.metrics["round"])
        for event in _clients(number, done):
            self._tell("on_client", number, lambda callback, event=event: callback.on_client(event))  # type: ignore[misc]
        if evaluation is not None:
            self.evaluated(number, evaluation)
        last = RoundEvent(number, MappingProxyType(copy.deepcopy(done.metrics)), run_dir)
        self._tell("on_round", number, lambda callback: callback.on_round(last))

    def _tell(self, method: str, server_round: int, call: Callable[[Callbacks], None]) -> None:
        for callback in self.callbacks:
            try:
                with callers_generators():
                    call(callback)
            except Exception as error:
                where = f"callback {type(callback).__name__}.{method}, round {server_round}"
                raise CallbackError(f"{where}: {type(error).__name__}: {error}") from error


def _listed(callbacks: object) -> list[Callbacks]:
    listed: list[Callbacks] = []
    for thing in callbacks if isinstance(callbacks, Iterable) else [callbacks]:
        if not isinstance(thing, Callbacks):
            name = thing.__name__ if isinstance(thing, type) else type(thing).__name__
            got = f"the class {name}" if isinstance(thing, type) else f"one of the type {name}"
            raise InputError(f"callbacks: expected objects of classes derived from fedlotr.Callbacks, got {got}")
        listed.append(thing)
    return listed


def _clients(number: int, done: Round) -> list[ClientEvent]:
    """One event a client that was asked, by number."""
    events = [
        ClientEvent(number, client, int(said["num-examples"]), float(said["weight"]), said.get("loss"))
        for client, said in done.replies.items()
    ]
    events += [
        ClientEvent(number, client, failure=failure.kind, reason=failure.reason)
        for client, failure in done.failures.items()
    ]
    return sorted(events, key=lambda event: event.client)
