"""The server's own work between rounds: the model scored on the held-out examples, or each client's on its own rows."""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlotr.errors import FedlotrError
from fedlotr.evaluation.results import Evaluated, Results
from fedlotr.evaluation.scores import Scores, shards, sum_scores
from fedlotr.flower.asking import nodes_by_client
from fedlotr.flower.federation import Federation
from fedlotr.flower.links.personal import OWN_ROWS
from fedlotr.flower.records import OF
from fedlotr.flower.replies import first_line
from fedlotr.models.kinds import ATTACK_SUCCESS, decisive
from fedlotr.reporting.documents import ClientScore

log = logging.getLogger("fedlotr")

EVALUATION_SHARD = 128
"""Held-out examples in one evaluate message: small enough to keep several workers busy to the end."""


PROMPT_SHARD = 32
"""Prompts in one."""
TRIGGERED = "triggered"
"""What is evaluated beside the test rows where there is a backdoor: some with its trigger, labelled as its class."""

Records = Mapping[str, Any]
NONE: Records = MappingProxyType({})


def evaluate(grid: Grid, federation: Federation, arrays: ArrayRecord, beside: Records = NONE) -> dict[str, Any]:
    """Loss, the metrics of the task, and the federation's own one, on the held-out examples.

    The server's own work, spread over the engine's workers; it passes by the ledger. beside: of what
    the model carries, what workers lack. Raises FedlotrError where a shard fails.
    """
    measured: dict[str, Any] = {} if federation.measure is None else {"rows": True}
    pieces = [("test", piece, measured) for piece in shards(federation.held_out, EVALUATION_SHARD)]
    for of, count in federation.further.items():
        size, config = (PROMPT_SHARD, federation.answers) if of == "prompts" else (EVALUATION_SHARD, measured)
        pieces += [(of, piece, {OF: of, **config}) for piece in shards(count, size)]
    asked = [
        (at % federation.clients, {"start": piece.start, "stop": piece.stop, **config}, "evaluation")
        for at, (_, piece, config) in enumerate(pieces)
    ]
    answers = _ask(grid, asked, arrays, beside)
    by: dict[str, list[Any]] = {}
    for (of, _, _), answer in zip(pieces, answers, strict=True):
        by.setdefault(of, []).append(answer)
    scores = sum_scores([_scores(answer) for answer in by["test"]])
    further: dict[str, Any] = {}
    if federation.measure is not None:
        rows = {of: [_arrays(answer) for answer in parts] for of, parts in by.items()}
        choices = Results.joined(rows["choices"]) if "choices" in rows else None
        said = [one for part in rows["prompts"] for one in _cut(part)] if "prompts" in rows else None
        further = federation.measure(Evaluated(Results.joined(rows["test"]), choices, said))
    if TRIGGERED in by:
        further = {**further, ATTACK_SUCCESS: sum_scores([_scores(answer) for answer in by[TRIGGERED]]).accuracy}
    return {"loss": scores.mean_loss, **scores.metrics(federation.task), **further}


def _arrays(answer: Any) -> dict[str, Any]:
    return {name: array.numpy() for name, array in answer["rows"].items()}


def _cut(part: dict[str, Any]) -> list[list[int]]:
    """The tokens of each answer of a shard."""
    return [ids.tolist() for ids in np.split(part["tokens"], np.cumsum(part["counts"])[:-1])]


def evaluate_clients(
    grid: Grid,
    arrays: ArrayRecord | Callable[[int], ArrayRecord],
    held_back: Sequence[int],
    beside: Records = NONE,
    *,
    task: str,
    number: int = 0,
) -> list[ClientScore]:
    """Every client's own model on its own rows, by client.

    arrays: of all, or of each. held_back: each client's number of such rows; who has none is left out. beside: as for
    `evaluate`. number: of the round. The metric is the task's decisive one. Raises FedlotrError where a client fails.
    """
    asked = [
        (client, {OWN_ROWS: True}, f"evaluation of client {client} on its own rows")
        for client, rows in enumerate(held_back)
        if rows
    ]
    found, metric = [_scores(answer) for answer in _ask(grid, asked, arrays, beside)], decisive(task)
    return [
        {
            "round": number,
            "client": client,
            "rows": held_back[client],
            "loss": one.mean_loss,
            "metric": metric,
            "score": getattr(one, metric),
        }
        for (client, _, _), one in zip(asked, found, strict=True)
    ]


def _ask(
    grid: Grid,
    asked: Sequence[tuple[int, dict[str, Any], str]],
    arrays: ArrayRecord | Callable[[int], ArrayRecord],
    beside: Records,
) -> list[Any]:
    """What comes of evaluate messages, in their order: (client, config, what it is called where it fails) of each."""
    nodes = nodes_by_client(grid)
    messages = [
        Message(
            RecordDict(
                {
                    "arrays": arrays if isinstance(arrays, ArrayRecord) else arrays(client),
                    "config": ConfigRecord(config),
                    **beside,
                }
            ),
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
