"""What the program asks of a strategy: one record with defaults, also for strategies of other authors.

A strategy declares a trait by an attribute or method of its name, on the class or itself. `traits_of` alone reads it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    MultiKrum,
    QFedAvg,
)
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.adapters.methods import Method
from fedlotr.flower.fewest import Fewest, fewest_of_flowers

FLOWERS: dict[type[FlowerStrategy], dict[str, bool]] = {
    **{Bulyan: {"several": True}, QFedAvg: {"losses": True}},
    **{kind: {"remembers": True} for kind in (FedAvgM, FedAdagrad, FedAdam, FedYogi)},
}
"""What is known of Flower's own."""


def _nothing(ranks: Sequence[int]) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class StrategyTraits:
    """Each with what holds where a strategy says nothing.

    averages: whether `combine` means to publish the weighted mean of the clients' updates, so that the certificate
    measures how far it is from that; else `aggregation_error` is null. None: it says nothing of it, as Flower's own.
    exact: whether what it publishes is that mean also where several factors move; the suite holds it to that.
    needs: the factors that must be in every update; a method whose clients send others is refused.
    controls: whether clients are to correct their gradients by control variates, and keep their own between rounds:
    `control` is then sent to them, and every `Update` has the change of the client's.
    restarts: whether the factors of one round are not those of the next, but drawn or turned anew, so that nothing a
    client keeps of them can be added to its next update.
    asks: what clients are to do besides plain training: keys of the train message's config with their values; which
    there are is said in `fedlotr.flower.links.objectives`, `links.first_loss` and `links.draws`.
    ranks: client -> the rank that it is to train from now on, where that is below its own; None: it changes no ranks.
    merges: ranks of a round's clients -> the rank that they add to a layer's carried term; `doctor` reckons by it.
    fewest: the clients that a round needs at least for what the strategy promises, and why; None: any number goes.
    remembers: whether it keeps something of the factors from round to round that is of no use between other bases, such
    as moments of their steps.
    several: whether it fails on a single update. losses: whether it reads the clients' training losses.
    rooted: whether the server is to train the present model itself, on the public rows, in every round: `take_root`
    is then told what that came to.
    mean_before_step: set in `combine`, the same as `Combined.mean` says.
    """

    averages: bool | None = None
    exact: bool = False
    needs: frozenset[str] = frozenset()
    controls: bool = False
    restarts: bool = False
    asks: Mapping[str, float | bool] = field(default_factory=lambda: MappingProxyType({}))
    ranks: Mapping[int, int] | None = None
    merges: Callable[[Sequence[int]], int] = _nothing
    fewest: Callable[[], Fewest | None] = lambda: None
    remembers: bool = False
    several: bool = False
    losses: bool = False
    rooted: bool = False
    mean_before_step: Mapping[str, npt.NDArray[np.float64]] | None = None

    def combines(self, row: Method) -> bool:
        """Whether clients of a method send what it combines, in every round; to who needs A and B, ΔW is B A."""
        return self.gets(row) and not (self.needs >= {"A", "B"} and row.has_core)

    def gets(self, row: Method) -> bool:
        """Whether clients of a method send all that it needs."""
        return all(self.needs <= set(turn) for turn in row.sent)

    @property
    def factors_last(self) -> bool:
        """Whether what a client keeps of its factors is of those that it gets next."""
        return not self.restarts and self.ranks is None

    @property
    def remembers_factors(self) -> bool:
        """Whether it, or its clients for it, remembers factors, which is of no use where bases move between rounds."""
        return self.remembers or self.controls or not self.factors_last or bool(self.merges([1, 1]))


def traits_of(strategy: FlowerStrategy | type[FlowerStrategy]) -> StrategyTraits:
    """What a strategy says of itself, or what is known of Flower's own; of a class, without what its methods say."""
    names = [trait.name for trait in fields(StrategyTraits)]
    said: dict[str, Any] = {name: getattr(strategy, name) for name in names if hasattr(strategy, name)}
    if "needs" in said:
        said["needs"] = frozenset(said["needs"])  # here, where whoever asks expects that it may be wrong
    for kind, known in FLOWERS.items():
        said |= known if isinstance(strategy, kind) else {}
    if isinstance(strategy, MultiKrum | Bulyan | FedTrimmedAvg | FedMedian):
        said["fewest"] = partial(fewest_of_flowers, strategy)
    return StrategyTraits(**said)
