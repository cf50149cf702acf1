"""Going on with a run: only with the configuration it began with, and with what that named, wherever it lies now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from flwr.app import ArrayRecord

from fedlotr.config.configuration import SimulationConfig, flag_of
from fedlotr.config.own import is_own
from fedlotr.errors import InputError, shorten
from fedlotr.fleet.modes import is_built_in
from fedlotr.fleet.presets import FLEETS
from fedlotr.privacy.ledger import known_again
from fedlotr.run.contents import Content
from fedlotr.run.directory import Checkpoint, RunDirectory
from fedlotr.said import say

MAY_CHANGE = {
    "workers",
    "workers_per_gpu",
    "ray_address",
    "show_examples",
    "quiet",
    "json_output",
    "out",
    "resume",
    "resume_round",
    "client_adapters",
    "adapter_every",
    "keep",
    "stop_after",
    "tensorboard",
    "mlflow",
    "wandb",
    "samples",
    "sample_tokens",
}
"""What changes nothing in the results."""
ROWS = ("data", "eval_data")
"""Options of which one hash tells: that of the rows of train and of the test split together."""
CODE = ("strategy", "add_link", "template", "format", "staleness")
"""Options that name classes: their code may be mended as a run goes on, which is said."""
BY_CONTENT = ("model", *ROWS, "public_data", "init_adapter", "fleet", *CODE)
"""Options that name files. Disks and folders get other names, so what counts is what is in them."""
DEFENCES = ("max_weight", "max_update_norm", "on_large_update")
"""What a run may go on with that was harmed without it, or stopped by it; that it has changed is said."""


def saved_configuration(out: Path) -> SimulationConfig | None:
    """The resolved configuration of the run in a folder, or None where it has none.

    Raises InputError where config.yaml cannot be read.
    """
    path = out / "config.yaml"
    if not path.is_file():
        return None
    try:
        return begun_with(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, RecursionError, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--resume: {path} cannot be read ({reason}); bring it back from a copy, or write it anew from what "
            f"{out / 'checkpoints'}/round-*.json say under 'configuration', or start a new run with another --out"
        ) from error


def begun_with(values: Mapping[str, Any]) -> SimulationConfig:
    """The configuration that a run was begun with; before there were codecs, all travelled as it is."""
    return SimulationConfig(**{**dict.fromkeys(("codec", "broadcast_codec", "basis_codec"), "float32"), **values})


def fixed_values(config: SimulationConfig) -> dict[str, Any]:
    """What a checkpoint keeps of the configuration: config.yaml may have been edited since."""
    return config.model_dump(mode="json", exclude=MAY_CHANGE)


def by_content(name: str, before: Any, now: Any) -> bool:
    """Whether two values of an option may be names of the same thing, whose content then says whether they are."""
    if name not in BY_CONTENT or before is None or now is None:
        return False
    if name == "staleness" and (is_built_in(before) or is_built_in(now)):
        return False
    if name in CODE:
        classes = [[one.rpartition(":")[1:] for one in value.split(",")] for value in (before, now)]
        return classes[0] == classes[1] and all(colon for colon, _ in classes[0])
    if name == "fleet":  # a preset is what its name says
        return before not in FLEETS and now not in FLEETS
    return name == "data" or not (is_own(before) or is_own(now))


def differences(before: SimulationConfig, now: SimulationConfig) -> list[str]:
    """What keeps a run from being continued with `now`, one line an option; more rounds are welcome."""
    return [
        f"{flag_of(name)} {getattr(now, name)}: the run in {now.out} was begun with {_in_words(before, name)}; "
        "--resume needs the same, or start a new run with another --out"
        for name in SimulationConfig.model_fields
        if name not in MAY_CHANGE
        and name not in DEFENCES
        and getattr(before, name) != getattr(now, name)
        and not by_content(name, getattr(before, name), getattr(now, name))
        and not (name == "rounds" and now.rounds > before.rounds)
    ]


def changed_defences(checkpoint: Checkpoint, now: SimulationConfig) -> list[str]:
    """What protects the run from here on and did not before, or the other way round, one line an option."""
    before = begun_with(checkpoint.extra["configuration"])
    return [
        f"{flag_of(name)} is {shorten(getattr(now, name))} from round {checkpoint.round + 1} on; before it was "
        f"{shorten(getattr(before, name))}"
        for name in DEFENCES
        if getattr(now, name) != getattr(before, name)
    ]


def _in_words(before: SimulationConfig, name: str) -> str:
    value = getattr(before, name)
    return f"{value}, the caller's own (run_simulation({name}=...))" if is_own(value) else str(value)


def continue_from(
    directory: RunDirectory, config: SimulationConfig, contents: Mapping[str, Content]
) -> Checkpoint | None:
    """The last good checkpoint of the run in a directory, or None where no round was finished yet; or the one that
    `--resume-round` names.

    contents: of what the configuration names (`Checked.contents`), which may lie elsewhere than it did.
    Raises InputError, with every difference, where the configuration or a content is another.
    """
    before = saved_configuration(directory.path)
    if before is None:
        raise InputError(f"--resume: there is no config.yaml in {directory.path}, so no run to go on with")
    problems = [*directory.obstacles(), *differences(before, config)]
    if config.resume_round is None:
        checkpoint = directory.last_checkpoint()
    else:
        checkpoint = directory.checkpoint_of(config.resume_round)
    begun, known = before, {}
    if checkpoint is not None:
        begun, known = begun_with(checkpoint.extra["configuration"]), contents_in(checkpoint.extra)
        contents = as_kept(contents, config, directory.path)
        if "data" not in contents:  # without its key nobody can say; the ledger, which needs it too, refuses by name
            known = {name: content for name, content in known.items() if name not in ROWS}
        problems = problems or differences(begun, config)
    others, moved = compare_contents(begun, known, config, contents)
    if problems + others:
        raise InputError(problems + others)
    for line in moved:
        say(line)
    return checkpoint


def as_kept(contents: Mapping[str, Content], config: SimulationConfig, folder: Path) -> dict[str, Content]:
    """Contents as the checkpoints in a folder have them: where data are hidden, their hash is keyed.

    Without the data's where that key is gone. Raises InputError for a key that cannot be read.
    """
    if config.privacy == "none":
        return dict(contents)
    kept = {name: content for name, content in contents.items() if name not in ROWS}
    rows = known_again(folder, contents["data"]["rows"]) if "data" in contents else None
    return kept if rows is None else {**kept, **{name: {"rows": rows} for name in ROWS if name in contents}}


def contents_in(extra: Mapping[str, Any]) -> dict[str, Content]:
    """What a checkpoint knows of the contents its run began with; those of older versions know less."""
    known: dict[str, Content] = dict(extra.get("contents", {}))
    for name, part in (("data", "rows"), ("init_adapter", "files")):
        if (sha256 := extra.get(f"{name}_sha256")) is not None:
            known[name] = {part: sha256}
    if "data" in known:
        known["eval_data"] = known["data"]
    return known


def compare_contents(
    begun: SimulationConfig, known: Mapping[str, Content], now: SimulationConfig, contents: Mapping[str, Content]
) -> tuple[list[str], list[str]]:
    """What keeps a run from being continued, and what a user is told of things that lie elsewhere; each one line.

    known: of what the run began with, contents: of what is named now. Code may be mended where it is.
    """
    problems, told = [], []
    for name in BY_CONTENT:
        before, given, flag = getattr(begun, name), getattr(now, name), flag_of(name)
        moved = before != given
        if given is None or (moved and not by_content(name, before, given)):
            continue  # nothing, or another option, which `differences` names
        if name in ROWS and begun.task != now.task:
            continue  # another task makes other rows of the same data
        was, found = known.get(name, {}), contents.get(name, {})
        parts = [part for part in sorted({*was, *found}) if was.get(part) != found.get(part)] if was else []
        differing = _differing(parts) if parts else ""
        if name in ROWS and now.privacy != "none":  # the hash is keyed
            differing += ", or privacy.key is another run's"
        if not was and moved:
            told.append(f"{flag} {given}: the run was begun with {before}, whose content it did not keep: not compared")
        elif not parts:
            told += [f"{flag} {given}: the run was begun with {before}; the content is the same"] if moved else []
        elif moved:
            mended = f" (mended code at {before})" if name in CODE else ""
            problems.append(
                f"{flag} {given}: the run in {now.out} was begun with {_in_words(begun, name)}, and "
                f"{differing}; --resume takes that content under any path{mended}, or start a new run with "
                "another --out"
            )
        elif name in CODE:
            told.append(f"{flag} {given}: its code has changed since the run began")
        else:
            problems.append(
                f"{flag} {given}: its content has changed since the run in {now.out} began ({differing}); "
                "bring that back, or name a copy of it: --resume takes it under any path"
            )
    return problems, told


def check_model(checkpoint: Checkpoint, bases_sha256: str, start: ArrayRecord, option: str = "--resume") -> None:
    """Raise InputError where the model that was made now is not the one that a checkpoint goes on with.

    option: that asks for it.
    """
    if checkpoint.extra["bases_sha256"] != bases_sha256:
        raise InputError(
            f"{option}: the bases made now ({bases_sha256[:12]}…) are not those of the run "
            f"({checkpoint.extra['bases_sha256'][:12]}…): {_why_other_bases(checkpoint)}; do this where it began"
        )
    wanted = _shapes({name: array.numpy() for name, array in start.items()})
    found = _shapes({name: array for name, array in checkpoint.arrays.items() if name in wanted})
    if found != wanted:
        differing = sorted(name for name in wanted if found.get(name) != wanted[name])
        raise InputError(
            f"{option}: the checkpoint has other tensors than this model ({', '.join(differing[:3])}); name by "
            "--model the one that the run began with"
        )


def _why_other_bases(checkpoint: Checkpoint) -> str:
    """In words, what may have made them."""
    reason = "another kind of processor, or other versions of torch and numpy than facts.json names"
    return reason if "contents" in checkpoint.extra else f"another base model, {reason}"


def _differing(parts: Sequence[str]) -> str:
    """'its weights differ', 'its tokenizer.json and weights differ'."""
    verb = "differs" if len(parts) == 1 and not parts[0].endswith("s") else "differ"
    return f"its {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]} {verb}"


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(array.dtype), tuple(array.shape)) for name, array in arrays.items()}
