"""A model from its configuration alone, on the meta device: the widths of its layers, without its weights.

The public dimensions of some models come with the package, in architectures.json, each with its source.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from fedlotr.adapters.layer import widths
from fedlotr.adapters.tuner import projection_type
from fedlotr.cost.formulas import Layer, Shapes
from fedlotr.errors import InputError, nearest
from fedlotr.models.loading import (
    PLAIN_ATTENTION,
    Kind,
    MeanPooledClassifier,
    ModelSpec,
    adaptable_layers,
    head_layers,
    head_names,
    load_base,
    with_head,
)
from fedlotr.models.source import first_line
from fedlotr.models.supported import fused_experts, is_sentence_encoder


@dataclass(frozen=True)
class Architecture(Shapes):
    """A model's shapes, and what it is. source: where the dimensions are from."""

    kind: Kind
    parameters: int
    source: str


@cache
def public_models() -> Mapping[str, Mapping[str, Any]]:
    """The models whose dimensions are known here, by name."""
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def read_architecture(model: str, kind: Kind | None, labels: int, targets: str) -> Architecture:
    """The architecture of a model of the package, of a local folder, or on the hub, whose config.json alone is fetched.

    kind: what it is for; None: what its configuration says. labels: classes of a classifier.
    Raises InputError.
    """
    module, kind, source = _module(model, kind, labels)
    if kind == "classification" and not head_layers(module):
        raise InputError(f"--model {model}: a {type(module).__name__} has no classification head that is known here")
    if targets == "all-linear" and (experts := fused_experts(module)) is not None:
        raise InputError(
            f"--model {model}: a mixture of experts whose experts are one tensor ({experts}); choose the layers that "
            "can be adapted, as in --targets '.*attn.*'"
        )
    try:
        names = adaptable_layers(module, targets)
    except ValueError as error:
        raise InputError(f"--targets {targets}: {error}") from error
    shapes = {name: widths(module.get_submodule(name)) for name in names}
    return Architecture(
        tuple(Layer(name, projection_type(name, *shape), *shape) for name, shape in shapes.items()),
        tuple(parameter.numel() for layer in head_layers(module).values() for parameter in layer.parameters()),
        kind,
        sum(parameter.numel() for parameter in module.parameters()),
        source,
    )


def _module(model: str, kind: Kind | None, labels: int) -> tuple[nn.Module, Kind, str]:
    known = public_models()
    name = next((n for n, row in known.items() if model in (n, row["hub"], row["hub"].partition("/")[2])), None)
    folder = Path(model).expanduser()
    mean_pooled, source = False, f"config.json of {model}"
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        if folder.is_dir():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            mean_pooled = is_sentence_encoder(folder)
        elif name is not None:
            row = known[name]
            fields = dict(row["config"])
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            kind, mean_pooled, source = kind or row["task"], bool(row.get("mean_pooled")), str(row["source"])
        else:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers and the hub fail each in their own way
        reason = first_line(error)
        if not folder.is_dir():
            reason = (
                f"no folder with a config.json, no model of the package{nearest(model, known)}, and no hub: {reason}"
            )
        raise InputError(f"--model {model}: {reason}") from error
    kind = kind or _kind(config)
    try:
        if folder.is_dir() and list(folder.glob("*.safetensors")):
            # What the files lack is a part of the head.
            spec = ModelSpec(path=str(folder), kind=kind, labels=labels, mean_pooled=mean_pooled, pad_id=0)
            return load_base(spec, meta=True), kind, source
        return _from_config(config, kind, labels, mean_pooled), kind, source
    except Exception as error:
        raise InputError(f"--model {model}: cannot be built for {kind}: {first_line(error)}") from error


def _kind(config: Any) -> Kind:
    """What the class that was saved is for."""
    saved = " ".join(getattr(config, "architectures", None) or ())
    return "causal-lm" if "CausalLM" in saved or "LMHeadModel" in saved else "classification"


def _from_config(config: Any, kind: Kind, labels: int, mean_pooled: bool) -> nn.Module:
    config.num_labels = labels
    mean_pooled = mean_pooled and kind == "classification"
    maker: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        module = (AutoModel if mean_pooled else maker).from_config(config, attn_implementation=PLAIN_ATTENTION)
        if mean_pooled:
            module = MeanPooledClassifier(module, labels)
    return with_head(module, [] if kind == "causal-lm" else head_names(module))
