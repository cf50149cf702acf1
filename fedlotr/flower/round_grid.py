"""A Grid that shows a strategy one round's clients alone, and writes what crosses it into the byte ledger."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlotr.communication.ledger import Direction, Entry, entry, total

PATIENCE = 10
"""How often a strategy may look again, each time after a pause, whether there are more clients."""
PAUSE = 0.5
"""Seconds between two looks from which on it is waiting: Flower's strategies sleep for one."""


class RoundGrid(Grid):
    """Around any Grid: `get_node_ids` gives the round's nodes, in client order; every record is measured as it passes.

    nodes: node id -> client (partition id). entries: the ledger's rows, whatever the engine really copies.
    """

    def __init__(self, grid: Grid, server_round: int, nodes: Mapping[int, int]) -> None:
        self._grid, self._round, self.nodes = grid, server_round, dict(nodes)
        self.entries: list[Entry] = []
        self._waited, self._looked = 0, time.monotonic()

    def set_run(self, run: Any) -> None:
        """Handed on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Handed on."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Handed on (deprecated by Flower in favour of `Message(...)`)."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> list[int]:
        """The nodes of this round's clients, in client order. Raises TimeoutError for who waits for others."""
        now = time.monotonic()
        self._waited = self._waited + 1 if now - self._looked >= PAUSE else 0
        self._looked = now
        if self._waited > PATIENCE:
            raise TimeoutError("it waits for more clients than this round has, and there will be no others")
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Measure and hand on."""
        pushed = list(messages)
        for message in pushed:
            self._measure(message, "down", message.metadata.dst_node_id)
        return list(self._grid.push_messages(pushed))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand on and measure what is ready."""
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            self._measure(reply, "up", reply.metadata.src_node_id)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Measure both ways."""
        pushed = list(messages)
        for message in pushed:
            self._measure(message, "down", message.metadata.dst_node_id)
        replies = list(self._grid.send_and_receive(pushed, timeout=timeout))
        for reply in replies:
            self._measure(reply, "up", reply.metadata.src_node_id)
        return replies

    def count(self, message: Message) -> None:
        """Measure one that is sent and lost on its way, so that no engine needs to see it."""
        self._measure(message, "down", message.metadata.dst_node_id)

    def count_instead(self, reply: Message, came: Iterable[Message]) -> None:
        """Measure what has crossed in the place of a reply that is measured already."""
        for gone in self._entries(reply, "up", reply.metadata.src_node_id):
            self.entries.remove(gone)
        for message in came:
            self._measure(message, "up", message.metadata.src_node_id)

    def bytes_to_send(self, message: Message) -> int:
        """What one that goes down will be on the wire."""
        return total(self._entries(message, "down", message.metadata.dst_node_id), "wire_bytes")

    def _measure(self, message: Message, direction: Direction, node: int) -> None:
        self.entries += self._entries(message, direction, node)

    def _entries(self, message: Message, direction: Direction, node: int) -> list[Entry]:
        if not message.has_content():
            return []
        records: Any = message.content
        return [entry(self._round, self.nodes[node], direction, name, record) for name, record in records.items()]
