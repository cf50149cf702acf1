"""SCAFFOLD: clients correct their gradients by how their own differ from everybody's.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (arXiv:1910.06378),
algorithm 1 with option II and a global rate of 1. A client steps along g - c_i + c; then its c_i is the mean of its g,
and the change Δc_i goes up with its update. The server's c is the mean of the c_i of *all* clients, also of those
that were absent, whose c_i is what it was (zero before their first round): with N equal weights a round of clients S
gives c ← c + |S|/N · mean_S Δc_i.
"""

from collections.abc import Sequence

import numpy as np
from flwr.app import ArrayRecord

from fedlotr.flower import Arrays, Strategy, Update, weighted_mean


class Scaffold(Strategy):
    """x ← Σ p_i x_i, and c ← c + Σ_S w_i Δc_i / Σ_all w_i.

    The weights of c are those of the mean of the updates (in the paper all are equal): the optimum that is found is
    where c is zero, so other weights would quietly solve another problem. Σ_all w_i is N times the mean weight of the
    clients seen so far, which is exact for equal weights, and for any once all were seen.
    """

    averages = True
    controls = True

    def __init__(self, clients: int) -> None:
        """clients: N, in the whole federation."""
        self.clients = clients
        self.sums: Arrays = {}
        self.weights: dict[int, float] = {}

    def control(self, arrays: ArrayRecord) -> Arrays:
        """c."""
        everybody = self.clients * sum(self.weights.values()) / max(len(self.weights), 1) or 1.0
        return {name: self.sums.get(name, np.zeros(tuple(array.shape))) / everybody for name, array in arrays.items()}

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """x, and on the way Σ w_i c_i, to which every client has added its changes."""
        for update in updates:
            self.weights[update.client] = update.weight
            for name, change in update.control.items():
                self.sums[name] = self.sums.get(name, np.zeros_like(change)) + update.weight * change
        return weighted_mean(updates)
