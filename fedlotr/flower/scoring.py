"""The server's own work between rounds: the model scored on the held-out examples, spread over the engine's workers."""

import logging
import math
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlotr.adapters.carry import Carry
from fedlotr.errors import FedlotrError
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import Scores, shards, sum_scores
from fedlotr.flower.federation import Federation
from fedlotr.flower.links.carry import carry_records
from fedlotr.flower.replies import first_line
from fedlotr.flower.round import nodes_by_client

log = logging.getLogger("fedlotr")

EVALUATION_SHARD = 128
"""Held-out examples in one evaluate message: small enough to keep several workers busy to the end."""


def evaluate(
    grid: Grid, federation: Federation, arrays: ArrayRecord, carry: Carry | None = None
) -> dict[str, float | None]:
    """Loss and accuracy, or loss and perplexity, and the federation's own metric, on the held-out examples.

    The server's own work, spread over the engine's workers; it passes by the ledger. carry: what the model carries;
    workers lack its newest version. Raises FedlotrError where a shard fails.
    """
    nodes = nodes_by_client(grid)
    carried = {} if carry is None else carry_records(carry, max(carry.version - 1, 0))
    pieces = shards(federation.held_out, EVALUATION_SHARD)
    asked = {} if federation.measure is None else {"rows": True}
    messages = [
        Message(
            RecordDict(
                {
                    "arrays": arrays,
                    "config": ConfigRecord({"start": piece.start, "stop": piece.stop, **asked}),
                    **carried,
                }
            ),
            nodes[at % federation.clients],
            MessageType.EVALUATE,
        )
        for at, piece in enumerate(pieces)
    ]
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(messages)}
    parts: list[Scores] = []
    rows: list[dict[str, Any]] = []
    for message in messages:
        reply = replies[message.metadata.message_id]
        if reply.has_error():
            reason = reply.error.reason or "no reason was given"
            log.error("evaluation failed: %s", reason)
            raise FedlotrError(f"evaluation failed: {first_line(reason)}")
        content: Any = reply.content
        found = content["metrics"]
        parts.append(Scores(float(found["loss"]), int(found["units"]), int(found["correct"])))
        rows += [{name: array.numpy() for name, array in content["rows"].items()}] if asked else []
    scores = sum_scores(parts)
    further = {} if federation.measure is None else federation.measure(Results.joined(rows))
    if federation.causal:
        return {"loss": scores.mean_loss, "perplexity": math.exp(min(scores.mean_loss, 700)), **further}
    return {"loss": scores.mean_loss, "accuracy": scores.accuracy, **further}
