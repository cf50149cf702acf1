"""HetLoRA: LoRA of ranks that differ; zero-padding, weights by what was learnt, and ranks that prune themselves.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (arXiv:2401.06432):
a client gets the leading r_k rows and columns; the server pads with zeros and weighs by ||B_k A_k|| ("sparsity
weights"); a client adds λ ||B_k[:, γ r_k:]|| ||A_k[γ r_k:]|| to its loss, and where that product is smaller after
its training than before, its rank is γ r_k from then on. Whether it is, the server sees in what it sent and got; so in
the round in which a client is pruned its last rows still cross the wire, and are left out of the mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedlotr.flower import Arrays, Combined, Strategy, Update, by_layer, to_arrays, weighted_mean


class HetLoRA(Strategy):
    """A ← Σ w_k A_k, B ← Σ w_k B_k, w_k ∝ ||B_k A_k||; the head ← Σ p_i.

    gamma: the share of its rank that a client keeps when it is pruned; 1 prunes nothing. penalty: λ, of the tail
    that would go (not searched for). sparsity_weights: off, clients weigh as in FedIT.
    """

    needs = frozenset("AB")

    def __init__(self, gamma: float = 0.99, penalty: float = 1e-3, sparsity_weights: bool = True) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}; expected a share above 0, at most 1")
        if penalty < 0:
            raise ValueError(f"penalty is {penalty}; expected 0 or more")
        self.gamma, self.penalty, self.sparsity_weights = gamma, penalty, sparsity_weights
        self.ranks: dict[int, int] = {}
        self.current: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember what is sent, and tell clients of the penalty on what they might lose."""
        self.current = to_arrays(arrays)
        if self.penalty and self.gamma < 1:
            config["tail-penalty"], config["tail-share"] = self.penalty, self.gamma
        return super().configure_train(server_round, arrays, config, grid)

    def combine(self, updates: Sequence[Update], server_round: int) -> Combined:
        """Prune, weigh, and average."""
        new = weighted_mean(updates)  # of the head; A and B are replaced
        layers = by_layer(new)
        ranks: dict[int, int] = {}
        kept = [self._pruned(update, layers, ranks) for update in updates]
        if self.sparsity_weights:
            norms = [_norm(update.arrays, layers) for update in kept]
            if any(norms):
                kept = [replace(update, weight=norm) for update, norm in zip(kept, norms, strict=True)]
        mean = weighted_mean(kept)
        return Combined(
            new | {name: mean[name] for factors in layers.values() for name in factors.values()}, ranks=ranks
        )

    def _pruned(self, update: Update, layers: Mapping[str, Mapping[str, str]], ranks: dict[int, int]) -> Update:
        """The update without the tail of a client that is pruned here, whose new rank goes to `ranks`."""
        rank = update.rank or max(len(update.arrays[factors["A"]]) for factors in layers.values())
        keeps = int(self.gamma * rank)
        if not 1 <= keeps < rank:
            return update

        def tail(arrays: Mapping[str, npt.NDArray[np.float64]]) -> float:
            return sum(
                float(np.linalg.norm(arrays[f["B"]][:, keeps:rank]) * np.linalg.norm(arrays[f["A"]][keeps:rank]))
                for f in layers.values()
            )

        if tail(update.arrays) >= tail(self.current):
            return update
        ranks[update.client] = keeps
        without = {name: value.copy() for name, value in update.arrays.items()}
        for factors in layers.values():
            without[factors["A"]][keeps:], without[factors["B"]][:, keeps:] = 0, 0
        return replace(update, arrays=without)

    def state(self) -> dict[str, Any]:
        """The clients' ranks and the arguments; what one round alone needs is not kept."""
        return {key: value for key, value in vars(self).items() if key != "current"}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        vars(self).update(state)


def _norm(arrays: Mapping[str, npt.NDArray[np.float64]], layers: Mapping[str, Mapping[str, str]]) -> float:
    """||B A|| over all layers, from the triangular QR factors."""
    return float(
        np.sqrt(
            sum(
                np.square(np.linalg.qr(arrays[f["B"]]).R @ np.linalg.qr(arrays[f["A"]].T).R.T).sum()
                for f in layers.values()
            )
        )
    )
