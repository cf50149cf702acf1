"""Bases that clients make by themselves of public rows: these go to each client once, then a hash of every pair.

A client takes the gradient as the server did, by the same functions, on the same rows, beside the same head; it codes
the bases as they would have been sent, and compares. What came out otherwise, as another kind of processor rounds, it
asks for, and is sent the codes of those pairs alone: so everybody has equal bits, whoever made them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord

from fedlotr.adapters.bases import Factors
from fedlotr.communication.basis_coding import Shapes, coded, decoded, fingerprints, part, shapes_of
from fedlotr.communication.wire_form import WireForm
from fedlotr.flower.link import Asks, Refused
from fedlotr.flower.reading import value
from fedlotr.flower.records import to_record
from fedlotr.training.examples import Examples
from fedlotr.training.packing import Rows

PUBLIC = "public"
"""The record of the public rows."""
HASHES, HEAD, TIES, CODES = "hashes", "head.", "ties", "codes"
"""Arrays: of each pair; the head's; which pairs are sent after all, by their place by name; their codes."""

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What stands for bases. hashes: (ties, 8). head: what the gradient was taken beside, by name. codes: of the bases,
    which whoever made others is sent; on a client empty.
    """

    hashes: npt.NDArray[np.uint8]
    head: Arrays
    codes: bytes = b""

    @classmethod
    def of(cls, bases: Mapping[str, Factors], head: Mapping[str, torch.Tensor], codes: bytes) -> "Offer":
        """Of bases as they are decoded from their codes."""
        return cls(
            hashes=fingerprints(bases), head={name: v.detach().numpy().copy() for name, v in head.items()}, codes=codes
        )

    def arrays(self, prefix: str = "") -> dict[str, npt.NDArray[Any]]:
        """As a message has it."""
        head = {f"{prefix}{HEAD}{name}": array for name, array in self.head.items()}
        return {f"{prefix}{HASHES}": self.hashes, **head}

    def pairs(self, form: WireForm, shapes: Shapes, ties: Sequence[int], prefix: str = "") -> Arrays:
        """What a message has besides, for one who made these pairs otherwise."""
        names = [name for at, name in enumerate(sorted(shapes)) if at in set(ties)]
        message = part(form, self.codes, shapes, names)
        return {
            f"{prefix}{TIES}": np.array(sorted(ties), np.int32),
            f"{prefix}{CODES}": np.frombuffer(message, np.uint8),
        }


@dataclass(frozen=True, kw_only=True)
class Derived:
    """The server's side of a run whose clients make bases. rows: the record of the public rows.

    first: of version 0, where clients make these too; form, shapes: of their codes.
    """

    rows: ArrayRecord
    form: WireForm
    shapes: Shapes
    first: Offer | None = None

    def again(self, ties: Sequence[int]) -> Arrays:
        """The offer of version 0 once more, with the pairs that a client made otherwise."""
        assert self.first is not None
        return {**self.first.arrays(), **self.first.pairs(self.form, self.shapes, ties)}


@dataclass(frozen=True)
class Offered:
    """The client's side: what a record offers, and the pairs that it brings after all."""

    record: ArrayRecord
    prefix: str = ""

    def __bool__(self) -> bool:
        return f"{self.prefix}{HASHES}" in self.record

    @property
    def head(self) -> dict[str, torch.Tensor]:
        """What the gradient is to be taken beside."""
        begin = f"{self.prefix}{HEAD}"
        return {
            name.removeprefix(begin): torch.from_numpy(value(array).copy())
            for name, array in self.record.items()
            if name.startswith(begin)
        }

    def settled(
        self, form: WireForm, made: Mapping[str, Factors], *, seed: int, version: int, link: str
    ) -> dict[str, Factors]:
        """The bases that everybody has, from those made here. Raises Asks for pairs that are others."""
        shapes = shapes_of(made)
        found = decoded(form, coded(form, made, seed, version), shapes)
        if f"{self.prefix}{CODES}" in self.record:
            places, codes = (value(self.record[self.prefix + name]) for name in (TIES, CODES))
            names = [name for at, name in enumerate(sorted(shapes)) if at in set(places.tolist())]
            found |= decoded(form, codes.tobytes(), {name: shapes[name] for name in names})
        wanted = value(self.record[f"{self.prefix}{HASHES}"])
        differ = np.flatnonzero((fingerprints(found) != wanted).any(axis=1)).tolist()
        if differ:
            raise Asks(link, version, differ)
        return found


def asking(asks: Asks) -> ConfigRecord:
    """As a client's reply has it."""
    return ConfigRecord({"link": asks.link, "version": asks.version, TIES: asks.ties})


def asked_for(record: ConfigRecord, least: int, most: int, ties: int) -> tuple[int, list[int]]:
    """(version, places of ties) that a client asks for, of versions and ties that there are. Raises Refused."""
    version, places = record.get("version"), record.get(TIES)
    if type(version) is not int or not least <= version <= most:
        raise Refused("records", f"it asks for bases of version {version!r}, and was offered {least} to {most}")
    known = isinstance(places, list) and places and all(type(at) is int and 0 <= at < ties for at in places)
    if not known:
        raise Refused("records", f"it asks for pairs that there are not, of {ties}")
    return version, sorted(set(places))  # type: ignore[arg-type, unused-ignore]


def public_record(examples: Examples, rows: Rows) -> ArrayRecord:
    """Rows as every client is sent them once, each number in the fewest bytes that hold all of its kind."""
    lengths = examples.lengths[rows]
    spans = [slice(int(examples.offsets[row]), int(examples.offsets[row + 1])) for row in rows]

    def of(flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([flat[span] for span in spans])

    labels = examples.labels[rows]
    numbers = labels.astype(np.float32) if labels.dtype.kind == "f" else _narrow(labels)
    arrays = {"tokens": _narrow(of(examples.tokens)), "lengths": _narrow(lengths), "labels": numbers}
    if examples.segments is not None:
        arrays["segments"] = of(examples.segments)
    if examples.targets is not None:
        arrays["targets"] = np.packbits(of(examples.targets))
    return to_record(arrays)


def public_rows(record: ArrayRecord, *, causal: bool) -> Examples:
    """What `public_record` wrote."""
    arrays = {name: value(array) for name, array in record.items()}
    lengths, labels = arrays["lengths"].astype(np.int64), arrays["labels"]
    packed = arrays.get("targets")
    return Examples(
        arrays["tokens"].astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
        labels if labels.dtype.kind == "f" else labels.astype(np.int64),
        arrays.get("segments"),
        causal,
        None if packed is None else np.unpackbits(packed, count=int(lengths.sum())).astype(bool),
    )


def _narrow(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
