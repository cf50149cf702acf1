"""Server optimizers: the clients' mean is a direction, Δ = Σ p_i x_i - x, and the server takes a step along it.

FedAvgM is Hsu, Qi & Brown 2019 (arXiv:1909.06335); FedAdagrad, FedYogi and FedAdam are algorithm 2 of Reddi et al.
2021, "Adaptive Federated Optimization" (arXiv:2003.00295). Ours and not Flower's: its FedAvgM and FedAdam do not say
that they average, so nothing would be certified. State is float64; the loop casts what is published.
"""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedlotr.flower import Arrays, Combined, FromStart, Update, weighted_mean

Array = npt.NDArray[np.float64]


class ServerOptimizer(FromStart):
    """x ← x + step(Δ), tensor by tensor; a tensor that did not move in a round keeps its state. eta: learning rate."""

    averages, remembers = True, True

    def __init__(self, eta: float) -> None:
        super().__init__()
        self.eta = eta

    def combine(self, updates: Sequence[Update], server_round: int) -> Combined:
        """x + step(Σ p_i x_i - x)."""
        mean = weighted_mean(updates)
        new = {name: self.current[name] + self.step(name, x - self.current[name]) for name, x in mean.items()}
        return Combined(new, mean=mean)

    @abstractmethod
    def step(self, name: str, delta: Array) -> Array:
        """The step for one tensor."""


class FedAvgM(ServerOptimizer):
    """v ← β v + Δ;  x ← x + η v."""

    def __init__(self, eta: float = 1.0, beta: float = 0.9) -> None:
        super().__init__(eta)
        self.beta = beta
        self.velocity: Arrays = {}

    def step(self, name: str, delta: Array) -> Array:
        """η v."""
        self.velocity[name] = self.beta * self.velocity.get(name, np.zeros_like(delta)) + delta
        return self.eta * self.velocity[name]


class Adaptive(ServerOptimizer):
    """m ← β₁ m + (1-β₁) Δ;  x ← x + η m / (√v + τ), v from τ²; η and τ were not searched for."""

    def __init__(self, eta: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        super().__init__(eta)
        self.beta1, self.beta2, self.tau = beta1, beta2, tau
        self.m: Arrays = {}
        self.v: Arrays = {}

    def step(self, name: str, delta: Array) -> Array:
        """η m / (√v + τ)."""
        self.m[name] = self.beta1 * self.m.get(name, np.zeros_like(delta)) + (1 - self.beta1) * delta
        self.v[name] = self.second(self.v.get(name, np.full_like(delta, self.tau**2)), np.square(delta))
        return np.asarray(self.eta * self.m[name] / (np.sqrt(self.v[name]) + self.tau))

    @abstractmethod
    def second(self, v: Array, squared: Array) -> Array:
        """The new v from the last and Δ²."""


class FedAdam(Adaptive):
    """v ← β₂ v + (1-β₂) Δ²."""

    def second(self, v: Array, squared: Array) -> Array:
        """β₂ v + (1-β₂) Δ²."""
        return self.beta2 * v + (1 - self.beta2) * squared


class FedYogi(Adaptive):
    """v ← v - (1-β₂) Δ² sign(v - Δ²)."""

    def second(self, v: Array, squared: Array) -> Array:
        """v - (1-β₂) Δ² sign(v - Δ²)."""
        return np.asarray(v - (1 - self.beta2) * squared * np.sign(v - squared))


class FedAdagrad(Adaptive):
    """v ← v + Δ², and β₁ = 0 unless asked for, as in the paper."""

    def __init__(self, eta: float = 1e-2, beta1: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(eta, beta1, 0.0, tau)

    def second(self, v: Array, squared: Array) -> Array:
        """v + Δ²."""
        return v + squared
