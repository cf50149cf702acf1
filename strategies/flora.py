"""FLoRA: the clients' updates stacked, which is their exact mean, and merged; every round begins a new adapter.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations"
(arXiv:2409.05976): Σ p_i B_i A_i = [B_1 ... B_c] [p_1 A_1; ...; p_c A_c]. The weight stands on one side alone.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedlotr.flower import Arrays, Combined, Product, Strategy, Update, by_layer, to_arrays, weighted_mean
from fedlotr.streams import generator

RESTARTS = ("fresh", "start", "client")


class FLoRA(Strategy):
    """carry ← carry + Σ p_i B_i A_i;  A ← drawn anew, B ← 0; the head ← Σ p_i.

    restart: what A is after a merge: drawn anew as LoRA draws it, one for all ("fresh"); what it was in the first round
    ("start"); or each client's own, drawn by itself in every round, the first too ("client", as in the code published
    with the paper), so that neither A nor B is sent to it. seed: of the draws; the run's.
    """

    averages = True
    exact = True
    restarts = True
    needs = frozenset("AB")

    def __init__(self, restart: str = "fresh", seed: int = 0) -> None:
        if restart not in RESTARTS:
            raise ValueError(f"restart is {restart!r}; expected one of {', '.join(RESTARTS)}")
        self.restart, self.seed = restart, seed
        if restart == "client":
            self.asks = {"own-factors": True}
        self.first: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the first A, where it is to come again."""
        if self.restart == "start" and not self.first:
            now = to_arrays(arrays)
            self.first = {factors["A"]: now[factors["A"]] for factors in by_layer(now).values()}
        return super().configure_train(server_round, arrays, config, grid)

    def merges(self, ranks: Sequence[int]) -> int:
        """Σ r_i."""
        return sum(ranks)

    def combine(self, updates: Sequence[Update], server_round: int) -> Combined:
        """Stack, and begin anew."""
        total = sum(update.weight for update in updates)
        new = weighted_mean(updates)  # of the head; A and B are replaced
        carry: dict[str, Product] = {}
        for layer, factors in by_layer(new).items():
            a, b = factors["A"], factors["B"]
            stacked_b = np.concatenate([update.arrays[b][:, : update.rank] for update in updates], axis=1)
            stacked_a = np.concatenate(
                [update.weight / total * update.arrays[a][: update.rank] for update in updates], axis=0
            )
            carry[layer] = Product(stacked_b, stacked_a)
            bound = new[a].shape[1] ** -0.5
            stream = generator(self.seed, "flora", server_round, layer)
            new[a] = self.first[a] if self.first else stream.uniform(-bound, bound, new[a].shape)
            new[b] = np.zeros_like(new[b])
        return Combined(new, carry)
