"""What the messages of a push have in common goes to each worker once, told apart by its content."""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, RecordDict

from fedlotr.engines.clients import Job

SHARED_BYTES = 2**12
"""Records below this go with their job: finding out which are equal would cost more than sending them."""


@dataclass(frozen=True)
class Parcel:
    """What one worker is handed for a job.

    job: without the records that the worker has or gets. places: (message, record's name, digest) of each of those.
    keep: digests of what the worker is to hold on to. fresh: those that it does not have yet. references: to them.
    """

    job: Job
    places: list[tuple[int, str, str]]
    keep: frozenset[str]
    fresh: list[str]
    references: list[Any]


class Broadcast:
    """Which records are shared, where they are stored, and which worker has them.

    A worker holds the shared records of the newest push, and no others: what it was sent to evaluate a model, it need
    not be sent again to train it. sent_bytes: of all that went to workers as shared records.
    """

    def __init__(self, put: Callable[[Any], Any]) -> None:
        """put: into the store from which workers get what they are handed a reference of."""
        self._put = put
        self._shared: dict[
            int, tuple[ArrayRecord, str]
        ] = {}  # by identity; the record too, so that its id stays its own
        self._stored: dict[str, Any] = {}
        self._held: dict[Any, set[str]] = {}
        self.sent_bytes = 0

    def pushed(self, jobs: Iterable[Job]) -> None:
        """Find what the messages of these jobs have in common, or have in common with what workers hold."""
        found = [record for job in jobs for message in job.messages for record in message.content.values()]
        uses = Counter(map(id, found))
        known = {at: digest for at, (_, digest) in self._shared.items()}
        records = {id(record): record for record in found if isinstance(record, ArrayRecord)}
        large = {at: record for at, record in records.items() if size(record) >= SHARED_BYTES}
        digests = {at: known.get(at) or digest_of(record) for at, record in large.items()}
        counts: Counter[str] = Counter()
        for at, digest in digests.items():
            counts[digest] += uses[at]
        held = set().union(*self._held.values())
        self._shared = {at: (large[at], d) for at, d in digests.items() if counts[d] > 1 or d in held}
        wanted = {digest for _, digest in self._shared.values()}
        self._stored = {digest: reference for digest, reference in self._stored.items() if digest in wanted}

    def parcel(self, job: Job, worker: Any) -> Parcel:
        """A job as it goes to a worker, which then has the shared records of it."""
        keep = frozenset(digest for _, digest in self._shared.values())
        held = self._held.setdefault(worker, set())
        held &= keep
        messages, places, fresh = [], [], []
        for at, message in enumerate(job.messages):
            light = copy.copy(message)
            light.content = RecordDict()
            for name, record in message.content.items():
                if id(record) not in self._shared:
                    light.content[name] = record
                    continue
                digest = self._shared[id(record)][1]
                places.append((at, name, digest))
                if digest not in held:
                    held.add(digest)
                    fresh.append(digest)
                    self.sent_bytes += size(record)
                    if digest not in self._stored:
                        self._stored[digest] = self._put(record)
            messages.append(light)
        references = [self._stored[digest] for digest in fresh]
        return Parcel(replace(job, messages=tuple(messages)), places, keep, fresh, references)

    def forget(self, worker: Any) -> None:
        """A worker that is gone, or may not have what it was handed."""
        self._held.pop(worker, None)

    def clear(self) -> None:
        """Let go of everything."""
        self._shared, self._stored, self._held = {}, {}, {}


def size(record: Any) -> int:
    """Bytes of a record's arrays."""
    return sum(len(array.data) for array in record.values())


def digest_of(record: ArrayRecord) -> str:
    """SHA-256 of all that a record holds, in its order."""
    digest = hashlib.sha256()
    for name, array in record.items():
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0{array.stype}\0{len(array.data)}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()
