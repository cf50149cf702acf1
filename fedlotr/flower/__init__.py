"""Federated learning over Flower's interfaces: the ClientApp, the round loop, and the base of server strategies.

The names below are loaded when they are first used: the engines need modules of this folder, and not torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlotr.flower.certificate import Product
    from fedlotr.flower.fewest import Fewest
    from fedlotr.flower.link import Draft, Job, Link, LinkTraits, Refused, Reply
    from fedlotr.flower.records import Arrays, by_layer, to_arrays
    from fedlotr.flower.strategy import Combined, FromStart, Strategy, Update, WithCarry, owned, weighted_mean
    from fedlotr.flower.traits import StrategyTraits

__all__ = [
    "Arrays",
    "Combined",
    "Draft",
    "Fewest",
    "FromStart",
    "Job",
    "Link",
    "LinkTraits",
    "Product",
    "Refused",
    "Reply",
    "Strategy",
    "StrategyTraits",
    "Update",
    "WithCarry",
    "by_layer",
    "owned",
    "to_arrays",
    "weighted_mean",
]

_HOMES = {
    **dict.fromkeys(("Draft", "Job", "Link", "LinkTraits", "Refused", "Reply"), "link"),
    "Product": "certificate",
    "Arrays": "records",
    "by_layer": "records",
    "to_arrays": "records",
    "Fewest": "fewest",
    "StrategyTraits": "traits",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'strategy')}"), name)
