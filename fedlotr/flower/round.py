"""The round loop: what holds for every strategy, ours, a user's or Flower's, is done here and not in the strategy.

A round samples clients, lets the strategy make the messages, sends them, checks and sorts the replies, lets the
strategy aggregate, certifies the result, casts it to the wire's numbers, and hands the finished round on.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.adapters.carry import Carry, in_words
from fedlotr.communication.codecs import Tensors
from fedlotr.communication.ledger import Entry, total
from fedlotr.communication.wire_form import UNCODED, Coding
from fedlotr.errors import FedlotrError
from fedlotr.evaluation.results import Results
from fedlotr.flower.blame import blaming
from fedlotr.flower.certificate import Layer, Weighted, aggregation_error, codec_error, transport_error
from fedlotr.flower.fewest import fewest
from fedlotr.flower.lazy import Decoded
from fedlotr.flower.links.carry import add_carry, additions, lost, merged
from fedlotr.flower.links.codec import RoundCoding, lost_by
from fedlotr.flower.links.moments import MOMENTS, add_moments, expected_moments, mean_moments
from fedlotr.flower.links.objectives import CONTROL
from fedlotr.flower.links.ranks import Blocks
from fedlotr.flower.norms import Norms, Watch, begun_with, bounded, look_at
from fedlotr.flower.plugins import whoever_is_there
from fedlotr.flower.records import Arrays, to_arrays, to_record
from fedlotr.flower.released import all_lost, released
from fedlotr.flower.replies import METRICS, Failure, Weights, check_replies, first_line
from fedlotr.flower.round_grid import RoundGrid
from fedlotr.flower.state import ClientStates, not_finite
from fedlotr.flower.strategy import Strategy
from fedlotr.privacy.guard import ClientGuard, Guard
from fedlotr.said import say
from fedlotr.streams import generator, own_streams, stream_key

log = logging.getLogger("fedlotr")

SHOWN_KINDS, SHOWN_REASON = 8, 300
"""Of failures in an error: how many kinds, and characters of each one's reason."""


TELLS_WHO_CAME = (
    *("clients", "failed", "failures", "train_loss", "bytes_up", "bytes_down", "broadcast_error", "train_seconds"),
)
"""Of a row of metrics.jsonl, what grows with the round's cohort or says what it was like."""


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
    weights: what clients may say that they weigh. max_update_norm: of an update, which is clipped to it, or refused
    where `refuse_large`; None: any. watched: whether clients that stand out are named; no client of a baseline can
    harm another.
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
    weights: Weights = field(default_factory=Weights)
    max_update_norm: float | None = None
    refuse_large: bool = False
    watched: bool = True


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
    watch: Watch = field(default_factory=Watch)
    """What has been noticed of clients that stand out."""


@dataclass(frozen=True)
class Round:
    """A finished round: its row of metrics.jsonl, its rows of the ledger, and why which client failed.

    replies: what each of the others said of its training. Where whole clients are hidden, the row has nothing of what
    `TELLS_WHO_CAME`, and no client is named.
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
    number = state.round + 1
    # Flower's strategies draw from the global generators: seeded per round, a resumed run draws the same.
    with own_streams(stream_key(federation.seed, "strategy", number)):
        return _run_round(grid, strategy, federation, state, number)


def _run_round(grid: Grid, strategy: FlowerStrategy, federation: Federation, state: State, number: int) -> Round:
    started = time.monotonic()
    clients, guard = _cohort(federation, number), federation.guard
    nodes = nodes_by_client(grid)
    view = RoundGrid(grid, number, {nodes[client]: client for client in clients})

    config = ConfigRecord({"lr-factor": federation.lr_factor(number)})
    messages: list[Message] = []
    with blaming(strategy, number, federation.method, "configure_train"):
        if clients:  # Flower's strategies would wait for some
            with whoever_is_there(strategy, len(clients)):
                messages = list(strategy.configure_train(number, state.arrays, config, view))
        _check_addresses(messages, view)
    kept = ClientStates(grid, clients)
    add_moments(messages, state.moments)
    newcomers = _add_basis(messages, view.nodes, federation.basis, state.known)
    add_carry(messages, view.nodes, state.carry, state.holds)
    blocks = Blocks(_ranks(strategy, federation))
    blocks.cut(messages, view.nodes)
    names = set(state.arrays) if federation.moving is None else federation.moving(number)
    expected = ArrayRecord({name: array for name, array in state.arrays.items() if name in names})
    wanted = partial(blocks.of, expected)
    starts = begun_with(messages, view.nodes, wanted)
    coder = RoundCoding(federation.coding, federation.seed, number, view.nodes, state.held)
    if federation.coding.at_work:
        coder.encode(messages)
    if guard is not None:
        guard.charge(number, sorted(view.nodes[message.metadata.dst_node_id] for message in messages))
    replies = view.send_and_receive(sorted(messages, key=lambda message: view.nodes[message.metadata.dst_node_id]))

    carry_sha256 = state.carry.sha256 if state.carry.version else ""
    beside = {CONTROL: expected} if getattr(strategy, "controls", False) else {}
    if federation.mean_moments:
        beside[MOMENTS] = expected_moments(expected)
    keys = METRICS if guard is None or guard.hides_clients else METRICS - {"loss"}
    readable, damaged = coder.decode(replies, wanted) if federation.coding.at_work else (replies, {})
    good, failures = check_replies(
        readable, messages, view.nodes, wanted, federation.bases_sha256, carry_sha256, beside, keys, federation.weights
    )
    failures |= damaged
    central, norms = isinstance(guard, ClientGuard), Norms()
    if not central:
        refuse = federation.refuse_large
        good, large, norms = bounded(good, view.nodes, starts, federation.max_update_norm, refuse=refuse)
        failures |= large
    blocks.pad(good, view.nodes, expected)
    kept.restore(failures)
    for client, failure in failures.items():
        log.warning("round %d: client %d failed and is left out: %s", number, client, failure.reason)
    # Where clients are hidden, one that failed counts as one that changed nothing: stopping for it would tell of it.
    if all_lost(messages, replies) if central else not good or len(failures) > federation.max_failed * len(messages):
        raise TooManyFailuresError(
            f"round {number}: all clients failed, which is the program's fault; log.txt has their reasons"
            if central
            else f"round {number}: {len(failures)} of {len(messages)} clients failed (--max-failed "
            f"{federation.max_failed}); {_some(failures)}{_likely_cause(number, failures, messages, state.watch)}"
        )
    watch = replace(state.watch, told=set(state.watch.told))
    if federation.watched and not central:
        look_at(watch, number, good, view.nodes, norms)
        _tell_of_few(watch, number, strategy, good, messages)
    if central:
        _tell_of_one(watch, strategy)
    unfit = not_finite(strategy)
    with blaming(strategy, number, federation.method, "aggregate_train"):
        seen = good
        if isinstance(guard, ClientGuard):
            seen = [released(guard, expected, good)]
        elif type(strategy).aggregate_train is not Strategy.aggregate_train:
            seen = list(map(_copy, good))  # some of Flower's strategies pop arrays out of the replies
        aggregated, metrics = strategy.aggregate_train(number, seen)
        if aggregated is None and seen:
            say(
                f"{type(strategy).__name__} combined nothing of a round's updates, so the model stayed as it was: some "
                "of Flower's strategies do that where they have too few"
            )
        published = _published(aggregated, expected, norms.largest())
        start = to_arrays(state.arrays)
        try:
            added = additions(strategy, federation.layers, start)
            carry = merged(state.carry, added)
        except ValueError as problem:
            raise ValueError(f"{problem}{norms.largest()}") from problem
        if getattr(strategy, "controls", False):
            _check_controls(strategy.control(expected), norms.largest())  # type: ignore[attr-defined]
        if spoilt := sorted(not_finite(strategy) - unfit):  # a strategy's own infinities are its affair
            raise ValueError(f"what it keeps between rounds is not finite ({', '.join(spoilt)}){norms.largest()}")
    # What did not move in this round stays.
    published = ArrayRecord({name: published.get(name, array) for name, array in state.arrays.items()})

    mean, sent = to_arrays(published), _cast(published, state.arrays)
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
        **norms.row(),
        **({"clipped": len(norms.clipped)} if federation.max_update_norm is not None else {}),
        **({"broadcast_error": coder.broadcast_error()} if federation.coding.broadcast.lossy else {}),
        "epsilon": None if guard is None else guard.epsilon(),
        "train_seconds": time.monotonic() - started,
        "evaluate_seconds": None,
    }
    if central:
        log.info("round %d: %s", number, {name: row[name] for name in TELLS_WHO_CAME if name in row})
        row |= {name: None for name in TELLS_WHO_CAME if name in row} | {"failures": {}}
    if federation.mean_moments:
        state.moments = mean_moments(good, state.moments)
    state.arrays, state.round = sent, number
    state.known |= newcomers - set(failures)
    state.holds |= {view.nodes[message.metadata.src_node_id]: state.carry.version for message in good}
    if federation.coding.broadcast.delta:
        answered = [view.nodes[message.metadata.src_node_id] for message in good]
        state.held |= {client: coder.sent[client] for client in answered if client in coder.sent}
    state.carry, state.watch = carry, watch
    if central:  # who came is not told of either
        return Round(row, view.entries, {})
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
        first.setdefault(failure.kind, f"client {client}: {first_line(failure.reason)[:SHOWN_REASON]}")
    shown = list(first.values())[:SHOWN_KINDS]
    more = [f"and {len(first) - len(shown)} more kinds"] if len(first) > len(shown) else []
    return "; ".join(shown + more) or "no client was asked"


def _likely_cause(number: int, failures: Mapping[int, Failure], messages: Sequence[Message], watch: Watch) -> str:
    """Where most clients come to numbers that are not finite: that it is the model they were sent, and no fault of
    theirs; and the way back."""
    lost = sum(failure.not_finite for failure in failures.values())
    if number == 1 or 2 * lost <= len(messages):
        return ""
    text = (
        f"; {lost} of them came to numbers that are not finite, so the likely cause is not they but the model that "
        f"round {number - 1} published"
    )
    if watch.first is None:
        return f"{text}: by a learning rate too high, or by a harmful update"
    since = f"round {watch.first}" if watch.first == watch.last else f"rounds {watch.first} to {watch.last}"
    back = f"go back with --resume --resume-round {watch.first - 1}" if watch.first > 1 else "start a new run"
    return f"{text}, with updates far outside in it since {since}: {back}, and with --max-update-norm"


def _tell_of_few(
    watch: Watch, number: int, strategy: FlowerStrategy, good: Sequence[Message], messages: Sequence[Message]
) -> None:
    """Say where a round has fewer clients than its strategy needs: by failures, or who has no privacy budget left."""
    needed = fewest(strategy)
    if needed is None or len(good) >= needed.clients:
        return
    text = (
        f"round {number}: of {len(messages)} clients {len(good)} are left for {type(strategy).__name__}, which needs "
        f"{needed.clients}: {needed.why}"
    )
    if watch.once("few"):
        say(text)
    else:
        log.warning("%s", text)


def _tell_of_one(watch: Watch, strategy: FlowerStrategy) -> None:
    """Say where a strategy that compares clients is shown one noised mean of them all."""
    if fewest(strategy) is not None and watch.once("one"):
        say(
            f"{type(strategy).__name__} compares clients, and where they are hidden it sees their noised mean alone: "
            "what it publishes is that mean, and --clip-norm is all that bounds a client"
        )


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


def _published(aggregated: ArrayRecord | None, before: ArrayRecord, cause: str) -> ArrayRecord:
    """The strategy's result. None means that the model stays. Raises ValueError for one that cannot be a model.

    cause: what else is to be said of one that is not finite.
    """
    if aggregated is None:
        return before
    if set(aggregated) != set(before):
        raise ValueError(f"it gave back tensors {sorted(aggregated)[:3]}…, expected {sorted(before)[:3]}…")
    for name, array in aggregated.items():
        if tuple(array.shape) != tuple(before[name].shape):
            raise ValueError(f"it gave {name} the shape {tuple(array.shape)}, expected {tuple(before[name].shape)}")
        _check_finite(f"it gave {name}", array.numpy(), before[name].dtype, cause)
    return aggregated


def _check_controls(controls: Mapping[str, npt.NDArray[Any]], cause: str) -> None:
    for name, value in controls.items():
        _check_finite(f"its control variates have in {name}", value, "float32", cause)


def _check_finite(whose: str, value: npt.NDArray[Any], dtype: str, cause: str) -> None:
    """Raises ValueError for numbers that are not finite, or would not be in the dtype that travels."""
    if not np.isfinite(value).all():
        raise ValueError(f"{whose} values that are not finite{cause}")
    with np.errstate(over="ignore"):
        fits = np.isfinite(value.astype(dtype)).all()
    if not fits:
        raise ValueError(f"{whose} values up to {np.abs(value).max():.3g}, which {dtype} has no room for{cause}")


def _cast(published: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """In the wire's dtypes and in the names' order."""
    return to_record({name: published[name].numpy().astype(like[name].dtype) for name in like})
