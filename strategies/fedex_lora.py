"""FedEx-LoRA: the factors averaged as in FedIT, and what that misses carried beside W, exactly, as factors.

Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models"
(arXiv:2410.09432): Σ p_i B_i A_i = B̄ Ā + Σ p_i (B_i - B̄)(A_i - Ā). Since Σ p_i (B_i - B̄) = 0, the last client's
term is that of the others: the residual is Σ_{i<c} p_i (B_i - B̄)(A_i - A_c), of rank (c - 1) r.
"""

from collections.abc import Sequence

import numpy as np

from fedlotr.flower import Combined, Product, Strategy, Update, by_layer, weighted_mean


class FedExLoRA(Strategy):
    """A ← Σ p_i A_i, B ← Σ p_i B_i;  carry ← carry + Σ p_i B_i A_i - B̄ Ā."""

    averages = True
    exact = True
    needs = frozenset("AB")

    def merges(self, ranks: Sequence[int]) -> int:
        """(c - 1) r."""
        return (len(ranks) - 1) * max(ranks)

    def combine(self, updates: Sequence[Update], server_round: int) -> Combined:
        """(Ā, B̄), and the residual."""
        total = sum(update.weight for update in updates)
        mean = weighted_mean(updates)
        *others, last = updates
        k = max((update.rank for update in updates if update.rank is not None), default=None)  # the rest is zero
        carry: dict[str, Product] = {}
        for layer, factors in by_layer(mean).items() if others else ():
            a, b = factors["A"], factors["B"]
            lefts = [update.weight / total * (update.arrays[b] - mean[b])[:, :k] for update in others]
            rights = [(update.arrays[a] - last.arrays[a])[:k] for update in others]
            carry[layer] = Product(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0))
        return Combined(mean, carry)
