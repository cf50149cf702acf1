"""FFA-LoRA: A is frozen where it was drawn, and the mean of the B_i is exact.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (arXiv:2403.12313):
Σ p_i (s·B_i A) = s·(Σ p_i B_i) A.
"""

from collections.abc import Sequence

from fedlotr.flower import Arrays, Strategy, Update, weighted_mean


class FFALoRA(Strategy):
    """B ← Σ p_i B_i."""

    averages = True

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """B̄ = Σ p_i B_i."""
        return weighted_mean(updates)
