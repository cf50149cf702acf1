"""Faults on purpose, put in at the server's doorstep: between what the engine gives and the check of replies.

So the checks meet them as they would meet a client's own. A client that has really failed suffers nothing more; what
is refused for a fault on purpose never ends a run. A client that has answered nothing yet has no reply to bring again.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from fedlotr.fleet.faults import FAULTS, FaultPlan
from fedlotr.flower.chain import Chain
from fedlotr.flower.lazy import LazyRecord
from fedlotr.flower.link import Draft, Reply
from fedlotr.flower.links.codec import Codec
from fedlotr.flower.private import CLIENT_RAISED, set_answered_id
from fedlotr.flower.reading import value
from fedlotr.flower.records import ARRAYS, ASKS
from fedlotr.flower.replies import Failure, first_line
from fedlotr.flower.round_grid import RoundGrid
from fedlotr.reporting.documents import AllFaults, FaultCounts, OfFaults
from fedlotr.streams import generator

log = logging.getLogger("fedlotr")

CRASHED = "CrashOnPurpose: --fault crash"


@dataclass(frozen=True, kw_only=True)
class Past:
    """A reply that has come. answered: the id of the message that it answers. records: what it said."""

    answered: str
    records: RecordDict


@dataclass(kw_only=True)
class Faults:
    """What a run's faults come to.

    plan: who suffers which. counted: over all rounds. put_in_now: kind -> in this round. under_way: client -> kind, of
    messages that nothing has become of yet. past: client -> its last reply, where faults need it.
    """

    plan: FaultPlan
    seed: int
    counted: dict[str, FaultCounts]
    put_in_now: dict[str, int] = field(default_factory=dict)
    under_way: dict[int, str] = field(default_factory=dict)
    past: dict[int, Past] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: FaultPlan, seed: int, state: Mapping[str, Any]) -> "Faults":
        """state: what `state` gave of the rounds before; empty before the first."""
        nothing: dict[str, FaultCounts] = {kind: {"put_in": 0, "refused": 0, "used": 0} for kind in plan.shares}
        past = {client: _unpacked(packed) for client, packed in state.get("past", {}).items()}
        counted = state.get("counted", nothing)
        return cls(plan=plan, seed=seed, counted=counted, under_way=dict(state.get("under_way", {})), past=past)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values and arrays."""
        past = {client: _packed(self.past[client]) for client in sorted(self.past)}
        return {"counted": self.counted, "under_way": self.under_way, "past": past}

    def next_round(self) -> "Faults":
        """For a round that may yet fail."""
        counted: dict[str, FaultCounts] = {kind: {**counts} for kind, counts in self.counted.items()}
        nothing = dict.fromkeys(self.plan.shares, 0)
        return Faults(
            plan=self.plan,
            seed=self.seed,
            counted=counted,
            put_in_now=nothing,
            under_way=dict(self.under_way),
            past=dict(self.past),
        )

    def kind(self, number: int, client: int) -> str | None:
        """What a client suffers that is asked in a round, whatever the engine; None: nothing."""
        return self.plan.kind(generator(self.seed, "fault", number, client).random())

    def put_in(
        self, number: int, drafts: Sequence[Draft], replies: Sequence[Message], view: RoundGrid, chain: Chain
    ) -> list[Message]:
        """What stands before the door instead of these replies; the ledger is told what has crossed."""
        sent = {draft.client: draft.message for draft in drafts}
        came: list[Message] = []
        last: list[Message] = []
        for reply in replies:
            client = view.nodes[reply.metadata.src_node_id]
            kind = self.kind(number, client)
            instead = None
            if kind is not None and _has_trained(reply):
                instead = self._instead(kind, client, reply, sent[client], chain)
            if kind is None or instead is None:
                came.append(reply)
                self._remember(client, reply)
                continue
            self._suffers(number, client, kind)
            view.count_instead(reply, instead)
            if kind == "reordered":
                last = [*instead, *last]
            else:
                came += instead
            if not FAULTS[kind].spoils:
                self._remember(client, reply)
        return came + last

    def _instead(self, kind: str, client: int, reply: Message, asked: Message, chain: Chain) -> list[Message] | None:
        """What comes in a reply's place; None where this fault is none of a reply's, or cannot be put in here."""
        match kind:
            case "dropout":
                return []
            case "crash":
                return [Message(Error(CLIENT_RAISED, CRASHED), reply_to=asked)]
            case "nan" | "shape":
                spoilt = _spoilt(kind, client, reply.content, chain)
                return None if spoilt is None else [Message(spoilt, reply_to=asked)]
            case "duplicate":
                return [reply, reply]
            case "reordered":
                return [reply]
            case "replayed" | "stale" if (past := self.past.get(client)) is not None:
                again = Message(past.records, reply_to=asked)
                if kind == "replayed":
                    set_answered_id(again, past.answered)
                return [again]
        return None

    def _remember(self, client: int, reply: Message) -> None:
        if self.plan.recalls and _has_trained(reply):
            records = {name: _plain(record) for name, record in reply.content.items()}
            self.past[client] = Past(answered=reply.metadata.reply_to_message_id, records=RecordDict(records))

    def slower(self, number: int, client: int) -> float:
        """How many times as long a client takes that is about to be asked."""
        kind = self.kind(number, client)
        if kind is None or not FAULTS[kind].takes_time:
            return 1.0
        self._suffers(number, client, kind)
        return self.plan.times

    def copies(self, client: int) -> int:
        """How often its reply comes that is on its way."""
        return 2 if self.under_way.get(client) == "duplicate" else 1

    def _suffers(self, number: int, client: int, kind: str) -> None:
        """One more is put in."""
        self.put_in_now[kind] += 1
        self.counted[kind]["put_in"] += 1
        self.under_way[client] = kind
        log.info("round %d: client %d: fault %s on purpose: %s", number, client, kind, FAULTS[kind].text)

    def settle(
        self, number: int, good: Sequence[Reply], failures: Mapping[int, Failure], lost: Collection[str]
    ) -> set[int]:
        """Count what has become of messages; returns the clients that are excused, since what failed was put in.

        lost: kinds of failures that are no refusals: what came was good, and too late.
        """
        excused = set()
        for client in sorted({reply.client for reply in good} | failures.keys()):
            if (kind := self.under_way.pop(client, None)) is None:
                continue
            failure = failures.get(client)
            if failure is None:
                self.counted[kind]["used"] += 1
                log.info("round %d: client %d: used, with %s on purpose", number, client, kind)
            elif failure.kind not in lost:
                self.counted[kind]["refused"] += 1
                reason = first_line(failure.reason)
                log.info("round %d: client %d: refused, with %s on purpose: %s", number, client, kind, reason)
                if FAULTS[kind].spoils:
                    excused.add(client)
        return excused


def row_of(faults: Faults | None) -> OfFaults:
    """For metrics.jsonl."""
    return {} if faults is None else {"faults": faults.put_in_now}


def summary_of(faults: Faults | None) -> AllFaults:
    """For summary.json."""
    return {} if faults is None else {"faults": faults.counted}


def _has_trained(reply: Message) -> bool:
    """Whether there is an update in it, which a fault could spoil."""
    return reply.has_content() and ASKS not in reply.content and ARRAYS in reply.content


def _spoilt(kind: str, client: int, content: RecordDict, chain: Chain) -> RecordDict | None:
    """A reply whose first tensor has a NaN or another shape; a coded one under a right checksum. None of none."""
    record: Any = content[ARRAYS]
    codec = chain.of(Codec)
    if codec is not None and codec.coding.update.coded:
        change = _with_nan if kind == "nan" else _too_short
        coded = codec.altered(client, record, change)
        return None if coded is None else RecordDict({**content, ARRAYS: coded})
    try:
        name = next(name for name in record if record[name].shape)
        tensor = np.array(value(record[name]), np.float32, order="C")
    except Exception:  # a reply is what a client sends, and may hold anything: the checks say what
        return None
    if kind == "nan":
        tensor.reshape(-1)[0] = np.nan
    else:
        tensor = np.append(tensor.reshape(-1), np.float32(0))
    return RecordDict({**content, ARRAYS: ArrayRecord({**record, name: Array(tensor)})})


def _with_nan(codes: bytes) -> bytes:
    """In all codecs codes begin with a float32 or a bfloat16, and of either all ones are a NaN."""
    return b"\xff" * min(4, len(codes)) + codes[4:]


def _too_short(codes: bytes) -> bytes:
    return codes[:-1]


def _plain(record: Any) -> Any:
    """With nothing that lies in files of the engine's."""
    return record.plain() if isinstance(record, LazyRecord) else record


def _packed(past: Past) -> dict[str, Any]:
    records: dict[str, Any] = {
        name: [
            (key, array.dtype, tuple(array.shape), array.stype, np.frombuffer(array.data, np.uint8))
            for key, array in record.items()
        ]
        if isinstance(record, ArrayRecord)
        else record
        for name, record in past.records.items()
    }
    return {"answered": past.answered, "records": records}


def _unpacked(packed: Mapping[str, Any]) -> Past:
    records: dict[str, Any] = {
        name: ArrayRecord({key: Array(dtype, shape, stype, data.tobytes()) for key, dtype, shape, stype, data in found})
        if isinstance(found, list)
        else found
        for name, found in packed["records"].items()
    }
    return Past(answered=packed["answered"], records=RecordDict(records))
