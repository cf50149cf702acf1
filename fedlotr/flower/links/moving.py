"""Bases that move: one coded core goes to everybody at a fold, and all go on between the next bases.

It stands in the place of the carried term, whose version is also that of the bases. The server keeps the messages of
all folds; a client is sent those that it missed, and comes by them to the bits that everybody has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord
from typing_extensions import override

from fedlotr.adapters.bases import Factors, threads
from fedlotr.adapters.moves import Rebase
from fedlotr.adapters.tuner import bases_of
from fedlotr.communication.basis_coding import coded, decoded
from fedlotr.communication.codecs import decode, encode
from fedlotr.communication.wire_form import Coding
from fedlotr.flower.certificate import Layer, layers_of
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Asks, Draft, Job, LinkTraits
from fedlotr.flower.links.carry import PARTS, STATE, CarriedTerm
from fedlotr.flower.links.codec import LOST
from fedlotr.flower.links.derived import PUBLIC, Arrays, Offer, Offered, asked_for
from fedlotr.flower.reading import value
from fedlotr.flower.records import to_record, to_tensors
from fedlotr.flower.workplace import Workplace
from fedlotr.streams import generator
from fedlotr.training.examples import Examples
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.moving import begin, fold, folded_names, head_of, next_bases, turn
from fedlotr.training.packing import Rows

AS_OF = "bases-of"
"""A record in a client's memory: the version of the bases that what its updates lost is of."""


class Fold(NamedTuple):
    """What everybody needs for one: the message of the core, and that of the next bases where they follow from neither
    a seed nor W. hashes, head: of an `Offer`, where clients make these by themselves.
    """

    core: npt.NDArray[np.uint8]
    basis: npt.NDArray[np.uint8] | None = None
    hashes: npt.NDArray[np.uint8] | None = None
    head: Arrays = MappingProxyType({})

    @property
    def offer(self) -> Offer | None:
        """What stands for the bases' message."""
        if self.hashes is None or self.basis is None:
            return None
        return Offer(hashes=self.hashes, head=self.head, codes=self.basis.tobytes())

    def arrays(self, version: int, *, whole: bool = False) -> Arrays:
        """By name, as a message has them. whole: with the bases themselves, whoever can make them."""
        named = {f"{version}.core": self.core}
        if self.basis is None:
            return named
        if (offer := self.offer) is None or whole:
            return {**named, f"{version}.basis": self.basis}
        return {**named, **offer.arrays(f"{version}.")}


class Mover:
    """One side's model, on which the folds are carried out.

    public: gives the rows of which gradients are taken, where this side takes them. offers: whether clients make bases
    of gradients by themselves, for whose sake the server makes them on as many threads as they have.
    """

    def __init__(
        self,
        model: TrainableModel,
        rebase: Rebase,
        coding: Coding,
        seed: int,
        public: Callable[[], tuple[Examples, Rows]] | None = None,
        *,
        offers: int | None = None,
    ) -> None:
        self.model, self.rebase = model, rebase
        self._coding, self._seed, self._public, self._offers = coding, seed, public, offers
        self._made: tuple[int, Mapping[str, Factors]] | None = None
        begin(model)
        self._both = model.core is not None and model.core.row.both
        values, folded = model.values(), folded_names(model)
        self._first = {name: values[name] for name in folded} if rebase.move.made_of == "start" else None

    def fold(self, tensors: Tensors) -> Fold:
        """On the server: the next version. tensors: all that are trained, as they were published."""
        version = self.model.carried.version + 1
        self.model.assign(tensors)
        cores = {name: tensors[name].numpy() for name in folded_names(self.model)}
        message = encode(self._coding.whole, cores, generator(self._seed, "fold", version))
        made = Fold(np.frombuffer(message, np.uint8))
        if self._both or self.rebase.move.derivable:
            self.follow(made)
            if self._both and self._first is None:  # as all that is trained, they go to clients by broadcasts
                began = {f"base_model.model.{name}.core_A": pair.A for name, pair in self._next(version).items()}
                self.model.assign({**self.model.values(), **began})
            return made
        fold(self.model, self._cores(made))
        pairs = self._next(version)
        made = made._replace(basis=np.frombuffer(coded(self._coding.basis, pairs, self._seed, version), np.uint8))
        bases = self._sent(made)
        if self._offers:
            offer = Offer.of(bases, head_of(self.model), b"")
            made = made._replace(hashes=offer.hashes, head=offer.head)
        self._go_on_between(bases)
        return made

    def follow(self, made: Fold, offered: Offered | None = None) -> None:
        """On either side: what a fold's messages say. offered: bases that this side is to make.

        Raises CodecError, and Asks with the model as it was.
        """
        move, before = self.rebase.move, self.model.carried
        if move.made_of == "product":
            turn(self.model, self._cores(made), move.make)
            return
        fold(self.model, self._cores(made), self._first)
        version = self.model.carried.version
        if self._both:
            return
        if made.basis is not None:
            self._go_on_between(self._sent(made))
        elif not offered:
            self._go_on_between(self._next(version))
        else:
            self.model.assign({**self.model.values(), **offered.head})
            if self._made is None or self._made[0] != version:  # it may have been made, and differ
                self._made = version, self._next(version)
            try:
                bases = offered.settled(
                    self._coding.basis, self._made[1], seed=self._seed, version=version, link=CarriedTerm.name
                )
            except Asks:
                self.model.carry(before)
                raise
            self._go_on_between(bases)

    def _next(self, version: int) -> dict[str, Factors]:
        taken = None if self.rebase.move.derivable or self._public is None else self._public()
        with threads(self._offers or torch.get_num_threads()):
            return next_bases(self.model, self.rebase, version, taken)

    def _go_on_between(self, bases: Mapping[str, Factors]) -> None:
        self.model.carry(replace(self.model.carried, bases=bases))

    def _cores(self, made: Fold) -> Tensors:
        shapes = {name: tuple(self.model.parameter(name).shape) for name in folded_names(self.model)}
        found = decode(self._coding.whole, made.core.tobytes(), shapes)
        return to_tensors(to_record(found))

    def _sent(self, made: Fold) -> dict[str, Factors]:
        assert made.basis is not None
        return decoded(self._coding.basis, made.basis.tobytes(), self.shapes)

    def pairs(self, offer: Offer, version: int, ties: Sequence[int]) -> Arrays:
        """What a client is sent that made these ties' bases otherwise."""
        return offer.pairs(self._coding.basis, self.shapes, ties, f"{version}.")

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Of A and B of each tie; of a B that is trained no column is sent."""
        core = self.model.core
        columns = 0 if core is not None and "B" in core.row.train else None
        return {
            name: (tuple(a.shape), (len(b), b.shape[1] if columns is None else columns))
            for name, (a, b) in bases_of(self.model.module).items()
        }


class Moving(CarriedTerm):
    """The carried term of a run whose bases move; of another run it is the plain one that stands in the chain."""

    traits = LinkTraits(in_evaluation=True, keeps_client_state=True)

    def __init__(self, mover: Mover, workplace: Workplace | None = None) -> None:
        super().__init__(mover.model.carried, workplace, mover.model)
        self._layers: tuple[int, list[Layer]] | None = None
        self.mover, self._start = mover, mover.model.carried
        self.folds: dict[int, Fold] = {}

    @classmethod
    @override
    def at_server(cls, run: Federation) -> CarriedTerm:
        return CarriedTerm.at_server(run) if run.mover is None else cls(run.mover)

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> CarriedTerm:
        recipe = workplace.recipe
        if recipe.rebase is None:
            return CarriedTerm.at_client(workplace, model)

        def public() -> tuple[Examples, Rows]:
            examples = workplace.public
            return examples, np.arange(len(examples))

        return cls(Mover(model, Rebase(**recipe.rebase), recipe.coding, recipe.seed, public), workplace)

    @override
    def in_words(self) -> str:
        return f"bases that move ({self.mover.rebase.how}, after every {self.mover.rebase.every})"

    @override
    def before(self, number: int, arrays: ArrayRecord) -> ArrayRecord:
        """Fold what the rounds so far have taught, where it is time to."""
        rebase = self.mover.rebase
        if rebase.versions(number - 1) == self.carry.version:
            return arrays
        self.mover.model.carry(self.carry)  # it may have had another round's, to be exported or asked
        made = self.mover.fold(to_tensors(arrays))
        self.carry = self.mover.model.carried
        self.folds[self.carry.version] = made
        folded = set(folded_names(self.mover.model))
        values, now = to_tensors(arrays), self.mover.model.values()
        return to_record({name: now[name] if name in folded else value for name, value in values.items()})

    @property
    def layers(self) -> list[Layer]:
        """How the certificate reads what is trained between the present bases."""
        if self._layers is None or self._layers[0] != self.carry.version:
            self._layers = self.carry.version, layers_of(self.mover.model)
        return self._layers[1]

    @override
    def records(self, since: int) -> dict[str, Any]:
        return self._records_since(since, self.carry.version)

    @override
    def newest(self) -> dict[str, Any]:
        """The bases themselves: whoever scores the model has no client's rows."""
        version = self.carry.version
        return self._records_since(max(version - 1, 0), max(version - 1, 0))

    @override
    def again(self, draft: Draft, asked: ConfigRecord) -> dict[str, Any]:
        since = self.holds.get(draft.client, 0)
        version, ties = asked_for(asked, since + 1, self.carry.version, len(self.mover.shapes))
        offer = self.folds[version].offer
        if offer is None:
            return super().again(draft, asked)
        draft.records.pop(PUBLIC, None)
        found = self._records_since(since, version)
        parts = {name: value(array) for name, array in found[PARTS].items()}
        return found | {PARTS: to_record({**parts, **self.mover.pairs(offer, version, ties)})}

    def _records_since(self, since: int, offered: int) -> dict[str, Any]:
        """For one who has a version. offered: up to which it makes bases by itself, where it may."""
        if not self.carry.version:
            return {}
        state: dict[str, Any] = {"version": self.carry.version, "since": since}
        missed = range(since + 1, self.carry.version + 1)
        parts = {
            name: array
            for version in missed
            for name, array in self.folds[version].arrays(version, whole=version > offered).items()
        }
        told = {STATE: ConfigRecord({**state, "sha256": bytes.fromhex(self.carry.sha256)})}
        return told | ({PARTS: to_record(parts)} if parts else {})

    @override
    def state(self) -> Mapping[str, Any]:
        found = super().state()
        return found and {
            **found,
            "folds": {v: {**made._asdict(), "head": dict(made.head)} for v, made in self.folds.items()},
        }

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        if state:
            self.folds = {int(version): Fold(**made) for version, made in state["folds"].items()}
            self.mover.model.carry(self.carry)

    @override
    def receive(self, job: Job) -> None:
        """Come to the version of a message, by what it brings as far as that is not here yet.

        Raises RuntimeError where it goes on from a version that this client never had.
        """
        if STATE not in job.records or self._workplace is None:
            return
        state, model = job.records[STATE], self.mover.model
        version, since = int(state["version"]), int(state["since"])
        if not model.carried.version:
            self._start = model.carried  # perhaps between bases that this message brought
        if model.carried.version != version:
            if not since <= model.carried.version < version or self._workplace.has_carry(version):
                model.carry(self._on_disk(since, version))
            if model.carried.version < version:
                brought = job.records[PARTS]
                for missing in range(model.carried.version + 1, version + 1):
                    core, basis = (brought.get(f"{missing}.{of}") for of in ("core", "basis"))
                    made = Fold(core.numpy(), None if basis is None else basis.numpy())
                    self.mover.follow(made, Offered(brought, f"{missing}."))
            self._workplace.save_carry(model.carried)
        self._sha256 = model.carried.sha256

    def _on_disk(self, since: int, version: int) -> Any:
        assert self._workplace is not None
        found = self._workplace.load_carry(max(since, 1), version)
        if found is None and since:
            raise RuntimeError(f"the bases of version {since}, which this message goes on from, are lost")
        return found or self._start

    @override
    def start(self, job: Job, values: Tensors) -> None:
        """Forget what its updates lost between other bases: it cannot be added to one between these."""
        version = self.mover.model.carried.version
        as_of = int(job.memory[AS_OF]["version"]) if AS_OF in job.memory else 0
        if LOST in job.memory and as_of != version:
            folded = set(folded_names(self.mover.model))
            job.memory[LOST] = ArrayRecord({name: a for name, a in job.memory[LOST].items() if name not in folded})
        job.memory[AS_OF] = ConfigRecord({"version": version})
