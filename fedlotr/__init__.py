"""Federated low-rank fine-tuning with small cores: simulate it, and take the adapter home.

The names below are loaded when they are first used, so that `from fedlotr import CoreConfig` needs neither
Flower nor Ray.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

# Flower reads these as it is imported: quiet, and off the network. Here, because this runs before any other module of
# ours can import it. A user's own choice wins.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
# cuBLAS reads it before its first product: its results are then the same each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# PEFT imports bitsandbytes where it is installed, which warns of lacking a kernel that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from fedlotr.adapters import CoreConfig, CoreModel, initialize_basis
    from fedlotr.config.configuration import SimulationConfig
    from fedlotr.data import OwnTask
    from fedlotr.reporting.callbacks import Callbacks, ClientEvent, EvaluateEvent, RoundEvent
    from fedlotr.run.simulation import SimulationResult, run_simulation

    __version__: str

__all__ = [
    "Callbacks",
    "ClientEvent",
    "CoreConfig",
    "CoreModel",
    "EvaluateEvent",
    "OwnTask",
    "RoundEvent",
    "SimulationConfig",
    "SimulationResult",
    "__version__",
    "initialize_basis",
    "run_simulation",
]

_HOMES = {
    "Callbacks": "fedlotr.reporting.callbacks",
    "ClientEvent": "fedlotr.reporting.callbacks",
    "EvaluateEvent": "fedlotr.reporting.callbacks",
    "RoundEvent": "fedlotr.reporting.callbacks",
    "CoreConfig": "fedlotr.adapters",
    "CoreModel": "fedlotr.adapters",
    "initialize_basis": "fedlotr.adapters",
    "OwnTask": "fedlotr.data",
    "SimulationConfig": "fedlotr.config.configuration",
    "SimulationResult": "fedlotr.run.simulation",
    "run_simulation": "fedlotr.run.simulation",
}

_MOVED = {
    "fedlotr.architectures": "fedlotr.cost.architectures",
    "fedlotr.billing": "fedlotr.cost.billing",
    "fedlotr.callbacks": "fedlotr.reporting.callbacks fedlotr.run.callbacks",
    "fedlotr.configuration": "fedlotr.config.configuration",
    "fedlotr.flower.carried": "fedlotr.flower.links.carry",
    "fedlotr.flower.loop": "fedlotr.flower.round",
    "fedlotr.flower.personal": "fedlotr.flower.links.personal",
    "fedlotr.flower.ranks": "fedlotr.flower.links.ranks",
    "fedlotr.flower.terms": "fedlotr.flower.links.objectives",
    "fedlotr.formulas": "fedlotr.cost.formulas",
    "fedlotr.rounds": "fedlotr.run.rounds",
    "fedlotr.simulation": "fedlotr.run.simulation",
    "fedlotr.training.evaluation": "fedlotr.evaluation.scores",
    "fedlotr.training.models": "fedlotr.training.model fedlotr.models.loading",
    "fedlotr.training.results": "fedlotr.evaluation.results",
    "fedlotr.wire_form": "fedlotr.communication.wire_form",
}
"""Modules that people may have imported from, and where their names are now; the old places go with version 0.2."""


class _Moved(MetaPathFinder, Loader):
    """Finds the names of a module that has moved also in its old place."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, origin=_MOVED[name]) if name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        def get(name: str) -> object:
            homes = [import_module(home) for home in _MOVED[module.__name__].split()]
            return getattr(next((home for home in homes if hasattr(home, name)), homes[0]), name)

        module.__dict__["__getattr__"] = get


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("fedlotr")
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlotr' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
