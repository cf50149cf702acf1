"""Ranks that differ between clients: each trains the leading block of the run's factors, and that alone is sent.

A client of rank k has A[:k], B[:, :k] and C[:k, :k]. The server computes with the blocks padded by zeros to the run's
rank, where the weighted mean is still exactly that of the updates; which entries a client owned, `Update.rank` says.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from flwr.app import Array, ArrayRecord
from typing_extensions import override

from fedlotr.flower.federation import Federation
from fedlotr.flower.lazy import LazyArray, LazyRecord
from fedlotr.flower.link import Draft, Link, Reply, Turn
from fedlotr.flower.records import ARRAYS, FACTOR
from fedlotr.flower.workplace import Workplace
from fedlotr.streams import generator
from fedlotr.training.model import TrainableModel


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


class Ranks(Link):
    """What each client is sent and expected to send of the run's tensors; made once for all clients of a rank."""

    name = "ranks"

    def __init__(self, ranks: Sequence[int] | None, rank: int, clients: int) -> None:
        """ranks: of each client, or None where all have the run's, `rank`, and everything crosses whole."""
        self._given, self._rank, self._clients = ranks, rank, clients

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self:
        return cls(run.ranks, run.rank, run.clients)

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self | None:
        return None  # a client trains whatever block it is sent

    @override
    def in_words(self) -> str:
        return "ranks of the clients" if self._given is not None else ""

    @override
    def begin(self, turn: Turn) -> None:
        """Where the strategy leaves a client fewer than its own, those."""
        super().begin(turn)
        self._ranks, self._made = self._given, dict[tuple[int, int], tuple[ArrayRecord, ArrayRecord]]()
        if turn.fewer:
            own = self._given or [self._rank] * self._clients
            self._ranks = [min(rank, turn.fewer.get(client, rank)) for client, rank in enumerate(own)]
        turn.part = self.part

    def part(self, record: ArrayRecord, client: int) -> ArrayRecord:
        """The client's part of a record."""
        if self._ranks is None:
            return record
        key = (id(record), self._ranks[client])
        if key not in self._made:
            self._made[key] = (record, block_record(record, key[1]))  # the record too, so that its id stays its own
        return self._made[key][1]

    @override
    def outgoing(self, draft: Draft) -> None:
        if isinstance(draft.records.get(ARRAYS), ArrayRecord):
            draft.records[ARRAYS] = self.part(draft.records[ARRAYS], draft.client)

    @override
    def incoming(self, reply: Reply) -> None:
        """Filled up with zeros to the run's shapes."""
        if self._ranks is not None:
            reply.arrays = _padded_record(reply.arrays, self.turn.moved)
            reply.rank = self._ranks[reply.client]


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
