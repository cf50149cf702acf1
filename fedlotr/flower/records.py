"""Tensors to Flower's records and back: one named array per trained tensor."""

import hashlib
import re
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedlotr.flower.reading import value

Arrays = dict[str, npt.NDArray[np.float64]]
ARRAYS, CONFIG, METRICS, CLIENT, ASKS = "arrays", "config", "metrics", "client", "asks"
"""Records: trained tensors both ways, what a message asks; what a reply says of its training, and who it is from; or,
alone, what a client needs before it can train."""
OF, TOKENS, STOPS, STOP_TEXT, TEMPERATURE = "of", "tokens", "stops", "stop-text", "temperature"
"""What an evaluate message's config says: which of the workplace's examples (test, choices, prompts); of prompts, how
many tokens an answer has at most, which end it, which text does (empty: none), and at which temperature they are
drawn."""
FACTOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.core_(?P<factor>[A-Z])")
"""How the trained tensors of an adapted layer are called."""
Bases = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def to_record(tensors: Mapping[str, torch.Tensor | npt.NDArray[np.generic]]) -> ArrayRecord:
    """Arrays by name, in their own dtype, copied into Flower's format."""
    return ArrayRecord(
        {
            name: Array(np.ascontiguousarray(t.detach().cpu().numpy() if isinstance(t, torch.Tensor) else t))
            for name, t in tensors.items()
        }
    )


def to_tensors(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Tensors by name that share nothing with the record."""
    return {name: torch.from_numpy(value(array).copy()) for name, array in record.items()}


def to_arrays(record: ArrayRecord) -> Arrays:
    """float64 arrays by name: what aggregation computes with."""
    return {name: value(array).astype(np.float64) for name, array in record.items()}


def by_layer(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The tensors of adapted layers: layer -> "A", "B" or "C" -> the tensor's name; a head's are passed over."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := FACTOR.fullmatch(name):
            found.setdefault(match["layer"], {})[match["factor"]] = name
    return found


def bases_record(bases: Bases) -> ArrayRecord:
    """Frozen pairs as one record: `<layer>.A`, `<layer>.B`."""
    return to_record(
        {f"{name}.{side}": factor for name, pair in bases.items() for side, factor in zip("AB", pair, strict=True)}
    )


def derivable_record(seed: int, sha256: str) -> ConfigRecord:
    """What a client needs to make the bases again by itself, and to know that they are the same: 40 bytes."""
    return ConfigRecord({"seed": seed, "sha256": bytes.fromhex(sha256)})


def bases_from_record(record: ArrayRecord) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What `bases_record` wrote."""
    tensors = to_tensors(record)
    return {name[:-2]: (tensors[name], tensors[f"{name[:-2]}.B"]) for name in tensors if name.endswith(".A")}


def arrays_sha256(record: ArrayRecord) -> str:
    """Fingerprint of named arrays in key order: names, dtypes, shapes and bytes; hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(record.keys()):
        array = value(record[name])
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
