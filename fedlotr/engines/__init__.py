"""Engines: Flower `Grid`s that execute clients, in this process (`LocalGrid`) or in worker processes (`RayGrid`).

Loaded when they are first used: signals and a head start need modules of this folder, and neither Flower nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlotr.engines.base import CohortRule, each_alone
    from fedlotr.engines.clients import FIRST_NODE, node_of, partition_of
    from fedlotr.engines.local import LocalGrid
    from fedlotr.engines.ray import RayGrid

__all__ = ["FIRST_NODE", "CohortRule", "LocalGrid", "RayGrid", "each_alone", "node_of", "partition_of"]

_HOMES = {"LocalGrid": "local", "RayGrid": "ray", "CohortRule": "base", "each_alone": "base"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'clients')}"), name)
