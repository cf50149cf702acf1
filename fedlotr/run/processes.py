"""What a run's processes load, and how many they are: told by the configuration alone, before anything is loaded."""

from fedlotr.config.configuration import SimulationConfig
from fedlotr.machine import cores

CLIENT_APP = "fedlotr.flower.client_app:app"


def workers_of(config: SimulationConfig) -> int:
    """On Ray: one for each core that this process may use, unless the configuration says how many."""
    return config.workers or cores().usable


def threads_of(config: SimulationConfig) -> int:
    """Of a process that trains: all cores for the local engine, which has only one, unless the configuration says.

    All that this process may use, by affinity and its control group's quota, and never by how busy they are: the number
    of threads decides the last bits of every result.
    """
    return config.threads or (cores().usable if config.engine == "local" else 1)
