"""FedSA: what clients share is averaged; what stays with them is theirs.

Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (arXiv:2410.01463). Every client
has another model, so there is no mean of updates to be exact about: nothing is certified.
"""

from collections.abc import Sequence

from fedlotr.flower import Arrays, Strategy, Update, weighted_mean


class FedSA(Strategy):
    """A ← Σ p_i A_i, and the head likewise; each client keeps its B (or, of another method, what stays with it)."""

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """The mean of what clients sent, which is all but their own factors."""
        return weighted_mean(updates)
