"""The adapter of a run as a plain PEFT folder: the one it left, or made again from a checkpoint."""

import shutil
from pathlib import Path

from fedlotr.config.configuration import SimulationConfig
from fedlotr.config.own import is_own
from fedlotr.errors import InputError, shorten
from fedlotr.flower.links.carry import carried_in
from fedlotr.flower.records import to_record, to_tensors
from fedlotr.reporting.documents import under
from fedlotr.reporting.run_record import RunRecord
from fedlotr.run.checking import Checked, check
from fedlotr.run.devices import gpus
from fedlotr.run.directory import Checkpoint, RunDirectory
from fedlotr.run.preparation import prepare
from fedlotr.run.resumption import check_model, saved_configuration
from fedlotr.run.simulation import limited_threads
from fedlotr.run.writing import adapter_writer


def configuration_of(run: Path, model: str | None = None, data: str | None = None) -> SimulationConfig:
    """What a run was begun with, resolved. model, data: where these lie now, if they have moved.

    Raises InputError where there is none.
    """
    found = saved_configuration(run)
    if found is None:
        raise InputError(f"{shorten(run)} is not a run: it has no config.yaml; give the folder that --out named")
    moved = {name: value for name, value in (("model", model), ("data", data)) if value is not None}
    return found.model_copy(update=moved)


def round_of(record: RunRecord, number: int | None) -> int:
    """The round that is asked for; of a run's own adapter (None) the one whose model that is.

    Raises InputError for one that the run has not come to.
    """
    if number is not None and number > len(record.rows):
        raise InputError(f"--round {number}: the run in {shorten(record.folder)} has {len(record.rows)} rounds so far")
    return number if number is not None else int(under(record.summary, "adapter_round") or len(record.rows))


def adapter_of(run: Path, config: SimulationConfig, number: int | None, place: Path) -> Path:
    """The folder of a run's adapter, as it was after a round, or at the end.

    config: the run's. place: an empty folder for what has to be made: the round's model is put together from its
    checkpoint, the base and the data, as a run that goes on from there would do, and its bases' hash compared.
    Raises InputError where there is no such adapter, or where it cannot be made here.
    """
    directory = RunDirectory(run)
    if config.baseline == "local":
        raise InputError(f"{shorten(run)}: each client alone has a model of its own (--baseline local), and no adapter")
    if number is None:
        if not (directory.adapter / "adapter_config.json").is_file():
            kept = ", ".join(map(str, directory.rounds())) or "none yet"
            raise InputError(
                f"{shorten(run)} is not finished and has no adapter/; --round N takes a round's (checkpoints: {kept})"
            )
        return directory.adapter
    if (written := directory.adapter_after(number)).is_dir():
        return written
    if (place / "adapter").exists():
        shutil.rmtree(place / "adapter")
    _rebuild(config, directory.checkpoint_of(number, "--round"), place)
    return place / "adapter"


def _rebuild(config: SimulationConfig, checkpoint: Checkpoint, place: Path) -> None:
    """Write the adapter of a checkpoint into `place/adapter`."""
    number = checkpoint.round
    for name in ("model", "data", "task"):
        if is_own(getattr(config, name)):
            raise InputError(
                f"--round {number}: the run's {name} was the caller's own (run_simulation({name}=...)), and without it "
                "a checkpoint cannot be put together; export the last adapter, without --round, or have the run write "
                "them by --adapter-every"
            )
    device = config.device if config.device != "cuda" or gpus() else "cpu"
    config = config.model_copy(update={"out": None, "resume": False, "device": device, "show_examples": 0})
    checked = check(config)
    _compare(checked, checkpoint)
    with limited_threads(config.threads):
        prepared = prepare(checked, place / "work")
        model = prepared.model
        start = to_record(model.values())
        check_model(checkpoint, prepared.bases_sha256, start, f"--round {number}")
        trained = {name: checkpoint.arrays[name] for name in start}
        model.carry(carried_in(checkpoint.extra["links"], checkpoint.arrays, model.carried))
        model.assign(to_tensors(to_record(trained)))
        adapter_writer(prepared)(place / "adapter")


def _compare(checked: Checked, checkpoint: Checkpoint) -> None:
    """Raise InputError where base or start are not what the run had; that the bases are, `check_model` says."""
    known = checkpoint.extra.get("contents", {})
    contents = checked.contents
    if known.get("model", contents.get("model")) != contents.get("model"):
        raise InputError(
            f"--model {checked.config.model}: its content is not that of the model which the run began with; name a "
            "copy of that by --model"
        )
    begun = checkpoint.extra.get("init_adapter_sha256")
    if begun is not None and (checked.start is None or checked.start.sha256 != begun):
        raise InputError(f"{checked.config.init_adapter}: the adapter that the run started from has changed since")
