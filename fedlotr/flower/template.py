"""A strategy to start from. It runs as it is: save it, and change what it does.

    fedlotr ls strategies --template > mine.py
    python -m fedlotr.simulate --strategy mine.py:Mine --strategy-arg trust=0.9

Put it through the suite that the built-in ones pass (weights, order, dropped clients, layer types, the certificate):

    python -c "from fedlotr.testing import check_strategy; check_strategy('mine.py:Mine', {'trust': 0.9})"
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedlotr.flower import Arrays, Combined, Strategy, Update, to_arrays, weighted_mean


class Mine(Strategy):
    """x ← x + trust · (Σ p_i x_i - x): go from the model towards the clients' mean, and not all the way."""

    averages = True
    """Whether the mean of the clients is what is meant: then every round's distance from it is measured."""

    def __init__(self, trust: float = 1.0) -> None:
        """Arguments come from --strategy-arg NAME=VALUE. What is raised here is shown before anything starts."""
        if not 0 < trust <= 1:
            raise ValueError(f"trust is {trust}; expected more than 0 and at most 1")
        self.trust = trust
        self.model: Arrays = {}
        self.steps = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Before a round: one message for each of its clients. Leave this out unless you need the model beforehand.

        arrays: the trained tensors by name, as the clients get them; grid: this round's clients, and no others.
        """
        self.model = to_arrays(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def combine(self, updates: Sequence[Update], server_round: int) -> Combined:
        """After a round: the new trained tensors. This is the one method that a strategy must have.

        updates: one a client that replied well, by client: `update.client`, `update.weight` (its examples) and
        `update.arrays`, float64 by name: only those tensors that this method sends in this round.
        """
        self.steps += 1
        mean = weighted_mean(updates)
        new = {name: self.model[name] + self.trust * (x - self.model[name]) for name, x in mean.items()}
        return Combined(new, mean=mean)  # what is certified to be the mean; return tensors alone where they are it

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint keeps: arrays, numbers, text, lists and mappings of them. Without this, the attributes."""
        return {"steps": self.steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave, as a run is resumed."""
        self.steps = state["steps"]
