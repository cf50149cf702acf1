"""Penalties on a client's trained factors, as gradient transforms: what they add to the gradients of its loss."""

from collections.abc import Mapping

import torch

from fedlotr.training.cohort import GradientTransform


def tail_penalty(layers: Mapping[str, Mapping[str, str]], weight: float, start: int) -> GradientTransform:
    """The gradient of `weight · Σ ||B[:, start:]|| ||A[start:]||` over the layers, for every client: HetLoRA's.

    layers: layer -> "A" and "B" -> the name of the tensor, (clients, r, d_in) and (clients, d_out, r). Where a norm is
    zero its gradient is taken as zero.
    """

    def transform(gradients: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = dict(gradients)
        for names in layers.values():
            tails = {"A": values[names["A"]][..., start:, :], "B": values[names["B"]][..., start:]}
            norms = {side: torch.linalg.matrix_norm(tail, keepdim=True) for side, tail in tails.items()}
            for side, other in ("AB", "BA"):
                step = weight * norms[other] * tails[side] / norms[side].clamp(min=torch.finfo(torch.float32).tiny)
                changed[names[side]] = gradients[names[side]].clone()
                rest = changed[names[side]]
                (rest[..., start:, :] if side == "A" else rest[..., start:]).add_(step)
        return changed

    return transform
