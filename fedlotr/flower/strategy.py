"""The base of our server strategies: one method combines the clients' updates, the rest is Flower's interface.

A concrete strategy is usually one method that reads like its paper's formula:

    class Median(Strategy):
        def combine(self, updates, server_round):
            return {name: np.median([u.arrays[name] for u in updates], axis=0) for name in updates[0].arrays}

The round loop validates and sorts the replies, certifies and casts the result, and saves; a strategy of Flower's own,
unchanged, gets the same care.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.flower.certificate import Product
from fedlotr.flower.lazy import Decoded
from fedlotr.flower.link import Reply
from fedlotr.flower.links.first_loss import first_loss
from fedlotr.flower.links.objectives import CONTROL, CONTROL_VARIATES
from fedlotr.flower.links.ranks import block, padded
from fedlotr.flower.records import ARRAYS, CLIENT, METRICS, Arrays, to_arrays, to_record
from fedlotr.flower.traits import traits_of


@dataclass(frozen=True)
class Update:
    """One client's reply: its trained tensors after local training (float64), and its weight p_i before division.

    arrays: read-only, and in a run decoded from the reply whenever one is asked for, so that a strategy that goes
    tensor by tensor needs no memory for all clients' tensors; `.copy()` what is to be changed.
    rank: of the leading block that it trained, where ranks differ; the rest of its factors is zero here. None: all.
    control: the change of its control variates, where the strategy has such (`Strategy.controls`).
    staleness: server steps since the model that it was trained on; its arrays are as if trained on the present one.
    first_loss: on its examples of the model that it was sent, in the unit in which it trains, where the strategy asks
    for that (`asks`); else None.
    """

    client: int
    arrays: Mapping[str, npt.NDArray[np.float64]]
    weight: float
    rank: int | None = None
    control: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    staleness: int = 0
    first_loss: float | None = None


def owned(update: Update, name: str) -> npt.NDArray[np.float64]:
    """Ones where a client trained an entry of a tensor, zeros where its rank leaves it out."""
    shape = update.arrays[name].shape
    return np.ones(shape) if update.rank is None else padded(block(name, np.ones(shape), update.rank), shape)


def weighted_mean(updates: Sequence[Update]) -> Arrays:
    """Σ w_i x_i / Σ w_i, accumulated in float64 in the given order (the loop's: by client)."""
    total = sum(update.weight for update in updates)
    mean: Arrays = {}
    for name, first in updates[0].arrays.items():
        accumulated = np.zeros_like(first)
        for update in updates:
            accumulated += update.weight * update.arrays[name]
        mean[name] = accumulated / total
    return mean


@dataclass(frozen=True)
class Combined:
    """What `combine` answers; tensors alone are `Combined(tensors)`.

    arrays: the new trained tensors by name, float64.
    carry: by layer (as `by_layer` names it) the factors of what the server is to merge into the model besides, in units
    of `B A`: the loop scales it by the s of `W x + s·B C A x`, as it does the adapter.
    mean: where `arrays` are a step from it, as a server optimizer's: the mean of the updates, which is certified then.
    ranks: client -> the rank that it is to train from now on, where that is below its own; a strategy that says so has
    an attribute `ranks` from the start, which is kept with its state.
    """

    arrays: Mapping[str, npt.NDArray[np.float64]]
    carry: Mapping[str, Product] = field(default_factory=dict)
    mean: Mapping[str, npt.NDArray[np.float64]] | None = None
    ranks: Mapping[int, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.arrays, self.carry))  # as when there were these two


WithCarry = Combined
"""What it was called when `carry` was all that it could say."""


class Answer(ArrayRecord):
    """The tensors of what `combine` answers as Flower wants them, and beside them the rest of it."""

    beside: Combined


class Strategy(FlowerStrategy):
    """Base class. Override `combine`; everything else has a default that suits one message and one reply a client.

    A checkpoint keeps the arrays and plain values among its attributes; a class with other state has `state()`, which
    returns arrays and plain values, and `load_state(state)`.

    What else the program asks of one is a trait, declared by an attribute or a method of its name, such as
    `averages = True`: `StrategyTraits` has them all, each with its default.
    """

    averages: ClassVar[bool] = False

    @abstractmethod
    def combine(self, updates: Sequence[Update], server_round: int) -> Mapping[str, npt.NDArray[np.float64]] | Combined:
        """The new trained tensors by name, from at least one update, sorted by client. Return float64."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same broadcast to every client of the round: the grid shows no others."""
        config["server-round"] = server_round
        traits = traits_of(self)
        config.update({**traits.asks, **({CONTROL_VARIATES: True} if traits.controls else {})})
        content = RecordDict({"arrays": arrays, "config": config})
        if traits.controls:
            control = self.control(arrays)
            content[CONTROL] = to_record({name: value.astype(np.float32) for name, value in control.items()})
        return [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As Flower has it, for whoever wraps a strategy; the round loop hands replies on by `answer`."""
        return self.answer([from_message(message) for message in replies], server_round)

    def answer(self, replies: Sequence[Reply], server_round: int) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """`combine` on the replies' arrays, and the weighted mean of their losses."""
        if not replies:
            return None, None
        controls = traits_of(self).controls
        updates = [
            Update(
                client=reply.client,
                arrays=Decoded(reply.arrays),
                weight=reply.weight,
                rank=reply.rank,
                control=Decoded(reply.records[CONTROL]) if controls else {},
                staleness=reply.staleness,
                first_loss=first_loss(reply.records),
            )
            for reply in replies
        ]
        found = self.combine(updates, server_round)
        combined = found if isinstance(found, Combined) else Combined(found)
        if combined.ranks:
            self.ranks = {**(traits_of(self).ranks or {}), **combined.ranks}
        record = Answer(dict(to_record(dict(combined.arrays))))
        record.beside = replace(combined, arrays={})  # else they would be there twice
        losses = [reply.loss for reply in replies if reply.loss is not None]
        if len(losses) < len(replies):  # where privacy leaves no loss to tell
            return record, None
        return record, MetricRecord({"loss": float(np.average(losses, weights=[reply.weight for reply in replies]))})

    def control(self, arrays: ArrayRecord) -> Arrays:
        """The server's control variates, one for each of the model's tensors; asked for where `controls` is set."""
        raise NotImplementedError(f"{type(self).__name__} says that it has control variates; give it `control`")

    def take_root(self, arrays: Arrays) -> None:
        """Told before `combine`, where `rooted` is set: what the server's own training on public rows came to."""
        raise NotImplementedError(f"{type(self).__name__} says that it is rooted; give it `take_root`")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: evaluation is the server's, on the test split."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None, as nothing was asked."""
        return None

    def summary(self) -> None:
        """Flower prints this where it runs the loop; ours writes its own table."""


class FromStart(Strategy):
    """Base of strategies that go by how far updates are from x, the model that a round's clients start from: `current`.

    root: what the server itself comes to from there, where the strategy asks for that (the trait `rooted`). Both are of
    one round alone, and no state.
    """

    def __init__(self) -> None:
        self.current: Arrays = {}
        self.root: Arrays = {}

    def take_root(self, arrays: Arrays) -> None:
        """Remember the server's own."""
        self.root = arrays

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember x."""
        self.current = to_arrays(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def state(self) -> dict[str, Any]:
        """All attributes but these."""
        return {key: value for key, value in vars(self).items() if key not in ("current", "root")}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        vars(self).update(state)


def ask(
    strategy: FlowerStrategy, server_round: int, replies: Sequence[Reply]
) -> tuple[ArrayRecord | None, MetricRecord | None, Combined]:
    """What any strategy makes of a round's replies: (its tensors, its metrics, what it answers beside them)."""
    if type(strategy).aggregate_train is Strategy.aggregate_train:
        arrays, metrics = cast(Strategy, strategy).answer(replies, server_round)
    else:
        arrays, metrics = strategy.aggregate_train(server_round, [as_message(reply) for reply in replies])
    beside = arrays.beside if isinstance(arrays, Answer) else Combined({})
    return arrays, metrics, beside if beside.mean else replace(beside, mean=traits_of(strategy).mean_before_step)


def from_message(message: Message) -> Reply:
    """A checked reply, from how one of Flower's strategies has it."""
    content: Any = message.content
    metrics, client = content[METRICS], content[CLIENT]
    return Reply(
        client=int(client["client"]),
        arrays=content[ARRAYS],
        weight=float(metrics["weight"]),
        examples=int(metrics.get("num-examples", 1)),
        loss=metrics.get("loss"),
        rank=client.get("rank"),
        records={name: record for name, record in content.items() if name not in (ARRAYS, METRICS, CLIENT)},
    )


def as_message(reply: Reply) -> Message:
    """A reply as Flower's strategies have it, who may change it."""
    metrics: dict[str, Any] = {"num-examples": reply.examples, "weight": reply.weight}
    rank = {} if reply.rank is None else {"rank": reply.rank}
    content = RecordDict(
        {
            ARRAYS: reply.arrays.copy(),
            METRICS: MetricRecord(metrics if reply.loss is None else {**metrics, "loss": reply.loss}),
            CLIENT: ConfigRecord({**reply.identity, "client": reply.client, **rank}),
            **{name: record.copy() for name, record in reply.records.items()},
        }
    )
    if reply.origin is None:
        return Message(content, 0, MessageType.TRAIN)
    own = copy.copy(reply.origin)
    own.content = content
    return own
