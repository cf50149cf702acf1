"""The base of our server strategies: one method combines the clients' updates, the rest is Flower's interface.

A concrete strategy is usually one method that reads like its paper's formula:

    class Median(Strategy):
        def combine(self, updates, server_round):
            return {name: np.median([u.arrays[name] for u in updates], axis=0) for name in updates[0].arrays}

The round loop validates and sorts the replies, certifies and casts the result, and saves; a strategy of Flower's own,
unchanged, gets the same care.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.flower.certificate import Product
from fedlotr.flower.fewest import Fewest
from fedlotr.flower.lazy import Decoded
from fedlotr.flower.links.objectives import CONTROL, CONTROL_VARIATES
from fedlotr.flower.links.ranks import block, padded
from fedlotr.flower.records import Arrays, to_record


@dataclass(frozen=True)
class Update:
    """One client's reply: its trained tensors after local training (float64), and its weight p_i before division.

    arrays: read-only, and in a run decoded from the reply whenever one is asked for, so that a strategy that goes
    tensor by tensor needs no memory for all clients' tensors; `.copy()` what is to be changed.
    rank: of the leading block that it trained, where ranks differ; the rest of its factors is zero here. None: all.
    control: the change of its control variates, where the strategy has such (`Strategy.controls`).
    """

    client: int
    arrays: Mapping[str, npt.NDArray[np.float64]]
    weight: float
    rank: int | None = None
    control: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)


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


class WithCarry(NamedTuple):
    """What `combine` may give instead of tensors alone: what the server is to merge into the model besides.

    carry: by layer (as `by_layer` names it) the factors of what is added to the carried term, in units of `B A`: the
    loop scales it by the s of `W x + s·B C A x`, as it does the adapter.
    """

    arrays: Mapping[str, npt.NDArray[np.float64]]
    carry: Mapping[str, Product]


class Strategy(FlowerStrategy):
    """Base class. Override `combine`; everything else has a default that suits one message and one reply a client.

    A checkpoint keeps the arrays and plain values among its attributes; a class with other state has `state()`, which
    returns arrays and plain values, and `load_state(state)`.

    averages: whether `combine` means to publish the weighted mean of the clients' updates, so that the certificate
    measures how far it is from that. Where it is False, `aggregation_error` is null.
    restarts: whether the factors of one round are not those of the next, but drawn or turned anew, so that nothing a
    client keeps of them can be added to its next update.
    mean_before_step: set by a server optimizer in `combine`: the mean before its step, which is certified.
    exact: whether what it publishes is that mean also where several factors move; the suite holds it to that.
    needs: the factors that must be in every update; a method whose clients send others is refused.
    ranks: client -> the rank that it is to train from now on, where the strategy says so and it is below its own.
    asks: what clients are to do besides plain training: keys of the train message's config with their values; which
    there are is said in `fedlotr.flower.links.objectives`.
    controls: whether they are to correct their gradients by control variates, and keep their own between rounds:
    `control` is then sent to them, and every `Update` has the change of the client's.
    """

    averages: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    controls: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    asks: Mapping[str, float | bool] = MappingProxyType({})
    mean_before_step: Arrays | None = None
    ranks: Mapping[int, int] = MappingProxyType({})
    _carry: Mapping[str, Product] = MappingProxyType({})

    @abstractmethod
    def combine(
        self, updates: Sequence[Update], server_round: int
    ) -> Mapping[str, npt.NDArray[np.float64]] | WithCarry:
        """The new trained tensors by name, from at least one update, sorted by client. Return float64."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same broadcast to every client of the round: the grid shows no others."""
        config["server-round"] = server_round
        config.update({**self.asks, **({CONTROL_VARIATES: True} if self.controls else {})})
        content = RecordDict({"arrays": arrays, "config": config})
        if self.controls:
            control = self.control(arrays)
            content[CONTROL] = to_record({name: value.astype(np.float32) for name, value in control.items()})
        return [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """`combine` on the replies' arrays, and the weighted mean of their losses."""
        updates, losses = [], []
        for reply in replies:
            content: Any = reply.content
            weight, loss = float(content["metrics"]["weight"]), content["metrics"].get("loss")
            client = content["client"]
            control = Decoded(content[CONTROL]) if self.controls else {}
            arrays = Decoded(content["arrays"])
            updates.append(Update(int(client["client"]), arrays, weight, client.get("rank"), control))
            losses.append(loss)
        if not updates:
            return None, None
        combined = self.combine(updates, server_round)
        if isinstance(combined, WithCarry):
            combined, self._carry = combined
        record = to_record(dict(combined))
        if None in losses:  # where privacy leaves no loss to tell
            return record, None
        return record, MetricRecord({"loss": float(np.average(losses, weights=[u.weight for u in updates]))})

    def merges(self, ranks: Sequence[int]) -> int:
        """The rank that a round of clients of these ranks adds to a layer's carried term; `doctor` reckons by it."""
        return 0

    def fewest(self) -> Fewest | None:
        """The clients that a round needs at least for what the strategy promises, and why; None: any number goes.

        A run that plans fewer is refused, and a round that is left with fewer, as clients fail, says so.
        """
        return None

    def take_carry(self) -> Mapping[str, Product]:
        """What the last `combine` wants merged, handed out once: the round loop asks."""
        taken = self._carry
        vars(self).pop("_carry", None)  # it is no state of ours, and would swell the checkpoints
        return taken

    def control(self, arrays: ArrayRecord) -> Arrays:
        """The server's control variates, one for each of the model's tensors; asked for where `controls` is set."""
        raise NotImplementedError(f"{type(self).__name__} says that it has control variates; give it `control`")

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
