"""Going on with a run: only with the configuration and the data it began with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from flwr.app import ArrayRecord

from fedlotr.configuration import SimulationConfig, flag_of
from fedlotr.errors import InputError
from fedlotr.own import is_own
from fedlotr.run_directory import Checkpoint, RunDirectory

MAY_CHANGE = {
    "workers",
    "workers_per_gpu",
    "ray_address",
    "quiet",
    "json_output",
    "out",
    "resume",
    "client_adapters",
    "tensorboard",
    "mlflow",
    "wandb",
}
"""What changes nothing in the results."""


def saved_configuration(out: Path) -> SimulationConfig | None:
    """The resolved configuration of the run in a folder, or None where it has none.

    Raises InputError where config.yaml cannot be read.
    """
    path = out / "config.yaml"
    if not path.is_file():
        return None
    try:
        return SimulationConfig(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, RecursionError, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--resume: {path} cannot be read ({reason}); start a new run with another --out") from error


def fixed_values(config: SimulationConfig) -> dict[str, Any]:
    """What a checkpoint keeps of the configuration: config.yaml may have been edited since."""
    return config.model_dump(mode="json", exclude=MAY_CHANGE)


def differences(before: SimulationConfig, now: SimulationConfig) -> list[str]:
    """What keeps a run from being continued with `now`, one line an option; more rounds are welcome."""
    return [
        f"{flag_of(name)} {getattr(now, name)}: the run in {now.out} was begun with {_in_words(before, name)}; "
        "--resume needs the same, or start a new run with another --out"
        for name in SimulationConfig.model_fields
        if name not in MAY_CHANGE
        and getattr(before, name) != getattr(now, name)
        and not (name == "rounds" and now.rounds > before.rounds)
    ]


def _in_words(before: SimulationConfig, name: str) -> str:
    value = getattr(before, name)
    return f"{value}, the caller's own (run_simulation({name}=...))" if is_own(value) else str(value)


def continue_from(
    directory: RunDirectory, config: SimulationConfig, data_sha256: str, adapter_sha256: str | None = None
) -> Checkpoint | None:
    """The last good checkpoint of the run in a directory, or None where no round was finished yet.

    adapter_sha256: of the adapter that the run starts from, if any.
    Raises InputError, with every difference, where the configuration, the data or that adapter is another.
    """
    before = saved_configuration(directory.path)
    if before is None:
        raise InputError(f"--resume: there is no config.yaml in {directory.path}, so no run to go on with")
    problems = [*directory.obstacles(), *differences(before, config)]
    checkpoint = directory.last_checkpoint()
    if checkpoint is not None:
        if not problems:
            problems = differences(SimulationConfig(**checkpoint.extra["configuration"]), config)
        if checkpoint.extra["data_sha256"] != data_sha256 and not (is_own(config.data) and problems):
            problems.append(f"--data {config.data}: its content has changed since the run in {directory.path} began")
        if config.init_adapter and checkpoint.extra.get("init_adapter_sha256") != adapter_sha256 and not problems:
            problems.append(
                f"--init-adapter {config.init_adapter}: its content has changed since the run in {directory.path} began"
            )
    if problems:
        raise InputError(problems)
    return checkpoint


def check_model(checkpoint: Checkpoint, bases_sha256: str, start: ArrayRecord) -> None:
    """Raise InputError where the model that was made now is not the one that a checkpoint goes on with."""
    if checkpoint.extra["bases_sha256"] != bases_sha256:
        raise InputError(
            f"--resume: the bases made now ({bases_sha256[:12]}…) are not those of the run "
            f"({checkpoint.extra['bases_sha256'][:12]}…): another base model or another kind of processor"
        )
    wanted = _shapes({name: array.numpy() for name, array in start.items()})
    found = _shapes({name: array for name, array in checkpoint.arrays.items() if name in wanted})
    if found != wanted:
        differing = sorted(name for name in wanted if found.get(name) != wanted[name])
        raise InputError(f"--resume: the checkpoint has other tensors than this model ({', '.join(differing[:3])})")


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(array.dtype), tuple(array.shape)) for name, array in arrays.items()}
