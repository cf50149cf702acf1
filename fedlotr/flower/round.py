"""The round loop: what holds for every strategy, ours, a user's or Flower's, is done here and not in the strategy.

A round samples clients, lets the strategy draft the messages, runs the chain of links over them, sends, checks the
replies and runs the chain back, lets the strategy combine, certifies the result, casts it to the wire's numbers, and
hands the finished round on.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.adapters.carry import Carry, in_words
from fedlotr.communication.ledger import Entry, total
from fedlotr.errors import FedlotrError
from fedlotr.fleet.draws import EVEN, Known, Sampler
from fedlotr.flower.asking import Asking
from fedlotr.flower.blame import blaming
from fedlotr.flower.certificate import Layer, Product, Weighted, aggregation_error, codec_error, transport_error
from fedlotr.flower.chain import Chain
from fedlotr.flower.faults import Faults, row_of
from fedlotr.flower.federation import Federation
from fedlotr.flower.fit import check_controls, published
from fedlotr.flower.lazy import Decoded
from fedlotr.flower.link import Reply, Turn
from fedlotr.flower.links.carry import CarriedTerm, additions, lost
from fedlotr.flower.links.codec import lost_by
from fedlotr.flower.links.moving import Moving
from fedlotr.flower.norms import Norms, Watch
from fedlotr.flower.records import Arrays, to_arrays, to_record
from fedlotr.flower.replies import Failure
from fedlotr.flower.state import ClientStates, not_finite
from fedlotr.flower.strategy import Combined, ask
from fedlotr.flower.timed import OF_THE_FLEET, Clock, Gathered, TimedRound
from fedlotr.flower.traits import traits_of
from fedlotr.flower.trouble import look, weigh_failures
from fedlotr.reporting.documents import Arrival, Errors, MetricsRow, TrainedRow, under
from fedlotr.said import say
from fedlotr.streams import generator, own_streams, stream_key

log = logging.getLogger("fedlotr")

TELLS_WHO_CAME = (
    *("clients", "failed", "failures", "train_loss", "bytes_up", "bytes_down", "broadcast_error", "train_seconds"),
)
"""Of a row of metrics.jsonl, what grows with the round's cohort or says what it was like."""


class BudgetSpentError(FedlotrError):
    """Nobody who was to train in the round has enough of the privacy budget left."""


@dataclass
class State:
    """Where a run stands after a round: with the strategy's own state, all that the next round depends on."""

    arrays: ArrayRecord
    round: int = 0
    chain: Chain = field(default_factory=lambda: Chain([]))
    """The server's links, with what each knows; made by the first round where there is none yet."""
    watch: Watch = field(default_factory=Watch)
    """What has been noticed of clients that stand out."""
    clock: Clock = field(default_factory=Clock)
    """Virtual time, and what is under way in it."""
    faults: Faults | None = None
    """What the faults on purpose have come to, in a run that has some; made as the chain is."""
    known: Known | None = None
    """What the server has seen of clients, which may decide whom it asks; made by the first round."""

    @property
    def carry(self) -> Carry:
        """What the server has merged into the model."""
        link = self.chain.of(CarriedTerm)
        return Carry() if link is None else link.carry

    def layers(self, federation: Federation) -> Sequence[Layer]:
        """How the certificate reads the trained tensors, between the present bases."""
        link = self.chain.of(Moving)
        return federation.layers if link is None else link.layers


@dataclass(frozen=True)
class Round:
    """A finished round: its row of metrics.jsonl, its rows of the ledger, and why which client failed.

    replies: what each of the others said of its training. mean: what was certified, where it is not what was published.
    arrivals: what became of messages, in virtual time.
    Where whole clients are hidden, the row has nothing of what `TELLS_WHO_CAME`, and no client is named.
    """

    metrics: MetricsRow
    entries: list[Entry]
    failures: dict[int, Failure]
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)
    mean: Mapping[str, npt.NDArray[np.float64]] | None = None
    arrivals: Sequence[Arrival] = ()


def draw_clients(
    clients: int, sampled: int, seed: int, server_round: int, sampler: Sampler = EVEN, known: Known | None = None
) -> dict[int, float]:
    """The round's clients, in their order, each with its chance over that of an even draw.

    Drawn without replacement from a stream of this round alone. known: what was seen of them before (default: nothing).
    """
    stream = generator(seed, "sample", server_round)
    return sampler.draw(stream, np.arange(clients), sampled, known or Known.nothing(clients))


def sample_clients(federation: Federation, server_round: int, known: Known | None = None) -> dict[int, float]:
    """Of a federation; where whole clients are hidden, its guard draws others instead."""
    run = federation
    return draw_clients(run.clients, run.sampled, run.seed, server_round, run.sampler, known)


def can_pay(federation: Federation, server_round: int) -> bool:
    """Whether anybody who is to train in a round has enough of the privacy budget left."""
    if federation.virtual is not None:  # who that will be is seen when it is time
        return bool(federation.guard.admitted(range(federation.clients)))
    return bool(federation.guard.admitted(list(sample_clients(federation, server_round))))


def _cohort(federation: Federation, server_round: int, known: Known | None) -> dict[int, float]:
    """Who trains in a round, with their chances. It may be nobody, where the guard draws. Raises BudgetSpentError."""
    clients = sample_clients(federation, server_round, known)
    admitted = federation.guard.admitted(list(clients))
    if not admitted:
        raise BudgetSpentError(f"round {server_round}: what it would release is over the privacy budget")
    if left_out := sorted(set(clients) - set(admitted)):
        say(f"round {server_round}: clients {left_out} have spent their privacy budget and sit out")
    return {client: clients.get(client, 1.0) for client in federation.guard.draw(server_round, admitted)}


def _gather(asking: Asking, federation: Federation, clock: Clock, known: Known) -> Gathered:
    """What a round has to combine."""
    if federation.virtual is not None:
        return TimedRound(asking, federation, clock, known).gather()
    came = asking.ask(_cohort(federation, asking.number, known))
    return Gathered(came=came, trained=came.good, entries=asking.entries)


def run_round(grid: Grid, strategy: FlowerStrategy, federation: Federation, state: State) -> Round:
    """Run the round after `state.round` and bring `state` up to date.

    Raises TooManyFailuresError or StrategyError, and then leaves `state` as it was.
    """
    if not state.chain:
        state.chain = Chain.at_server(federation)
    if state.faults is None and federation.faults is not None:
        state.faults = Faults.of(federation.faults, federation.seed, {})
    # Flower's strategies draw from the global generators: seeded per round, a resumed run draws the same.
    with own_streams(stream_key(federation.seed, "strategy", state.round + 1)):
        return _run_round(grid, strategy, federation, state)


def _run_round(grid: Grid, strategy: FlowerStrategy, federation: Federation, state: State) -> Round:
    started, number = time.monotonic(), state.round + 1
    chain, guard = state.chain, federation.guard
    state.arrays = chain.before(number, state.arrays)

    faults = None if state.faults is None else state.faults.next_round()
    asking = Asking(grid, strategy, federation, chain, number, state.arrays, faults)
    clock, known = state.clock.copy(), state.known or Known.nothing(federation.clients)
    gathered = _gather(asking, federation, clock, known)
    came, entries = gathered.came, gathered.entries
    turn, good, failures, norms = came.turn, came.good, came.failures, came.norms
    excused = set() if faults is None else faults.settle(number, good, failures, OF_THE_FLEET)
    excused |= {client for client, failure in failures.items() if failure.kind in OF_THE_FLEET}
    failed = {client: failure for client, failure in failures.items() if client not in excused}
    weigh_failures(federation, number, state.watch, failed, came.replies, good, len(excused))

    watch = replace(state.watch, told=set(state.watch.told))
    look(watch, strategy, federation, number, good, came.asked, norms)
    combined = _combined(strategy, federation, state, turn, good, norms)
    mean, sent = to_arrays(combined.published), _cast(combined.published, state.arrays)
    kept = asking.kept if gathered.fresh else None
    errors = _errors(strategy, federation, state, turn, kept, good, combined, mean, to_arrays(sent))

    row: TrainedRow = {
        "round": number,
        "loss": None,
        "clients": came.asked,
        "failed": len(failures),
        "failures": {str(client): failure.kind for client, failure in failures.items()},
        "train_loss": None if guard.promises else _loss(combined.metrics, good),
        "bytes_up": total(entries, "wire_bytes", direction="up"),
        "bytes_down": total(entries, "wire_bytes", direction="down"),
        **errors,
        **norms.row(federation.max_update_norm),
        **chain.row(),
        **gathered.row(clock),
        **row_of(faults),
        "epsilon": guard.epsilon(),
        "train_seconds": time.monotonic() - started,
        "evaluate_seconds": None,
    }
    chain.commit(gathered.trained)
    state.arrays, state.round, state.watch, state.clock, state.faults = sent, number, watch, clock, faults
    state.known = known.after(asking.asked, {reply.client: reply.loss for reply in good})
    if guard.hides_clients:  # who came is not told of either
        log.info("round %d: %s", number, {name: under(row, name) for name in TELLS_WHO_CAME if name in row})
        hidden: dict[str, Any] = {name: None for name in TELLS_WHO_CAME if name in row} | {"failures": {}}
        return Round(cast(MetricsRow, row | hidden), entries, {})
    said = {reply.client: _said(reply) for reply in good}
    return Round(cast(MetricsRow, row), entries, failures, said, combined.answer.mean, arrivals=gathered.arrivals or ())


@dataclass(frozen=True, kw_only=True)
class _Combined:
    """What came of a strategy's turn. answer: what it said beside tensors. added: to the carried term, scaled.

    carry: with that.
    """

    published: ArrayRecord
    metrics: MetricRecord | None
    answer: Combined
    added: Mapping[str, Product]
    carry: Carry


def _combined(
    strategy: FlowerStrategy,
    federation: Federation,
    state: State,
    turn: Turn,
    good: Sequence[Reply],
    norms: Norms,
) -> _Combined:
    """Let the strategy combine, and check all that it gives. Raises StrategyError."""
    if traits_of(strategy).rooted and federation.root is not None:
        strategy.take_root(federation.root(turn.number, state.arrays, state.carry))  # type: ignore[attr-defined]
    unfit = not_finite(strategy)
    with blaming(strategy, turn.number, federation.method, "aggregate_train"):
        seen = state.chain.gather(list(good))
        aggregated, metrics, answer = ask(strategy, turn.number, seen)
        if aggregated is None and seen:
            say(
                f"{type(strategy).__name__} combined nothing of a round's updates, so the model stayed as it was: some "
                "of Flower's strategies do that where they have too few"
            )
        fitting = published(aggregated, turn.moved, norms.largest())
        try:
            added = additions(answer.carry, state.layers(federation), to_arrays(state.arrays))
            carry = state.chain.the(CarriedTerm).merge(added)
        except ValueError as problem:
            raise ValueError(f"{problem}{norms.largest()}") from problem
        if turn.controls:
            check_controls(strategy.control(turn.moved), norms.largest())  # type: ignore[attr-defined]
        if spoilt := sorted(not_finite(strategy) - unfit):  # a strategy's own infinities are its affair
            raise ValueError(f"what it keeps between rounds is not finite ({', '.join(spoilt)}){norms.largest()}")
    if added:
        log.info("round %d: the model carries %s", turn.number, in_words(carry.terms.values()))
    # What did not move in this round stays.
    whole = ArrayRecord({name: fitting.get(name, array) for name, array in state.arrays.items()})
    return _Combined(published=whole, metrics=metrics, answer=answer, added=added, carry=carry)


def _errors(
    strategy: FlowerStrategy,
    federation: Federation,
    state: State,
    turn: Turn,
    kept: ClientStates | None,
    good: Sequence[Reply],
    combined: _Combined,
    mean: Arrays,
    sent: Arrays,
) -> Errors:
    """The certificate: how far what is published is from the clients' mean, and what the way took of it.

    mean: what the strategy published, float64; sent: in the wire's numbers. kept: by the clients; None: what they lost
    of these updates is not to be had any more.
    """
    hidden, start, weighted = federation.guard.hides_clients, to_arrays(state.arrays), _weighted(good, state)
    error, layers = None, state.layers(federation)
    if traits_of(strategy).averages and not hidden:
        certified = mean | dict(combined.answer.mean or {})
        error = aggregation_error(layers, start, certified, weighted, combined.added)
    if federation.coding.update.lossy:
        lossy = (
            None if hidden or kept is None else _codec_error(federation, state, kept, good, weighted, start, turn.moved)
        )
    else:
        missed = partial(lost, state.carry, combined.carry, combined.added)
        lossy = transport_error(layers, start, mean, sent, combined.added, missed)
    return {"aggregation_error": error, "transport_error": lossy}


def _said(reply: Reply) -> dict[str, Any]:
    """What a client says of its training."""
    loss = {} if reply.loss is None else {"loss": reply.loss}
    return {"num-examples": reply.examples, "weight": reply.weight, **loss}


def _weighted(good: Sequence[Reply], state: State) -> list[Weighted]:
    start, total = to_arrays(state.arrays), sum(reply.weight for reply in good)
    return [Weighted(Decoded(reply.arrays, start), reply.weight / total) for reply in good]


def _codec_error(
    federation: Federation,
    state: State,
    kept: ClientStates,
    good: Sequence[Reply],
    weighted: Sequence[Weighted],
    start: Arrays,
    moved: ArrayRecord,
) -> float | None:
    """What the updates' codec loses of their mean; None where an engine does not show what clients keep."""
    memories = [(kept.before(reply.client), kept.now(reply.client)) for reply in good]
    gone = [lost_by(before, now, moved, federation.coding) for before, now in memories]
    seen = [one for one in gone if one is not None]
    if not good or len(seen) < len(good):
        return None
    return codec_error(state.layers(federation), start, weighted, seen)


def _loss(metrics: MetricRecord | None, good: Sequence[Reply]) -> float | None:
    """The clients' mean training loss: the strategy's own figure, or else the weighted mean; None of nobody."""
    found = None if metrics is None else metrics.get("loss")
    if not good:
        return None
    if isinstance(found, int | float):
        return float(found)
    losses = [cast(float, reply.loss) for reply in good]
    return float(np.average(losses, weights=[reply.weight for reply in good]))


def _cast(published: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """In the wire's dtypes and in the names' order."""
    return to_record({name: published[name].numpy().astype(like[name].dtype) for name in like})
