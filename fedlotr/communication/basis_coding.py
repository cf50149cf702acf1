"""Frozen factors in few bits: every singular vector with a scale of its own, and of unit length again once decoded.

A frozen factor is only a subspace that all agree on, so what its codes lose is no error of the model: whoever computes
with it, the server first, computes with what the codes stand for.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedlotr.adapters.bases import Factors
from fedlotr.communication.codecs import CodecError, cut, decode, encode
from fedlotr.communication.wire_form import FINGERPRINT, WireForm
from fedlotr.streams import generator

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def shapes_of(pairs: Pairs) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """By tie the shapes of A (r, d_in) and B (d_out, r): what `decoded` asks for."""
    return {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in pairs.items()}


def coded(form: WireForm, pairs: Pairs, seed: int, version: int = 0) -> bytes:
    """The message of pairs A (r, d_in), whose rows, and B (d_out, r), whose columns are of unit length.

    seed, version: of the run and of the bases; rounding to int8 and int4 is drawn by them.
    """
    vectors = {
        _vector(name, side, at): vector
        for name, (a, b) in pairs.items()
        for side, rows in (("A", a), ("B", b.T))
        for at, vector in enumerate(rows.detach().numpy())
    }
    return encode(form, vectors, generator(seed, "basis codec", version))


def decoded(form: WireForm, message: bytes, shapes: Shapes) -> dict[str, Factors]:
    """The pairs of a message, float32, every row of A and column of B of unit length. Raises CodecError."""
    found = decode(form, message, _vectors(shapes))
    stacked: dict[tuple[str, str], torch.Tensor] = {}
    for (name, side), (count, width) in _rows(shapes).items():
        vectors_of = [found[_vector(name, side, at)] for at in range(count)]
        factor = np.array(vectors_of, np.float64).reshape(count, width)
        lengths = np.sqrt(np.square(factor).sum(axis=1, keepdims=True))
        if not lengths.all():
            raise CodecError(f"a vector of {name}.{side} is zero")
        stacked[name, side] = torch.from_numpy((factor / lengths).astype(np.float32))
    return {name: Factors(stacked[name, "A"], stacked[name, "B"].T.contiguous()) for name in shapes}


def part(form: WireForm, message: bytes, shapes: Shapes, ties: Sequence[str]) -> bytes:
    """The message of some ties, which is decoded to what the whole one, of these shapes, says of them."""
    return cut(form, message, _vectors(shapes), _vectors({name: shapes[name] for name in ties}).keys())


def fingerprints(pairs: Pairs) -> npt.NDArray[np.uint8]:
    """(ties, 8): the first bytes of the SHA-256 of each tie's A and B in float32, in the order of their names."""
    found = [
        hashlib.sha256(b"".join(np.ascontiguousarray(factor.detach(), "<f4").tobytes() for factor in pair)).digest()
        for _, pair in sorted(pairs.items())
    ]
    return np.frombuffer(b"".join(digest[:FINGERPRINT] for digest in found), np.uint8).reshape(-1, FINGERPRINT)


def _vector(tie: str, side: str, at: int) -> str:
    return f"{tie}.{side}.{at:05d}"


def _rows(shapes: Shapes) -> dict[tuple[str, str], tuple[int, int]]:
    """Of each tie's A and B how many vectors there are, and how long each is."""
    return {
        (name, side): (shape[0], shape[1]) if side == "A" else (shape[1], shape[0])
        for name, of in shapes.items()
        for side, shape in zip("AB", of, strict=True)
    }


def _vectors(shapes: Shapes) -> dict[str, tuple[int]]:
    return {
        _vector(name, side, at): (width,)
        for (name, side), (count, width) in _rows(shapes).items()
        for at in range(count)
    }
