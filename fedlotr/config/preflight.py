"""Cheap checks of the files and folders a run names, before anything is loaded."""

import difflib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from fedlotr.config.own import bring_again, is_own
from fedlotr.config.values import BUILT_IN_DATA, is_data_id
from fedlotr.errors import closest, nearest
from fedlotr.files import GGUF


def path_problems(
    model: str,
    data: str,
    strategy: str | None,
    out: Path | None,
    resume: bool,
    init_adapter: str | None = None,
    task: str = "auto",
    public_data: str | None = None,
    eval_data: str | None = None,
) -> Iterator[tuple[str, str]]:
    """What is wrong, as pairs of the configuration's field and one line; nothing where all is well."""
    for field, found in (
        ("model", _model_problems(model)),
        ("data", _data_problems(data)),
        ("public_data", iter(()) if public_data is None else _data_problems(public_data)),
        ("eval_data", iter(()) if eval_data is None else _data_problems(eval_data)),
        ("task", iter([bring_again("task")] if is_own(task) else [])),
        ("init_adapter", _adapter_problems(init_adapter)),
        ("strategy", _strategy_problems(strategy)),
        ("out", _out_problems(out, resume)),
    ):
        try:
            yield from ((field, text + (if_moved(field, text) if resume else "")) for text in found)
        except OSError as error:  # a name that is too long, a folder that one may not look into
            yield field, f"cannot be looked at ({error.strerror})"


def if_moved(field: str, text: str) -> str:
    """How a run goes on whose files have gone elsewhere, to be added to a text that says that they are not there."""
    if not any(f"no such {thing}" in text for thing in ("folder", "file", "data set")):
        return ""
    return f"; where it has moved, say so (--{field.replace('_', '-')} PATH): --resume takes the same content anywhere"


def expanded(given: str) -> Path:
    """With the home folder for ~; as it stands where there is no such user."""
    try:
        return Path(given).expanduser()
    except RuntimeError:
        return Path(given)


def _model_problems(model: str) -> Iterator[str]:
    if is_own(model):
        yield bring_again("model")
        return
    path = expanded(model)
    # "org/name" is an id on the hub, unless there is such a folder to look into here.
    names_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or ("/" in model and path.parent.is_dir())
    if path.suffix == GGUF and not path.is_dir():
        if not path.is_file():
            yield f"no such file{sibling(path)}"
    elif path.exists():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            yield "no model there but an adapter; give its base by --model, and start from it by --init-adapter"
        elif not (path / "config.json").is_file():
            files = sorted(path.glob(f"*{GGUF}")) if path.is_dir() else []
            hint = f", or a GGUF file by its name, as {files[0]}" if files else ""
            yield f"no config.json there; expected a folder that `save_pretrained` wrote{hint}"
    elif names_path:
        yield f"no such folder{sibling(path)}"


def _data_problems(data: str) -> Iterator[str]:
    if is_own(data):
        yield bring_again("data")
        return
    path = expanded(data)
    if data not in BUILT_IN_DATA and not path.exists() and not is_data_id(data):
        built_in = "" if "/" in data else nearest(data, BUILT_IN_DATA)
        hint = built_in if built_in and closest(data, BUILT_IN_DATA) else sibling(path) or built_in
        yield f"no such data set, folder or file (nor a hub id, org/name){hint}"


def _adapter_problems(adapter: str | None) -> Iterator[str]:
    if adapter is None:
        return
    path = expanded(adapter)
    if not path.exists():
        yield f"no such folder{sibling(path)}"
    elif not any((folder / "adapter_config.json").is_file() for folder in (path, path / "adapter")):
        yield "no adapter_config.json there; expected a folder that PEFT's save_pretrained wrote, or a run's folder"


def _strategy_problems(strategy: str | None) -> Iterator[str]:
    if strategy is None:
        return
    where, colon, name = strategy.rpartition(":")
    if not colon:
        names = entry_points(group="fedlotr.strategies").names
        if strategy not in names:
            yield f"not a strategy{nearest(strategy, names)}; your own is named module:Class or file.py:Class"
    elif not name.isidentifier():
        yield "no name of a class after the colon; expected module:Class or file.py:Class"
    elif where.endswith(".py"):
        if not Path(where).is_file():
            yield f"no such file{sibling(Path(where))}"
    elif not _can_be_imported(where):
        yield f"no module '{where}' can be imported; a file is named file.py:Class"


def _can_be_imported(module: str) -> bool:
    """Whether the package that a module lies in is there; nothing is imported."""
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    package = module.split(".")[0]
    try:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _out_problems(out: Path | None, resume: bool) -> Iterator[str]:
    folder = out or Path("runs")
    standing = standing_folder(folder)
    if folder.is_symlink() and not folder.exists():
        yield f"a link to {folder.readlink()}, which does not exist; make that folder or remove the link"
        return
    if not standing.is_dir():
        yield f"{standing} is a file; expected a folder"
        return
    try:
        # The only test that also holds for root and for read-only mounts.
        with tempfile.TemporaryDirectory(dir=standing):
            pass
    except OSError as error:
        yield f"cannot write in {standing} ({error.strerror}); choose another --out"
        return
    used = folder.is_dir() and any(folder.iterdir())
    if resume and out is not None and not (used and (folder / "config.yaml").is_file()):
        missing = " (the folder has no config.yaml)" if used else ""
        yield f"no run there to go on with{missing}; leave --resume away to start one"
    if used and not resume and out is not None:
        yield "this folder is not empty; choose a new one, or give --resume to go on with the run in it"


def standing_folder(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def sibling(path: Path) -> str:
    """A hint at an existing neighbour of a path that does not exist, or nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f", did you mean '{path.parent / close[0]}'?" if close else ""
