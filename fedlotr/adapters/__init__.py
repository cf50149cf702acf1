"""The factored layer, its bases and methods, as a guest in PEFT. Loads torch only when a name that needs it is used."""

import importlib
from typing import TYPE_CHECKING, Any

from fedlotr.adapters.kinds import BASES, CORES, TIES, BasisKind, CoreKind
from fedlotr.adapters.methods import METHODS, Method

if TYPE_CHECKING:
    from fedlotr.adapters.gradient_bases import initialize_basis
    from fedlotr.adapters.layer import CopiesLinear, FactoredLayer, copies
    from fedlotr.adapters.tuner import CoreConfig, CoreModel, bases_of, bases_sha256

__all__ = [
    "BASES",
    "CORES",
    "METHODS",
    "TIES",
    "BasisKind",
    "CopiesLinear",
    "CoreConfig",
    "CoreKind",
    "CoreModel",
    "FactoredLayer",
    "Method",
    "bases_of",
    "bases_sha256",
    "copies",
    "initialize_basis",
]

_HOMES = {
    "CopiesLinear": "layer",
    "CoreConfig": "tuner",
    "CoreModel": "tuner",
    "FactoredLayer": "layer",
    "bases_of": "tuner",
    "bases_sha256": "tuner",
    "copies": "layer",
    "initialize_basis": "gradient_bases",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
