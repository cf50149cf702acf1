"""How far clients' updates go: their norms, which of them are far outside, and the bound that may be set on them.

A mean has no defence of its own: one update of a million times the others' size carries it away. Norms show that; an
update of ordinary size into a wrong direction they do not show, and robust rules are for that.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedlotr.flower.lazy import LazyArray, LazyRecord
from fedlotr.flower.link import Draft, Reply
from fedlotr.flower.links.moments import MOMENTS
from fedlotr.flower.links.objectives import CONTROL
from fedlotr.flower.reading import value
from fedlotr.flower.records import ARRAYS
from fedlotr.flower.replies import Failure
from fedlotr.reporting.documents import UpdateNorms
from fedlotr.said import say

log = logging.getLogger("fedlotr")

FEWEST = 5
"""Clients of a round below which nobody can say what is usual."""
FAR = 10.0
"""Spreads above the median that are far outside. Honest clients differ by their numbers of steps, some severalfold."""
SPREAD = 0.5
"""Of the median: the least spread. Among norms that are nearly equal only one of six times their size is far then."""
NORMAL = 1.4826
"""Times the median absolute deviation: the standard deviation, where norms are normal."""
NAMED = 4
"""Clients that one line names."""


@dataclass
class Watch:
    """What a run has noticed of its clients. first, last: rounds in which an update far outside was averaged.

    told: what has been said already; what is said of a client is said once a run, and each time in log.txt.
    """

    first: int | None = None
    last: int | None = None
    told: set[str] = field(default_factory=set)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"first": self.first, "last": self.last, "told": sorted(self.told)}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Watch":
        """What `state` gave; nothing yet of a checkpoint that is older than this."""
        return cls(state.get("first"), state.get("last"), set(state.get("told", ())))

    def once(self, *keys: str) -> bool:
        """Whether any of these is said for the first time; then they all count as said."""
        new = not self.told.issuperset(keys)
        self.told.update(keys)
        return new


def norm_of(record: ArrayRecord, start: Mapping[str, Array] | None = None) -> float:
    """L2 over all tensors of the change since `start` (None: of the tensors themselves), in float64, one at a time."""
    total = 0.0
    for name, array in record.items():
        change = value(array).astype(np.float64)
        if start is not None:
            change -= value(start[name])
        total += float(np.square(change, out=change).sum())
    return float(np.sqrt(total))


def begun_with(drafts: Iterable[Draft], expected: Callable[[int], ArrayRecord]) -> dict[int, ArrayRecord]:
    """Client -> the tensors that it starts from: those of its message; the run's own where these are not to be had.

    expected: client -> the tensors that it is to send back, as the server has them.
    """
    found: dict[int, ArrayRecord] = {}
    for draft in drafts:
        sent, wanted = draft.meant or draft.records.get(ARRAYS), expected(draft.client)
        fits = isinstance(sent, ArrayRecord) and all(
            name in sent and tuple(sent[name].shape) == tuple(array.shape) for name, array in wanted.items()
        )
        found[draft.client] = sent if fits else wanted  # type: ignore[assignment]
    return found


@dataclass(frozen=True)
class Norms:
    """Of the updates of a round, as they came: client -> norm. clipped: the clients whose update is shorter now.

    Empty where clients are hidden: their norms would tell of them.
    """

    of: Mapping[int, float] = field(default_factory=dict)
    clipped: Sequence[int] = ()

    def row(self, bound: float | None) -> UpdateNorms:
        """For metrics.jsonl. bound: of the norm, where there is one."""
        found: UpdateNorms = {
            "update_norm_median": statistics.median(self.of.values()) if self.of else None,
            "update_norm_largest": max(self.of.values(), default=None),
        }
        if bound is not None:
            found["clipped"] = len(self.clipped)
        return found

    def largest(self) -> str:
        """Whose update is the longest, in words, as the likely cause of what cannot be published; perhaps nothing."""
        if not self.of:
            return ""
        client = max(self.of, key=lambda client: self.of[client])
        median = statistics.median(self.of.values())
        return (
            f"; the longest update is that of client {client}, with a norm of {self.of[client]:.3g} (median "
            f"{median:.3g}): --max-update-norm bounds it"
        )


def bounded(
    replies: Sequence[Reply], starts: Mapping[int, ArrayRecord], bound: float | None, *, refuse: bool
) -> tuple[list[Reply], dict[int, Failure], Norms]:
    """(replies, failures, norms): no update that is left is longer than the bound. starts: what each was trained from.

    A longer one is scaled down to it, x + bound / norm · (x_i - x), with its change of control variates, or refused.
    Tensors are scaled as they are asked for. bound: None: any length goes.
    """
    good: list[Reply] = []
    failures: dict[int, Failure] = {}
    norms: dict[int, float] = {}
    clipped: list[int] = []
    for reply in replies:
        norm = norms[reply.client] = norm_of(reply.arrays, starts[reply.client])
        if bound is not None and norm > bound and refuse:
            reason = f"its update has a norm of {norm:.3g}, expected at most {bound:g} (--max-update-norm)"
            failures[reply.client] = Failure("update too large", reason)
            continue
        if bound is not None and norm > bound:
            reply.arrays = _scaled(reply.arrays, starts[reply.client], bound / norm)
            if CONTROL in reply.records:
                reply.records[CONTROL] = _scaled(reply.records[CONTROL], None, bound / norm)
            clipped.append(reply.client)
        good.append(reply)
    return good, failures, Norms(norms, clipped)


def _scaled(record: ArrayRecord, start: Mapping[str, Array] | None, factor: float) -> ArrayRecord:
    """start + factor · (record - start), made when a tensor is read: of all clients they would fill the memory."""

    def get(name: str) -> Array:
        array = record[name]

        def data() -> bytes:
            end = value(record[name]).astype(np.float64)
            begin = np.zeros(()) if start is None else value(start[name]).astype(np.float64)
            return Array(np.ascontiguousarray(begin + factor * (end - begin), dtype=array.dtype)).data

        return LazyArray(array.dtype, tuple(array.shape), array.stype, data)

    return LazyRecord(dict.fromkeys(record), get)


def outside(norms: Mapping[int, float]) -> dict[int, float]:
    """Client -> how many times the usual its norm is, of those far above it; none where too few clients are there.

    By the median and the median absolute deviation, which those few do not move.
    """
    if len(norms) < FEWEST:
        return {}
    moved = [norm for norm in norms.values() if norm > 0]  # most may have had nothing to learn
    usual = statistics.median(norms.values()) or (statistics.median(moved) if moved else 0.0)
    deviation = statistics.median(abs(norm - usual) for norm in norms.values())
    far = usual + FAR * max(NORMAL * deviation, SPREAD * usual)
    return {client: norm / usual for client, norm in norms.items() if norm > far}


def look_at(watch: Watch, server_round: int, replies: Sequence[Reply], norms: Norms) -> None:
    """Say whose update is far outside, whose other records are, and who has most of the round's weight.

    replies: those that are averaged.
    """
    if norms.clipped:
        them = {client: f"{norms.of[client]:.3g}" for client in norms.clipped}
        log.info("round %d: --max-update-norm has clipped the updates of %s", server_round, _named(them))
    if far := outside({reply.client: norms.of[reply.client] for reply in replies}):
        text = f"round {server_round}: the norm of an update is far outside: {_factors(norms.of, far)}"
        if set(far) <= set(norms.clipped):
            text += "; --max-update-norm has clipped it"
        else:
            bound = "--max-update-norm X clips updates to a norm of X, or with --on-large-update refuse leaves them out"
            text += f"; it may carry the model away: {bound}; {_noted(watch, server_round)}"
        _tell(watch, text, [f"norm {client}" for client in far])
    controls = {one.client: norm_of(one.records[CONTROL]) for one in replies if CONTROL in one.records}
    moments = {one.client: _norm_of_moments(one.records[MOMENTS]) for one in replies if MOMENTS in one.records}
    for what, sizes in (("change of control variates", controls), ("record of second moments", moments)):
        if far := outside(sizes):
            text = f"round {server_round}: the norm of a {what} is far outside: {_factors(sizes, far)}"
            text += f"; it reaches every client, and no bound is set on it: {_noted(watch, server_round)}"
            _tell(watch, text, [f"{what} {client}" for client in far])
    _look_at_weights(watch, server_round, {reply.client: reply.weight for reply in replies})


def _norm_of_moments(record: ArrayRecord) -> float:
    """Of the means alone: each pair's other number is a weight."""
    return float(np.sqrt(sum(float(value(pair)[0]) ** 2 for pair in record.values())))


def _noted(watch: Watch, server_round: int) -> str:
    """Note the round as one that may have harmed the model; the way back to before the first such round."""
    watch.first, watch.last = watch.first or server_round, server_round
    before = watch.first - 1
    if not before:
        return "no checkpoint is older than this, so the way back is a new run, with another --out"
    return f"the checkpoint of round {before} is kept, and --resume --resume-round {before} goes back to it"


def _look_at_weights(watch: Watch, server_round: int, weights: Mapping[int, float]) -> None:
    heaviest = max(weights, key=lambda client: weights[client], default=None)
    if heaviest is None or len(weights) < 3 or weights[heaviest] <= sum(weights.values()) / 2:
        return
    share = weights[heaviest] / sum(weights.values())
    text = (
        f"round {server_round}: client {heaviest} has {share:.1%} of the weight of all {len(weights)} clients, so a "
        "mean is mostly its update; --max-weight bounds what one may weigh, under --weights uniform all weigh the same"
    )
    _tell(watch, text, [f"weight {heaviest}"])


def _tell(watch: Watch, text: str, keys: Sequence[str]) -> None:
    if watch.once(*keys):
        say(text)
    else:
        log.warning("%s", text)


def _factors(norms: Mapping[int, float], far: Mapping[int, float]) -> str:
    usual = next(norms[client] / factor for client, factor in far.items())
    them = {client: f"{norms[client]:.3g}, {factor:.3g} times the median {usual:.3g}" for client, factor in far.items()}
    return _named(them)


def _named(clients: Mapping[int, str]) -> str:
    more = f" and {len(clients) - NAMED} more" if len(clients) > NAMED else ""
    return ", ".join(f"client {client} ({what})" for client, what in list(clients.items())[:NAMED]) + more
