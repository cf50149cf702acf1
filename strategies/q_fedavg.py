"""q-FedAvg: who is served badly weighs more, so that the model is more even over clients.

Li, Sanjabi, Beirami & Smith 2020, "Fair Resource Allocation in Federated Learning" (arXiv:1905.10497), algorithm 2:
Σ p_k F_k^(q+1) / (q+1) is to become small, F_k being client k's loss of the model that it was sent. There
Δ_k = F_k^q L (x - x_k), h_k = q F_k^(q-1) ||L (x - x_k)||² + L F_k^q and x ← x - Σ p_k Δ_k / Σ p_k h_k; divided by L
that is what stands below.
"""

from collections.abc import Sequence

import numpy as np

from fedlotr.flower import Arrays, FromStart, Update


class QFedAvg(FromStart):
    """x ← x + Σ p_k F_k^q (x_k - x) / Σ p_k (q F_k^(q-1) ||x_k - x||² / η + F_k^q), η = `lr`.

    q: how much unevenness costs; with 0 it is the weighted mean. lr: of clients that train by plain SGD, whose inverse
    stands for L, how fast gradients change; without it the term with L is left out, which is a bound on steps along a
    gradient, and steps of AdamW are none.
    """

    losses = True

    def __init__(self, q: float = 1.0, lr: float | None = None) -> None:
        super().__init__()
        if not 0 <= q < float("inf"):
            raise ValueError(f"q is {q}; expected a number of 0 or more")
        if lr is not None and not 0 < lr < float("inf"):
            raise ValueError(f"lr is {lr}; expected a learning rate above 0, or none")
        self.q, self.lr = q, lr
        self.asks = {"first-loss": True}

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """The step; where every loss is zero, none."""
        x, bound = self.current, 0.0 if self.lr is None else self.q / self.lr
        losses = np.array([np.nan if update.first_loss is None else update.first_loss for update in updates])
        highest = float(losses.max()) or 1.0  # losses over the highest one: powers stay within bounds
        powers = (losses / highest) ** self.q
        shares = np.array([update.weight for update in updates]) / sum(update.weight for update in updates)
        below = float(shares @ powers)
        if bound:
            norms = np.array([sum(np.square(u.arrays[n] - x[n]).sum() for n in u.arrays) for u in updates])
            smooth = np.divide(powers, losses, out=np.zeros(len(powers)), where=losses > 0)
            below += bound * float(shares @ (smooth * norms))
        weights = shares * powers / (below or 1.0)
        return {
            name: x[name] + sum(w * (u.arrays[name] - x[name]) for w, u in zip(weights, updates, strict=True))
            for name in updates[0].arrays
        }
