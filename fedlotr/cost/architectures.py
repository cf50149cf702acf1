"""A model from its configuration alone, on the meta device: the widths of its layers, without its weights.

The public dimensions of some models come with the package, in architectures.json, each with its source.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from fedlotr.adapters.layer import FactoredLayer, widths
from fedlotr.adapters.tuner import projection_type
from fedlotr.cost.formulas import Layer, Shapes
from fedlotr.errors import InputError, nearest
from fedlotr.models.gguf import is_gguf, read_header
from fedlotr.models.loading import Kind, ModelSpec, head_layers
from fedlotr.models.meta import check_meta, chosen_layers, meta_model
from fedlotr.models.source import first_line
from fedlotr.models.supported import check_depth, is_sentence_encoder, read_config


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
    """The architecture of a model of the package, of a local folder, in a GGUF file, whose header alone is read, or on
    the hub, whose config.json alone is fetched.

    kind: what it is for; None: what its configuration says. labels: classes of a classifier.
    Raises InputError.
    """
    folder, (config, kind, mean_pooled, source) = Path(model).expanduser(), _configuration(model, kind)
    spec = ModelSpec(path=str(folder), kind=kind, labels=labels, mean_pooled=mean_pooled, pad_id=0)
    # What the files of a folder lack is a part of the head.
    module = meta_model(model, spec, None if any(folder.glob("*.safetensors")) else config)
    check_meta(model, module, headed=spec.headed)
    shapes = shapes_of(module, chosen_layers(module, targets))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Architecture(shapes.layers, shapes.heads, kind, parameters, source)


def shapes_of(module: nn.Module, adapted: Iterable[str]) -> Shapes:
    """Of a model, of which these layers are adapted, with their ranks where they are already."""
    layers = {name: module.get_submodule(name) for name in adapted}
    ranks = {name: layer.r.get("default") for name, layer in layers.items() if isinstance(layer, FactoredLayer)}
    shapes = {name: widths(layer) for name, layer in layers.items()}
    heads = {
        f"{name}.{part}": parameter.numel()
        for name, layer in head_layers(module).items()
        for part, parameter in layer.named_parameters()
    }
    return Shapes(
        tuple(Layer(name, projection_type(name, *shape), *shape, ranks.get(name)) for name, shape in shapes.items()),
        tuple(heads[name] for name in sorted(heads)),
    )


def _configuration(model: str, kind: Kind | None) -> tuple[Any, Kind, bool, str]:
    """A model's configuration, what it is for, whether it is read out by a mean, and where that is from."""
    known = public_models()
    name = next((n for n, row in known.items() if model in (n, row["hub"], row["hub"].partition("/")[2])), None)
    folder = Path(model).expanduser()
    mean_pooled, source = False, f"config.json of {model}"
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        if folder.is_dir():
            check_depth(read_config(folder))
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            mean_pooled = is_sentence_encoder(folder)
        elif name is not None:
            row = known[name]
            fields = dict(row["config"])
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            kind, mean_pooled, source = kind or row["task"], bool(row.get("mean_pooled")), str(row["source"])
        elif is_gguf(model):
            config, kind, source = read_header(folder), kind or "causal-lm", f"header of {model}"
        else:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            check_depth(config.to_dict())
    except Exception as error:  # transformers and the hub fail each in their own way
        reason = str(error) if is_gguf(model) else first_line(error)
        if not folder.is_dir() and not is_gguf(model):
            reason = (
                f"no folder with a config.json, no model of the package{nearest(model, known)}, and no hub: {reason}"
            )
        raise InputError(f"--model {model}: {reason}") from error
    return config, kind or _kind(config), mean_pooled, source


def _kind(config: Any) -> Kind:
    """What the class that was saved is for."""
    saved = " ".join(getattr(config, "architectures", None) or ())
    return "causal-lm" if "CausalLM" in saved or "LMHeadModel" in saved else "classification"
