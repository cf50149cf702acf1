"""FlowerGrid: the grid that Flower's own engine hands a ServerApp, with the few facts that a run asks of an engine."""

import time
from collections.abc import Iterable
from typing import Any, ClassVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlotr.errors import InputError

REGISTRATION_SECONDS = 60.0
"""How long nodes may take to appear: Flower starts a ServerApp before they have registered."""
POLL_SECONDS = 0.1


class FlowerGrid(Grid):
    """Around Flower's grid, its nodes in partition order: Flower numbers them at random and lists them as it likes.

    `workers` is 0: Flower does not say how many there are; nor does it replace them. `client_states` stays empty:
    Flower keeps what clients put into their `Context.state` and does not show it, so no checkpoint has it.
    """

    name: ClassVar[str] = "flower"
    workers = 0
    restarts = 0

    def __init__(self, grid: Grid, clients: int, *, patience: float = REGISTRATION_SECONDS) -> None:
        """Waits until `clients` nodes are registered. Raises InputError where there are fewer or more."""
        self._grid = grid
        self.client_states: dict[int, RecordDict] = {}
        end = time.monotonic() + patience
        while len(nodes := list(grid.get_nodes())) < clients and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if len(nodes) != clients:
            raise InputError(
                f"clients: {clients}, but Flower's federation has {len(nodes)} nodes; "
                f'start it with --federation-config "num-supernodes={clients}", or change clients in the configuration'
            )
        # The simulation creates nodes in partition order, and no two at the same microsecond.
        self._nodes = [node.node_id for node in sorted(nodes, key=lambda node: (node.registered_at, node.node_id))]

    def close(self) -> None:
        """Nothing: the engine is Flower's."""

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
        """All nodes, in partition order."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Handed on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handed on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Handed on."""
        return self._grid.send_and_receive(messages, timeout=timeout)
