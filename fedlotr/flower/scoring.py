"""The server's own work between rounds: the model scored on the held-out examples, or each client's on its own rows."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlotr.adapters.carry import Carry
from fedlotr.errors import FedlotrError
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import Scores, shards, sum_scores
from fedlotr.flower.federation import Federation
from fedlotr.flower.links.carry import carry_records
from fedlotr.flower.links.personal import OWN_ROWS
from fedlotr.flower.replies import first_line
from fedlotr.flower.round import nodes_by_client
from fedlotr.models.kinds import METRICS, decisive
from fedlotr.reporting.documents import ClientEvaluation

log = logging.getLogger("fedlotr")

EVALUATION_SHARD = 128
"""Held-out examples in one evaluate message: small enough to keep several workers busy to the end."""


def evaluate(
    grid: Grid, federation: Federation, arrays: ArrayRecord, carry: Carry | None = None
) -> dict[str, float | None]:
    """Loss, the metrics of the task, and the federation's own one, on the held-out examples.

    The server's own work, spread over the engine's workers; it passes by the ledger. carry: what the model carries;
    workers lack its newest version. Raises FedlotrError where a shard fails.
    """
    measured = {} if federation.measure is None else {"rows": True}
    pieces = [
        {"start": piece.start, "stop": piece.stop, **measured}
        for piece in shards(federation.held_out, EVALUATION_SHARD)
    ]
    asked = [(at % federation.clients, config, "evaluation") for at, config in enumerate(pieces)]
    answers = _ask(grid, asked, arrays, carry)
    scores = sum_scores([_scores(answer) for answer in answers])
    further: dict[str, float | None] = {}
    if federation.measure is not None:
        rows = [{name: array.numpy() for name, array in answer["rows"].items()} for answer in answers]
        further = federation.measure(Results.joined(rows))
    return {"loss": scores.mean_loss, **scores.metrics(federation.task), **further}


def evaluate_clients(
    grid: Grid, arrays: ArrayRecord, held_back: Sequence[int], carry: Carry | None = None, *, task: str
) -> ClientEvaluation:
    """Every client's own model on its own rows.

    held_back: each client's number of such rows; who has none is left out. carry: as for `evaluate`.
    The metric is the task's decisive one. Raises FedlotrError where a client fails.
    """
    asked = [
        (client, {OWN_ROWS: True}, f"evaluation of client {client} on its own rows")
        for client, rows in enumerate(held_back)
        if rows
    ]
    found = [_scores(answer) for answer in _ask(grid, asked, arrays, carry)]
    metric = decisive(task)
    scores = [getattr(one, metric) for one in found]
    return summary_of(metric, [one.mean_loss for one in found], scores)


def _ask(
    grid: Grid, asked: Sequence[tuple[int, dict[str, Any], str]], arrays: ArrayRecord, carry: Carry | None
) -> list[Any]:
    """What comes of evaluate messages, in their order: (client, config, what it is called where it fails) of each."""
    nodes = nodes_by_client(grid)
    carried = {} if carry is None else carry_records(carry, max(carry.version - 1, 0))
    messages = [
        Message(
            RecordDict({"arrays": arrays, "config": ConfigRecord(config), **carried}),
            nodes[client],
            MessageType.EVALUATE,
        )
        for client, config, _ in asked
    ]
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(messages)}
    answers = [replies[message.metadata.message_id] for message in messages]
    for (_, _, name), reply in zip(asked, answers, strict=True):
        if reply.has_error():
            reason = reply.error.reason or "no reason was given"
            log.error("%s failed: %s", name, reason)
            raise FedlotrError(f"{name} failed: {first_line(reason)}")
    return [reply.content for reply in answers]


def _scores(answer: Any) -> Scores:
    found = answer["metrics"]
    moments = tuple(map(float, found["moments"]))
    return Scores(float(found["loss"]), int(found["units"]), int(found["correct"]), moments)


def worst_tenth(scores: Sequence[float], *, larger_is_worse: bool) -> float:
    """The mean of the worst tenth of the clients' scores: of ⌈n/10⌉ of n, so never of fewer than a tenth, nor of none.

    This is what "worst tenth" means wherever a run says it.
    """
    ordered = sorted(scores, reverse=larger_is_worse)
    return float(np.mean(ordered[: -(-len(ordered) // 10)]))


def summary_of(metric: str, losses: Sequence[float], scores: Sequence[float]) -> ClientEvaluation:
    """Of scores by client. metric: which they are."""
    return {
        "metric": metric,
        "clients": len(scores),
        "loss": float(np.mean(losses)),
        "mean": float(np.mean(scores)),
        "spread": float(np.std(scores)),
        "worst_tenth": worst_tenth(scores, larger_is_worse=not METRICS[metric].higher_is_better),
    }
