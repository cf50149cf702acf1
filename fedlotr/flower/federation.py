"""What the round loop is told of a run; all else is the strategy's or the engine's affair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord

from fedlotr.adapters.carry import Carry
from fedlotr.communication.wire_form import UNCODED, Coding
from fedlotr.evaluation.results import Evaluated
from fedlotr.fleet.draws import EVEN, Sampler
from fedlotr.fleet.faults import FaultPlan
from fedlotr.fleet.virtual_time import VirtualTime
from fedlotr.flower.certificate import Layer
from fedlotr.flower.records import Arrays
from fedlotr.privacy.guard import NoGuard


@dataclass(frozen=True)
class Weights:
    """What clients may say that they weigh. most: of a weight, and of a count of examples. uniform: all weigh 1."""

    most: float = 1e9
    uniform: bool = False


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A run as the round loop and the links know it.

    sampled: clients in a round. sampler: how they are drawn. lr_factor: round -> what the clients' learning rates are
    multiplied by.
    basis: what a client receives at its first participation, or None. bases_sha256: what it must then compute with.
    layers: how the certificate reads the trained tensors. held_out: examples that the evaluate messages divide.
    task: one of `TASK_KINDS`. method: for error messages. moving: round -> the tensors that clients send then; None:
    all, always. mover: what moves the bases, where they move. derived: where clients make bases by themselves, the
    server's `Derived`.
    measure: further metrics, of what the model made of each test row, and of what else was `further` evaluated.
    further: "choices" or "prompts" -> how many there are. answers: what an evaluate message of prompts says.
    ranks: of each client; None: all have the run's, which is `rank`. carried: what the model carries from the start.
    mean_moments: whether means of AdamW's second moments travel beside them.
    guard: keeps the clients' privacy. coding: of what crosses. links: the user's, as `chain.link_classes` finds them.
    weights: what clients may say that they weigh. max_update_norm: of an update, which is clipped to it, or refused
    where `refuse_large`; None: any. watched: whether clients that stand out are named; no client of a baseline can
    harm another. virtual: time, where it is; None: a round is whole, and takes what it takes. faults: on purpose.
    root: (round, the model's tensors, what it carries) -> what the server's own training on public rows makes of those
    that move; None: there are no such rows.
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
    task: str
    method: str
    moving: Callable[[int], frozenset[str]] | None = None
    measure: Callable[[Evaluated], dict[str, Any]] | None = None
    further: Mapping[str, int] = field(default_factory=dict)
    answers: Mapping[str, Any] = field(default_factory=dict)
    ranks: Sequence[int] | None = None
    rank: int = 0
    carried: Carry = field(default_factory=Carry)
    mover: Any = None
    derived: Any = None
    mean_moments: bool = False
    guard: NoGuard = field(default_factory=NoGuard)
    coding: Coding = UNCODED
    links: Sequence[str] = ()
    weights: Weights = field(default_factory=Weights)
    max_update_norm: float | None = None
    refuse_large: bool = False
    root: Callable[[int, ArrayRecord, Carry], Arrays] | None = None
    watched: bool = True
    virtual: VirtualTime | None = None
    faults: FaultPlan | None = None
    sampler: Sampler = EVEN
