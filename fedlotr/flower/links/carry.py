"""The carried term between server and clients: what a strategy adds to it, and the records by which clients follow."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.flower.certificate import Layer, Matrix, Product
from fedlotr.flower.records import Arrays, arrays_sha256, to_record, to_tensors
from fedlotr.flower.strategy import Strategy

PARTS, STATE = "carry", "carry-state"
"""Records of a message: the parts that a client missed, and what it must then have."""


def additions(strategy: Any, layers: Sequence[Layer], start: Arrays) -> dict[str, Product]:
    """What a strategy adds to the carried term in this round, scaled, in float64.

    Raises ValueError for what cannot be added: another layer, another shape, numbers that are not finite.
    """
    if not isinstance(strategy, Strategy):
        return {}
    by_name = {layer.name: layer for layer in layers}
    found: dict[str, Product] = {}
    for name, (left, right) in strategy.take_carry().items():
        if name not in by_name:
            raise ValueError(f"it carries {name}, expected an adapted layer such as {next(iter(by_name), '(none)')}")
        d_out, d_in = _shape(by_name[name], start)
        k = left.shape[-1]
        if left.shape != (d_out, k) or right.shape != (k, d_in):
            raise ValueError(f"it carries {left.shape} times {right.shape} in {name}, expected {(d_out, d_in)} in all")
        if not np.isfinite(left).all() or not np.isfinite(right).all():
            raise ValueError(f"it carries values in {name} that are not finite")
        if k:
            found[name] = Product(by_name[name].scale * left.astype(np.float64), right.astype(np.float64))
    return found


def _shape(layer: Layer, arrays: Arrays) -> tuple[int, int]:
    """(d_out, d_in)."""
    if "D" in layer.trained:
        d_out, d_in = arrays[layer.trained["D"]].shape
        return d_out, d_in
    a = layer.A if layer.A is not None else arrays[layer.trained["A"]]
    b = layer.B if layer.B is not None else arrays[layer.trained["B"]]
    return len(b), a.shape[1]


def merged(carry: Carry, added: Mapping[str, Product]) -> Carry:
    """The carried term with the additions, in float32. Raises ValueError where that has no room for them."""
    if not added:
        return carry
    with np.errstate(over="ignore"):
        pairs = {name: Factors(_float32(right), _float32(left)) for name, (left, right) in sorted(added.items())}
    after = carry.grown(pairs)
    for name in added:
        if not all(torch.isfinite(tensor).all() for tensor in after.terms[name].tensors()):
            raise ValueError(f"what it carries in {name} is past what float32 has room for")
    return after


def lost(before: Carry, after: Carry, added: Mapping[str, Product], layer: str) -> Product | Matrix | None:
    """How far the carried term's change in a layer is from what was to be added: as a product, or as a matrix."""
    if layer not in added:
        return None
    left, right = added[layer]
    if (term := after.terms[layer]).dense is None:
        v, u = (factor.double().numpy() for factor in term.parts[-1].pair)
        return Product(np.concatenate([u, -left], axis=1), np.concatenate([v, right], axis=0))
    change = term.matrix() - (before.terms[layer].matrix() if layer in before.terms else 0)
    return np.asarray(change.numpy() - left @ right)


def _float32(matrix: Matrix) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix, np.float32))


def carry_records(carry: Carry, since: int) -> dict[str, Any]:
    """The records for one who has version `since`; none where nothing has been added yet."""
    if not carry.version:
        return {}
    state: dict[str, Any] = {"version": carry.version, "since": since, "sha256": bytes.fromhex(carry.sha256)}
    records: dict[str, Any] = {STATE: ConfigRecord(state)}
    if missed := carry.missed(since):
        records[PARTS] = to_record(missed)
    return records


def add_carry(messages: Iterable[Message], nodes: Mapping[int, int], carry: Carry, holds: Mapping[int, int]) -> None:
    """Put into each client's message what it missed. holds: client -> the version it has (default: 0)."""
    records: dict[int, dict[str, Any]] = {}
    for message in messages:
        since = holds.get(nodes[message.metadata.dst_node_id], 0)
        if since not in records:
            records[since] = carry_records(carry, since)
        message.content = RecordDict({**message.content, **records[since]})


def parts_of(content: Any) -> dict[str, torch.Tensor]:
    """The parts that a message brings."""
    return to_tensors(content[PARTS]) if PARTS in content else {}


def saved(carry: Carry) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """(arrays, JSON values) of a checkpoint; nothing of version 0, which the adapter that the run starts from has."""
    if not carry.version:
        return {}, {}
    tensors, about = carry.saved()
    return {f"{PARTS}.{name}": tensor.numpy() for name, tensor in tensors.items()}, {PARTS: about}


def restored(arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]) -> Carry:
    """What `saved` was given, from all arrays of a checkpoint."""
    prefix = f"{PARTS}."
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return Carry.restored({name: torch.from_numpy(array) for name, array in own.items()}, about)


def model_sha256(arrays: ArrayRecord, carry: Carry) -> str:
    """Fingerprint of a trained model: of its tensors in key order, with the carried term's where there is one."""
    if not carry.version:
        return arrays_sha256(arrays)
    matrices = {
        f"{PARTS}.{name}.{side}": factor
        for name, term in carry.terms.items()
        for side, factor in zip("W" if term.dense is not None else "VU", term.tensors(), strict=True)
    }
    return arrays_sha256(ArrayRecord({**arrays, **to_record(matrices)}))
