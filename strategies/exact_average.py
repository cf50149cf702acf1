"""The weighted mean of the cores, which is exactly the weighted mean of the updates.

Singhal et al. 2025, "Fed-SB" (arXiv:2502.15436): with B and A frozen and equal on all clients,
Σ p_i (s·B C_i A) = s·B (Σ p_i C_i) A.
"""

from collections.abc import Sequence

from fedlotr.flower import Arrays, Strategy, Update, weighted_mean


class ExactAverage(Strategy):
    """C ← Σ p_i C_i, and the head likewise."""

    averages = True

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """C̄ = Σ p_i C_i."""
        return weighted_mean(updates)
