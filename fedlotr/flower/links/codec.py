"""Codecs around a round's messages, below every strategy: a strategy makes and sees tensors, bytes are what crosses.

An update is coded as the difference to what the client was sent, and the server adds what it decodes to what it holds
itself: what a broadcast's codec lost moves where a client starts, and never enters the model. With feedback a client
adds what its last message lost to its next one (Seide et al. 2014; Karimireddy et al. 2019). A broadcast by delta is
the difference to what the client holds; the server keeps the same, bit for bit, and the message's checksum says so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedlotr.communication.codecs import CodecError, Tensors, added, decode, encode, shapes_of, witness
from fedlotr.communication.wire_form import Coding
from fedlotr.flower.links.ranks import padded
from fedlotr.flower.reading import value
from fedlotr.flower.records import Arrays, to_arrays, to_record
from fedlotr.flower.replies import Failure
from fedlotr.flower.state import ClientStates
from fedlotr.streams import generator

CODED, STYPE = "coded", "fedlotr.codec"
"""The one array of a coded record, and what it is, in the place of numpy's format."""
LOST, HELD = "lost", "held"
"""Records in a client's state: what its last messages lost of each tensor, and what it was sent last, as decoded."""


def coded_record(message: bytes) -> ArrayRecord:
    """A message of a codec as a record."""
    return ArrayRecord({CODED: Array("uint8", (len(message),), STYPE, message)})


def coded_message(record: Any) -> bytes | None:
    """What `coded_record` was given; None for a record of tensors."""
    if not isinstance(record, ArrayRecord) or set(record) != {CODED} or record[CODED].stype != STYPE:
        return None
    return bytes(record[CODED].data)


def _plain(record: ArrayRecord) -> Tensors:
    return {name: value(array) for name, array in record.items()}


def holdings(states: Mapping[int, Any]) -> dict[int, Tensors]:
    """What every client holds that was sent something to go on from: of a resumed run, whose server held the same.

    A checkpoint keeps it once, with the clients; that it is the same is what the next message's checksum says.
    """
    return {client: _plain(records[HELD]) for client, records in states.items() if HELD in records}


def received(content: Any, state: Any, coding: Coding, shapes: Mapping[str, tuple[int, ...]]) -> ArrayRecord:
    """The tensors that a train message brings to a client, which keeps them where the next ones are told by delta.

    shapes: of all that can be sent. Raises CodecError.
    """
    form = coding.broadcast
    record: ArrayRecord = content["arrays"]
    if form.coded and (message := coded_message(record)) is not None:
        if not form.delta:
            record = to_record(decode(form, message, shapes))
        elif HELD in state:
            base = _plain(state[HELD])
            record = to_record(added(base, decode(form, message, shapes_of(base), witness(base))))
        else:
            raise CodecError("it was sent a change of what it holds, and holds nothing")
    if form.delta:
        state[HELD] = record
    return record


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


class RoundCoding:
    """The server's side in one round.

    nodes: node id -> client. held: client -> what it holds, where broadcasts are told by delta.
    """

    def __init__(
        self, coding: Coding, seed: int, server_round: int, nodes: Mapping[int, int], held: Mapping[int, Tensors]
    ) -> None:
        self.coding, self._seed, self._round = coding, seed, server_round
        self._nodes, self._held = nodes, held
        self.meant: dict[int, Tensors] = {}
        """Client -> the tensors that its message is about."""
        self.sent: dict[int, Tensors] = {}
        """Client -> these as it decodes them."""
        self._known: dict[int, tuple[ArrayRecord, Tensors]] = {}
        self._whole: dict[int, tuple[ArrayRecord, Tensors]] = {}

    def encode(self, messages: Sequence[Message]) -> None:
        """Put coded records in place of the tensors of each message."""
        for message in messages:
            content: Any = message.content
            if not isinstance(content.get("arrays"), ArrayRecord):
                continue
            client = self._nodes[message.metadata.dst_node_id]
            record, self.sent[client] = self._coded(content["arrays"], client)
            self.meant[client] = self._tensors(content["arrays"])
            message.content = RecordDict({**content, "arrays": record})

    def _coded(self, record: ArrayRecord, client: int) -> tuple[ArrayRecord, Tensors]:
        """What a client is sent in place of some tensors, and what that makes there."""
        form, tensors = self.coding.broadcast, self._tensors(record)
        if not form.coded or (form.delta and client not in self._held):
            return record, tensors
        if form.delta:
            base = self._held[client]
            change = {name: tensor.astype(np.float64) - base[name] for name, tensor in tensors.items()}
            tied = witness(base)
            message = encode(form, change, generator(self._seed, "broadcast codec", self._round, client), tied)
            return coded_record(message), added(base, decode(form, message, shapes_of(base), tied))
        if id(record) not in self._whole:
            message = encode(form, tensors, generator(self._seed, "broadcast codec", self._round))
            self._whole[id(record)] = coded_record(message), decode(form, message, shapes_of(tensors))
        return self._whole[id(record)]

    def _tensors(self, record: ArrayRecord) -> Tensors:
        if id(record) not in self._known:
            self._known[id(record)] = record, _plain(record)  # the record too, so that its id stays its own
        return self._known[id(record)][1]

    def decode(
        self, replies: Sequence[Message], expected: Callable[[int], ArrayRecord]
    ) -> tuple[list[Message], dict[int, Failure]]:
        """The replies with tensors in them, and why those of other clients cannot be decoded.

        expected: client -> the tensors that its reply has.
        """
        found: list[Message] = []
        failures: dict[int, Failure] = {}
        for reply in replies:
            client = self._nodes[reply.metadata.src_node_id]
            content: Any = reply.content if reply.has_content() else {}
            if client in self.sent and isinstance(content.get("arrays"), ArrayRecord):
                try:
                    arrays = self._decoded(content["arrays"], client, expected(client))
                except CodecError as error:
                    failures[client] = Failure("damaged message", f"its update cannot be decoded: {error}")
                    continue
                reply.content = RecordDict({**content, "arrays": arrays})
            found.append(reply)
        return found, failures

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

    def broadcast_error(self) -> float | None:
        """||decoded - meant|| / ||meant|| of the tensors that clients were sent, over all of them; 0/0 is None."""
        pairs = [(self.sent[client], meant) for client, meant in self.meant.items()]
        gone = sum(_square(s[name].astype(np.float64) - m[name]) for s, m in pairs for name in m)
        size = sum(_square(m[name]) for _, m in pairs for name in m)
        return float(np.sqrt(gone / size)) if size else None


def _square(x: npt.NDArray[Any]) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def lost_by(states: ClientStates, client: int, like: ArrayRecord, coding: Coding) -> Arrays | None:
    """By how much a client's own tensors are ahead of what the server decoded; None where nobody can see its state.

    like: the tensors that moved, with the run's shapes. It is read from the simulated client's own memory: in a real
    federation the server would not know, and it costs no byte here either.
    """
    before, now = states.before(client), states.now(client)
    if LOST not in now:
        return None
    gone = {name: array for name, array in to_arrays(now[LOST]).items() if name in like}
    if coding.feedback and LOST in before:
        fed = to_arrays(before[LOST])
        gone = {name: array - fed[name] if name in fed else array for name, array in gone.items()}
    return {name: padded(array, tuple(like[name].shape)) for name, array in gone.items()}
