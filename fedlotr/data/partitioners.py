"""flwr-datasets' partitioners without its plots, with which seaborn, matplotlib and scipy.stats come: a second's work.

The package imports its plots by itself, so a module that is not read yet stands for them as it is imported.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

PLOTS = "flwr_datasets.visualization"


class _Unread(ModuleType):
    """Stands for a module until something of it is used; then it is read, and takes its place again."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules asks for these
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


if "flwr_datasets" not in sys.modules:
    sys.modules[PLOTS] = _Unread(PLOTS)

from flwr_datasets.partitioner import (  # noqa: E402 (what comes before is for this import)
    DirichletPartitioner,
    GroupedNaturalIdPartitioner,
    IidPartitioner,
    Partitioner,
    ShardPartitioner,
    SizePartitioner,
)

__all__ = [
    "DirichletPartitioner",
    "GroupedNaturalIdPartitioner",
    "IidPartitioner",
    "Partitioner",
    "ShardPartitioner",
    "SizePartitioner",
]
