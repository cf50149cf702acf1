"""Federated low-rank fine-tuning with small cores: simulate it, and take the adapter home.

The names below are loaded when they are first used, so that `from fedlotr import CoreConfig` needs neither
Flower nor Ray.
"""

import logging
import os
import warnings
from importlib import import_module
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
# In a notebook without ipywidgets tqdm warns of its bars, which are not shown here.
warnings.filterwarnings("ignore", message="IProgress not found")

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


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # half of what importing this module took

        return version("fedlotr")
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlotr' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
