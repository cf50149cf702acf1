"""Going on with a run: only with the configuration and the data it began with."""

from pathlib import Path

import yaml

from fedlotr.configuration import SimulationConfig, flag_of
from fedlotr.errors import InputError
from fedlotr.run_directory import Checkpoint, RunDirectory

MAY_CHANGE = {"workers", "quiet", "json_output", "out", "resume"}
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
    except (yaml.YAMLError, TypeError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"--resume: {path} cannot be read ({error}); start a new run with another --out") from error


def differences(before: SimulationConfig, now: SimulationConfig) -> list[str]:
    """What keeps a run from being continued with `now`, one line an option; more rounds are welcome."""
    return [
        f"{flag_of(name)} {getattr(now, name)}: the run in {now.out} was begun with {getattr(before, name)}; "
        "--resume needs the same, or start a new run with another --out"
        for name in SimulationConfig.model_fields
        if name not in MAY_CHANGE
        and getattr(before, name) != getattr(now, name)
        and not (name == "rounds" and now.rounds > before.rounds)
    ]


def continue_from(directory: RunDirectory, config: SimulationConfig, data_sha256: str) -> Checkpoint | None:
    """The last good checkpoint of the run in a directory, or None where no round was finished yet.

    Raises InputError, with every difference, where the configuration or the data is another.
    """
    before = saved_configuration(directory.path)
    if before is None:
        raise InputError(f"--resume: there is no config.yaml in {directory.path}, so no run to go on with")
    problems = differences(before, config)
    checkpoint = directory.last_checkpoint()
    if checkpoint is not None and checkpoint.extra.get("data_sha256") != data_sha256:
        problems.append(f"--data {config.data}: its content has changed since the run in {directory.path} was begun")
    if problems:
        raise InputError(problems)
    return checkpoint
