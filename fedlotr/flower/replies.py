"""Which replies are fit to be averaged, and why the others are not."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedlotr.errors import harmless, written
from fedlotr.flower.lazy import LazyRecord
from fedlotr.flower.links.moments import MOMENTS
from fedlotr.flower.private import CLIENT_CRASHED
from fedlotr.flower.reading import value

RECORDS = {"arrays": ArrayRecord, "metrics": MetricRecord, "client": ConfigRecord}
"""What a reply consists of, ConfigRecords of other names apart."""
METRICS = {"num-examples", "weight", "loss"}
"""What its MetricRecord holds: Flower's strategies stop the run where one client's has other keys than the rest.

The loss is missing from all of them where single examples are hidden: it would tell of them."""
IDENTITY = {"client", "bases-sha256", "carry-sha256"}
"""What its record `client` may say. Its rank is not for a client to say: strategies cut by it."""
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


@dataclass(frozen=True)
class Weights:
    """What clients may say that they weigh. most: of a weight, and of a count of examples. uniform: all weigh 1."""

    most: float = 1e9
    uniform: bool = False


def check_replies(
    replies: Iterable[Message],
    messages: Iterable[Message],
    nodes: Mapping[int, int],
    expected: Callable[[int], ArrayRecord],
    bases_sha256: str,
    carry_sha256: str = "",
    beside: Mapping[str, ArrayRecord] = MappingProxyType({}),
    metrics: Collection[str] = METRICS,
    weights: Weights = Weights(),
) -> tuple[list[Message], dict[int, Failure]]:
    """Replies fit to be averaged, sorted by client, and the reason for every other client that was asked.

    nodes: node id -> client. expected: client -> tensors whose names, shapes and dtypes its reply must have.
    bases_sha256, carry_sha256: what a client must have computed with. beside: by the name of a record the same as
    `expected`, of what every reply holds besides. metrics: the keys of its MetricRecord. weights: what these may say.
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
                    reply, client, {"arrays": expected(client), **beside}, bases_sha256, carry_sha256, metrics, weights
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
    weights: Weights,
) -> Failure | None:
    """What makes a reply unfit to be averaged; None if nothing does."""
    if reply.has_error():
        reason = reply.error.reason or "no reason was given"
        name = reason[:100].split(":")[0].strip()
        named = name if KIND.fullmatch(name) else "error"
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
        if list(content[name]) != list(tensors):  # Flower's Krum and Bulyan go by the order, and would mix tensors up
            content[name] = LazyRecord(dict.fromkeys(tensors), content[name].__getitem__)
    if MOMENTS in expected and (failure := _moments(content[MOMENTS])) is not None:
        return failure
    metrics = content["metrics"]
    if set(metrics) != set(wanted_metrics):
        return Failure("metrics", f"its metrics are {sorted(metrics)}, expected {sorted(wanted_metrics)}")
    if (failure := _metrics(metrics, weights)) is not None:
        return failure
    if unknown := sorted(content["client"].keys() - IDENTITY):
        return Failure("records", f"its record client says {unknown[:3]}, which is not for it to say")
    sender = content["client"].get("client")
    if type(sender) is not int or sender != client:
        return Failure(
            "another client", f"it answers as client {written(sender)}: the engine lists its nodes in another order"
        )
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


def _metrics(metrics: Mapping[str, Any], weights: Weights) -> Failure | None:
    """What of the numbers that a client says of itself cannot be reckoned with."""
    weight, count, loss = metrics["weight"], metrics["num-examples"], metrics.get("loss", 0.0)
    limit = f"{weights.most:g} (--max-weight)"
    if not _is_number(weight) or not LEAST_WEIGHT <= weight <= weights.most:
        wanted = f"a number from {LEAST_WEIGHT:g} to {limit}"
        return Failure("weight", f"its weight is {written(weight)}, expected {wanted}")
    if weights.uniform and weight != 1:
        return Failure("weight", f"its weight is {written(weight)}, expected 1 as of all clients (--weights uniform)")
    if type(count) is not int or not 1 <= count <= weights.most:
        wanted = f"a whole number from 1 to {limit}"
        return Failure("num-examples", f"its num-examples is {written(count)}, expected {wanted}")
    if not _is_number(loss) or (isinstance(loss, float) and not math.isfinite(loss)):
        return Failure("loss not finite", f"its loss is {written(loss)}, which is not finite; expected a number")
    if abs(loss) > LARGEST_LOSS:
        return Failure("loss", f"its loss is {written(loss)}, expected at most {LARGEST_LOSS:.2g}")
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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


def _moments(pairs: ArrayRecord) -> Failure | None:
    """What of some means of second moments cannot be one: no square is negative, and weights sum to at most 1."""
    for name, array in pairs.items():
        square, weight = value(array).tolist()
        if square < 0 or not 0 < weight <= 1:
            wanted = "a number of 0 or more and a weight above 0, at most 1"
            return Failure("moments", f"its moments of {name} are {square:g} and {weight:g}, expected {wanted}")
    return None


def first_line(reason: str) -> str:
    """Of what a client said went wrong: without the traceback, which the log has."""
    return reason.partition("\n")[0]
