"""Rounds in virtual time: when messages arrive, which of them the server waits for, and what late ones count.

Clients train for real, on the model that they were given; when their update arrives is reckoned by the run's fleet.
Until then it is under way, also in the checkpoint. Whoever is asked at the same time trains together, whatever
the number of workers; events of the same second are taken by client.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from fedlotr.communication.ledger import Entry, total
from fedlotr.errors import FedlotrError
from fedlotr.fleet.draws import Known
from fedlotr.fleet.fleet import Fleet
from fedlotr.fleet.modes import OUTCOMES
from fedlotr.flower.asking import Asking, Came
from fedlotr.flower.federation import Federation
from fedlotr.flower.lazy import LazyArray, LazyRecord
from fedlotr.flower.link import Reply
from fedlotr.flower.links.carry import CarriedTerm
from fedlotr.flower.norms import Norms
from fedlotr.flower.reading import value
from fedlotr.flower.records import to_record
from fedlotr.flower.replies import Failure
from fedlotr.reporting.documents import Arrival, InVirtualTime
from fedlotr.streams import generator

log = logging.getLogger("fedlotr")

Tensors = Mapping[str, npt.NDArray[Any]]

USED, LATE, DROPPED, AWAY, MOVED = OUTCOMES
OF_THE_FLEET = frozenset(OUTCOMES) - {USED}
"""What keeps an update from being used that is nobody's failure."""


class NobodyThereError(FedlotrError):
    """No client is there any more, and none will come."""


@dataclass(kw_only=True)
class Flight:
    """A message to a client, and what comes of it.

    job: its number in the run. round: whose model it trains from. chance: of the client to be drawn, over that of an
    even draw. asked, ends: virtual seconds at which it is sent and
    at which its update has arrived, or is known to be lost. computing: seconds of it. trouble: why no update is used.
    reply: what arrives. norm: of its update. basis: version of the bases that it is between. down: bytes of the
    message. entries: the ledger's, of what goes up.
    """

    job: int
    client: int
    round: int
    asked: float
    ends: float
    chance: float = 1.0
    computing: float = 0.0
    trouble: Failure | None = None
    reply: Reply | None = None
    norm: float | None = None
    clipped: bool = False
    basis: int = 0
    down: int = 0
    entries: Sequence[Entry] = ()

    @property
    def order(self) -> tuple[float, int]:
        """In which flights arrive."""
        return self.ends, self.client


@dataclass(kw_only=True)
class Clock:
    """Where virtual time stands. now: seconds since the run began. jobs: messages sent so far.

    under_way: what has not arrived yet. models: round -> the tensors that those of its flights began with.
    """

    now: float = 0.0
    jobs: int = 0
    under_way: list[Flight] = field(default_factory=list)
    models: dict[int, Tensors] = field(default_factory=dict)

    def copy(self) -> "Clock":
        """For a round that may yet fail."""
        return replace(self, under_way=list(self.under_way), models=dict(self.models))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values and arrays."""
        return {
            "now": self.now,
            "jobs": self.jobs,
            "under_way": [_packed(flight) for flight in self.under_way],
            "models": {number: dict(tensors) for number, tensors in self.models.items()},
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Clock":
        """What `state` gave."""
        return cls(
            now=state["now"],
            jobs=state["jobs"],
            under_way=[_unpacked(flight) for flight in state["under_way"]],
            models=dict(state["models"]),
        )


def deserted(fleet: Fleet, clock: Clock) -> bool:
    """Whether nothing is under way, nobody is there, and nobody comes."""
    gone = not clock.under_way and not fleet.available(clock.now).any()
    return gone and fleet.next_arrival(clock.now) == math.inf


def _packed(flight: Flight) -> dict[str, Any]:
    update, trouble = flight.reply, flight.trouble
    found = vars(flight) | {"entries": [asdict(entry) for entry in flight.entries]}
    found["trouble"] = None if trouble is None else (trouble.kind, trouble.reason)
    if update is not None:
        found["reply"] = {
            "arrays": {name: value(array) for name, array in update.arrays.items()},
            "weight": update.weight,
            "examples": update.examples,
            "loss": update.loss,
            "says": dict(update.identity),
            "records": {name: {key: value(array) for key, array in one.items()} for name, one in _beside(update)},
        }
    return found


def _beside(update: Reply) -> list[tuple[str, ArrayRecord]]:
    """The tensors that came beside an update, such as a first loss, by the names of their records."""
    return [(name, one) for name, one in update.records.items() if isinstance(one, ArrayRecord)]


def _unpacked(found: Mapping[str, Any]) -> Flight:
    trouble, update = found["trouble"], found["reply"]
    if update is not None:
        said = {**update, "arrays": to_record(update["arrays"])}
        said["records"] = {name: to_record(one) for name, one in update.get("records", {}).items()}
        update = Reply(client=found["client"], identity=said.pop("says"), **said)
    entries = [Entry(**entry) for entry in found["entries"]]
    return Flight(
        **{**found, "trouble": None if trouble is None else Failure(*trouble), "reply": update, "entries": entries}
    )


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What a round has to combine, as `Came` has it. trained: replies of the last asking, for the links to keep.

    entries: the ledger's. fresh: whether all updates were trained in this round. arrivals: what became of messages, as
    far as is known now and was not before; None: time is not virtual.
    """

    came: Came
    trained: Sequence[Reply]
    entries: list[Entry]
    fresh: bool = True
    arrivals: list[Arrival] | None = None

    def row(self, clock: Clock) -> InVirtualTime:
        """For metrics.jsonl."""
        if self.arrivals is None:
            return {}
        used = [arrival["staleness"] for arrival in self.arrivals if arrival["outcome"] == USED]
        vain = [arrival for arrival in self.arrivals if arrival["outcome"] != USED]
        return {
            "virtual_seconds": clock.now,
            "used": len(used),
            "staleness_mean": sum(used) / len(used) if used else None,
            "bytes_in_vain": sum(arrival["bytes_down"] + arrival["bytes_up"] for arrival in vain),
            "under_way": len(clock.under_way),
        }


class TimedRound:
    """One round of a run in virtual time. It decides, as the `Way` of what is sent, when and whether that arrives.

    known: what has been seen of clients before.
    """

    def __init__(self, asking: Asking, federation: Federation, clock: Clock, known: Known) -> None:
        plan = federation.virtual
        assert plan is not None
        self._asking, self._run, self._plan, self._clock, self._known = asking, federation, plan, clock, known
        self._sent: dict[int, Flight] = {}
        """By client, what the present asking sends."""
        self._asked: set[int] = set()
        """Who need not be asked in this round any more."""
        self._close: Callable[[Sequence[Flight]], set[int]] = lambda flights: {flight.client for flight in flights}
        self._came: Came | None = None
        self._arrived: list[Flight] = []
        self._count = 0
        self._fold = asking.chain.the(CarriedTerm).carry.version if federation.mover is not None else 0

    def gather(self) -> Gathered:
        """Let time go on until the round is complete. Raises NobodyThereError, StrategyError."""
        if self._plan.mode == "async":
            self._until_buffered()
        else:
            self._whole()
        came = self._came or self._asking.ask({}, self)
        return self._gathered(came)

    # One asking, and a moment at which the round is over.

    def _whole(self) -> None:
        plan, run = self._plan, self._run
        if len(there := self._wait_for_somebody()):
            drawn = self._draw("sample", self._asking.number, there, plan.asked)
            self._close = self._in_time
            self._ask([self._flight(client, drawn[client]) for client in run.guard.admitted(list(drawn))])
            if not plan.stale:
                self._forget_late()
        self._arrive(self._due())

    def _due(self) -> list[Flight]:
        """What is known of by now, in order."""
        due = [flight for flight in self._clock.under_way if flight.ends <= self._clock.now]
        return sorted(due, key=lambda flight: flight.order)

    def _forget_late(self) -> None:
        """Of who has not been heard of when a round is over nothing more is expected."""
        for flight in self._sent.values():
            if flight.ends > (now := self._clock.now):
                flight.ends = now
                if flight.trouble is not None and flight.trouble.kind in OF_THE_FLEET:
                    flight.trouble = Failure(
                        LATE, f"nothing had come of it after {now - flight.asked:.3g} virtual seconds"
                    )

    def _wait_for_somebody(self) -> npt.NDArray[np.int64]:
        """Who is there and has nothing to do, once somebody has; nobody, where updates of before come first."""
        clock, fleet = self._clock, self._plan.fleet
        while not len(idle := self._idle()) and not self._arrived:
            coming = min([fleet.next_arrival(clock.now), *(flight.ends for flight in clock.under_way)])
            if coming == math.inf:
                raise self._nobody()
            clock.now = max(coming, clock.now)
            self._arrive(self._due())
        return idle

    def _nobody(self) -> NobodyThereError:
        number, now = self._asking.number, self._clock.now
        return NobodyThereError(f"round {number}: after {now:.0f} virtual seconds no client is there any more")

    def _idle(self) -> npt.NDArray[np.int64]:
        there = self._plan.fleet.available(self._clock.now).copy()
        there[[flight.client for flight in self._clock.under_way]] = False
        there[list(self._asked)] = False
        return np.flatnonzero(there)

    def _in_time(self, good: Sequence[Flight]) -> set[int]:
        """The clients whose updates come before the round is over; time goes on until then."""
        clock, plan = self._clock, self._plan
        ends = [flight.ends for flight in self._sent.values()]
        last = max(ends, default=clock.now)
        by_time = sorted(good, key=lambda flight: flight.order)
        if plan.mode == "over-select" and len(by_time) >= plan.wanted:
            by_time = by_time[: plan.wanted]
            last = by_time[-1].ends
        elif plan.mode == "deadline" and last > (limit := clock.now + plan.deadline):
            before = [flight for flight in clock.under_way if flight.trouble is None]
            coming = [flight.ends for flight in (*by_time, *before)]
            last = max(limit, min(coming, default=limit))  # an empty-handed server waits for the first one
        clock.now = last
        return {flight.client for flight in by_time if flight.ends <= last}

    # Without rounds of clients: whoever is done makes room for the next one.

    def _until_buffered(self) -> None:
        clock, plan = self._clock, self._plan
        waiting: list[Flight] = []
        while True:
            for flight in self._due():
                self._arrive([flight])
                if len(self._used) == plan.wanted:
                    self._flush(waiting)
                    return
            room = plan.asked - len(clock.under_way) - len(waiting)
            idle = self._idle()
            if room and len(idle):
                chosen = self._draw("asked", clock.jobs, idle, room)
                waiting += [self._flight(client, chance) for client, chance in chosen.items()]
                self._asked.update(chosen)
                room -= len(chosen)
            ahead = min((flight.ends for flight in clock.under_way), default=math.inf)
            if waiting and min(map(self._soonest, waiting)) <= ahead:
                self._flush(waiting)
                continue
            if not clock.under_way and self._arrived:
                return  # with fewer: who might still come has been asked already, or may stay away for long
            if room:
                ahead = min(ahead, plan.fleet.next_arrival(clock.now))
            if ahead == math.inf:
                raise self._nobody()
            clock.now = ahead

    def _soonest(self, flight: Flight) -> float:
        """A second before which nothing is known of a client that has not trained yet."""
        fleet, link = self._plan.fleet, self._link(flight.client)
        latency = 0.0 if link is None else link.latency
        share = fleet.drops_out(flight.client, flight.job)
        least = 2 * latency + flight.computing if share is None else share * (latency + flight.computing)
        return min(flight.asked + least, fleet.until(flight.client, flight.asked))

    def _flush(self, waiting: list[Flight]) -> None:
        """Have those train who were asked and have not yet: together, since the model is still the same."""
        if waiting:
            self._ask(sorted(waiting, key=lambda flight: flight.client))
            waiting.clear()

    # What both have in common.

    def _draw(self, purpose: str, number: int, there: npt.NDArray[np.int64], wanted: int) -> dict[int, float]:
        """So many of who is there, or all, from a stream of their own."""
        stream = generator(self._run.seed, purpose, number)
        return self._run.sampler.draw(stream, there, min(wanted, len(there)), self._known)

    def _flight(self, client: int, chance: float) -> Flight:
        """A message that is sent now."""
        clock, plan, faults = self._clock, self._plan, self._asking.faults
        clock.jobs += 1
        slower = 1.0 if faults is None else faults.slower(self._asking.number, client)
        return Flight(
            job=clock.jobs - 1,
            client=client,
            round=self._asking.number,
            asked=clock.now,
            ends=clock.now,
            chance=chance,
            computing=plan.fleet.compute_seconds(client, plan.operations[client]) * slower,
            basis=self._fold,
        )

    def _ask(self, flights: Sequence[Flight]) -> None:
        """Have clients train."""
        clock, number = self._clock, self._asking.number
        if self._came is not None:
            self._asking.chain.commit(self._came.good)  # what links know of clients, before they go on
        self._sent = {flight.client: flight for flight in flights}
        self._came = came = self._asking.ask({flight.client: flight.chance for flight in flights}, self)
        updates = {reply.client: reply for reply in came.good}
        for client, flight in self._sent.items():
            flight.reply, flight.trouble = updates.get(client), came.failures.get(client)
            flight.norm, flight.clipped = came.norms.of.get(client), client in came.norms.clipped
        self._count += came.asked
        clock.under_way += flights
        if self._plan.stale:
            for flight in flights:
                flight.reply = flight.reply and _kept(flight.reply)
            clock.models[number] = {name: value(array) for name, array in self._asking.arrays.items()}

    def lost(self, client: int, size: Callable[[], int]) -> Failure | None:
        """Where a client vanishes before it has trained."""
        fleet, link, flight = self._plan.fleet, self._link(client), self._sent[client]
        spent = flight.computing + (0.0 if link is None else link.latency + 8 * size() / link.down)
        share, leaves = fleet.drops_out(client, flight.job), fleet.until(client, flight.asked)
        vanishes = math.inf if share is None else flight.asked + share * spent
        flight.ends = min(flight.asked + spent, vanishes, leaves)
        if flight.ends == flight.asked + spent:
            return None
        if vanishes <= leaves:
            return Failure(DROPPED, f"it dropped out {vanishes - flight.asked:.3g} virtual seconds after it was asked")
        return Failure(AWAY, f"it went offline {leaves - flight.asked:.3g} virtual seconds after it was asked")

    def missed(self, good: Sequence[Reply], entries: Sequence[Entry]) -> Mapping[int, Failure]:
        """Updates that are cut off on their way, or that the round does not wait for."""
        for flight in self._sent.values():
            own = [entry for entry in entries if entry.client == flight.client]
            flight.down = total(own, "wire_bytes", direction="down")
            flight.entries = [entry for entry in own if entry.direction == "up"]
        failures, in_the_air = {}, []
        for reply in good:
            flight, link = self._sent[reply.client], self._link(reply.client)
            if link is not None:
                copies = 1 if self._asking.faults is None else self._asking.faults.copies(reply.client)
                flight.ends += link.latency + 8 * total(flight.entries, "wire_bytes") / copies / link.up
            if (leaves := self._plan.fleet.until(reply.client, flight.asked)) < flight.ends:
                flight.ends, flight.entries = leaves, ()
                failures[reply.client] = Failure(AWAY, "it went offline while its update was on its way")
            else:
                in_the_air.append(flight)
        in_time, now = self._close(in_the_air), self._clock.now
        for flight in in_the_air:
            if flight.client in in_time:
                continue
            if not self._plan.stale:
                failures[flight.client] = Failure(LATE, "the round was over")
            elif flight.ends <= now:  # at the same moment as the last that the round waited for: just after it
                flight.ends = math.nextafter(now, math.inf)
        return failures

    def _link(self, client: int) -> Any:
        links = self._plan.fleet.links
        return None if links is None else links[client]

    def _arrive(self, flights: Sequence[Flight]) -> None:
        """These are known of now."""
        gone = set(map(id, flights))
        self._clock.under_way = [flight for flight in self._clock.under_way if id(flight) not in gone]
        for flight in flights:
            if flight.trouble is None and flight.basis != self._fold:
                flight.trouble = Failure(
                    MOVED, "the bases moved while it trained, and its core is between those before"
                )
            self._asked.add(flight.client)
        self._arrived += flights

    @property
    def _used(self) -> list[Flight]:
        return [flight for flight in self._arrived if flight.trouble is None]

    def _gathered(self, came: Came) -> Gathered:
        number, clock = self._asking.number, self._clock
        good, factors = [], {}
        for flight in sorted(self._used, key=lambda flight: flight.client):
            update = flight.reply
            assert update is not None
            if flight.round != number or self._plan.mixing is not None:
                update, factors[flight.client] = self._translated(flight, update)
            good.append(update)
        failures = {flight.client: flight.trouble for flight in self._arrived if flight.trouble is not None}
        for client, failure in failures.items():
            if failure.kind in OF_THE_FLEET:
                log.info("round %d: client %d: %s", number, client, failure.reason)
        norms = {flight.client: flight.norm for flight in self._used if flight.norm is not None}
        clipped = [flight.client for flight in self._used if flight.clipped]
        down = [entry for entry in self._asking.entries if entry.direction == "down"]
        by_client = sorted(self._arrived, key=lambda flight: flight.client)
        up = [replace(entry, round=number) for flight in by_client for entry in flight.entries]
        here = {flight.round for flight in clock.under_way}
        clock.models = {at: tensors for at, tensors in clock.models.items() if at in here}
        return Gathered(
            came=replace(
                came, asked=self._count, good=good, failures=failures, norms=Norms(norms, clipped), replies=[]
            ),
            trained=came.good,
            fresh=all(flight.round == number for flight in self._used),
            arrivals=[_arrival(flight, number, factors.get(flight.client, 1.0)) for flight in self._arrived],
            entries=down + up,
        )

    def _translated(self, flight: Flight, update: Reply) -> tuple[Reply, float]:
        """A late update as if trained on the present model, and what it counts of a fresh one.

        FedBuff: x + s(τ) (x_i - x_v), the change since the model of its own; FedAsync: x + α s(τ) (x_i - x).
        """
        age = self._asking.number - flight.round
        factor = self._plan.staleness(age)
        here = {name: self._asking.arrays[name] for name in update.arrays}
        if self._plan.mixing is None:
            start: Tensors = self._clock.models[flight.round]
        else:
            factor *= self._plan.mixing
            start = {name: value(array) for name, array in here.items()}
        return replace(update, arrays=_moved(update.arrays, here, start, factor), staleness=age), factor


def _kept(update: Reply) -> Reply:
    """As a checkpoint could hold it too: with nothing that lies in files of the engine's."""

    def plain(record: ArrayRecord) -> ArrayRecord:
        return record.plain() if isinstance(record, LazyRecord) else record

    beside = {name: plain(one) for name, one in _beside(update)}
    return replace(update, arrays=plain(update.arrays), records={**update.records, **beside}, origin=None)


def _moved(trained: ArrayRecord, here: Mapping[str, Array], start: Tensors, factor: float) -> ArrayRecord:
    """here + factor · (trained - start), made when a tensor is read."""

    def get(name: str) -> Array:
        array = trained[name]

        def data() -> bytes:
            change = value(trained[name]).astype(np.float64) - start[name]
            return Array(np.ascontiguousarray(value(here[name]) + factor * change, dtype=array.dtype)).data

        return LazyArray(array.dtype, tuple(array.shape), array.stype, data)

    return LazyRecord(dict.fromkeys(trained), get)


def _arrival(flight: Flight, number: int, factor: float) -> Arrival:
    update = flight.reply if flight.trouble is None else None
    return {
        "round": number,
        "job": flight.job,
        "client": flight.client,
        "trained_on": flight.round - 1,
        "asked": flight.asked,
        "ended": flight.ends,
        "computing": flight.computing,
        "outcome": USED if flight.trouble is None else flight.trouble.kind,
        "staleness": number - flight.round,
        "weight": None if update is None else factor * update.weight,
        "bytes_down": flight.down,
        "bytes_up": total(flight.entries, "wire_bytes"),
    }
