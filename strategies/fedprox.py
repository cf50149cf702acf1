"""FedProx: clients are held near the model they were sent.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (arXiv:1812.06127): each client minimises
F_k(x) + μ/2 ||x - x₀||² over the factors and the head; the server averages as ever.
"""

from collections.abc import Sequence

from fedlotr.flower import Arrays, Strategy, Update, weighted_mean


class FedProx(Strategy):
    """x ← Σ p_i x_i of clients that pay μ/2 ||x - x₀||²; μ was not searched for."""

    averages = True

    def __init__(self, mu: float = 0.1) -> None:
        if not 0 <= mu < float("inf"):
            raise ValueError(f"mu is {mu}; expected a number, 0 or more")
        self.asks = {"proximal-mu": float(mu)}

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """Σ p_i x_i."""
        return weighted_mean(updates)
