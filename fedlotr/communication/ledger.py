"""The byte ledger: a row for every record of every message between server and client, measured on the record."""

import hashlib
import io
import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from fedlotr.files import write_atomically
from fedlotr.reporting.documents import Communication

Direction = Literal["up", "down"]
Kind = Literal["broadcast", "update", "basis", "carry", "control"]
Record = ArrayRecord | ConfigRecord | MetricRecord

SCHEMA = pa.schema(
    [
        ("round", pa.int32()),
        ("client", pa.int32()),
        ("direction", pa.string()),
        ("kind", pa.string()),
        ("payload_bytes", pa.int64()),
        ("wire_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """One record of one message. client is its partition id.

    payload_bytes: numbers times their width. wire_bytes: what Flower counts for the serialised record.
    """

    round: int
    client: int
    direction: Direction
    kind: Kind
    payload_bytes: int
    wire_bytes: int


def payload_bytes(record: Record) -> int:
    """Numbers times their width (8 for a Python number; strings and bytes by their length)."""
    if isinstance(record, ArrayRecord):
        return sum(map(_array_bytes, record.values()))
    values = [item for value in record.values() for item in (value if isinstance(value, list) else [value])]
    return sum(len(v.encode()) if isinstance(v, str) else len(v) if isinstance(v, bytes) else 8 for v in values)


def _array_bytes(array: Array) -> int:
    """What an array says of itself need not be true: where it makes no sense, what it holds is counted."""
    try:
        return math.prod(map(operator.index, array.shape)) * np.dtype(array.dtype).itemsize
    except TypeError:
        return len(array.data)


def entry(server_round: int, client: int, direction: Direction, name: str, record: Record) -> Entry:
    """The ledger's row for a record; its kind follows from its name and its direction.

    Only the trained tensors are a broadcast or an update: what links send beside them, such as control variates or
    moments, steers training and is no part of the model.
    """
    kind: Kind = "control"
    if name in ("basis", "public"):
        kind = "basis"
    elif name == "carry":
        kind = "carry"
    elif name == "arrays":
        kind = "broadcast" if direction == "down" else "update"
    return Entry(server_round, client, direction, kind, payload_bytes(record), record.count_bytes())


def write_part(folder: Path, server_round: int, entries: Sequence[Entry]) -> str:
    """Write one round's rows as `round-00001.parquet`, atomically; the file's SHA-256."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in entries], schema=SCHEMA), buffer)
    content = buffer.getvalue()
    write_atomically(part_path(folder, server_round), content)
    return hashlib.sha256(content).hexdigest()


def part_path(folder: Path, server_round: int) -> Path:
    """The file of one round's rows."""
    return folder / f"round-{server_round:05d}.parquet"


def read_parts(folder: Path) -> Iterator[list[Entry]]:
    """The rows of each round of a run."""
    for path in sorted(folder.glob("round-*.parquet")):
        yield [Entry(**row) for row in pq.read_table(path).to_pylist()]


def read_ledger(folder: Path) -> list[Entry]:
    """All rows of a run, round by round."""
    return [row for part in read_parts(folder) for row in part]


def total(
    entries: Iterable[Entry],
    column: Literal["payload_bytes", "wire_bytes"],
    *,
    direction: Direction | None = None,
    kind: Kind | None = None,
) -> int:
    """The sum of one column over the rows of a direction and a kind."""
    return sum(
        getattr(row, column)
        for row in entries
        if (direction is None or row.direction == direction) and (kind is None or row.kind == kind)
    )


@dataclass
class Totals:
    """What rows of the ledger come to, added up so that they need not stay in memory.

    amounts: (direction, kind) -> payload and wire bytes. messages: direction -> pairs of a client and a round. clients:
    of any row. updates: client -> how often it sent one.
    """

    amounts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    clients: set[int] = field(default_factory=set)
    updates: Counter[int] = field(default_factory=Counter)

    def add(self, entries: Iterable[Entry]) -> "Totals":
        """The rows of whole rounds."""
        pairs = set()
        for row in entries:
            self.amounts[row.direction, row.kind, "payload"] += row.payload_bytes
            self.amounts[row.direction, row.kind, "wire"] += row.wire_bytes
            self.clients.add(row.client)
            self.updates[row.client] += row.kind == "update"
            pairs.add((row.direction, row.client, row.round))
        self.messages.update(direction for direction, _, _ in pairs)
        return self

    def _sum(self, measure: str, *, direction: Direction | None = None, kind: Kind | None = None) -> int:
        return sum(
            amount
            for (way, sort, of), amount in self.amounts.items()
            if of == measure and way == (direction or way) and sort == (kind or sort)
        )

    def summary(self) -> Communication:
        """What a run cost."""

        def mean(amount: int, pairs: int) -> float | int:
            return 0 if not pairs else amount // pairs if amount % pairs == 0 else amount / pairs

        up, down = self.messages["up"], self.messages["down"]
        carried = self._sum("payload", kind="broadcast") + self._sum("payload", kind="carry")
        return {
            "upload_payload_bytes_per_client_round": mean(self._sum("payload", kind="update"), up),
            "download_payload_bytes_per_client_round": mean(carried, down),
            "upload_wire_bytes_per_client_round": mean(self._sum("wire", direction="up"), up),
            "download_wire_bytes_per_client_round": mean(
                self._sum("wire", direction="down") - self._sum("wire", kind="basis"), down
            ),
            "one_off_bytes_per_client": mean(self._sum("payload", kind="basis"), len(self.clients)),
            "total_payload_bytes": self._sum("payload"),
            "total_wire_bytes": self._sum("wire"),
        }
