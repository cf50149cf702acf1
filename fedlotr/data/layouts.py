"""Which files of a folder are which split, by the names and layouts that the `datasets` library takes."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlotr.config.values import BUILT_IN_DATA
from fedlotr.data.readers import READERS, suffix_of
from fedlotr.errors import InputError

TRAIN_WORDS = ("train", "training")
TEST_WORDS = (("test", "testing"), ("eval", "evaluation"), ("dev",), ("val",), ("validation", "valid"))
"""Words in the names of splits to test on, best first; a name has them in any case, between marks or digits."""

SHARD = re.compile(r"[-_.](\d+)-of-(\d+)(-[0-9a-z]+)?$", re.IGNORECASE)
"""What ends the name of a part of a split, as the `datasets` library writes them."""
NUMBER = re.compile(r"[-_.](\d+)$")
"""What ends the name of a part of a split whose other parts are not counted."""
DEEPEST = 2
"""Folders in one another that are looked through for the one that holds the data."""

FORMS = ", ".join(READERS)
OTHER_FORMS = (".txt", ".xls", ".xlsx", ".zip", ".tar", ".zst", ".xz", ".bz2", ".feather", ".pkl")
"""Endings of files that may well hold rows, and are not read."""
JSON = (".json", ".json.gz")
DESCRIBING = re.compile(
    r"(dataset_infos?|dataset_dict|state|trainer_state|tokenizer|vocab|special_tokens_map|added_tokens|croissant|"
    r"manifest|meta(data)?|info|index|schema|readme|license|package(-lock)?|"
    r"((all|train|eval|test|predict)_)?results|.*[-_.](config|index|schema|info)|config)(\.safetensors)?",
    re.IGNORECASE,
)
"""Names of JSON files that say something of data or of a model, or what came out of a run, and hold no rows."""

Files = dict[str, list[Path]]
"""Split -> its files, in their order."""


@dataclass(frozen=True)
class Layout:
    """The splits of a data set on disk. files: that to train on is called train. others: files that no split has."""

    files: Files
    trained: str
    others: tuple[str, ...] = ()


def layout_of(folder: Path, given: str, *, train: bool = True) -> Layout:
    """The splits of a folder, or of the one folder in it that has some to train on.

    A single file is a split called train, and so is the only file of a folder, whatever its name, and what
    `save_to_disk` has left of one split. A folder with the name of a split is that split. Files whose names contain
    train are it together, where none is called so; `test-0` and `test-1` are parts of one split.

    given: the option and its value, for messages. train: whether there must be a split to train on.
    Raises InputError for what is missing, and for two forms of one split.
    """
    if folder.is_file():
        if not suffix_of(folder):
            raise InputError(f"{given}: not a form that is read; expected a folder, or a file that ends in {FORMS}")
        return Layout({"train": [folder]}, folder.name)
    if not folder.is_dir():
        raise InputError(f"{given}: no such folder or file{_nearest_path(folder)}")
    fit: Callable[[Files], bool] = (lambda files: train_splits(files) != []) if train else bool
    found = _search(folder, given, fit, DEEPEST)
    if len(found) > 1:
        one = found[0][0]
        raise InputError(
            f"{given}: data in several folders ({', '.join(str(path.relative_to(folder)) for path, _ in found[:10])}); "
            f"name one of them, as {one}, or {one.relative_to(folder)} after a colon for a data set on the hub"
        )
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "an empty folder"
        wanted = "no split to train on; expected train" if train else "no split to evaluate on; expected test"
        raise InputError(f"{given}: {wanted} with one of the endings {FORMS} (or a folder of that name), found {there}")
    place, files = found[0]
    trained = train_splits(files)
    said = ", ".join(_in_words(files[name], place, name) for name in trained)
    merged = {"train": [path for name in trained for path in files[name]]} if trained else {}
    merged |= {name: paths for name, paths in files.items() if name not in trained}
    taken = {path for paths in files.values() for path in paths}
    return Layout(merged, said, tuple(_others(folder, place, taken)))


def words_of(name: str) -> set[str]:
    """The words of a split's name, which stand between marks, digits or spaces."""
    return set(re.split(r"[-._ 0-9]+", name.casefold()))


def kind_of_split(name: str) -> str | None:
    """Whether a split's name says that it is there to "train" or to "test" on, as far as it does."""
    if test_rank(name) is not None:
        return "test"
    return None if words_of(name).isdisjoint(TRAIN_WORDS) else "train"


def train_splits(names: Iterable[str]) -> list[str]:
    """Those to train on: the one that is just called so, or all with such a word; or the only one there is."""
    names = list(names)
    for word in TRAIN_WORDS:
        if exact := [name for name in names if name.casefold() == word]:
            return exact
    if named := [name for name in names if kind_of_split(name) == "train"]:
        return named
    return names if len(names) == 1 and kind_of_split(names[0]) is None else []


def test_rank(name: str) -> tuple[int, int] | None:
    """How good a split is to test on by its name, the best first; None for one that is not there for that.

    Those that are just called so come before those that have such a word beside others.
    """
    words, plain = words_of(name), name.casefold()
    for rank, known in enumerate(TEST_WORDS):
        if plain in known or (known[0] == "eval" and plain.startswith("eval")):
            return 0, rank
        if not words.isdisjoint(known) and words.isdisjoint(TRAIN_WORDS):
            return 1, rank
    return None


def _search(folder: Path, given: str, fit: Callable[[Files], bool], depth: int) -> list[tuple[Path, Files]]:
    """The folders that hold splits which are fit: this one, else those in it."""
    files = _splits_in(folder, given)
    if fit(files):
        return [(folder, files)]
    if not depth:
        return []
    return [found for inner in _folders(folder) for found in _search(inner, given, fit, depth - 1)]


def _splits_in(folder: Path, given: str) -> Files:
    """The splits whose files, or folders, lie in this folder."""
    if saved := _saved(folder, given):
        return {"train": saved}
    files: Files = {}
    for path in _of_data(folder):
        if path.is_file():
            stem = _stem(path)
            split = SHARD.sub("", stem)
            others = files.setdefault(_same(split, files), [])
            if others and (stem == split or _part(others[0]) is None or _part(others[-1]) == _part(path)):
                raise InputError(f"{given}: both {others[0].relative_to(folder)} and {path.name}; keep one of them")
            others.append(path)
        elif parts := _saved(path, given) or _parts(path):
            others = files.setdefault(_same(path.name, files), [])
            if others:
                raise InputError(
                    f"{given}: both {others[0].relative_to(folder)} and the folder {path.name}; keep one of them"
                )
            if len(forms := {suffix_of(part) for part in parts}) > 1:
                raise InputError(
                    f"{given}: {path.name} has files that end in {' and '.join(sorted(forms))}; keep one form"
                )
            others += parts
    for split, paths in files.items():
        _check_whole(split, paths, given)
    return _numbered(files)


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, in order, but for hidden files and those that `datasets` keeps results in."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__", "cache-")))
    except OSError:  # a folder that one may not look into
        return []


def _of_data(folder: Path) -> list[Path]:
    """The files of a folder that hold rows by their names, and its folders."""
    inside = _visible(folder)
    files = _surely([path for path in inside if may_hold_rows(path) and path.is_file()])
    folders = [path for path in inside if path.is_dir()]
    if not any(map(_is_sure, files)) and any(may_hold_rows(path) for one in folders for path in _within(one)):
        files = []
    return [path for path in inside if path in files or path in folders]


def _surely(files: list[Path]) -> list[Path]:
    """Those that are called as data are, if any is: any JSON may be an array of objects, and most are none."""
    return [path for path in files if _is_sure(path)] or files


def _is_sure(path: Path) -> bool:
    return not _is_json(path) or kind_of_split(SHARD.sub("", _stem(path))) is not None


def _within(folder: Path) -> list[Path]:
    """What lies in a folder, and in those in it."""
    return [path for one in (folder, *_folders(folder)) for path in _visible(one)]


def may_hold_rows(path: Path) -> bool:
    """Whether a file is, by its name, of a form that is read, and does not describe something else."""
    return suffix_of(path) != "" and not (_is_json(path) and DESCRIBING.fullmatch(_stem(path)))


def _is_json(path: Path) -> bool:
    return suffix_of(path) in JSON


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _stem(path: Path) -> str:
    return path.name[: -len(suffix_of(path))]


def _part(path: Path) -> tuple[str, str, str] | None:
    """What a part is one of, its number, and of how many."""
    part = SHARD.search(_stem(path))
    return (_stem(path)[: part.start()], part[1], part[2]) if part else None


def _same(split: str, files: Files) -> str:
    """The name under which a split is there already, in whatever case; else its own."""
    return next((name for name in files if name.casefold() == split.casefold()), split)


def _check_whole(split: str, paths: Sequence[Path], given: str) -> None:
    """Raise InputError where the names of parts say that there are more."""
    numbers: dict[tuple[str, str], set[str]] = {}
    for part in filter(None, map(_part, paths)):
        numbers.setdefault((part[0], part[2]), set()).add(part[1])
    for (_, count), there in numbers.items():
        if len(there) != int(count):
            raise InputError(f"{given}: {len(there)} of the {int(count)} parts of {split} are there; fetch the others")


def _numbered(files: Files) -> Files:
    """With `test-00`, `test-01`, ... as one split, where there is none without a number and none of them is missing.

    One digit makes parts of a split to train on alone: `eval_1` and `eval_2` may be two ways to test.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in files:
        number = NUMBER.search(name)
        if number and (kind_of_split(name) == "train" or (len(number[1]) > 1 and kind_of_split(name))):
            found.setdefault(name[: number.start()], []).append((int(number[1]), name))
    for split, parts in found.items():
        numbers = [number for number, _ in sorted(parts)]
        whole = numbers in ([*range(len(parts))], [*range(1, len(parts) + 1)])
        if whole and len(parts) > 1 and _same(split, files) not in files:
            files[split] = [path for _, name in sorted(parts) for path in files.pop(name)]
    return files


def _saved(folder: Path, given: str) -> list[Path]:
    """The files of a split that `Dataset.save_to_disk` left in this folder; none where it did not."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise InputError(f"{given}: {folder / missing[0]} is missing, which state.json there names; fetch it")
    return [folder / name for name in names]


def _parts(folder: Path) -> list[Path]:
    """The files of a folder that is a split by its name; none where it is not, or holds splits of its own."""
    kind = kind_of_split(folder.name)
    if kind is None:
        return []
    inside = _surely([path for path in sorted(folder.rglob("*")) if may_hold_rows(path) and path.is_file()])
    parts = [
        path
        for path in inside
        if not any(name.startswith((".", "__", "cache-")) for name in path.relative_to(folder).parts)
    ]
    return [] if any(kind_of_split(_stem(path)) not in (None, kind) for path in parts) else parts


def _others(folder: Path, place: Path, taken: Collection[Path]) -> list[str]:
    """What lies beside the splits and is left unread: files of other forms that are called as splits are, folders of
    data, and files above the folder that was taken."""
    found: list[str] = []
    for path in (path for where in dict.fromkeys([folder, place]) for path in _visible(where)):
        if path in taken or path == place or any(path in file.parents for file in taken):
            continue
        if path.is_file():
            stem = path.name.partition(".")[0]
            if may_hold_rows(path) or (path.name.lower().endswith(OTHER_FORMS) and kind_of_split(stem)):
                found.append(str(path.relative_to(folder)))
        elif path not in place.parents and any(_holds_rows(inner, path) for inner in _visible(path)):
            found.append(f"{path.relative_to(folder)}/")
    return found


def _holds_rows(path: Path, folder: Path) -> bool:
    """Whether this file is data: of a form that is read, or any that may hold rows in a folder called as a split is."""
    return may_hold_rows(path) or (path.name.lower().endswith(OTHER_FORMS) and kind_of_split(folder.name) is not None)


def _in_words(paths: Sequence[Path], place: Path, split: str) -> str:
    """What a split's files are called: the only one by its name, several by their number."""
    if len(paths) == 1:
        return str(paths[0].relative_to(place))
    return f"{split} ({len(paths)} files)"


def _nearest_path(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f", nor is there {parent}; give a folder, a file or 'pydoc'"
    there = [entry for entry in parent.iterdir() if entry.is_dir() or suffix_of(entry)]
    choices = {entry.name: str(entry) for entry in there} | {name: name for name in BUILT_IN_DATA}
    close = difflib.get_close_matches(path.name, choices, n=1)
    return f", did you mean '{choices[close[0]]}'?" if close else "; give a folder, a file or 'pydoc'"
