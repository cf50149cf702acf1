"""In which form tensors travel: the words of `--codec` and `--broadcast-codec`, and what follows from them alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from fedlotr.errors import nearest

Kind = Literal["float32", "bfloat16", "int8", "int4", "int2", "sign", "top-k"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8", "int4", "int2", "sign", "top-k")
ZSTD, DELTA = "+zstd", "delta+"
FINGERPRINT = 8
"""Bytes of the hash of a pair of frozen factors."""
NEED_DELTA = ("int2", "sign", "top-k")
"""They keep so little of a tensor that only a change can be told by them, with what was lost made up for later."""
EXPECTED = "float32, bfloat16, int8, int4, int2, sign or top-k:DENSITY, perhaps with +zstd, such as 'top-k:0.01+zstd'"


@dataclass(frozen=True)
class WireForm:
    """How the tensors of one direction travel.

    density: share of each tensor's numbers that top-k sends, as it was written, exactly. zstd: whether a lossless stage
    follows, kept where it makes a message shorter. delta: of a broadcast, the change of what the client holds is sent.
    """

    kind: Kind = "float32"
    density: str = "1"
    zstd: bool = False
    delta: bool = False

    @property
    def coded(self) -> bool:
        """Whether a codec is at work at all; float32 by itself travels as Flower's arrays, bit for bit."""
        return self.kind != "float32" or self.zstd

    @property
    def lossy(self) -> bool:
        """Whether what arrives differs by more than the rounding of float32."""
        return self.kind != "float32"

    def kept(self, numbers: int) -> int:
        """How many of a tensor's numbers top-k sends: that share, rounded up; at least one."""
        return max(1, math.ceil(Fraction(self.density) * numbers)) if numbers else 0


def read_form(given: str) -> WireForm:
    """A codec by its words: [delta+]KIND[:DENSITY][+zstd]. Raises ValueError."""
    delta, zstd = given.startswith(DELTA), given.endswith(ZSTD)
    name, colon, density = given.removeprefix(DELTA).removesuffix(ZSTD).partition(":")
    kind = next((kind for kind in KINDS if kind == name), None)
    if kind is None:
        raise ValueError(f"not a codec{nearest(name, KINDS)}")
    if kind != "top-k":
        if colon:
            raise ValueError(f"{kind} takes no argument; expected {EXPECTED}")
        return WireForm(kind, zstd=zstd, delta=delta)
    if not re.fullmatch(r"\d{0,9}\.?\d{1,9}", density) or not 0 < Fraction(density) <= 1:
        raise ValueError("expected top-k:DENSITY, the share of the numbers that are sent, such as 'top-k:0.01'")
    return WireForm(kind, density, zstd, delta)


@dataclass(frozen=True)
class Coding:
    """What both sides of a run know of its codecs, by their words.

    feedback: whether a client adds to an update what its last one has lost. basis_codec: of frozen factors that are
    sent, a singular vector at a time.
    """

    codec: str = "float32"
    broadcast_codec: str = "float32"
    feedback: bool = False
    basis_codec: str = "float32"

    @cached_property
    def update(self) -> WireForm:
        """From client to server."""
        return read_form(self.codec)

    @cached_property
    def broadcast(self) -> WireForm:
        """From server to client."""
        return read_form(self.broadcast_codec)

    @cached_property
    def basis(self) -> WireForm:
        """Of frozen factors, to a client once."""
        return read_form(self.basis_codec)

    @cached_property
    def whole(self) -> WireForm:
        """Of what is no change: a client's first message, a core that all fold. As a broadcast, or in int4 where that
        keeps too little of a whole."""
        form = self.broadcast
        return WireForm("int4" if form.kind in NEED_DELTA else form.kind, zstd=form.zstd)

    @property
    def at_work(self) -> bool:
        """Whether any trained tensors are coded."""
        return self.update.coded or self.broadcast.coded


UNCODED = Coding()
"""Everything travels as it is."""


def coding_in(config: Mapping[str, Any]) -> Coding:
    """Of a run's config.yaml; those of before there was a codec for bases sent them as they are."""
    return Coding(config["codec"], config["broadcast_codec"], basis_codec=config.get("basis_codec", "float32"))


def check_codec(given: str) -> str:
    """Of an update, which is always the difference to what the client was sent. Raises ValueError."""
    if read_form(given).delta:
        raise ValueError("an update always is the difference to what the client was sent; leave 'delta+' out")
    return given


def check_broadcast_codec(given: str) -> str:
    """Of a broadcast. Raises ValueError for one that would leave a client without a model."""
    form = read_form(given)
    if form.kind in NEED_DELTA and not form.delta:
        raise ValueError(f"too little of a model would arrive; send the change alone: '{DELTA}{given}'")
    if form.delta and not form.coded:
        raise ValueError("as large as the whole, which is exact; choose float32, or a codec after 'delta+'")
    return given


def check_basis_codec(given: str) -> str:
    """Of bases, which are sent whole. Raises ValueError for one that tells a change, or a share of the numbers."""
    form = read_form(given)
    if form.delta or form.kind == "top-k":
        raise ValueError("bases are sent once and whole; choose float32, bfloat16, int8, int4, int2 or sign")
    return given
