"""FedIT: both LoRA factors averaged, each on its own.

Zhang et al. 2023, "Towards Building the Federated GPT: Federated Instruction Tuning" (arXiv:2305.05644). The product
of the means is not the mean of the products: it misses Σ p_i (B_i - B̄)(A_i - Ā). The certificate shows by how much.
"""

from collections.abc import Sequence

from fedlotr.flower import Arrays, Strategy, Update, weighted_mean


class FedIT(Strategy):
    """A ← Σ p_i A_i, B ← Σ p_i B_i."""

    averages = True

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """(Ā, B̄), published as if B̄ Ā were the mean of the B_i A_i."""
        return weighted_mean(updates)
