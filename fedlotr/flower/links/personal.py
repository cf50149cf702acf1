"""What is a client's own: the factors that stay with it, and its score on rows that are held back of its own.

Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (arXiv:2410.01463), FedSA-LoRA:
A is averaged, B stays. There is then no one model to be tested, so every client is, on rows of its own.
"""

import math
from collections.abc import Sequence
from typing import Any, Self, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from typing_extensions import override

from fedlotr.adapters.carry import Carry
from fedlotr.errors import FedlotrError
from fedlotr.evaluation.scores import Scores
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Job, Link, LinkTraits
from fedlotr.flower.links.carry import carry_records
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


def evaluate_clients(
    grid: Grid, arrays: ArrayRecord, held_back: Sequence[int], carry: Carry | None = None, *, causal: bool
) -> dict[str, Any]:
    """Every client's own model on its own rows: mean, spread (standard deviation) and worst tenth over the clients.

    held_back: each client's number of such rows; who has none is left out. carry: as for `scoring.evaluate`.
    Every client counts the same. The metric is accuracy, or perplexity (whose worst are the largest). Raises
    FedlotrError where a client fails.
    """
    nodes = cast(Sequence[int], grid.get_node_ids())
    clients = [client for client, rows in enumerate(held_back) if rows]
    carried = {} if carry is None else carry_records(carry, max(carry.version - 1, 0))
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({OWN_ROWS: True}), **carried})
    messages = [Message(content, nodes[client], MessageType.EVALUATE) for client in clients]
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(messages)}
    losses, scores = [], []
    for client, message in zip(clients, messages, strict=True):
        reply = replies[message.metadata.message_id]
        if reply.has_error():
            reason = (reply.error.reason or "no reason was given").partition("\n")[0]
            raise FedlotrError(f"evaluation of client {client} on its own rows failed: {reason}")
        reported: Any = reply.content
        found = reported["metrics"]
        one = Scores(float(found["loss"]), int(found["units"]), int(found["correct"]))
        losses.append(one.mean_loss)
        scores.append(math.exp(min(one.mean_loss, 700)) if causal else one.accuracy)
    return summary_of(losses, scores, larger_is_worse=causal)


def worst_tenth(scores: Sequence[float], *, larger_is_worse: bool) -> float:
    """The mean of the worst tenth of the clients' scores: of ⌈n/10⌉ of n, so never of fewer than a tenth, nor of none.

    This is what "worst tenth" means wherever a run says it.
    """
    ordered = sorted(scores, reverse=larger_is_worse)
    return float(np.mean(ordered[: -(-len(ordered) // 10)]))


def summary_of(losses: Sequence[float], scores: Sequence[float], *, larger_is_worse: bool) -> dict[str, Any]:
    """Of scores by client."""
    return {
        "metric": "perplexity" if larger_is_worse else "accuracy",
        "clients": len(scores),
        "loss": float(np.mean(losses)),
        "mean": float(np.mean(scores)),
        "spread": float(np.std(scores)),
        "worst_tenth": worst_tenth(scores, larger_is_worse=larger_is_worse),
    }
