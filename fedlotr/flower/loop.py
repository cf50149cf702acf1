"""The round loop: what holds for every strategy, ours, a user's or Flower's, is done here and not in the strategy.

A round samples clients, lets the strategy make the messages, sends them, checks and sorts the replies, lets the
strategy aggregate, certifies the result, casts it to the wire's numbers, and hands the finished round on.
"""

import copy
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.adapters.carry import Carry, in_words
from fedlotr.communication.codecs import Tensors
from fedlotr.communication.ledger import Entry, total
from fedlotr.errors import FedlotrError
from fedlotr.flower.blame import blaming
from fedlotr.flower.carried import add_carry, additions, lost, merged
from fedlotr.flower.certificate import Layer, Weighted, aggregation_error, codec_error, transport_error
from fedlotr.flower.coding import RoundCoding, lost_by
from fedlotr.flower.lazy import Decoded
from fedlotr.flower.moments import MOMENTS, add_moments, expected_moments, mean_moments
from fedlotr.flower.ranks import Blocks
from fedlotr.flower.records import Arrays, to_arrays, to_record
from fedlotr.flower.released import all_lost, released
from fedlotr.flower.replies import METRICS, Failure, check_replies, first_line
from fedlotr.flower.round_grid import RoundGrid
from fedlotr.flower.state import ClientStates
from fedlotr.flower.strategy import Strategy
from fedlotr.flower.terms import CONTROL
from fedlotr.privacy.guard import ClientGuard, Guard
from fedlotr.said import say
from fedlotr.streams import generator, stream_key
from fedlotr.training.results import Results
from fedlotr.wire_form import UNCODED, Coding

log = logging.getLogger("fedlotr")


class BudgetSpentError(FedlotrError):
    """Nobody who was to train in the round has enough of the privacy budget left."""


class TooManyFailuresError(FedlotrError):
    """More of a round's clients failed than the run allows; the last good state is on disk."""


@dataclass(frozen=True)
class Federation:
    """What the loop needs to know of a run; all else is the strategy's or the engine's affair.

    sampled: clients in a round. lr_factor: round -> what the clients' learning rates are multiplied by.
    basis: what a client receives at its first participation, or None. bases_sha256: what it must then compute with.
    layers: how the certificate reads the trained tensors. held_out: examples that the evaluate messages divide.
    method: for error messages. moving: round -> the tensors that clients send then; None: all, always.
    measure: further metrics, of what the model made of each test row.
    ranks: of each client; None: all have the run's, which is `rank`.
    mean_moments: whether means of AdamW's second moments travel beside them.
    guard: keeps the clients' privacy, where that was promised. coding: of what crosses, if anything is coded.
    """

    clients: int
    sampled: int
    rounds: int
    seed: int
    max_failed: float
    lr_factor: Callable[[int], float]
    basis: ArrayRecord | ConfigRecord | None
    bases_sha256: str
    layers: Sequence[Layer]
    held_out: int
    causal: bool
    method: str
    moving: Callable[[int], frozenset[str]] | None = None
    measure: Callable[[Results], dict[str, float | None]] | None = None
    ranks: Sequence[int] | None = None
    rank: int = 0
    mean_moments: bool = False
    guard: Guard | None = None
    coding: Coding = UNCODED


@dataclass
class State:
    """Where a run stands after a round: with the strategy's own state, all that the next round depends on."""

    arrays: ArrayRecord
    round: int = 0
    known: set[int] = field(default_factory=set)
    """Clients that have received the bases."""
    carry: Carry = field(default_factory=Carry)
    """What the server has merged into the model."""
    holds: dict[int, int] = field(default_factory=dict)
    """Client -> the version of it that the client has; a client that is not named has version 0."""
    moments: Arrays = field(default_factory=dict)
    """Where `mean_moments`: by tensor the mean of AdamW's second moments, and the weight it is corrected by."""
    held: dict[int, Tensors] = field(default_factory=dict)
    """Where broadcasts are told by delta: client -> what it holds, bit for bit."""


@dataclass(frozen=True)
class Round:
    """A finished round: its row of metrics.jsonl, its rows of the ledger, and why which client failed.

    replies: what each of the others said of its training.
    """

    metrics: dict[str, Any]
    entries: list[Entry]
    failures: dict[int, Failure]
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)


def draw_clients(clients: int, sampled: int, seed: int, server_round: int) -> list[int]:
    """The round's clients, sorted: drawn without replacement from a stream of this round alone."""
    return sorted(generator(seed, "sample", server_round).choice(clients, sampled, replace=False).tolist())


def sample_clients(federation: Federation, server_round: int) -> list[int]:
    """Of a federation; where whole clients are hidden, its guard draws others instead."""
    return draw_clients(federation.clients, federation.sampled, federation.seed, server_round)


def can_pay(federation: Federation, server_round: int) -> bool:
    """Whether anybody who is to train in a round has enough of the privacy budget left."""
    return federation.guard is None or bool(federation.guard.admitted(sample_clients(federation, server_round)))


def _cohort(federation: Federation, server_round: int) -> list[int]:
    """Who trains in a round. It may be nobody, where the guard draws. Raises BudgetSpentError."""
    guard, clients = federation.guard, sample_clients(federation, server_round)
    if guard is None:
        return clients
    admitted = guard.admitted(clients)
    if not admitted:
        raise BudgetSpentError(f"round {server_round}: what it would release is over the privacy budget")
    if left_out := sorted(set(clients) - set(admitted)):
        say(f"round {server_round}: clients {left_out} have spent their privacy budget and sit out")
    return guard.draw(server_round) if isinstance(guard, ClientGuard) else admitted


def nodes_by_client(grid: Grid) -> Sequence[int]:
    """Node ids by client: every engine of ours, and `FlowerGrid`, lists them in partition order."""
    return cast(Sequence[int], grid.get_node_ids())


def run_round(grid: Grid, strategy: FlowerStrategy, federation: Federation, state: State) -> Round:
    """Run the round after `state.round` and bring `state` up to date.

    Raises TooManyFailuresError or StrategyError, and then leaves `state` as it was.
    """
    started = time.monotonic()
    number = state.round + 1
    clients, guard = _cohort(federation, number), federation.guard
    nodes = nodes_by_client(grid)
    view = RoundGrid(grid, number, {nodes[client]: client for client in clients})
    # Flower's strategies draw from the global generator: seeded per round, a resumed run draws the same.
    random.seed(stream_key(federation.seed, "strategy", number))
    np.random.seed(stream_key(federation.seed, "strategy", number) % 2**32)

    config = ConfigRecord({"lr-factor": federation.lr_factor(number)})
    messages: list[Message] = []
    with blaming(strategy, number, federation.method, "configure_train"):
        if clients:  # Flower's strategies would wait for some
            messages = list(strategy.configure_train(number, state.arrays, config, view))
        _check_addresses(messages, view)
    kept = ClientStates(grid, clients)
    add_moments(messages, state.moments)
    newcomers = _add_basis(messages, view.nodes, federation.basis, state.known)
    add_carry(messages, view.nodes, state.carry, state.holds)
    blocks = Blocks(_ranks(strategy, federation))
    blocks.cut(messages, view.nodes)
    coder = RoundCoding(federation.coding, federation.seed, number, view.nodes, state.held)
    if federation.coding.at_work:
        coder.encode(messages)
    if guard is not None:
        guard.charge(number, sorted(view.nodes[message.metadata.dst_node_id] for message in messages))
    replies = view.send_and_receive(sorted(messages, key=lambda message: view.nodes[message.metadata.dst_node_id]))

    names = set(state.arrays) if federation.moving is None else federation.moving(number)
    expected = ArrayRecord({name: array for name, array in state.arrays.items() if name in names})
    carry_sha256 = state.carry.sha256 if state.carry.version else ""
    beside = {CONTROL: expected} if getattr(strategy, "controls", False) else {}
    if federation.mean_moments:
        beside[MOMENTS] = expected_moments(expected)
    wanted = partial(blocks.of, expected)
    keys = METRICS if guard is None or guard.hides_clients else METRICS - {"loss"}
    readable, damaged = coder.decode(replies, wanted) if federation.coding.at_work else (replies, {})
    good, failures = check_replies(
        readable, messages, view.nodes, wanted, federation.bases_sha256, carry_sha256, beside, keys
    )
    failures |= damaged
    blocks.pad(good, view.nodes, expected)
    kept.restore(failures)
    for client, failure in failures.items():
        log.warning("round %d: client %d failed and is left out: %s", number, client, failure.reason)
    central = isinstance(guard, ClientGuard)
    # Where clients are hidden, one that failed counts as one that changed nothing: stopping for it would tell of it.
    if all_lost(messages, replies) if central else not good or len(failures) > federation.max_failed * len(messages):
        raise TooManyFailuresError(
            f"round {number}: {len(failures)} of {len(messages)} clients failed (--max-failed "
            f"{federation.max_failed}); {_some(failures)}"
        )
    with blaming(strategy, number, federation.method, "aggregate_train"):
        seen = good
        if isinstance(guard, ClientGuard):
            seen = [released(guard, expected, good)]
        elif type(strategy).aggregate_train is not Strategy.aggregate_train:
            seen = list(map(_copy, good))  # some of Flower's strategies pop arrays out of the replies
        aggregated, metrics = strategy.aggregate_train(number, seen)
        published = _published(aggregated, expected)
        start = to_arrays(state.arrays)
        added = additions(strategy, federation.layers, start)
    # What did not move in this round stays.
    published = ArrayRecord({name: published.get(name, array) for name, array in state.arrays.items()})

    mean, sent, carry = to_arrays(published), _cast(published, state.arrays), merged(state.carry, added)
    error = None
    weighted = _weighted(good, start)
    if getattr(strategy, "averages", False) and not central:
        error = aggregation_error(federation.layers, start, _certified(strategy, mean), weighted, added)
    if federation.coding.update.lossy:
        lost_on_the_way = None if central else _codec_error(federation, kept, good, weighted, start, expected)
    else:
        lost_on_the_way = transport_error(
            federation.layers, start, mean, to_arrays(sent), added, partial(lost, state.carry, carry, added)
        )
    if added:
        log.info("round %d: the model carries %s", number, in_words(carry.terms.values()))
    row: dict[str, Any] = {
        "round": number,
        "loss": None,
        "clients": len(messages),
        "failed": len(failures),
        "failures": {str(client): failure.kind for client, failure in failures.items()},
        "train_loss": _loss(metrics, good) if guard is None else None,
        "bytes_up": total(view.entries, "wire_bytes", direction="up"),
        "bytes_down": total(view.entries, "wire_bytes", direction="down"),
        "aggregation_error": error,
        "transport_error": lost_on_the_way,
        **({"broadcast_error": coder.broadcast_error()} if federation.coding.broadcast.lossy else {}),
        "epsilon": None if guard is None else guard.epsilon(),
        "train_seconds": time.monotonic() - started,
        "evaluate_seconds": None,
    }
    if federation.mean_moments:
        state.moments = mean_moments(good, state.moments)
    state.arrays, state.round = sent, number
    state.known |= newcomers - set(failures)
    state.holds |= {view.nodes[message.metadata.src_node_id]: state.carry.version for message in good}
    if federation.coding.broadcast.delta:
        answered = [view.nodes[message.metadata.src_node_id] for message in good]
        state.held |= {client: coder.sent[client] for client in answered if client in coder.sent}
    state.carry = carry
    said = [(int(reply.content["client"]["client"]), dict(reply.content["metrics"])) for reply in good]  # type: ignore[arg-type]
    return Round(row, view.entries, failures, dict(said))


def _ranks(strategy: FlowerStrategy, federation: Federation) -> Sequence[int] | None:
    """Of each client in this round; None where all have the run's."""
    fewer = strategy.ranks if isinstance(strategy, Strategy) else {}
    if not fewer:
        return federation.ranks
    own = federation.ranks or [federation.rank] * federation.clients
    return [min(rank, fewer.get(client, rank)) for client, rank in enumerate(own)]


def _check_addresses(messages: Sequence[Message], view: RoundGrid) -> None:
    addressed = [message.metadata.dst_node_id for message in messages]
    if len(set(addressed)) < len(addressed) or not set(addressed) <= set(view.nodes):
        raise ValueError(
            f"it addressed nodes {addressed[:5]}…; expected each of {view.get_node_ids()[:5]}… at most once"
        )


def _add_basis(
    messages: Iterable[Message], nodes: Mapping[int, int], basis: ArrayRecord | ConfigRecord | None, known: set[int]
) -> set[int]:
    """Put the bases into the messages of clients that have none yet; returns those clients."""
    if basis is None:
        return set()
    newcomers = set()
    for message in messages:
        client = nodes[message.metadata.dst_node_id]
        if client not in known:
            message.content = RecordDict({**message.content, "basis": basis})
            newcomers.add(client)
    return newcomers


def _some(failures: Mapping[int, Failure]) -> str:
    """The first of each kind, in one line."""
    first: dict[str, str] = {}
    for client, failure in failures.items():
        first.setdefault(failure.kind, f"client {client}: {first_line(failure.reason)}")
    return "; ".join(first.values()) or "no client was asked"


def _certified(strategy: FlowerStrategy, published: Arrays) -> Arrays:
    """What is to be the mean of the updates: what a server optimizer starts its step from, or what is published."""
    before_step: Arrays | None = getattr(strategy, "mean_before_step", None)
    return published if before_step is None else published | before_step


def _weighted(good: Sequence[Message], start: Arrays) -> list[Weighted]:
    contents: list[Any] = [message.content for message in good]
    weights = [float(content["metrics"]["weight"]) for content in contents]
    total = sum(weights)
    return [Weighted(Decoded(c["arrays"], start), w / total) for c, w in zip(contents, weights, strict=True)]


def _codec_error(
    federation: Federation,
    kept: ClientStates,
    good: Sequence[Message],
    weighted: Sequence[Weighted],
    start: Arrays,
    moved: ArrayRecord,
) -> float | None:
    """What the updates' codec loses of their mean; None where an engine does not show what clients keep."""
    clients = [int(reply.content["client"]["client"]) for reply in good]  # type: ignore[arg-type]
    gone = [lost_by(kept, client, moved, federation.coding) for client in clients]
    seen = [one for one in gone if one is not None]
    if not good or len(seen) < len(good):
        return None
    return codec_error(federation.layers, start, weighted, seen)


def _loss(metrics: MetricRecord | None, good: Sequence[Message]) -> float:
    """The clients' mean training loss: the strategy's own figure, or else the weighted mean."""
    found = None if metrics is None else metrics.get("loss")
    if isinstance(found, int | float):
        return float(found)
    contents: list[Any] = [message.content for message in good]
    return float(
        np.average([c["metrics"]["loss"] for c in contents], weights=[c["metrics"]["weight"] for c in contents])
    )


def _copy(message: Message) -> Message:
    own = copy.copy(message)
    own.content = RecordDict({name: record.copy() for name, record in message.content.items()})
    return own


def _published(aggregated: ArrayRecord | None, before: ArrayRecord) -> ArrayRecord:
    """The strategy's result. None means that the model stays. Raises ValueError for one that cannot be a model."""
    if aggregated is None:
        return before
    if set(aggregated) != set(before):
        raise ValueError(f"it gave back tensors {sorted(aggregated)[:3]}…, expected {sorted(before)[:3]}…")
    for name, array in aggregated.items():
        if tuple(array.shape) != tuple(before[name].shape):
            raise ValueError(f"it gave {name} the shape {tuple(array.shape)}, expected {tuple(before[name].shape)}")
        if not np.isfinite(array.numpy()).all():
            raise ValueError(f"it gave {name} values that are not finite")
    return aggregated


def _cast(published: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """In the wire's dtypes and in the names' order."""
    return to_record({name: published[name].numpy().astype(like[name].dtype) for name in like})
