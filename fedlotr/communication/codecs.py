"""Codecs: tensors to few bytes and back. Each says whether it is biased, and how far off a number may be.

A message is the codes of every tensor, in the order of their names, perhaps squeezed by zstd, and a CRC-32. That is
taken over these bytes and over what the receiver must hold to use them (`witness`), so a message that was damaged, or
that meets another base than it was made for, is noticed before anything is made of it. Little-endian throughout. The
names and shapes do not travel: both sides have them.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from fedlotr.communication.wire_form import WireForm
from fedlotr.errors import FedlotrError

Float32 = npt.NDArray[np.float32]
Tensors = dict[str, Float32]

CHECKSUM = 4
"""Bytes of a message's CRC-32."""
LEVEL = 19
"""Of zstd, for messages of some kilobytes: as small as it gets."""


class CodecError(FedlotrError):
    """Numbers that cannot be coded, or a message that cannot be decoded."""


class Codec(ABC):
    """One tensor, flattened, to codes and back."""

    @abstractmethod
    def size(self, numbers: int) -> int:
        """Bytes of the codes of so many numbers."""

    @abstractmethod
    def encode(self, x: Float32, stream: np.random.Generator) -> bytes:
        """Codes of finite numbers. Raises CodecError for what it has no code for."""

    @abstractmethod
    def decode(self, codes: memoryview, numbers: int) -> Float32:
        """What codes of the right size stand for. Raises CodecError for what `encode` never writes."""


class Plain(Codec):
    """float32: exact."""

    def size(self, numbers: int) -> int:
        """Four bytes a number."""
        return 4 * numbers

    def encode(self, x: Float32, stream: np.random.Generator) -> bytes:
        """As they are."""
        return x.astype("<f4").tobytes()

    def decode(self, codes: memoryview, numbers: int) -> Float32:
        """As they are."""
        return np.frombuffer(codes, "<f4").astype(np.float32)


class BFloat16(Codec):
    """bfloat16, rounded to the nearest, ties to even: biased, by at most 2⁻⁸ of each number's size.

    (Below 2⁻¹²⁶, where floats thin out: by at most 2⁻¹³⁴.)
    """

    def size(self, numbers: int) -> int:
        """Two bytes a number."""
        return 2 * numbers

    def encode(self, x: Float32, stream: np.random.Generator) -> bytes:
        """The upper half of the bits of the nearest."""
        bits = x.view(np.uint32).astype(np.uint64)
        return _upper_half(bits + 0x7FFF + (bits >> 16 & 1))

    def decode(self, codes: memoryview, numbers: int) -> Float32:
        """The lower half of the bits is zero."""
        return _from_upper_half(codes)


def _upper_half(bits: npt.NDArray[np.uint64]) -> bytes:
    upper = bits >> 16
    if np.any(upper & 0x7F80 == 0x7F80):
        raise CodecError("a number is too large for bfloat16")
    return bytes(upper.astype("<u2").tobytes())


def _from_upper_half(codes: memoryview | bytes) -> Float32:
    return (np.frombuffer(codes, "<u2").astype(np.uint32) << 16).view(np.float32)


SCALE = 2
"""Bytes of a tensor's scale, a bfloat16."""


class Stochastic(Codec):
    """int8 or int4 with stochastic rounding: unbiased, every number off by less than (1 + 2⁻⁷) max|x| / levels.

    x / s is rounded up with the probability of its fraction, else down (Alistarh et al. 2017, QSGD), where one s a
    tensor is max|x| / levels, rounded up to a bfloat16, which the integers times it need no more digits for than
    float32 has; levels is 127 of int8 and 7 of int4, two of which share a byte. (Below 2⁻¹²⁶, where floats thin out, a
    number may be off by 2⁻¹³³ more.)
    """

    def __init__(self, bits: int) -> None:
        self.bits, self.levels = bits, 2 ** (bits - 1) - 1

    def size(self, numbers: int) -> int:
        """The scale and the integers, in whole bytes."""
        return SCALE + math.ceil(numbers * self.bits / 8)

    def encode(self, x: Float32, stream: np.random.Generator) -> bytes:
        """Scale, then integers; of a pair of int4 the first is in the lower half of its byte."""
        peak = float(np.abs(x).max(initial=0.0))
        exact = np.float32(peak / self.levels)
        if float(exact) * self.levels < peak:  # else the largest could round to more than there are levels
            exact = np.nextafter(exact, np.float32(np.inf))
        scale = _upper_half(exact.reshape(1).view(np.uint32).astype(np.uint64) + 0xFFFF)
        steps = x.astype(np.float64) / (float(_from_upper_half(scale)[0]) or 1.0)
        q = np.floor(steps + stream.random(len(x))).astype(np.int8)
        if self.bits == 4:
            raised = np.append(q + 8, [8] * (len(q) % 2)).astype(np.uint8)
            q = (raised[::2] | raised[1::2] << 4).view(np.int8)
        return scale + bytes(q.tobytes())

    def decode(self, codes: memoryview, numbers: int) -> Float32:
        """Integers times scale."""
        scale, q = _from_upper_half(codes[:SCALE]), np.frombuffer(codes[SCALE:], np.int8)
        if self.bits == 4:
            pairs = q.view(np.uint8)
            q = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:numbers].astype(np.int8) - np.int8(8)
        return q.astype(np.float32) * scale


class TwoBits(Codec):
    """Two bits a number: the nearest of -3/2, -1/2, 1/2 and 3/2 times one step a tensor, its root mean square: biased.

    The step is that of the best four equal steps for numbers of a normal distribution, 0.9957 σ (Max 1960), which lose
    0.12 of its variance. No number is off by more than (1/2 + 2⁻⁶) of the step, or its size less 1.49 steps. Zero is
    told as half a step. (Squares that float32 has no room for are no matter: they are added up in float64.)
    """

    def size(self, numbers: int) -> int:
        """The step, and four codes a byte."""
        return SCALE + math.ceil(numbers / 4)

    def encode(self, x: Float32, stream: np.random.Generator) -> bytes:
        """Step, then codes 0 to 3 from the lowest level on; the first is in the lowest bits of its byte."""
        step = np.float32(np.sqrt(np.square(x, dtype=np.float64).mean()) if len(x) else 0.0).reshape(1)
        scale = BFloat16().encode(step, stream)
        steps = x.astype(np.float64) / (float(_from_upper_half(scale)[0]) or 1.0)
        q = np.clip(np.floor(steps) + 2, 0, 3).astype(np.uint8)
        quads = np.append(q, np.zeros(-len(q) % 4, np.uint8)).reshape(-1, 4)
        return scale + bytes((quads << np.array([0, 2, 4, 6], np.uint8)).sum(axis=1).astype(np.uint8).tobytes())

    def decode(self, codes: memoryview, numbers: int) -> Float32:
        """Levels times the step."""
        scale, packed = _from_upper_half(codes[:SCALE]), np.frombuffer(codes[SCALE:], np.uint8)
        q = (packed[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1)[:numbers]
        return (q.astype(np.float32) - np.float32(1.5)) * scale


class Sign(Codec):
    """One bit a number and one scale a tensor, mean|x| as a bfloat16: biased.

    Karimireddy et al. 2019, "Error Feedback Fixes SignSGD": of x it loses ||x||² - n·mean|x|², at most
    (1 - 1/n) ||x||², and for the scale's rounding 2⁻¹⁶·n·mean|x|² more. No number is off by more than
    (1 + 2⁻⁸) max|x|. Zero has the sign +.
    """

    def size(self, numbers: int) -> int:
        """The scale, and eight signs a byte."""
        return SCALE + math.ceil(numbers / 8)

    def encode(self, x: Float32, stream: np.random.Generator) -> bytes:
        """Scale, then signs; the first is the lowest bit."""
        scale = np.float32(np.abs(x.astype(np.float64)).mean() if len(x) else 0.0).reshape(1)
        return BFloat16().encode(scale, stream) + np.packbits(x >= 0, bitorder="little").tobytes()

    def decode(self, codes: memoryview, numbers: int) -> Float32:
        """Plus or minus the scale."""
        scale, positive = _from_upper_half(codes[:SCALE]), _bits(codes[SCALE:], numbers)
        return np.where(positive, scale, -scale).astype(np.float32)


class TopK(Codec):
    """The numbers of the largest size, a share of each tensor, exactly; the rest is zero: biased.

    Of x it loses at most (1 - k/n) ||x||² (Stich et al. 2018), and no number is off by more than the least that was
    kept. Which they are is said by a bit for every number or by an index for each that is kept, whichever is shorter.
    """

    def __init__(self, form: WireForm) -> None:
        self.form = form

    def size(self, numbers: int) -> int:
        """Four bytes a number that is kept, and where they are."""
        k = self.form.kept(numbers)
        return 4 * k + min(_whole(numbers), _whole(k * _width(numbers)))

    def encode(self, x: Float32, stream: np.random.Generator) -> bytes:
        """The numbers that are kept in their order, then where they are. Of equal ones the first are kept."""
        n, k = len(x), self.form.kept(len(x))
        at = np.sort(np.argsort(-np.abs(x), kind="stable")[:k])
        if _by_map(n, k):
            chosen = np.zeros(n, bool)
            chosen[at] = True
        else:
            chosen = (at[:, None] >> np.arange(_width(n)) & 1).reshape(-1).astype(bool)
        return x[at].astype("<f4").tobytes() + np.packbits(chosen, bitorder="little").tobytes()

    def decode(self, codes: memoryview, numbers: int) -> Float32:
        """Zeros elsewhere."""
        k = self.form.kept(numbers)
        values, where = np.frombuffer(codes[: 4 * k], "<f4"), codes[4 * k :]
        if _by_map(numbers, k):
            at = np.flatnonzero(_bits(where, numbers))
        else:
            width = _width(numbers)
            bits = _bits(where, k * width).reshape(k, width)
            at = (bits.astype(np.int64) << np.arange(width)).sum(axis=1)
        if len(at) != k or np.any(np.diff(at) <= 0) or (k and at[-1] >= numbers):
            raise CodecError("what says which numbers were sent makes no sense")
        x = np.zeros(numbers, np.float32)
        x[at] = values
        return x


def _whole(bits: int) -> int:
    return math.ceil(bits / 8)


def _width(numbers: int) -> int:
    """Bits of an index."""
    return max(numbers - 1, 0).bit_length()


def _by_map(numbers: int, kept: int) -> bool:
    return _whole(numbers) <= _whole(kept * _width(numbers))


def _bits(codes: memoryview, count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(codes, np.uint8), count=count, bitorder="little").astype(bool)


def codec_of(form: WireForm) -> Codec:
    """The codec of a form, without its lossless stage."""
    makers: dict[str, Any] = {
        "float32": Plain,
        "bfloat16": BFloat16,
        "int8": lambda: Stochastic(8),
        "int4": lambda: Stochastic(4),
        "int2": TwoBits,
        "sign": Sign,
        "top-k": lambda: TopK(form),
    }
    made: Codec = makers[form.kind]()
    return made


def witness(tensors: Mapping[str, Float32]) -> int:
    """What a message is tied to: a CRC-32 of what the receiver must hold; of nothing it is 0."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(np.ascontiguousarray(tensors[name], "<f4").tobytes(), found)
    return found


def encode(
    form: WireForm, tensors: Mapping[str, npt.NDArray[Any]], stream: np.random.Generator, tied: int = 0
) -> bytes:
    """The message of some tensors. tied: see `witness`. Raises CodecError for NaN and Inf, in float32."""
    codec, codes = codec_of(form), b""
    for name in sorted(tensors):
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(tensors[name], np.float32).reshape(-1)
        if not np.isfinite(x).all():
            raise CodecError(f"{name} has values that are not finite, for which there is no code")
        codes += codec.encode(x, stream)
    return _sealed(form, codes, tied)


def cut(form: WireForm, message: bytes, shapes: Mapping[str, tuple[int, ...]], names: Collection[str]) -> bytes:
    """The message of some of a message's tensors, with the codes that they have in it. Raises as `decode` does."""
    codec = codec_of(form)
    sizes = {name: codec.size(math.prod(shapes[name])) for name in sorted(shapes)}
    codes, kept, at = _codes(form, message, sum(sizes.values()), 0), b"", 0
    for name, size in sizes.items():
        if name in names:
            kept += codes[at : at + size]
        at += size
    return _sealed(form, kept, 0)


def altered(
    form: WireForm,
    message: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    tied: int,
    change: Callable[[bytes], bytes],
) -> bytes:
    """A message with other codes under a right checksum, for faults on purpose. Raises as `decode` does."""
    codec = codec_of(form)
    size = sum(codec.size(math.prod(shape)) for shape in shapes.values())
    return _sealed(form, change(bytes(_codes(form, message, size, tied))), tied)


def _sealed(form: WireForm, codes: bytes, tied: int) -> bytes:
    """A message of codes: squeezed where that makes it shorter, and with its checksum."""
    if form.zstd:
        small = zstandard.ZstdCompressor(compression_params=_zstd_parameters()).compress(codes)
        codes = small if len(small) < len(codes) else codes
    return codes + _checksum(codes, tied)


def decode(form: WireForm, message: bytes, shapes: Mapping[str, tuple[int, ...]], tied: int = 0) -> Tensors:
    """The tensors of a message; `form`, the shapes and `tied` are the sender's. Raises CodecError for any other."""
    codec = codec_of(form)
    sizes = {name: codec.size(math.prod(shapes[name])) for name in sorted(shapes)}
    codes = _codes(form, message, sum(sizes.values()), tied)
    found: Tensors = {}
    at = 0
    for name, size in sizes.items():
        x = codec.decode(codes[at : at + size], math.prod(shapes[name]))
        if not np.isfinite(x).all():
            raise CodecError(f"{name} has values that are not finite")
        found[name] = x.reshape(shapes[name])
        at += size
    return found


def _checksum(body: bytes | memoryview, tied: int) -> bytes:
    return zlib.crc32(body, tied).to_bytes(CHECKSUM, "little")


def _codes(form: WireForm, message: bytes, size: int, tied: int) -> memoryview:
    """The codes of a message, which take so many bytes; a shorter message is one that zstd has squeezed."""
    body, checksum = memoryview(message)[:-CHECKSUM], message[-CHECKSUM:]
    squeezed = form.zstd and len(body) < size
    if len(body) != size and not squeezed:
        raise CodecError(
            f"it has {len(message)} bytes, expected {size + CHECKSUM}: the message is truncated or damaged"
        )
    if _checksum(body, tied) != checksum:
        raise CodecError("its checksum is wrong: the message was damaged, or is about another state than there is here")
    if not squeezed:
        return body
    try:
        # Never more than there can be, whatever the message says of itself.
        with zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS).stream_reader(bytes(body)) as reader:
            codes = reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise CodecError(f"its zstd stage cannot be read: {error}") from None
    if len(codes) != size:
        raise CodecError(f"its zstd stage gives {len(codes)} bytes or more, expected {size}")
    return memoryview(codes)


def _zstd_parameters() -> zstandard.ZstdCompressionParameters:
    """Of a frame that says nothing of itself: both sides know its size, and it has a checksum already."""
    return zstandard.ZstdCompressionParameters.from_level(
        LEVEL, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_checksum=0, write_content_size=0, write_dict_id=0
    )


def added(base: Mapping[str, Float32], change: Mapping[str, Float32]) -> Tensors:
    """base + change, in float32 of the sum in float64: one function for both sides, so that they have equal bits."""
    return {name: (base[name].astype(np.float64) + step).astype(np.float32) for name, step in change.items()}


def shapes_of(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """What `decode` asks for."""
    return {name: tensor.shape for name, tensor in tensors.items()}
