"""Which model folders can be used, told from their JSON files alone; what cannot be is refused by name."""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from fedlotr.adapters.quantised import QUANTISED

CLASSES = {
    "classification": (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "text classifier"),
    "regression": (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "text classifier"),
    "causal-lm": (MODEL_FOR_CAUSAL_LM_MAPPING, "language model"),
}
QUANTISERS = {"bitsandbytes": "bitsandbytes"}
"""Kinds of quantised weights whose linear layers can be adapted, and the package that reads them."""
PASSED_OVER = {"Transformer", "Pooling", "Normalize"}
"""Modules of sentence-transformers that a classifier on mean-pooled tokens does as well with or without."""


MOST_LAYERS = 2_000
"""Layers of one kind, or experts of one layer, that a configuration may ask for: each becomes modules, on the meta
device too, and a million of them keep a process for hours. The deepest language models have about a hundred."""
COUNTS = re.compile(r"(^|_)(layers?|blocks?|experts|depths?)$")
"""How the keys end that count modules."""


def check_depth(config: Mapping[str, Any]) -> None:
    """Raises ValueError where a configuration, or one inside it, asks for more modules than any model has."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_depth(value)
        elif COUNTS.search(str(key)):
            most = max((n for n in (value if isinstance(value, list) else [value]) if type(n) is int), default=0)
            if most > MOST_LAYERS:
                raise ValueError(f"its configuration asks for {most:,} {key}; expected at most {MOST_LAYERS:,}")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ValueError where it is not a JSON object."""
    found = _read_json(folder / "config.json")
    if not isinstance(found, dict):
        raise ValueError("its config.json is not a JSON object")
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {path.name} cannot be read ({error})") from error


def read_architecture(folder: Path) -> Any:
    """The configuration as transformers understands it. Raises ValueError where it does not."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers checks some fields and trips over others, each in its own way
        raise ValueError(f"its config.json is not one that transformers reads ({error})") from error


def is_sentence_encoder(folder: Path) -> bool:
    """Whether a folder is in the sentence-transformers layout with mean pooling.

    One that pools the first token (CLS) is not: it is taken as the encoder it is, whose own classifier reads that
    token. Raises ValueError for other pooling, and for further modules that would change what is pooled.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return False
    found = _read_json(path)
    if not isinstance(found, dict):
        raise ValueError("its 1_Pooling/config.json is not a JSON object")
    on = {str(name).removeprefix("pooling_mode_") for name, value in found.items() if value is True}
    on = (
        {str(found["pooling_mode"])} if found.get("pooling_mode") else {name for name in on if name != "include_prompt"}
    )
    on = {name.removesuffix("_tokens").removesuffix("_token") for name in on}
    if on not in ({"cls"}, {"mean"}):
        raise ValueError(
            f"a sentence encoder that pools by {', '.join(sorted(on)) or 'nothing known'}; only mean and cls are known "
            "here: remove 1_Pooling to have it as a plain encoder with its own classifier"
        )
    modules = folder / "modules.json"
    listed = _read_json(modules) if modules.is_file() else []
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise ValueError("its modules.json is not a list of modules")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in listed]
    further = sorted(set(kinds) - PASSED_OVER)
    if further:
        raise ValueError(
            f"a sentence encoder with a further module, {', '.join(further)}, which is not applied here; "
            "take an encoder without it, or remove 1_Pooling to have a plain encoder with its own classifier"
        )
    return on == {"mean"}


def check_folder(folder: Path, quantize: str = "none") -> None:
    """Raises ValueError, with the reason and the way out, for a model of a kind that cannot be used for any task.

    quantize: the form that its layers are to be brought into, if any.
    """
    config = read_config(folder)
    check_depth(config)
    model_type = str(config.get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ValueError(
                f"model type {model_type or '(none)'!r} brings its own code (auto_map), which is never run; "
                "take a model whose class is part of transformers"
            )
        raise ValueError(f"model type {model_type or '(none)'!r} is not known to this transformers")
    if read_architecture(folder).is_encoder_decoder:
        raise ValueError(
            f"an encoder-decoder ({model_type}), which is not supported; take an encoder (BERT and its kin) or a "
            "decoder (GPT-2, Llama and their kin)"
        )
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict):
        method = str(quantised.get("quant_method", "unknown"))
        package = QUANTISERS.get(method)
        if package is None or importlib.util.find_spec(package) is None:
            need = f"needs the package {package}" if package else "cannot be adapted here"
            raise ValueError(f"its weights are quantised ({method}), which {need}; take the unquantised model")
        if quantize != "none":
            raise ValueError(
                f"its weights were saved quantised ({method}) and stay so; leave out --quantize {quantize}, or take "
                "the unquantised model"
            )
    is_sentence_encoder(folder)


def form_of_weights(folder: Path) -> str:
    """4bit or 8bit where a model was saved quantised by bitsandbytes, else none."""
    quantised = read_config(folder).get("quantization_config") or {}
    return next((form for form in QUANTISED if quantised.get(f"load_in_{form}")), "none")


def check_kind(config: Any, kind: str) -> None:
    """Raises ValueError where transformers has no class of this architecture for a task."""
    mapping, called = CLASSES[kind]
    if type(config) not in mapping:
        raise ValueError(f"a {config.model_type} is no {called}: transformers has no class of it for --task {kind}")
