"""What a run's processes load, and how many they are: told by the configuration alone, before anything is loaded."""

from fedlotr.configuration import SimulationConfig
from fedlotr.machine import cores

CLIENT_APP = "fedlotr.flower.client_app:app"


def workers_of(config: SimulationConfig) -> int:
    """On Ray: one for each core that this process may use, unless the configuration says how many."""
    return config.workers or cores().allowed


def threads_of(config: SimulationConfig) -> int:
    """Of a process that trains: all cores for the local engine, which has only one, unless the configuration says."""
    return config.threads or (cores().allowed if config.engine == "local" else 1)
