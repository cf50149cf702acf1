"""Values of many kinds as plain JSON with their arrays set apart, and back, so that a checkpoint needs no pickle.

What JSON has is itself; anything else is an object with one word that says what it is.
"""

import base64
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlotr.flower.lazy import LazyArray, LazyRecord

Arrays = dict[str, npt.NDArray[Any]]

PLAIN = (type(None), bool, int, float, str)
SEQUENCES: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda items: Counter(dict(items)),
    "ConfigRecord": lambda items: ConfigRecord(dict(items)),
    "MetricRecord": lambda items: MetricRecord(dict(items)),
    "ArrayRecord": lambda items: ArrayRecord(OrderedDict(items)),
    "RecordDict": lambda items: RecordDict(dict(items)),
}
FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, list, dict, set)}
"""What a defaultdict may make of nothing."""
BIT_GENERATORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
IN_SAFETENSORS = frozenset(f"{kind}{width}" for kind in "iu" for width in (1, 2, 4, 8)) | {"b1", "f2", "f4", "f8"}


class NotPlainError(TypeError):
    """A value that is no state, or one that cannot be written: a function, a logger, an object of some other kind."""


def pack(value: Any, arrays: Arrays, prefix: str) -> Any:
    """The JSON of a value; its arrays are added to `arrays` under names that begin with the prefix.

    Only exact types are taken: an object of a class derived from one would not be the same when it comes back. Raises
    NotPlainError for any other.
    """

    def inner(item: Any) -> Any:
        return pack(item, arrays, prefix)

    kind = type(value)
    if kind is float and not math.isfinite(value):  # JSON has no such number
        return {"float": repr(value)}
    if kind in PLAIN:
        return value
    if kind is np.ndarray:
        return _pack_array(value, arrays, prefix)
    if isinstance(value, np.generic):
        return {"scalar": _pack_array(np.asarray(value), arrays, prefix)}
    if kind.__name__ in SEQUENCES and kind is SEQUENCES[kind.__name__]:
        return {kind.__name__: [inner(item) for item in value]}
    if kind in (dict, OrderedDict, Counter, ConfigRecord, MetricRecord, ArrayRecord, RecordDict):
        return {kind.__name__: [[inner(key), inner(item)] for key, item in value.items()]}
    if kind is defaultdict:
        factory = None if value.default_factory is None else value.default_factory.__name__
        if factory is None or FACTORIES.get(factory) is value.default_factory:
            return {"defaultdict": [[inner(key), inner(item)] for key, item in value.items()], "factory": factory}
    if kind is deque:
        return {"deque": [inner(item) for item in value], "maxlen": value.maxlen}
    if kind is LazyRecord:
        return inner(value.plain())
    if kind in (Array, LazyArray) and value.stype == "numpy.ndarray":
        return {"Array": inner(value.numpy())}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"complex": [inner(value.real), inner(value.imag)]}
    if kind is torch.Tensor:
        return _pack_tensor(value, arrays, prefix)
    if (generator := _generator_state(value)) is not None:
        return {"generator": inner(generator)}
    raise NotPlainError(f"a {kind.__name__} cannot be part of a checkpoint; give arrays and plain values")


def unpack(packed: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
    """What `pack` was given. Raises KeyError or ValueError where the JSON and the arrays do not belong together."""

    def inner(item: Any) -> Any:
        return unpack(item, arrays)

    if not isinstance(packed, dict):
        return packed
    word, content = next(iter(packed.items()))
    if word in SEQUENCES:
        return SEQUENCES[word](map(inner, content))
    if word in MAPPINGS:
        return MAPPINGS[word]([(inner(key), inner(item)) for key, item in content])
    match packed:
        case {"array": name, "shape": shape, "dtype": dtype}:
            found = arrays[name]
            return (found if found.dtype.str == dtype else found.view(dtype)).reshape(shape).copy()
        case {"scalar": array}:
            return inner(array)[()]
        case {"defaultdict": items, "factory": factory}:
            made: Any = defaultdict(FACTORIES[factory] if factory else None)
            made.update((inner(key), inner(item)) for key, item in items)
            return made
        case {"deque": items, "maxlen": maxlen}:
            return deque(map(inner, items), maxlen)
        case {"Array": array}:
            return Array(inner(array))
        case {"bytes": text}:
            return base64.b64decode(text)
        case {"complex": [real, imaginary]}:
            return complex(inner(real), inner(imaginary))
        case {"float": text}:
            return float(text)
        case {"tensor": array, "as": dtype}:
            return torch.from_numpy(inner(array)).view(getattr(torch, dtype))
        case {"generator": state}:
            return _unpack_generator(*inner(state))
    raise ValueError(f"{word} is no kind of value that a checkpoint has")


def to_blob(records: RecordDict) -> npt.NDArray[np.uint8]:
    """Records as bytes: their JSON with the length of that before it, and then what their arrays hold, as it is."""
    raw: list[bytes] = []

    def head(record: Any) -> Any:
        if not isinstance(record, ArrayRecord):
            return pack(record, {}, "")
        told = []
        for name, array in record.items():
            raw.append(array.data)
            told.append([name, array.dtype, list(array.shape), array.stype, len(raw[-1])])
        return told

    text = json.dumps([[name, head(record)] for name, record in records.items()]).encode()
    return np.frombuffer(b"".join([len(text).to_bytes(8, "little"), text, *raw]), np.uint8)


def from_blob(blob: npt.NDArray[np.uint8]) -> RecordDict:
    """What `to_blob` was given."""
    content = blob.tobytes()
    at = 8 + int.from_bytes(content[:8], "little")
    found = RecordDict()
    for name, head in json.loads(content[8:at]):
        if isinstance(head, dict):
            found[name] = unpack(head, {})
            continue
        arrays = {}
        for key, dtype, shape, stype, size in head:
            arrays[key] = Array(dtype, tuple(shape), stype, content[at : at + size])
            at += size
        found[name] = ArrayRecord(arrays)
    return found


def _pack_array(value: npt.NDArray[Any], arrays: Arrays, prefix: str) -> Any:
    """Numbers as they are; what safetensors does not have (complex numbers, dates, texts) as its bytes."""
    if value.dtype.kind not in "biufcmMSU":
        raise NotPlainError(f"an array of {value.dtype} cannot be part of a checkpoint; give arrays of numbers")
    name = f"{prefix}.{len(arrays)}"
    whole = np.ascontiguousarray(value)
    fits = value.dtype.isnative and value.dtype.str[1:] in IN_SAFETENSORS
    arrays[name] = whole if fits else whole.reshape(-1).view(np.uint8)
    return {"array": name, "shape": list(value.shape), "dtype": value.dtype.str}


def _pack_tensor(value: torch.Tensor, arrays: Arrays, prefix: str) -> Any:
    """On the CPU and without its graph; numpy has no bfloat16, so that goes by its bits."""
    plain = value.detach().cpu()
    if plain.is_quantized or plain.layout is not torch.strided:
        raise NotPlainError("a sparse or quantised tensor cannot be part of a checkpoint; give arrays and plain values")
    bits = plain.contiguous().view(torch.int16) if plain.dtype is torch.bfloat16 else plain
    return {"tensor": _pack_array(bits.numpy(), arrays, prefix), "as": str(plain.dtype).removeprefix("torch.")}


def _generator_state(value: Any) -> list[Any] | None:
    """Kind and state of a random generator of Python, numpy or torch."""
    if type(value) is random.Random:
        return ["random", value.getstate()]
    if type(value) is np.random.Generator and type(value.bit_generator).__name__ in BIT_GENERATORS:
        return ["Generator", value.bit_generator.state]
    if type(value) is np.random.RandomState:
        return ["RandomState", value.get_state(legacy=False)]
    if type(value) is torch.Generator and value.device.type == "cpu":
        return ["torch", value.get_state()]
    return None


def _unpack_generator(kind: str, state: Any) -> Any:
    if kind == "random":
        stream = random.Random()
        stream.setstate(state)
        return stream
    if kind == "torch":
        return torch.Generator().set_state(state)
    made = BIT_GENERATORS[state["bit_generator"]]()
    if kind == "RandomState":
        legacy = np.random.RandomState(made)
        legacy.set_state(state)
        return legacy
    made.state = state
    return np.random.Generator(made)
