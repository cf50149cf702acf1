"""FlexLoRA: the mean update, and of it what fits the rank: its leading singular values and vectors.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
(arXiv:2402.11505): Σ p_i B_i A_i = U S Vᵀ; B ← U S, A ← Vᵀ, of which a client of rank r_i gets the first r_i columns
and rows. The product is never formed: it is that of the stacked factors, and its singular values are those of the
product of their triangular QR factors. What is lost are the discarded singular values; at full rank nothing is.
"""

from collections.abc import Sequence

import numpy as np

from fedlotr.flower import Arrays, Strategy, Update, by_layer, weighted_mean


class FlexLoRA(Strategy):
    """B A ← the best approximation of Σ p_i B_i A_i of rank r; the head ← Σ p_i."""

    averages = True
    restarts = True
    needs = frozenset("AB")

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """(U S, Vᵀ) of the mean."""
        total = sum(update.weight for update in updates)
        new = weighted_mean(updates)  # of the head; A and B are replaced
        for factors in by_layer(new).values():
            a, b = factors["A"], factors["B"]
            r = len(new[a])
            left = np.linalg.qr(np.concatenate([u.weight / total * u.arrays[b] for u in updates], axis=1))
            right = np.linalg.qr(np.concatenate([u.arrays[a] for u in updates], axis=0).T)
            u, s, v = np.linalg.svd(left.R @ right.R.T)
            new[b] = left.Q @ u[:, :r] * s[:r]
            new[a] = v[:r] @ right.Q.T
        return new
