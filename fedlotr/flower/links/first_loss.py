"""The loss of the model that a client was sent, on its examples, where a strategy asks for it; it goes up as a record.

A client's training loss is of a model that moves while it is summed up; what fairness weighs by is the loss of the
common one. It costs the client a pass without gradients over all its examples.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from flwr.app import Array, ArrayRecord
from typing_extensions import override

from fedlotr.errors import written
from fedlotr.evaluation.scores import mean_loss
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Job, Link, Refused, Reply
from fedlotr.flower.reading import value
from fedlotr.flower.records import ARRAYS, CONFIG, to_tensors
from fedlotr.flower.workplace import Workplace
from fedlotr.training.model import Tensors, TrainableModel

FIRST_LOSS = "first-loss"
"""Key of a train message's config, and the record of a reply."""
LOSS = "loss"
"""What the record holds: one number."""


def recorded(loss: float) -> ArrayRecord:
    """The record."""
    return ArrayRecord({LOSS: Array(np.array(loss, np.float64))})


def first_loss(records: Mapping[str, Any]) -> float | None:
    """Of a reply's records; None where there is none."""
    return float(value(records[FIRST_LOSS][LOSS]).item()) if FIRST_LOSS in records else None


class FirstLoss(Link):
    """At the client the pass over its examples, at the server what it may come to."""

    name = "first loss"
    understands = frozenset({FIRST_LOSS})

    def __init__(self, workplace: Workplace | None = None, model: TrainableModel | None = None) -> None:
        self._workplace, self._model = workplace, model
        self._found: dict[int, float] = {}

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self:
        return cls()

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self:
        return cls(workplace, model)

    @override
    def in_words(self) -> str:
        return ""  # whether it is asked for is the strategy's affair

    @override
    def expects(self, client: int) -> Mapping[str, ArrayRecord]:
        return {FIRST_LOSS: recorded(0.0)} if FIRST_LOSS in self.turn.asks else {}

    @override
    def verify(self, reply: Reply) -> None:
        """No loss here is negative."""
        if (loss := first_loss(reply.records)) is not None and loss < 0:
            raise Refused("first loss", f"its first loss is {written(loss)}; expected a number of 0 or more")

    @override
    def start(self, job: Job, values: Tensors) -> None:
        if self._workplace is None or self._model is None or FIRST_LOSS not in job.records[CONFIG]:
            return
        self._model.assign(to_tensors(job.records[ARRAYS]) | job.own)
        rows = self._workplace.rows(job.client)
        self._found[job.client] = mean_loss(self._model, self._workplace.train, rows)

    @override
    def send(self, job: Job) -> None:
        if (loss := self._found.pop(job.client, None)) is not None:
            job.beside[FIRST_LOSS] = recorded(loss)
