"""What stands between the frozen factors: each core is two plain functions of its trained tensors θ.

`expand(θ, P)` gives C (..., r, r), linear in what is published, for any leading copies axes; `publish(θ)` gives the
tensors that leave the client. "S" stays on the client: it starts at one in every round. All other tensors start at
zero, so that the first forward is the base model's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fedlotr.adapters.methods import HEADS
from fedlotr.streams import stream_key

MIXED = 64
"""Matrices that `mix` combines, at most: the number that PEFT's TinyLoRA takes."""

Theta = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Core:
    """shapes: r -> the trained tensors' shapes, "C" and perhaps "S"."""

    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    expand: Callable[[Theta, torch.Tensor | None], torch.Tensor]
    publish: Callable[[Theta], dict[str, torch.Tensor]]


def _itself(theta: Theta) -> dict[str, torch.Tensor]:
    return {"C": theta["C"]}


def expand_heads(theta: Theta, _: torch.Tensor | None = None) -> torch.Tensor:
    """C = blockdiag(s_1 H_1, ..., s_h H_h): Raje et al. 2025, RAVAN (arXiv:2506.05568), ΔW = Σ s_i B_i H_i A_i."""
    blocks = publish_heads(theta)["C"] if "S" in theta else theta["C"]
    h, m = blocks.shape[-3], blocks.shape[-1]
    places = torch.eye(h, dtype=blocks.dtype, device=blocks.device)
    # (..., i, a, j, b) is block i's entry (a, b) where i = j, else zero.
    spread = blocks.unsqueeze(-2) * places[:, None, :, None]
    return spread.reshape(*blocks.shape[:-3], h * m, h * m)


def publish_heads(theta: Theta) -> dict[str, torch.Tensor]:
    """The products s_i H_i: averaging s and H apart would not be exact."""
    return {"C": theta["S"][..., None, None] * theta["C"]}


def expand_mix(theta: Theta, mixed: torch.Tensor | None) -> torch.Tensor:
    """C = Σ v_i P_i: Koohpayegani et al. 2024, NOLA (arXiv:2310.02556); Morris et al. 2026, TinyLoRA (2602.04118)."""
    assert mixed is not None
    core: torch.Tensor = torch.tensordot(theta["C"], mixed.to(theta["C"].dtype), dims=1)
    return core


def mixed_matrices(r: int, seed: int, tag: str) -> torch.Tensor:
    """P (n, r, r), normal with variance 1/r, from the seed and the tie's name; n is 64, or r² where that is less."""
    stream = torch.Generator().manual_seed(stream_key(seed, "mix", tag))
    return torch.randn(min(MIXED, r * r), r, r, generator=stream, dtype=torch.float64).div(r**0.5).float()


CORES: dict[str, Core] = {
    "full": Core(lambda r: {"C": (r, r)}, lambda theta, _: theta["C"], _itself),
    "diag": Core(lambda r: {"C": (r,)}, lambda theta, _: torch.diag_embed(theta["C"]), _itself),
    "heads": Core(lambda r: {"C": (HEADS, r // HEADS, r // HEADS), "S": (HEADS,)}, expand_heads, publish_heads),
    "mix": Core(lambda r: {"C": (min(MIXED, r * r),)}, expand_mix, _itself),
}
"""The functions of each core of `methods.CORES` but `identity`, which has nothing to train."""
