"""What stands between the frozen factors: the plain functions that the entries of `kinds.CORES` name."""

from collections.abc import Mapping

import torch

from fedlotr.adapters.kinds import BLOCKS, MIXED
from fedlotr.streams import stream_key

Theta = Mapping[str, torch.Tensor]


def as_trained(theta: Theta, _: torch.Tensor | None = None) -> torch.Tensor:
    """C is the trained matrix itself."""
    return theta["C"]


def core_alone(theta: Theta) -> dict[str, torch.Tensor]:
    """What leaves the client is "C" as it is trained."""
    return {"C": theta["C"]}


def expand_diagonal(theta: Theta, _: torch.Tensor | None = None) -> torch.Tensor:
    """C = diag(v): Shi et al. 2024, LoLDU (arXiv:2410.13618)."""
    return torch.diag_embed(theta["C"])


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


def recover_whole(core: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
    """Of `as_trained`."""
    return core


def recover_diagonal(core: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
    """Of `expand_diagonal`."""
    return core.diagonal()


def recover_heads(core: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
    """Of `expand_heads`, with scales of one."""
    m = len(core) // BLOCKS
    return torch.stack([core[at : at + m, at : at + m] for at in range(0, len(core), m)])


def recover_mix(core: torch.Tensor, mixed: torch.Tensor | None) -> torch.Tensor:
    """Of `expand_mix`, by least squares."""
    assert mixed is not None
    found: torch.Tensor = torch.linalg.lstsq(mixed.flatten(1).T.to(core.dtype), core.reshape(-1, 1)).solution
    return found[:, 0]


def mixed_matrices(r: int, seed: int, tag: str) -> torch.Tensor:
    """P (n, r, r), normal with variance 1/r, from the seed and the tie's name; n is 64, or r² where that is less."""
    stream = torch.Generator().manual_seed(stream_key(seed, "mix", tag))
    return torch.randn(min(MIXED, r * r), r, r, generator=stream, dtype=torch.float64).div(r**0.5).float()
