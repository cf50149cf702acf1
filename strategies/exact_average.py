"""The weighted mean of the cores, which is exactly the weighted mean of the updates.

Singhal et al. 2025, "Fed-SB" (arXiv:2502.15436): with B and A frozen and equal on all clients,
Σ p_i (s·B C_i A) = s·B (Σ p_i C_i) A. Of clients whose ranks differ (`--client-rank`) it is as exact, each core being
padded with zeros; or, an estimator that shrinks less and is another, each entry is the mean over those that own it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedlotr.flower import Arrays, Strategy, Update, owned, to_arrays, weighted_mean

ESTIMATORS = ("zero-padding", "owners")


class ExactAverage(Strategy):
    """C ← Σ p_i C_i, and the head likewise.

    estimator: what the mean is where ranks differ. "zero-padding": what a client does not own counts as zero, so that
    it is the mean of the updates; "owners": the weights of an entry are those of the clients that own it.
    """

    averages = True

    def __init__(self, estimator: str = "zero-padding") -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator is {estimator!r}; expected one of {', '.join(ESTIMATORS)}")
        self.estimator = estimator
        self.current: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember what an entry is that nobody owns in this round."""
        if self.estimator == "owners":
            self.current = to_arrays(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """C̄ = Σ p_i C_i, or entry by entry Σ_{i owns} w_i c_i / Σ_{i owns} w_i."""
        if self.estimator == "zero-padding":
            return weighted_mean(updates)
        mean: Arrays = {}
        for name in updates[0].arrays:
            weights = [update.weight * owned(update, name) for update in updates]
            total = sum(weights, np.zeros(()))
            above = sum((w * u.arrays[name] for w, u in zip(weights, updates, strict=True)), np.zeros(()))
            mean[name] = np.where(total > 0, above / np.where(total > 0, total, 1), self.current[name])
        return mean

    def state(self) -> dict[str, object]:
        """Nothing but the argument: what one round alone needs is not kept."""
        return {"estimator": self.estimator}

    def load_state(self, state: dict[str, str]) -> None:
        """Take back what `state` gave."""
        self.estimator = state["estimator"]
