"""Federated learning over Flower's interfaces: the ClientApp, the round loop, and the base of server strategies."""

from fedlotr.flower.certificate import Product
from fedlotr.flower.records import Arrays, by_layer, to_arrays
from fedlotr.flower.strategy import Strategy, Update, WithCarry, owned, weighted_mean

__all__ = ["Arrays", "Product", "Strategy", "Update", "WithCarry", "by_layer", "owned", "to_arrays", "weighted_mean"]
