"""RoLoRA: in a round only one of LoRA's factors moves, so the mean of that one is exact.

Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (arXiv:2502.01755):
odd rounds Σ p_i (s·B_i A) = s·(Σ p_i B_i) A, even rounds Σ p_i (s·B A_i) = s·B (Σ p_i A_i).
"""

from collections.abc import Sequence

from fedlotr.flower import Arrays, Strategy, Update, weighted_mean


class RoLoRA(Strategy):
    """B ← Σ p_i B_i in odd rounds, A ← Σ p_i A_i in even ones: the clients send the one that moved."""

    averages = True

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """The mean of the factor whose turn it is."""
        return weighted_mean(updates)
