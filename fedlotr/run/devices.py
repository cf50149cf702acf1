"""Which device a run computes on, and how its workers share the GPUs of this machine."""

from collections.abc import Iterator

import torch

from fedlotr.config.configuration import SimulationConfig
from fedlotr.run.processes import workers_of


def gpus() -> int:
    """How many GPUs torch sees here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of(config: SimulationConfig) -> str:
    """Where a run computes: what its configuration says, or for auto a GPU where there is one that it can use."""
    if config.device != "auto":
        return config.device
    return "cuda" if gpus() and config.engine != "flower" and config.privacy_engine != "opacus" else "cpu"


def workers_on(config: SimulationConfig, device: str) -> int:
    """The workers of the engine ray: so many as were asked for, or one a core, or on each GPU its share."""
    if config.workers is None and device == "cuda":
        return max(1, gpus() * (config.workers_per_gpu or 1))
    return workers_of(config)


def device_problems(config: SimulationConfig) -> Iterator[str]:
    """What a configuration asks of devices and is not here, each one line."""
    there, device, each = gpus(), device_of(config), config.workers_per_gpu or 1
    if config.device == "cuda" and not there:
        yield (
            f"--device cuda: torch {torch.__version__} sees no GPU here; give --device cpu, or leave it out; "
            "on a machine that has one, install a torch with CUDA"
        )
    elif config.workers_per_gpu is not None and device == "cpu":
        yield f"--workers-per-gpu {config.workers_per_gpu}: this run computes on the CPU; leave it out"
    elif device == "cuda" and config.ray_address is None and (config.workers or 1) > there * each:
        yield (
            f"--workers {config.workers}: {there} GPU{'s' if there > 1 else ''} with {each} "
            f"worker{'s' if each > 1 else ''} each have room for {there * each}; lower it, or raise --workers-per-gpu"
        )
