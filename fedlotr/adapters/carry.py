"""The carried term: what the server has merged into a model so far, as `U V x` beside `W x`. W is never written.

It grows by a part a version. A layer's term is the stack of its parts, exact, until their rank passes
min(d_in, d_out); then it is the matrix itself. The term of a version is a plain function of the parts up to it,
computed in float64 on one thread, so that the server and a client that receives them piece by piece have equal bits.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fedlotr.adapters.bases import Factors, one_thread
from fedlotr.adapters.bases import sha256 as bases_sha256


class Part(NamedTuple):
    """What one version added to a layer: V (k, d_in) as A and U (d_out, k) as B, float32."""

    version: int
    pair: Factors

    @property
    def numbers(self) -> int:
        """k (d_in + d_out)."""
        return self.pair.A.numel() + self.pair.B.numel()


@dataclass(frozen=True)
class Term:
    """The carried term of one layer.

    dense: the matrix (d_out, d_in), float32, or None while the parts are the term. parts: by version; beside a matrix
    that contains them the newest ones, as long as they are smaller than it, for clients that miss no more than those.
    changed: the version that added last. complete: all parts that came after this version are in `parts`.
    """

    dense: torch.Tensor | None
    parts: tuple[Part, ...]
    changed: int
    complete: int = -1

    @property
    def rank(self) -> int:
        """Of the stack, or of a matrix that is full."""
        return min(self.dense.shape) if self.dense is not None else sum(part.pair.A.shape[0] for part in self.parts)

    def pair(self) -> Factors:
        """V and U of a term that is not dense, the parts stacked."""
        pairs = [part.pair for part in self.parts]
        return Factors(torch.cat([pair.A for pair in pairs]), torch.cat([pair.B for pair in pairs], dim=1))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """V and U, or the matrix: what the layer computes with."""
        return self.pair() if self.dense is None else (self.dense,)

    def matrix(self) -> torch.Tensor:
        """(d_out, d_in) in float64."""
        if self.dense is not None:
            return self.dense.double()
        pair = self.pair()
        with one_thread():
            return pair.B.double() @ pair.A.double()

    def grown(self, part: Part) -> "Term":
        """With one more part."""
        parts = (*self.parts, part)
        if self.dense is None:
            factored = replace(self, parts=parts, changed=part.version)
            if factored.rank <= min(part.pair.A.shape[1], part.pair.B.shape[0]):
                return factored
        before = self.matrix() if self.dense is not None or self.parts else 0
        with one_thread():
            dense = (before + part.pair.B.double() @ part.pair.A.double()).float()
        complete = self.complete
        while parts and sum(kept.numbers for kept in parts) >= dense.numel():
            complete, parts = parts[0].version, parts[1:]
        return Term(dense, parts, part.version, complete)


@dataclass(frozen=True)
class Carry:
    """The carried terms by layer, as they are after `version` additions; version 0 is what a run starts from."""

    terms: Mapping[str, Term] = field(default_factory=dict)
    version: int = 0
    bases: Mapping[str, Factors] = field(default_factory=dict)
    """Where bases move: those that go with this version, by the name of the first layer that holds each."""

    @classmethod
    def start(cls, pairs: Mapping[str, Factors]) -> "Carry":
        """Version 0: nothing, or the adapter that a run starts from."""
        return cls({name: Term(None, (Part(0, pair),), 0) for name, pair in pairs.items()})

    def grown(self, pairs: Mapping[str, Factors]) -> "Carry":
        """The next version, with a pair V and U (as A and B, float32) more in some layers."""
        version = self.version + 1
        terms = dict(self.terms)
        for name, pair in pairs.items():
            terms[name] = terms.get(name, Term(None, (), 0)).grown(Part(version, pair))
        return Carry(terms, version, self.bases)

    def missed(self, since: int) -> dict[str, torch.Tensor]:
        """What takes one who has version `since` to this one: the parts since then, or the matrix where it is less.

        Names are `<layer>.V.<version>` and `<layer>.U.<version>`, or `<layer>.W`.
        """
        found: dict[str, torch.Tensor] = {}
        for name, term in sorted(self.terms.items()):
            if term.changed <= since:
                continue
            if term.dense is not None and since < term.complete:
                found[f"{name}.W"] = term.dense
                continue
            for part in term.parts:
                if part.version > since:
                    found[f"{name}.V.{part.version}"], found[f"{name}.U.{part.version}"] = part.pair
        return found

    def caught_up(self, version: int, received: Mapping[str, torch.Tensor]) -> "Carry":
        """This one brought to a later version by what `missed` gave for it, or for an earlier one."""
        terms, parts = dict(self.terms), []
        for key, tensor in received.items():
            name, kind, *of = _split(key)
            if kind == "W":
                terms[name] = Term(tensor, (), version, version)
            elif kind == "V" and of[0] > self.version:
                parts.append((of[0], name, Factors(tensor, received[f"{name}.U.{of[0]}"])))
        for of_version, name, pair in sorted(parts, key=lambda part: part[:2]):
            terms[name] = terms.get(name, Term(None, (), 0)).grown(Part(of_version, pair))
        return Carry(terms, version)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the terms, whatever way they came about; hexadecimal."""
        digest = hashlib.sha256()
        for name, term in sorted(self.terms.items()):
            for tensor in term.tensors():
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        if self.bases:
            digest.update(bases_sha256(list(self.bases.items())).encode())
        return digest.hexdigest()

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors, named as in `missed`, and plain values that `restored` makes it of again."""
        tensors: dict[str, torch.Tensor] = {}
        for name, term in self.terms.items():
            if term.dense is not None:
                tensors[f"{name}.W"] = term.dense
            for part in term.parts:
                tensors[f"{name}.V.{part.version}"], tensors[f"{name}.U.{part.version}"] = part.pair
        for name, pair in self.bases.items():
            tensors[f"{name}.A"], tensors[f"{name}.B"] = pair
        about = {name: [term.changed, term.complete] for name, term in self.terms.items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, {"version": self.version, "of": about}

    @classmethod
    def restored(cls, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> "Carry":
        """What `saved` gave. Raises KeyError or ValueError where the two do not belong together."""
        parts: dict[str, list[Part]] = {name: [] for name in about["of"]}
        for key, tensor in tensors.items():
            name, kind, *of = _split(key)
            if kind == "V":
                parts[name].append(Part(of[0], Factors(tensor, tensors[f"{name}.U.{of[0]}"])))
        bases = {key[:-2]: Factors(tensors[key], tensors[f"{key[:-2]}.B"]) for key in tensors if key.endswith(".A")}
        terms = {
            name: Term(tensors.get(f"{name}.W"), tuple(sorted(parts[name], key=lambda part: part.version)), *values)
            for name, values in about["of"].items()
        }
        return cls(terms, about["version"], bases)


def in_words(terms: Iterable[Term]) -> str:
    """For the log."""
    found = list(terms)
    ranks = [term.rank for term in found if term.dense is None]
    dense = len(found) - len(ranks)
    words = [f"rank {min(ranks)} to {max(ranks)} in {len(ranks)} layers"] if ranks else []
    return ", ".join(words + ([f"{dense} layers dense"] if dense else []))


def _split(key: str) -> tuple[Any, ...]:
    """(layer, "W", "A" or "B"), or (layer, "V" or "U", version). Raises ValueError for another name."""
    if key.endswith((".W", ".A", ".B")):
        return key[:-2], key[-1]
    name, kind, version = key.rsplit(".", 2)
    if kind not in ("U", "V"):
        raise ValueError(f"{key} names no part of a carried term")
    return name, kind, int(version)
