"""What the files that a configuration names hold, wherever they lie: hashes by which a run knows them again."""

import hashlib
import importlib.util
import json
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedlotr.errors import InputError, shorten
from fedlotr.fleet.file import files_of
from fedlotr.models.user_model import VOLATILE

Content = dict[str, str]
"""Part of a thing -> its SHA-256."""

DESCRIBING = (
    *("config.json", "1_Pooling/config.json", "modules.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
"""The files of a model's folder that say how its weights and a text are read."""
WHOLE = 2 * 10**9
"""Bytes of weights up to which each of them is hashed, at one to two seconds; of more, blocks of every tensor.

Another fine-tune changes whole tensors and so their blocks; what escapes is a large model in which somebody has changed
single numbers by hand.
"""
BLOCKS, BLOCK = 16, 4096
"""Of each tensor: the first, the last, and those at equal distances between them; bytes of one."""


def model_content(folder: Path) -> Content:
    """The weights, by their tensors, and each file of `DESCRIBING`. Raises ValueError for a file that is damaged.

    Weights that are cut into other files hold the same; so does a JSON file that says where it came from.
    """
    found = {"weights": _weights(folder)}
    for path in sorted({path for name in DESCRIBING for path in folder.glob(name) if path.is_file()}):
        content = path.read_bytes()
        if path.suffix == ".json":
            known = json.loads(content)
            kept = {k: v for k, v in known.items() if k not in VOLATILE} if isinstance(known, dict) else known
            content = json.dumps(kept, sort_keys=True).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def _weights(folder: Path) -> str:
    files = _weight_files(folder)
    whole = sum(path.stat().st_size for path in files) <= WHOLE
    tensors = sorted(tensor for path in files for tensor in _tensors(path, whole))
    return hashlib.sha256(json.dumps(tensors).encode()).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads: one, those of an index, or (in layouts of others) all."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return sorted({folder / str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def _tensors(path: Path, whole: bool) -> Iterator[tuple[str, str, list[int], str]]:
    """(name, format, shape, SHA-256 of the bytes or of blocks of them) of each tensor of a safetensors file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        first = 8 + int.from_bytes(content[:8], "little")
        header: dict[str, Any] = json.loads(content[8:first])
        for name, about in header.items():
            if name == "__metadata__":
                continue
            begin, end = (first + offset for offset in about["data_offsets"])
            if end > len(content):
                raise ValueError(f"{path.name} ends within {name}")
            digest = hashlib.sha256()
            if whole or end - begin <= BLOCKS * BLOCK:
                with memoryview(content) as all_of_it, all_of_it[begin:end] as tensor:
                    digest.update(tensor)
            else:
                for number in range(BLOCKS):
                    at = begin + (end - begin - BLOCK) * number // (BLOCKS - 1)
                    digest.update(content[at : at + BLOCK])
            yield name, about["dtype"], about["shape"], digest.hexdigest()


def fleet_content(given: str | None) -> Content:
    """A fleet's file and each file that it names; nothing of a preset, which its name says. Raises InputError."""
    found = {}
    for part, path in (files_of(given) if given is not None else {}).items():
        try:
            found[part] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"--fleet {shorten(given)}: {shorten(path)} cannot be read ({error.strerror})") from None
    return found


def code_content(names: Iterable[str]) -> Content:
    """The code of what is named by file.py:Class or module:Class; nothing of what is installed by name.

    The named files alone: what they import is not looked at.
    """
    found = []
    for name in names:
        where, colon, _ = name.rpartition(":")
        spec = None if where.endswith(".py") or not colon else importlib.util.find_spec(where)
        path = Path(where) if where.endswith(".py") else Path(spec.origin or "") if spec is not None else Path()
        if path.is_file():
            found.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return {"code": "/".join(found)} if found else {}
