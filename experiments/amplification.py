"""What the noise of DP does to a published update: once, linearly, in a core; multiplied by itself in LoRA's factors.

All that is trained gets independent noise of one deviation τ in every number (τ = rate · σ · bound / batch for a step
of SGD). The update is ΔW = s·B C A, so what the noise puts into it has, squared and on average, the size

    C trained (cores)     s² τ² ‖B‖² ‖A‖²
    B trained (FFA-LoRA)  s² τ² m ‖A‖²
    A and B (LoRA)        s² (τ² n ‖B‖² + τ² m ‖A‖² + τ⁴ m n r)

with A (r, n) and B (m, r), norms of Frobenius: the last term, noise times noise, has no counterpart elsewhere (Sun et
al. 2024, FFA-LoRA, arXiv:2403.12313, have the argument).
"""

from collections.abc import Collection, Mapping

import torch


def expected_noise(
    factors: Mapping[str, torch.Tensor],
    trained: Collection[str],
    tau: float,
    scaling: float = 1.0,
    over: int = 1,
    exact: bool = True,
) -> float:
    """The mean of ‖noise in ΔW‖² of one layer, each trained factor of which has noise of deviation tau a number.

    factors: "A" (r, n) and "B" (m, r), without noise. trained: {"C"}, {"B"}, {"A"} or {"A", "B"}. over: in the mean of
    so many clients, each with noise of its own; exact: of their products (FedEx-LoRA, FLoRA), or the product of the
    means of their factors (FedIT).
    """
    a, b = factors["A"].double(), factors["B"].double()
    (r, n), m, each = a.shape, len(b), tau**2 / over
    sizes = {"A": float(a.square().sum()), "B": float(b.square().sum())}
    if set(trained) == {"C"}:
        return scaling**2 * each * sizes["A"] * sizes["B"]
    linear = each * (n * sizes["B"] * ("A" in trained) + m * sizes["A"] * ("B" in trained))
    both = {"A", "B"} == set(trained)
    return scaling**2 * (linear + both * (tau**4 / over if exact else each**2) * m * n * r)
