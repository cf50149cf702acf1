"""What a strategy is shown of a round in which clients are hidden: one reply, which is the noised mean of all."""

from collections.abc import Collection
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from fedlotr.flower.lazy import Decoded
from fedlotr.flower.records import to_arrays, to_record
from fedlotr.privacy.guard import ClientGuard


def released(guard: ClientGuard, start: ArrayRecord, good: Collection[Message]) -> Message:
    """One reply in place of all, also of none. start: the tensors that moved, as they were sent."""
    contents: list[Any] = [message.content for message in good]
    mean = guard.mean(to_arrays(start), [Decoded(content["arrays"]) for content in contents])
    content = RecordDict(
        {
            "arrays": to_record(mean),
            "metrics": MetricRecord({"num-examples": 1, "weight": 1.0}),  # no loss: it would tell of the clients
            "client": ConfigRecord({"client": 0}),
        }
    )
    return Message(content, 0, MessageType.TRAIN)


def all_lost(messages: Collection[Message], replies: Collection[Message]) -> bool:
    """Whether every one of several clients crashed: that is the program's fault, and no client's data."""
    return len(messages) > 1 and len(replies) == len(messages) and all(reply.has_error() for reply in replies)
