"""Codecs around a round's messages, below every strategy: a strategy makes and sees tensors, bytes are what crosses.

An update is coded as the difference to what the client was sent, and the server adds what it decodes to what it holds
itself: what a broadcast's codec lost moves where a client starts, and never enters the model. With feedback a client
adds what its last message lost to its next one (Seide et al. 2014; Karimireddy et al. 2019). A broadcast by delta is
the difference to what the client holds; the server keeps the same, bit for bit, and the message's checksum says so.
Whoever holds nothing yet is sent the whole, coded as well: what that loses, the next delta makes up for. Where a
message has its client fold first, what is folded is zero on both sides, and the change is told of that.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord
from typing_extensions import override

from fedlotr.adapters.moves import Rebase
from fedlotr.communication.codecs import CodecError, Tensors, added, altered, decode, encode, shapes_of, witness
from fedlotr.communication.wire_form import Coding
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Draft, Job, Link, LinkTraits, Refused, Reply, Turn
from fedlotr.flower.links.carry import STATE
from fedlotr.flower.links.ranks import padded
from fedlotr.flower.reading import value
from fedlotr.flower.records import ARRAYS, Arrays, to_arrays, to_record
from fedlotr.flower.workplace import Workplace
from fedlotr.streams import generator
from fedlotr.training.model import TrainableModel
from fedlotr.training.moving import zeroed_names

CODED, WHOLE, STYPE = "coded", "whole", "fedlotr.codec"
"""The one array of a coded record, or of one that is no change of anything; and its type, in place of numpy's."""
LOST, HELD = "lost", "held"
"""Records in a client's state: what its last messages lost of each tensor, and what it was sent last, as decoded."""


def coded_record(message: bytes, name: str = CODED) -> ArrayRecord:
    """A message of a codec as a record."""
    return ArrayRecord({name: Array("uint8", (len(message),), STYPE, message)})


def coded_message(record: Any, name: str = CODED) -> bytes | None:
    """What `coded_record` was given; None for a record of tensors."""
    if not isinstance(record, ArrayRecord) or set(record) != {name} or record[name].stype != STYPE:
        return None
    return bytes(record[name].data)


def _plain(record: ArrayRecord) -> Tensors:
    return {name: value(array) for name, array in record.items()}


def received(
    content: Any,
    state: Any,
    coding: Coding,
    shapes: Mapping[str, tuple[int, ...]],
    zeroed: frozenset[str] = frozenset(),
) -> ArrayRecord:
    """The tensors that a train message brings to a client, which keeps them where the next ones are told by delta.

    shapes: of all that can be sent. zeroed: what a fold leaves at zero. Raises CodecError.
    """
    form = coding.broadcast
    record: ArrayRecord = content[ARRAYS]
    if (message := coded_message(record, WHOLE)) is not None:
        record = to_record(decode(coding.whole, message, shapes))
    elif (message := coded_message(record)) is not None:
        if HELD not in state:
            raise CodecError("it was sent a change of what it holds, and holds nothing")
        base = _folded(_plain(state[HELD]), content, zeroed)
        record = to_record(added(base, decode(form, message, shapes_of(base), witness(base))))
    if form.delta:
        state[HELD] = record
    return record


def _folded(held: Tensors, records: Any, zeroed: frozenset[str]) -> Tensors:
    """What a client holds once it has done what these records of a message say of folds."""
    if not zeroed or STATE not in records or records[STATE]["since"] == records[STATE]["version"]:
        return held
    return {name: np.zeros_like(tensor) if name in zeroed else tensor for name, tensor in held.items()}


def coded_update(
    tensors: Mapping[str, torch.Tensor], sent: ArrayRecord, state: Any, coding: Coding, stream: np.random.Generator
) -> ArrayRecord:
    """What goes up of a client's trained tensors. sent: as it was sent them. What is lost goes into its state.

    Raises CodecError for tensors that are not finite.
    """
    base = {name: value(sent[name]) for name in tensors}
    change: dict[str, npt.NDArray[Any]] = {name: t.double().numpy() - base[name] for name, t in tensors.items()}
    before = _plain(state[LOST]) if LOST in state else {}
    if coding.feedback:
        change = {name: step + before[name] if name in before else step for name, step in change.items()}
    tied = witness(base)
    message = encode(coding.update, change, stream, tied)
    arrived = decode(coding.update, message, shapes_of(change), tied)
    lost = {name: (step - arrived[name]).astype(np.float32) for name, step in change.items()}
    # What did not move in this round has lost nothing more.
    state[LOST] = to_record({**before, **lost})
    return coded_record(message)


class Codec(Link):
    """Tensors to bytes and back on both ways; on the server also what every client holds, and what updates lost."""

    name = "codec"
    traits = LinkTraits(keeps_client_state=True)

    def __init__(
        self, coding: Coding, seed: int, model: TrainableModel | None = None, zeroed: frozenset[str] = frozenset()
    ) -> None:
        self.coding, self._seed, self._model, self._zeroed = coding, seed, model, zeroed
        self.held: dict[int, Tensors] = {}
        """Where broadcasts are told by delta: client -> what it holds, bit for bit."""

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self | None:
        if not run.coding.at_work:
            return None
        zeroed = frozenset[str]() if run.mover is None else zeroed_names(run.mover.model, run.mover.rebase)
        return cls(run.coding, run.seed, zeroed=zeroed)

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self | None:
        recipe = workplace.recipe
        if not recipe.coding.at_work:
            return None
        zeroed = frozenset[str]() if recipe.rebase is None else zeroed_names(model, Rebase(**recipe.rebase))
        return cls(recipe.coding, recipe.seed, model, zeroed)

    @override
    def in_words(self) -> str:
        up = [f"{self.coding.codec} up"] if self.coding.update.coded else []
        down = [f"{self.coding.broadcast_codec} down"] if self.coding.broadcast.coded else []
        return f"codec {', '.join(up + down)}"

    @override
    def begin(self, turn: Turn) -> None:
        super().begin(turn)
        self._forget()

    def _forget(self) -> None:
        self.meant: dict[int, Tensors] = {}
        """Client -> the tensors that its message is about."""
        self.sent: dict[int, Tensors] = {}
        """Client -> these as it decodes them."""
        self._known: dict[int, tuple[ArrayRecord, Tensors]] = {}
        self._whole: dict[int, tuple[ArrayRecord, Tensors]] = {}

    @override
    def outgoing(self, draft: Draft) -> None:
        record = draft.records.get(ARRAYS)
        if isinstance(record, ArrayRecord):
            draft.meant, self.meant[draft.client] = record, self._tensors(record)
            draft.records[ARRAYS], self.sent[draft.client] = self._coded(record, draft)

    def _coded(self, record: ArrayRecord, draft: Draft) -> tuple[ArrayRecord, Tensors]:
        """What a client is sent in place of some tensors, and what that makes there."""
        client = draft.client
        form, tensors = self.coding.broadcast, self._tensors(record)
        if not form.coded:
            return record, tensors
        if form.delta and client in self.held:
            base = _folded(self.held[client], draft.records, self._zeroed)
            change = {name: tensor.astype(np.float64) - base[name] for name, tensor in tensors.items()}
            tied = witness(base)
            message = encode(form, change, generator(self._seed, "broadcast codec", self.turn.number, client), tied)
            return coded_record(message), added(base, decode(form, message, shapes_of(base), tied))
        if id(record) not in self._whole:
            whole = self.coding.whole
            message = encode(whole, tensors, generator(self._seed, "broadcast codec", self.turn.number))
            self._whole[id(record)] = coded_record(message, WHOLE), decode(whole, message, shapes_of(tensors))
        return self._whole[id(record)]

    def _tensors(self, record: ArrayRecord) -> Tensors:
        if id(record) not in self._known:
            self._known[id(record)] = record, _plain(record)  # the record too, so that its id stays its own
        return self._known[id(record)][1]

    @override
    def arrived(self, client: int, records: dict[str, Any]) -> None:
        if client in self.sent and isinstance(records.get(ARRAYS), ArrayRecord):
            try:
                records[ARRAYS] = self._decoded(records[ARRAYS], client, self.turn.expected(client))
            except CodecError as error:
                raise Refused("damaged message", f"its update cannot be decoded: {error}") from error

    def _decoded(self, record: ArrayRecord, client: int, expected: ArrayRecord) -> ArrayRecord:
        shapes = {name: tuple(array.shape) for name, array in expected.items()}
        base = {name: self.sent[client][name] for name in shapes}
        if self.coding.update.coded:
            message = coded_message(record)
            if message is None:
                raise CodecError(f"it is not coded as {self.coding.codec}")
            change: Mapping[str, npt.NDArray[Any]] = decode(self.coding.update, message, shapes, witness(base))
        else:
            arrays = _plain(record)
            if shapes_of(arrays) != shapes or any(array.dtype != np.float32 for array in arrays.values()):
                return record  # whoever checks replies says what is wrong with it
            change = {name: array.astype(np.float64) - base[name] for name, array in arrays.items()}
        return to_record(added({name: self.meant[client][name] for name in shapes}, change))

    def altered(self, client: int, record: Any, change: Callable[[bytes], bytes]) -> ArrayRecord | None:
        """An update with other codes under a right checksum, which no `encode` writes; None of a damaged one."""
        shapes = {name: tuple(array.shape) for name, array in self.turn.expected(client).items()}
        tied = witness({name: self.sent[client][name] for name in shapes})
        if (message := coded_message(record)) is None:
            return None
        try:
            return coded_record(altered(self.coding.update, message, shapes, tied, change))
        except CodecError:
            return None

    @override
    def commit(self, good: Sequence[Reply]) -> None:
        if self.coding.broadcast.delta:
            self.held |= {reply.client: self.sent[reply.client] for reply in good if reply.client in self.sent}
        self._forget()  # what a round's clients were sent need not stay in memory until the next one

    @override
    def row(self) -> dict[str, Any]:
        return {"broadcast_error": self.broadcast_error()} if self.coding.broadcast.lossy else {}

    def broadcast_error(self) -> float | None:
        """||decoded - meant|| / ||meant|| of the tensors that clients were sent, over all of them; 0/0 is None."""
        pairs = [(self.sent[client], meant) for client, meant in self.meant.items()]
        gone = sum(_square(s[name].astype(np.float64) - m[name]) for s, m in pairs for name in m)
        size = sum(_square(m[name]) for _, m in pairs for name in m)
        return float(np.sqrt(gone / size)) if size else None

    @override
    def recall(self, memories: Mapping[int, Any]) -> None:
        """A checkpoint keeps it once, with the clients; that it is the same is what the next checksum says."""
        self.held = {client: _plain(records[HELD]) for client, records in memories.items() if HELD in records}

    @override
    def receive(self, job: Job) -> None:
        """The tensors of a train message; kept where the next ones are told by delta."""
        assert self._model is not None
        if self.coding.broadcast.coded:
            job.records[ARRAYS] = received(job.records, job.memory, self.coding, self._shapes, self._zeroed)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that travel."""
        assert self._model is not None
        return {name: tuple(tensor.shape) for name, tensor in self._model.values().items()}

    @override
    def send(self, job: Job) -> None:
        """Raises CodecError for tensors that are not finite."""
        if self.coding.update.coded:
            stream = generator(self._seed, "codec", job.round, job.client)
            sent = job.records[ARRAYS]
            job.arrays = coded_update(job.trained.tensors, sent, job.memory, self.coding, stream)


def _square(x: npt.NDArray[Any]) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def lost_by(before: Any, now: Any, like: ArrayRecord, coding: Coding) -> Arrays | None:
    """By how much a client's own tensors are ahead of what the server decoded; None where nobody can see its state.

    before, now: its memory around the round. like: the tensors that moved, with the run's shapes. It is read from the
    simulated client's own memory: in a real federation the server would not know, and it costs no byte here either.
    """
    if LOST not in now:
        return None
    gone = {name: array for name, array in to_arrays(now[LOST]).items() if name in like}
    if coding.feedback and LOST in before:
        fed = to_arrays(before[LOST])
        gone = {name: array - fed[name] if name in fed else array for name, array in gone.items()}
    return {name: padded(array, tuple(like[name].shape)) for name, array in gone.items()}
