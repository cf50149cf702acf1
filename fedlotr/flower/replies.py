"""Which replies are fit to be averaged, and why the others are not."""

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedlotr.errors import harmless, written
from fedlotr.flower.chain import Chain
from fedlotr.flower.federation import Weights
from fedlotr.flower.lazy import LazyRecord
from fedlotr.flower.link import Draft, Refused, Reply
from fedlotr.flower.private import CLIENT_CRASHED
from fedlotr.flower.reading import value
from fedlotr.flower.records import ARRAYS, ASKS, CLIENT, METRICS

log = logging.getLogger("fedlotr")

RECORDS = {ARRAYS: ArrayRecord, METRICS: MetricRecord, CLIENT: ConfigRecord}
"""What a reply consists of, ConfigRecords of other names apart."""
METRICS_OF_A_REPLY = {"num-examples", "weight", "loss"}
"""What its MetricRecord holds: Flower's strategies stop the run where one client's has other keys than the rest.

The loss is missing from all of them where single examples are hidden: it would tell of them."""
LEAST_WEIGHT = 1e-9
"""Below, a mean of so light clients alone would lose its numbers to underflow, down to zeros."""
LARGEST_LOSS = float(np.finfo(np.float32).max)
"""A client computes in float32; and the mean of such losses, weights and all, is far from float64's end."""
LONGEST_REASON = 4000
"""Characters of what a client says went wrong that are kept."""
KIND = re.compile(r"[A-Za-z_][A-Za-z_0-9]{0,39}")
"""What an exception may be called in a table."""


@dataclass(frozen=True)
class Failure:
    """Why a client is left out of a round.

    kind: a few words, for tables. reason: for the log, perhaps with a traceback. Both may come from the client, so they
    are made harmless here.
    """

    kind: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", harmless(self.reason, LONGEST_REASON))

    @property
    def not_finite(self) -> bool:
        """Whether the client came to numbers that are not finite: it may have been sent a model that leads there."""
        return "not finite" in self.kind or "not finite" in first_line(self.reason)


def check_replies(
    replies: Iterable[Message], drafts: Iterable[Draft], nodes: Mapping[int, int], rules: "Rules"
) -> tuple[list[Reply], dict[int, Failure]]:
    """Replies fit to be averaged, by client, and the reason for every other client that was asked.

    Of a client's replies the first counts that answers what it was sent; others are noted. nodes: node id -> client.
    """
    by_client: dict[int, list[Message]] = {}
    for reply in replies:
        by_client.setdefault(nodes[reply.metadata.src_node_id], []).append(reply)
    good: list[Reply] = []
    failures: dict[int, Failure] = {}
    for draft in drafts:
        try:
            good.append(rules.read(draft.client, rules.answer(draft, by_client.get(draft.client, []))))
        except Refused as refused:
            failures[draft.client] = Failure(refused.kind, refused.reason)
        except Exception as error:  # a reply is what a client sends, and may hold anything
            failures[draft.client] = Failure("unreadable", f"its reply cannot be read: {type(error).__name__}: {error}")
    return good, failures


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a reply has to be in one round.

    expected: client -> the tensors that it is to have: names, shapes, dtypes. chain: undoes what the way up did, knows
    which records a reply has besides, and refuses what is wrong with those. metrics: the keys of its MetricRecord.
    weights: what these may say. number: of the round.
    """

    expected: Callable[[int], ArrayRecord]
    chain: Chain
    metrics: Collection[str]
    weights: Weights
    number: int

    def answer(self, draft: Draft, came: Sequence[Message]) -> Message | None:
        """Which of a client's replies is its answer; None where none came. Raises Refused where none answers."""
        asked = draft.message.metadata.message_id
        answers = [reply for reply in came if reply.metadata.reply_to_message_id == asked]
        if came and not answers:
            raise Refused("another message", "it answers another message than the one that it was sent in this round")
        if len(came) > 1:
            log.warning(
                "round %d: client %d sent %d replies: its first answer counts, and no other",
                *(self.number, draft.client, len(came)),
            )
        return next(iter(answers), None)

    def read(self, client: int, message: Message | None) -> Reply:
        """A client's reply. Raises Refused for what makes it unfit to be averaged."""
        if message is None:
            raise Refused("no reply", "no reply")
        if message.has_error():
            reason = message.error.reason or "no reason was given"
            name = reason[:100].split(":")[0].strip()
            named = name if KIND.fullmatch(name) else "error"
            raise Refused("worker died" if message.error.code == CLIENT_CRASHED else named, reason)
        records: dict[str, Any] = dict(message.content.items())
        if ASKS in records:
            raise Refused("other bases", "it asks for bases again, or for what it was not offered, and has not trained")
        self.chain.arrived(client, records)
        beside = self.chain.expects(client)
        _check_records(records, beside)
        for name, wanted in {ARRAYS: self.expected(client), **beside}.items():
            _check_tensors(name, records[name], wanted)
            if list(records[name]) != list(
                wanted
            ):  # Flower's Krum and Bulyan go by the order, and would mix tensors up
                records[name] = LazyRecord(dict.fromkeys(wanted), records[name].__getitem__)
        metrics, identity = records[METRICS], records[CLIENT]
        if set(metrics) != set(self.metrics):
            raise Refused("metrics", f"its metrics are {sorted(metrics)}, expected {sorted(self.metrics)}")
        _check_metrics(metrics, self.weights)
        if unknown := sorted(identity.keys() - self.chain.says - {"client"}):
            raise Refused("records", f"its record client says {unknown[:3]}, which is not for it to say")
        if type(sender := identity.get("client")) is not int or sender != client:
            raise Refused(
                "another client", f"it answers as client {written(sender)}: the engine lists its nodes in another order"
            )
        reply = Reply(
            client=client,
            arrays=records[ARRAYS],
            weight=float(metrics["weight"]),
            examples=metrics["num-examples"],
            loss=metrics.get("loss"),
            records={name: record for name, record in records.items() if name not in RECORDS},
            identity=identity,
            origin=message,
        )
        self.chain.verify(reply)
        return reply


def _check_records(records: Mapping[str, Any], beside: Collection[str]) -> None:
    kinds = {name: ArrayRecord if type(r) is LazyRecord else type(r) for name, r in records.items()}
    needed = RECORDS | dict.fromkeys(beside, ArrayRecord)
    if needed.items() - kinds.items() or any(kinds[name] is not ConfigRecord for name in kinds.keys() - needed.keys()):
        found = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items()) or "none"
        wanted = f"{', '.join(list(needed)[:-1])} and {list(needed)[-1]}"
        raise Refused("records", f"a reply needs the records {wanted}; this one has {found}")


def _check_metrics(metrics: Mapping[str, Any], weights: Weights) -> None:
    """What of the numbers that a client says of itself cannot be reckoned with."""
    weight, count, loss = metrics["weight"], metrics["num-examples"], metrics.get("loss", 0.0)
    limit = f"{weights.most:g} (--max-weight)"
    if not _is_number(weight) or not LEAST_WEIGHT <= weight <= weights.most:
        wanted = f"a number from {LEAST_WEIGHT:g} to {limit}"
        raise Refused("weight", f"its weight is {written(weight)}, expected {wanted}")
    if weights.uniform and weight != 1:
        raise Refused("weight", f"its weight is {written(weight)}, expected 1 as of all clients (--weights uniform)")
    if type(count) is not int or not 1 <= count <= weights.most:
        wanted = f"a whole number from 1 to {limit}"
        raise Refused("num-examples", f"its num-examples is {written(count)}, expected {wanted}")
    if not _is_number(loss) or (isinstance(loss, float) and not math.isfinite(loss)):
        raise Refused("loss not finite", f"its loss is {written(loss)}, which is not finite; expected a number")
    if abs(loss) > LARGEST_LOSS:
        raise Refused("loss", f"its loss is {written(loss)}, expected at most {LARGEST_LOSS:.2g}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_tensors(record: str, arrays: ArrayRecord, expected: ArrayRecord) -> None:
    """Raises Refused for what of a record's tensors is not as expected."""
    its = "" if record == ARRAYS else f"its {record}: "
    if set(arrays) != set(expected):
        missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        raise Refused("tensors", f"{its}tensors missing: {missing[:3] or 'none'}, unexpected: {extra[:3] or 'none'}")
    for name, array in arrays.items():
        # Decoded, and not only by what it says of itself: that need not be so.
        decoded, wanted = value(array), expected[name]
        shape, dtype = tuple(wanted.shape), wanted.dtype
        if {tuple(array.shape), decoded.shape} != {shape} or {array.dtype, str(decoded.dtype)} != {dtype}:
            kind = "wrong dtype" if decoded.shape == shape == tuple(array.shape) else "wrong shape"
            raise Refused(kind, f"{its}{name} is {decoded.dtype} {decoded.shape}, expected {dtype} {shape}")
        if not np.isfinite(decoded).all():
            raise Refused("not finite", f"{its}{name} has values that are not finite")


def first_line(reason: str) -> str:
    """Of what a client said went wrong: without the traceback, which the log has."""
    return reason.partition("\n")[0]
