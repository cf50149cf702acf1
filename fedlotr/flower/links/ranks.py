"""Ranks that differ between clients: each trains the leading block of the run's factors, and that alone is sent.

A client of rank k has A[:k], B[:, :k] and C[:k, :k]. The server computes with the blocks padded by zeros to the run's
rank, where the weighted mean is still exactly that of the updates; which entries a client owned, `Update.rank` says.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlotr.flower.lazy import LazyArray, LazyRecord
from fedlotr.flower.records import FACTOR
from fedlotr.streams import generator


def client_ranks(given: str, clients: int, seed: int) -> list[int]:
    """The rank of each client: '4,8,16' in turn; '4:1,8:2' drawn from the seed by shares that need not sum to one."""
    entries = [part.split(":") for part in given.split(",")]
    ranks = [int(entry[0]) for entry in entries]
    if len(entries[0]) == 1:
        return [ranks[client % len(ranks)] for client in range(clients)]
    shares = np.array([float(entry[1]) for entry in entries])
    drawn: list[int] = generator(seed, "client rank").choice(ranks, clients, p=shares / shares.sum()).tolist()
    return drawn


def block(name: str, tensor: Any, rank: int) -> Any:
    """The leading block of a factor, a core or the diagonal of one; any other tensor whole."""
    match = FACTOR.fullmatch(name)
    if match is None or match["factor"] not in "ABC":
        return tensor
    if match["factor"] == "B":
        return tensor[:, :rank]
    return tensor[:rank, :rank] if match["factor"] == "C" and tensor.ndim == 2 else tensor[:rank]


def block_record(record: ArrayRecord, rank: int) -> ArrayRecord:
    """The blocks of a record."""
    return ArrayRecord(
        {name: Array(np.ascontiguousarray(block(name, array.numpy(), rank))) for name, array in record.items()}
    )


class Blocks:
    """What each client is sent and expected to send of the run's tensors; made once for all clients of a rank.

    ranks: of each client, or None where all have the run's, and everything crosses whole.
    """

    def __init__(self, ranks: Sequence[int] | None) -> None:
        self._ranks = ranks
        self._made: dict[tuple[int, int], tuple[ArrayRecord, ArrayRecord]] = {}

    def of(self, record: ArrayRecord, client: int) -> ArrayRecord:
        """The client's part of a record."""
        if self._ranks is None:
            return record
        key = (id(record), self._ranks[client])
        if key not in self._made:
            self._made[key] = (record, block_record(record, key[1]))  # the record too, so that its id stays its own
        return self._made[key][1]

    def cut(self, messages: Iterable[Message], nodes: Mapping[int, int]) -> None:
        """Leave in each message what its client trains. nodes: node id -> client."""
        for message in messages if self._ranks is not None else ():
            content: Any = message.content
            if isinstance(content.get("arrays"), ArrayRecord):
                part = self.of(content["arrays"], nodes[message.metadata.dst_node_id])
                message.content = RecordDict({**content, "arrays": part})

    def pad(self, replies: Iterable[Message], nodes: Mapping[int, int], like: ArrayRecord) -> None:
        """Fill checked replies up with zeros to the shapes of `like`, and note the client's rank in each."""
        if self._ranks is None:
            return
        for reply in replies:
            content: Any = reply.content
            rank = self._ranks[nodes[reply.metadata.src_node_id]]
            whole = _padded_record(content["arrays"], like)
            client = ConfigRecord({**content["client"], "rank": rank})
            reply.content = RecordDict({**content, "arrays": whole, "client": client})


def _padded_record(record: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """With zeros around its arrays, put there when one is read: padded, all clients' would fill the memory."""

    def get(name: str) -> Array:
        array, shape = record[name], tuple(like[name].shape)
        return LazyArray(array.dtype, shape, array.stype, lambda: Array(padded(array.numpy(), shape)).data)

    return LazyRecord(dict.fromkeys(record), get)


def padded(value: Any, shape: tuple[int, ...]) -> Any:
    """A block with zeros around it."""
    whole = np.zeros(shape, value.dtype)
    whole[tuple(slice(size) for size in value.shape)] = value
    return whole
