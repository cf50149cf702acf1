"""Asking clients to train on the present model: their messages through the chain, and what comes back, checked.

A round asks once; where time is virtual it may ask more often, and some of what is on its way never arrives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.communication.ledger import Entry
from fedlotr.flower.blame import blaming
from fedlotr.flower.chain import Chain, post
from fedlotr.flower.faults import Faults
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Draft, Reply, Turn
from fedlotr.flower.norms import Norms, begun_with, bounded
from fedlotr.flower.plugins import whoever_is_there
from fedlotr.flower.replies import METRICS_OF_A_REPLY, Failure, Rules, check_replies
from fedlotr.flower.round_grid import RoundGrid
from fedlotr.flower.state import ClientStates
from fedlotr.flower.traits import traits_of


class Way(Protocol):
    """What happens between server and clients besides what either does; whom it costs a message is left as it was."""

    def lost(self, client: int, size: Callable[[], int]) -> Failure | None:
        """Why a client never answers; None: it does. size: bytes of the message that it is sent."""
        ...

    def missed(self, good: Sequence[Reply], entries: Sequence[Entry]) -> Mapping[int, Failure]:
        """Of replies fit to be averaged, those that the server has no use for, and why. entries: the ledger's."""
        ...


@dataclass(frozen=True, kw_only=True)
class Came:
    """What came of asking some clients.

    turn: as the links had it. asked: how many. good: replies fit to be averaged, by client. failures: why the others
    are not. norms: of the updates. replies: as they crossed.
    """

    turn: Turn
    asked: int
    good: list[Reply]
    failures: dict[int, Failure]
    norms: Norms
    replies: Sequence[Message]


class Asking:
    """A round's side of it. kept: what its clients had kept before it. entries: what has crossed in it, for the ledger.
    asked: who was.

    arrays: the model that clients train from. faults: on purpose, where there are some.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: FlowerStrategy,
        federation: Federation,
        chain: Chain,
        number: int,
        arrays: ArrayRecord,
        faults: Faults | None = None,
    ) -> None:
        self._grid, self._strategy, self._federation = grid, strategy, federation
        self.chain, self.number, self.arrays, self.faults = chain, number, arrays, faults
        self.kept = ClientStates(grid)
        self.entries: list[Entry] = []
        self.asked: list[int] = []

    def ask(self, clients: Mapping[int, float], way: Way | None = None) -> Came:
        """Have clients train. Raises StrategyError.

        clients: each with its chance of being drawn over that of an even draw, by which its weight is divided. way:
        what else may become of messages; None: they arrive.
        """
        federation, chain, guard = self._federation, self.chain, self._federation.guard
        nodes = nodes_by_client(self._grid)
        view = RoundGrid(self._grid, self.number, {nodes[client]: client for client in clients})
        messages = self._messages(view, clients)
        self.asked += clients
        self.kept.remember(clients)
        turn = self._turn()
        drafts = chain.outgoing(turn, messages, view.nodes)
        starts = begun_with(drafts, turn.expected)
        guard.charge(self.number, [draft.client for draft in drafts])
        post(drafts)
        failures, reached = _lost(drafts, view, way)
        replies = _answered(view, chain, reached, view.send_and_receive([draft.message for draft in reached]))
        if self.faults is not None:
            replies = self.faults.put_in(self.number, reached, replies, view, chain)

        metrics = METRICS_OF_A_REPLY if not guard.promises or guard.hides_clients else METRICS_OF_A_REPLY - {"loss"}
        weights = federation.weights
        rules = Rules(expected=turn.expected, chain=chain, metrics=metrics, weights=weights, number=self.number)
        good, unfit = check_replies(replies, reached, view.nodes, rules)
        good = [replace(reply, weight=reply.weight / clients[reply.client]) for reply in good]
        norms = Norms()
        if not guard.hides_clients:
            bound, refuse = federation.max_update_norm, federation.refuse_large
            good, large, norms = bounded(good, starts, bound, refuse=refuse)
            unfit |= large
        failures |= unfit
        if way is not None:
            missed = way.missed(good, view.entries)
            good = [reply for reply in good if reply.client not in missed]
            failures |= missed
        chain.incoming(good)
        self.kept.restore(failures)
        self.entries += view.entries
        return Came(
            turn=turn,
            asked=len(messages),
            good=good,
            failures=failures,
            norms=norms,
            replies=replies,
        )

    def _messages(self, view: RoundGrid, clients: Mapping[int, float]) -> list[Message]:
        """What the strategy would send, before any link. Raises StrategyError."""
        strategy, federation, number = self._strategy, self._federation, self.number
        config = ConfigRecord({"lr-factor": federation.lr_factor(number)})
        messages: list[Message] = []
        with blaming(strategy, number, federation.method, "configure_train"):
            if clients:  # Flower's strategies would wait for some
                with whoever_is_there(strategy, len(clients)):
                    messages = list(strategy.configure_train(number, self.arrays, config, view))
            _check_addresses(messages, view)
        return messages

    def _turn(self) -> Turn:
        number, traits, moving = self.number, traits_of(self._strategy), self._federation.moving
        names = set(self.arrays) if moving is None else moving(number)
        return Turn(
            number=number,
            moved=ArrayRecord({name: array for name, array in self.arrays.items() if name in names}),
            fewer=traits.ranks or {},
            controls=traits.controls,
            asks=traits.asks,
        )


def _lost(drafts: Sequence[Draft], view: RoundGrid, way: Way | None) -> tuple[dict[int, Failure], Sequence[Draft]]:
    """(the clients that never answer and why, what reaches the others)."""
    if way is None:
        return {}, drafts
    failures: dict[int, Failure] = {}
    for draft in drafts:
        if (lost := way.lost(draft.client, partial(view.bytes_to_send, draft.message))) is not None:
            failures[draft.client] = lost
            view.count(draft.message)
    return failures, [draft for draft in drafts if draft.client not in failures]


def nodes_by_client(grid: Grid) -> Sequence[int]:
    """Node ids by client: every engine of ours, and `FlowerGrid`, lists them in partition order."""
    return cast(Sequence[int], grid.get_node_ids())


def _answered(view: RoundGrid, chain: Chain, drafts: Sequence[Draft], replies: Iterable[Message]) -> list[Message]:
    """The replies, once every client that asked for more has been sent it. One that asks for ever is left asking."""
    found = list(replies)
    for _ in chain:  # each link may be asked
        first = {reply.metadata.src_node_id: reply for reply in reversed(found)}
        by_client = {view.nodes[node]: reply for node, reply in first.items()}
        again = [again for draft in drafts if (again := chain.again(draft, by_client.get(draft.client))) is not None]
        if not again:
            break
        asked = {message.metadata.dst_node_id for message in again}
        found = [reply for reply in found if reply.metadata.src_node_id not in asked] + list(
            view.send_and_receive(again)
        )
    return found


def _check_addresses(messages: Sequence[Message], view: RoundGrid) -> None:
    addressed = [message.metadata.dst_node_id for message in messages]
    if len(set(addressed)) < len(addressed) or not set(addressed) <= set(view.nodes):
        raise ValueError(
            f"it addressed nodes {addressed[:5]}…; expected each of {view.get_node_ids()[:5]}… at most once"
        )
