"""A GGUF file, llama.cpp's form of a model, as a folder like any other: dequantised once and kept in a cache."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available
from transformers.utils import logging as transformers_logging

from fedlotr.errors import shorten
from fedlotr.files import GGUF, write_atomically
from fedlotr.models.supported import check_depth, check_kind

MAGIC = b"GGUF"
ORIGIN = "gguf.json"
"""In a folder that was made of such a file: what file that was."""
FORM = 1
"""Of what is kept in the cache: another number where folders are made in another way."""
PARTIAL = ".partial"


@dataclass(frozen=True)
class Origin:
    """The GGUF file that a folder was made of."""

    file: str
    sha256: str


def is_gguf(model: str) -> bool:
    """Whether a model's name is that of a GGUF file, which may not exist."""
    return model.endswith(GGUF)


def origin_of(folder: Path) -> Origin | None:
    """What a folder of the cache was made of; None for any other folder."""
    path = folder / ORIGIN
    return Origin(**json.loads(path.read_bytes())) if path.is_file() else None


def sha256_of(file: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def cache() -> Path:
    """Where the folders lie: beside what else is kept of the Hugging Face hub, as HF_HOME and XDG_CACHE_HOME say."""
    return Path(constants.HF_HOME).absolute() / "fedlotr" / "gguf"


def read_header(file: Path) -> Any:
    """The model's configuration, which the file's header tells. Raises ValueError where it is none of a decoder."""
    _check_readable(file)
    with _reading("header and tensors"):
        config = AutoConfig.from_pretrained(**_where(file))
    check_depth(config.to_dict())
    check_kind(config, "causal-lm")
    return config


def dequantised(file: Path, *, make: bool = True) -> tuple[Path | None, bool]:
    """The folder of a file's model, its weights in bfloat16, with its tokenizer; and whether it was made just now.

    It is made where the cache has none of this content, by these versions of what reads it; without `make`, None then.
    Raises ValueError for a file that cannot be read, and OSError where the cache cannot be written; neither leaves
    anything there.
    """
    _check_readable(file)
    before, sha256 = file.stat(), sha256_of(file)
    folder = cache() / f"{sha256[:32]}-transformers-{transformers.__version__}-gguf-{version('gguf')}-{FORM}"
    if folder.is_dir() or not make:
        return (folder if folder.is_dir() else None), False
    cache().mkdir(parents=True, exist_ok=True)
    # One at a time: a second process waits, and finds what the first has made. The lock of one that is killed is free.
    with FileLock(cache() / ".lock"):
        if folder.is_dir():
            return folder, False
        for left in cache().glob(f"*{PARTIAL}"):  # by a process that was killed
            shutil.rmtree(left)
        partial = folder.with_name(folder.name + PARTIAL)
        try:
            partial.mkdir()
            _write(file, partial)
            now = file.stat()
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise ValueError("the file was changed while it was read; start again once it is whole")
            write_atomically(partial / ORIGIN, json.dumps(asdict(Origin(file.name, sha256))))
            for path in partial.iterdir():
                with open(path, "rb+") as written:
                    os.fsync(written.fileno())
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder, True


def _write(file: Path, folder: Path) -> None:
    """Make the folder's files. Raises ValueError where the file lacks something."""
    config = read_header(file)
    with _reading("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**_where(file))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with _reading("weights"), redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **_where(file),
            config=config,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    model, found = loaded
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(
            f"it lacks {', '.join(lacking[:3])}; a model that is split over several files is merged first, by "
            "llama-gguf-split --merge"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _where(file: Path) -> dict[str, Any]:
    # By its whole path: a file of the same name in the working directory would be taken for it.
    return {
        "pretrained_model_name_or_path": file.absolute().parent,
        "gguf_file": str(file.absolute()),
        "local_files_only": True,
    }


def _check_readable(file: Path) -> None:
    """Raises ValueError where what reads such files is not installed, or a file does not begin as they do."""
    if not is_gguf_available() or not hasattr(transformers, "GgufConfig"):
        raise ValueError(
            "reading a GGUF file needs the package gguf, and a transformers that knows GgufConfig: "
            "pip install 'fedlotr[chat]'"
        )
    with open(file, "rb") as content:
        if content.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"not a GGUF file: it does not begin with {MAGIC.decode()}")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Say of any error in the block what could not be read."""
    try:
        yield
    except Exception as error:  # transformers and gguf fail each in their own ways
        reason = f"{type(error).__name__}: {shorten(str(error))}"
        raise ValueError(
            f"its {what} cannot be read ({reason}); expected a whole GGUF file of a decoder that transformers loads, "
            "with its tokenizer"
        ) from error
