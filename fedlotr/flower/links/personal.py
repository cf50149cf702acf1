"""What is a client's own: the factors that stay with it.

Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (arXiv:2410.01463), FedSA-LoRA:
A is averaged, B stays. There is then no one model to be tested, so every client is, on rows of its own.
"""

from typing import Any, Self

from flwr.app import ArrayRecord
from typing_extensions import override

from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Job, Link, LinkTraits
from fedlotr.flower.records import to_record, to_tensors
from fedlotr.flower.workplace import Workplace
from fedlotr.training.model import Tensors, TrainableModel

PERSONAL = "personal"
"""The record in a client's state."""
OWN_ROWS = "own-rows"
"""In the config of an evaluate message: the client scores its own model on its own rows."""


class Personal(Link):
    """A client's own factors, in its memory from round to round."""

    name = "personal parts"
    traits = LinkTraits(keeps_client_state=True, in_evaluation=True)

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self | None:
        return None  # which never sees them

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self | None:
        return cls() if model.personal else None

    @override
    def receive(self, job: Job) -> None:
        job.own = personal(job.memory)

    @override
    def send(self, job: Job) -> None:
        """Those that did not move in this round stay as they are."""
        if own := job.trained.personal:
            before = dict(job.memory[PERSONAL].items()) if PERSONAL in job.memory else {}
            job.memory[PERSONAL] = ArrayRecord({**before, **to_record(own)})


def personal(state: Any) -> Tensors:
    """A client's own factors; nothing before its first round."""
    return to_tensors(state[PERSONAL]) if PERSONAL in state else {}
