"""What a federation is held against: one model on the pooled data, and each client alone. Nothing is sent.

Both take the federation's own path (its rounds, optimizer, schedule, evaluation and checkpoints), so that what differs
from it is the division of the data alone:

* central: one model on the examples of all clients. In a round it takes as many optimizer steps as a client does on
  average, and as many examples as the round's clients together, so that both the steps in a row and the examples
  worked through are the federation's. The optimizer begins anew in every round, as a client's does.
* local: every client, in every round, goes on with its own model from the common start. A result is the mean over the
  clients, all on the same test rows, beside their spread. There is no common model to hand over.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, assert_never

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlotr.evaluation.spreads import worst_tenth
from fedlotr.flower import Strategy, Update, weighted_mean
from fedlotr.flower.records import to_record
from fedlotr.flower.round import Round
from fedlotr.reporting.documents import MetricsRow
from fedlotr.training.cohort import LocalTraining
from fedlotr.training.packing import Rows

Baseline = Literal["central", "local"]


def pooled(parts: Sequence[Rows], training: LocalTraining, sampled: int) -> tuple[list[Rows], LocalTraining]:
    """The one part, and the training, of the baseline central.

    sampled: clients in a round of the federation. The batch is at most all examples there are.
    """
    steps = max(1, round(float(np.mean([training.steps_of(len(part)) for part in parts]))))
    examples = sampled * float(np.mean([training.examples_of(len(part)) for part in parts]))
    everything = np.sort(np.concatenate(parts))
    batch = min(max(1, round(examples / steps)), len(everything))
    return [everything], replace(training, steps=steps, batch_size=batch)


class Central(Strategy):
    """One client, whose result is the model."""

    def combine(self, updates: Sequence[Update], server_round: int) -> Mapping[str, npt.NDArray[np.float64]]:
        """The mean of one."""
        return weighted_mean(updates)


class Alone(Strategy):
    """Every client goes on with what it has; the common model stays as it was at the start."""

    def __init__(self) -> None:
        self.arrays: dict[int, dict[str, npt.NDArray[Any]]] = {}
        """Client -> what moved of its trained tensors; nothing yet of a client that failed in every round."""

    def of(self, client: int, start: ArrayRecord) -> ArrayRecord:
        """A client's model. start: what all began with."""
        own = self.arrays.get(client, {})
        return to_record({name: own.get(name, array.numpy()) for name, array in start.items()})

    def all(self, clients: int, start: ArrayRecord) -> ArrayRecord:
        """The tensors of all clients, by client and name."""
        return to_record(
            {
                f"{client}/{name}": array.numpy()
                for client in range(clients)
                for name, array in self.of(client, start).items()
            }
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """To each client its own model: the grid shows all of them, in their order."""
        config["server-round"] = server_round
        return [
            Message(RecordDict({"arrays": self.of(client, arrays), "config": config}), node, MessageType.TRAIN)
            for client, node in enumerate(grid.get_node_ids())
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep each client's model; the common one stays."""
        for reply in replies:
            content: Any = reply.content
            own = self.arrays.setdefault(int(content["client"]["client"]), {})
            own |= {name: array.numpy() for name, array in content["arrays"].items()}
        return None, None

    def combine(self, updates: Sequence[Update], server_round: int) -> Mapping[str, npt.NDArray[np.float64]]:
        """Not used: there is nothing to combine."""
        raise NotImplementedError


def strategy_of(baseline: Baseline) -> Strategy:
    """What takes the place of a strategy."""
    match baseline:
        case "central":
            return Central()
        case "local":
            return Alone()
        case _:
            assert_never(baseline)


def without_wire(done: Round) -> Round:
    """A finished round as a baseline's: no byte crossed a wire, and no update was averaged."""
    row: MetricsRow = {
        **done.metrics,
        "bytes_up": 0,
        "bytes_down": 0,
        "aggregation_error": None,
        "transport_error": None,
    }
    return replace(done, metrics=row, entries=[])


def over_clients(
    scores: Sequence[Mapping[str, float | None]], higher_is_better: Collection[str] = ("accuracy",)
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """(mean of each metric, its spread): the standard deviation over all clients, and `worst_tenth`.

    A metric that some client's model leaves undefined is None. higher_is_better: the metrics of which it is so.
    """
    means: dict[str, float | None] = {}
    spread: dict[str, float | None] = {}
    for name in scores[0]:
        found = [value for score in scores if (value := score[name]) is not None]
        if len(found) < len(scores):
            means[name] = spread[f"{name}_std"] = spread[f"{name}_worst_tenth"] = None
            continue
        values = np.sort(found)
        means[name] = float(values.mean())
        spread[f"{name}_std"] = float(values.std())
        spread[f"{name}_worst_tenth"] = worst_tenth(found, larger_is_worse=name not in higher_is_better)
    return means, spread
