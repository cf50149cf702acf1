"""A model object of the caller's own, kept as files that every worker can build the same base from; no pickle."""

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedlotr.config.own import own_name
from fedlotr.errors import InputError
from fedlotr.models.user_class import (
    changes_since_built,
    is_transformers_own,
    name_of,
    sources,
    takes_segments,
)

VOLATILE = {"_name_or_path", "name_or_path", "transformers_version", "padding", "truncation", "padding_side"}
"""Keys of JSON files that say where a model came from, or how the tokenizer was last called, and not what it is."""


@dataclass(frozen=True)
class OwnModel:
    """A caller's model as it lies on disk.

    name: own:HASH, of weights, configuration, tokenizer and the class' own code. folder: what `save_pretrained` wrote.
    kind: the name of its class. code, code_folder: module:Class and where that is found, for a class that is not part
    of transformers. architecture: its configuration.
    """

    name: str
    folder: Path
    kind: str
    code: str | None
    code_folder: str
    tokenizer: PreTrainedTokenizerBase
    architecture: Any


def keep_model(given: object, folder: Path) -> OwnModel:
    """Write a pair (model, tokenizer) into an empty folder. Raises InputError for what could not be built again."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise InputError(
            f"model: expected a pair (model, tokenizer), a transformers PreTrainedModel and its tokenizer; got "
            f"{_called(given)}"
        )
    model, tokenizer = given
    problems = [problem for problem in (_unusable(model), _no_tokenizer(tokenizer)) if problem]
    if problems:
        raise InputError([f"model: {problem}" for problem in problems])
    kind, code, code_folder = type(model), None, ""
    try:
        if not is_transformers_own(kind):
            code, code_folder = name_of(kind)
        if changed := changes_since_built(model):
            raise ValueError(
                f"{changed}; workers build it from its files, which do not hold that: put it into a class derived "
                f"from {kind.__name__}, in a module of its own, and give an object of that class"
            )
        _save(model, tokenizer, folder)
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    except OSError as error:
        raise InputError(
            f"model: cannot be kept in {folder} ({error.strerror or error}); make room there, or name another place "
            "by the environment variable TMPDIR"
        ) from error
    name = own_name(_sha256(folder, sources(kind) if code else []))
    tokenizer = copy.deepcopy(tokenizer)
    if getattr(model.config, "type_vocab_size", 1) < 2 or not takes_segments(kind):
        tokenizer.model_input_names = [part for part in tokenizer.model_input_names if part != "token_type_ids"]
    return OwnModel(name, folder, kind.__name__, code, code_folder, tokenizer, model.config)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    config = copy.deepcopy(model.config)  # which saving writes to
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"a {type(model).__name__} cannot be saved ({type(error).__name__}: {error})") from error
    finally:
        model.config.__dict__.update(config.__dict__)


def _unusable(model: object) -> str | None:
    """Why a model cannot be used, or None."""
    if isinstance(model, PeftModel):
        return (
            "a PeftModel, whose base and adapter are two things; give model.merge_and_unload(), or the base, and the "
            "adapter's folder as init_adapter"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        return (
            "a model with an adapter in it (add_adapter, load_adapter), of whose files its base would not come back; "
            "give the base, and the adapter's folder as init_adapter"
        )
    if not isinstance(model, PreTrainedModel):
        instead = ", a torch module with no configuration that it could be built from" * isinstance(model, nn.Module)
        return (
            f"expected a transformers PreTrainedModel, got {_called(model)}{instead}; derive its class from "
            "PreTrainedModel (README, 'From Python')"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        return "its weights are quantised and cannot be saved again as they are; name its folder or hub id instead"
    if any(tensor.is_meta for tensor in model.parameters()):
        return "some of its weights are on the meta device, so there is nothing to start from; load it whole"
    if getattr(model.config, "is_encoder_decoder", False):
        return f"an encoder-decoder ({model.config.model_type}), which is not supported; take an encoder or a decoder"
    return None


def _no_tokenizer(tokenizer: object) -> str | None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return f"its tokenizer is {_called(tokenizer)}; expected one of transformers (PreTrainedTokenizerBase)"
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        return "its tokenizer is empty: every word would be unknown"
    return None


def _called(thing: object) -> str:
    kind = type(thing)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"an object of the type {name}"


def _sha256(folder: Path, code: list[Path]) -> str:
    """Of a saved model's files by name, apart from where it came from, and of its code."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            kept = {k: v for k, v in found.items() if k not in VOLATILE} if isinstance(found, dict) else found
            content = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()
        elif path.is_file():
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        else:
            continue
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
    for path in code:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def move_model(own: OwnModel, to: Path) -> OwnModel:
    """Bring the files to where the run's workers find them."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(own.folder, to)
    return replace(own, folder=to)
