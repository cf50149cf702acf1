"""Federated learning over Flower's interfaces: the ClientApp, the round loop, and the base of server strategies."""

from fedlotr.flower.records import Arrays, to_arrays
from fedlotr.flower.strategy import Strategy, Update, weighted_mean

__all__ = ["Arrays", "Strategy", "Update", "to_arrays", "weighted_mean"]
