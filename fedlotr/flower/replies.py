"""Which replies are fit to be averaged, and why the others are not."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedlotr.flower.lazy import LazyRecord
from fedlotr.flower.private import CLIENT_CRASHED
from fedlotr.flower.reading import value

RECORDS = {"arrays": ArrayRecord, "metrics": MetricRecord, "client": ConfigRecord}
"""What a reply consists of, ConfigRecords of other names apart."""
METRICS = {"num-examples", "weight", "loss"}
"""What its MetricRecord holds: Flower's strategies stop the run where one client's has other keys than the rest.

The loss is missing from all of them where single examples are hidden: it would tell of them."""


@dataclass(frozen=True)
class Failure:
    """Why a client is left out of a round.

    kind: a few words, for tables. reason: for the log, perhaps with a traceback.
    """

    kind: str
    reason: str


def check_replies(
    replies: Iterable[Message],
    messages: Iterable[Message],
    nodes: Mapping[int, int],
    expected: Callable[[int], ArrayRecord],
    bases_sha256: str,
    carry_sha256: str = "",
    beside: Mapping[str, ArrayRecord] = MappingProxyType({}),
    metrics: Collection[str] = METRICS,
) -> tuple[list[Message], dict[int, Failure]]:
    """Replies fit to be averaged, sorted by client, and the reason for every other client that was asked.

    nodes: node id -> client. expected: client -> tensors whose names, shapes and dtypes its reply must have.
    bases_sha256, carry_sha256: what a client must have computed with. beside: by the name of a record the same as
    `expected`, of what every reply holds besides. metrics: the keys of its MetricRecord.
    """
    by_client = {nodes[reply.metadata.src_node_id]: reply for reply in replies}
    good: list[Message] = []
    failures: dict[int, Failure] = {}
    for client in sorted(nodes[message.metadata.dst_node_id] for message in messages):
        reply = by_client.get(client)
        try:
            failure = (
                Failure("no reply", "no reply")
                if reply is None
                else _failure(
                    reply, client, {"arrays": expected(client), **beside}, bases_sha256, carry_sha256, metrics
                )
            )
        except Exception as error:  # a reply is what a client sends, and may hold anything
            failure = Failure("unreadable", f"its reply cannot be read: {type(error).__name__}: {error}")
        if failure is not None:
            failures[client] = failure
        elif reply is not None:
            good.append(reply)
    return good, failures


def _failure(
    reply: Message,
    client: int,
    expected: Mapping[str, ArrayRecord],
    bases_sha256: str,
    carry_sha256: str,
    wanted_metrics: Collection[str],
) -> Failure | None:
    """What makes a reply unfit to be averaged; None if nothing does."""
    if reply.has_error():
        reason = reply.error.reason or "no reason was given"
        name = reason.split(":")[0].strip()
        named = name if name.isidentifier() else "error"
        return Failure("worker died" if reply.error.code == CLIENT_CRASHED else named, reason)
    content: Any = reply.content
    kinds = {name: ArrayRecord if type(r) is LazyRecord else type(r) for name, r in content.items()}
    needed = RECORDS | dict.fromkeys(expected, ArrayRecord)
    if needed.items() - kinds.items() or any(kinds[name] is not ConfigRecord for name in kinds.keys() - needed.keys()):
        found = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items()) or "none"
        wanted = f"{', '.join(list(needed)[:-1])} and {list(needed)[-1]}"
        return Failure("records", f"a reply needs the records {wanted}; this one has {found}")
    for name, tensors in expected.items():
        if (failure := _tensors(content[name], tensors)) is not None:
            return failure if name == "arrays" else Failure(failure.kind, f"its {name}: {failure.reason}")
    metrics = content["metrics"]
    if set(metrics) != set(wanted_metrics):
        return Failure("metrics", f"its metrics are {sorted(metrics)}, expected {sorted(wanted_metrics)}")
    weight, loss = metrics["weight"], metrics.get("loss", 0.0)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
        return Failure("weight", f"its weight is {weight!r}, expected a number above 0")
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        return Failure("loss not finite", f"its loss is {loss!r}, expected a finite number")
    sender = content["client"].get("client")
    if sender != client:
        return Failure("another client", f"it answers as client {sender}: the engine lists its nodes in another order")
    found = str(content["client"].get("bases-sha256"))
    if found != bases_sha256:
        reason = f"it trained between other bases (SHA-256 {found[:12]}…, expected {bases_sha256[:12]}…)"
        return Failure("other bases", reason)
    found = str(content["client"].get("carry-sha256", ""))
    if found != carry_sha256:
        reason = (
            f"it trained beside another carried term (SHA-256 {found[:12] or 'none'}, expected {carry_sha256[:12]})"
        )
        return Failure("another carried term", reason)
    return None


def _tensors(arrays: ArrayRecord, expected: ArrayRecord) -> Failure | None:
    """What of a record's tensors is not as expected."""
    if set(arrays) != set(expected):
        missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        return Failure("tensors", f"tensors missing: {missing[:3] or 'none'}, unexpected: {extra[:3] or 'none'}")
    for name, array in arrays.items():
        # Decoded, and not only by what it says of itself: that need not be so.
        decoded, wanted = value(array), expected[name]
        shape, dtype = tuple(wanted.shape), wanted.dtype
        if {tuple(array.shape), decoded.shape} != {shape} or {array.dtype, str(decoded.dtype)} != {dtype}:
            kind = "wrong dtype" if decoded.shape == shape == tuple(array.shape) else "wrong shape"
            return Failure(kind, f"{name} is {decoded.dtype} {decoded.shape}, expected {dtype} {shape}")
        if not np.isfinite(decoded).all():
            return Failure("not finite", f"{name} has values that are not finite")
    return None


def first_line(reason: str) -> str:
    """Of what a client said went wrong: without the traceback, which the log has."""
    return reason.partition("\n")[0]
