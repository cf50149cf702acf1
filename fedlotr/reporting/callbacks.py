"""What a run tells of itself, and to whom: its console and loggers and a caller's own code are of one kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedlotr.config.configuration import SimulationConfig
from fedlotr.reporting.documents import Facts, Summary


@dataclass(frozen=True)
class Event:
    """round: the one that it is about, or the last that is finished."""

    hook: ClassVar[str]
    round: int


@dataclass(frozen=True)
class StartEvent(Event):
    """All is prepared, and nothing trained.

    facts: as in facts.json, and the chain.
    """

    hook = "on_start"
    config: SimulationConfig
    facts: Facts


@dataclass(frozen=True)
class ClientEvent(Event):
    """A client's part in a round.

    examples: it holds so many. weight: of its update in the mean, before division. loss: its mean training loss.
    failure: why it was left out, in a word, with the reason; then the other three are None.
    Where examples are hidden there is no loss, and where whole clients are, no event tells that one took part.
    """

    hook = "on_client"
    client: int
    examples: int | None = None
    weight: float | None = None
    loss: float | None = None
    failure: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class EvaluateEvent(Event):
    """The model after a round (0: before the first) on the test rows. metrics: loss among them, by name."""

    hook = "on_evaluate"
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class RoundEvent(Event):
    """A round that is on disk. metrics: its row of metrics.jsonl. run_dir: where the run is kept."""

    hook = "on_round"
    metrics: Mapping[str, Any]
    run_dir: Path

    def __repr__(self) -> str:
        return f"RoundEvent(round={self.round}, {len(self.metrics)} metrics, run_dir={str(self.run_dir)!r})"


@dataclass(frozen=True)
class TrainedEvent(Event):
    """The last round is over; what is said from here on until all are told is in summary.json."""

    hook = "on_trained"


@dataclass(frozen=True)
class FinishEvent(Event):
    """All is on disk. summary: as in summary.json."""

    hook = "on_finish"
    summary: Summary


class Callbacks:
    """Derive from this and write the methods you need; what they return is not looked at."""

    def on_start(self, event: StartEvent) -> None:
        """Before the first round, or before a run goes on."""

    def on_client(self, event: ClientEvent) -> None:
        """After each round, for each of its clients in the order of their numbers; of hidden clients for none."""

    def on_evaluate(self, event: EvaluateEvent) -> None:
        """Before the first round, and after each round that was evaluated."""

    def on_round(self, event: RoundEvent) -> None:
        """After each round, last."""

    def on_trained(self, event: TrainedEvent) -> None:
        """After the last round, before the run is summed up."""

    def on_finish(self, event: FinishEvent) -> None:
        """At the end of a run that ends well."""
