"""An exported adapter of other ranks: a lower one by singular values, with its error, or one rank for all layers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedlotr.adapters.bases import Factors, one_thread
from fedlotr.adapters.experts import Slot
from fedlotr.adapters.export import PREFIX, rank_fields
from fedlotr.adapters.stacked import WEIGHT, filled, stacked
from fedlotr.adapters.start import CONFIG, WEIGHTS, read_lora
from fedlotr.files import write_atomically


@dataclass(frozen=True)
class Reduced:
    """rank: the most that a layer has now. layers: how many of them had more, of `of`.

    error: ‖ΔW - ΔW_r‖ / ‖ΔW‖, Frobenius, of all layers together; worst: the largest of one layer's, which is `where`.
    """

    rank: int
    layers: int
    of: int
    error: float
    worst: float
    where: str

    def in_words(self) -> str:
        """One line."""
        if not self.layers:
            return f"no layer has a rank above {self.rank}: nothing is lost"
        return (
            f"{self.layers} of {self.of} layers are reduced to rank {self.rank} by their leading singular values: "
            f"relative Frobenius error {self.error:.3g} in all, {self.worst:.3g} at most, in {self.where}"
        )


def truncated(pair: Factors, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of `B A` of a rank (Eckart and Young 1936), and the squared norms of what is lost, and of
    the whole.

    pair: A (k, d_in) and B (d_out, k). No matrix of d_out × d_in is made: B = Q R and Aᵀ = P S give B A = Q (R Sᵀ) Pᵀ.
    """
    with one_thread():
        q, r = torch.linalg.qr(pair.B.double())
        p, s = torch.linalg.qr(pair.A.double().T)
        u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
        root = values[:rank].sqrt()
        found = Factors((root[:, None] * (v[:rank] @ p.T)).float(), ((q @ u[:, :rank]) * root).float())
    squares = values.square()
    return found, float(squares[rank:].sum()), float(squares.sum())


def reduce_adapter(folder: Path, rank: int) -> Reduced:
    """Bring each layer of a plain LoRA's folder to at most a rank, in place.

    Raises InputError for a folder that holds no plain LoRA.
    """
    read = read_lora(folder)
    layers = read.layers
    lost, whole, errors = 0.0, 0.0, {}
    for name, pair in layers.items():
        size = _squared(pair)
        if len(pair.A) > rank:
            layers[name], tail, size = truncated(pair, rank)
            errors[name], lost = math.sqrt(tail / size) if size else 0.0, lost + tail
        whole += size
    where = max(errors, key=lambda name: errors[name], default="")
    if errors:
        rewrite(folder, layers, read.slots)
    error = math.sqrt(lost / whole) if whole else 0.0
    return Reduced(rank, len(errors), len(layers), error, errors.get(where, 0.0), where)


def pad_adapter(folder: Path) -> int:
    """Give all layers of a plain LoRA's folder the largest rank among them, in place, and return it.

    Raises InputError for a folder that holds no plain LoRA.
    """
    read = read_lora(folder)
    rank = max(len(pair.A) for pair in read.layers.values())
    rewrite(folder, {name: filled(pair, rank) for name, pair in read.layers.items()}, read.slots)
    return rank


def rewrite(folder: Path, layers: Mapping[str, Factors], slots: Mapping[str, Slot]) -> None:
    """Put other pairs, whose scale is 1, in the place of those of an adapter's folder; all else in it stays.

    slots: of its layers that are experts'.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    made = stacked(layers, slots)
    tensors = load_file(folder / WEIGHTS) | {f"{PREFIX}{name}": tensor for name, tensor in made.tensors.items()}
    weights = {name.removesuffix(WEIGHT) for name in config.get("target_parameters") or ()}
    ranks = {name + WEIGHT * (name in weights and name in layers): rank for name, rank in made.ranks.items()}
    config |= {**rank_fields(ranks, ranks.keys() - made.modules), "use_rslora": False}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))


def _squared(pair: Factors) -> float:
    """‖B A‖², of the small matrices alone: the trace of (BᵀB)(A Aᵀ)."""
    a, b = pair.A.double(), pair.B.double()
    return float(((b.T @ b) * (a @ a.T)).sum())
