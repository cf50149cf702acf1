"""Engines: Flower `Grid`s that execute clients, in this process (`LocalGrid`) or in worker processes (`RayGrid`)."""

from typing import TYPE_CHECKING, Any

from fedlotr.engines.base import FIRST_NODE, CohortRule, each_alone, node_of, partition_of
from fedlotr.engines.local import LocalGrid

if TYPE_CHECKING:
    from fedlotr.engines.ray import RayGrid

__all__ = ["FIRST_NODE", "CohortRule", "LocalGrid", "RayGrid", "each_alone", "node_of", "partition_of"]


def __getattr__(name: str) -> Any:
    if name == "RayGrid":  # importing Ray takes half a second, which a local run need not pay
        from fedlotr.engines.ray import RayGrid

        return RayGrid
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
