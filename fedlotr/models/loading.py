"""A frozen base: loading it in the form it is asked for, and finding its layers and its head."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedlotr.adapters.experts import unfuse
from fedlotr.adapters.layer import CopiesLinear, widths
from fedlotr.adapters.quantised import is_quantised, multiply_plainly, quantise
from fedlotr.models.checkpointing import run_again
from fedlotr.models.kinds import TASK_KINDS
from fedlotr.models.mixtures import EXPERTS, expert_tensors, routes
from fedlotr.models.supported import form_of_weights
from fedlotr.models.targets import matches, meant, nearest_types
from fedlotr.models.user_class import import_class
from fedlotr.streams import stream_key

Kind = Literal["classification", "regression", "causal-lm"]

NOT_TEXT = re.compile(r"(?<![a-z])(vision|visual|image|audio|speech|multi_modal|mm_projector|entity)(?![a-z])")
"""In the name of a part of a model that reads something else than texts."""

HEADS = ("classifier", "score")
"""What transformers calls the module that turns features into class logits, or a number."""

PLAIN_ATTENTION = "eager"
ATTENTION = {"float32": "sdpa", "bfloat16": PLAIN_ATTENTION}
"""Named, since they differ in bits. In bfloat16 the backward of torch's fused attention took a third of a whole
training step of MiniLM on a CPU (in float32 a twentieth)."""


UNBATCHED = {
    "deberta": ("pos_proj", "pos_q_proj"),
    "deberta-v2": ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj"),
}
"""By architecture the last parts of the names of layers that also meet an input without a batch axis (the table of
relative positions), whose rows have no client: copies for a cohort cannot be told apart there."""


OUTPUT = (
    "the output layer is never adapted: the loss reads its weight, often the embedding's too, in pieces, with no room "
    "for factors between"
)
"""Why what is named is refused, for a message."""


@dataclass(frozen=True)
class ModelSpec:
    """What a worker needs to build the same base as everyone else.

    path: a local folder in the Hugging Face layout. labels: numbers that the head makes of a text (0 for a language
    model).
    mean_pooled: a sentence encoder, read out by the mean of its token vectors. dtype: of the frozen base.
    code, code_folder: module:Class of a class that is not part of transformers, and the folder of that module.
    checkpointed: whether its blocks run again in backward instead of keeping what is inside them.
    quantize: 8bit or 4bit, the form that the weights of the linear layers are kept in; none: in `dtype`.
    device: cpu, or cuda: the first GPU that a process sees.
    head_rows, head_labels: where the head of the files is gone on with, its row for each label, and its labels.
    shift, step: of a regression, whose model makes (label - shift) / step, so that rates fit whatever the labels' unit.
    """

    path: str
    kind: Kind
    labels: int
    mean_pooled: bool
    pad_id: int
    dtype: str = "float32"
    code: str | None = None
    code_folder: str = ""
    checkpointed: bool = False
    quantize: str = "none"
    device: str = "cpu"
    head_rows: tuple[int, ...] = ()
    head_labels: int = 0
    shift: float = 0.0
    step: float = 1.0

    @property
    def headed(self) -> bool:
        """Whether a head reads the model out."""
        return TASK_KINDS[self.kind].headed

    @property
    def scale(self) -> bool:
        """Whether it makes a number on a scale."""
        return TASK_KINDS[self.kind].scale


class MeanPooledClassifier(nn.Module):
    """A sentence encoder, the mean of its token vectors, and a linear head."""

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.classifier = nn.Linear(int(encoder.config.hidden_size), labels)  # type: ignore[union-attr,arg-type]

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Token ids (rows, length) to logits (rows, labels)."""
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: torch.Tensor = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        return logits


def load_base(spec: ModelSpec, *, meta: bool = False, config: Any = None) -> nn.Module:
    """The frozen base in eval mode (no dropout), its weights memory-mapped from safetensors.

    Its logits are zero, but where `spec.head_rows` says which rows of the head in its files make them.

    Experts are a layer for each of their matrices, where they can be (`adapters.experts`).
    The layers of the classification head are `CopiesLinear`: `classifier` or `score`, and the linear layers before it
    that the files lack, as nearly every checkpoint on the hub lacks RoBERTa's `classifier.dense`, DistilBERT's
    `pre_classifier` or BERT's pooler. Those are drawn, alike in every process.
    meta: on the meta device, without reading the weights; with `config`, of that configuration alone, without a folder:
    nothing is lacking then.
    Raises OSError or ValueError as transformers does where the folder holds no such model, and ValueError where
    weights other than the head's are missing, or where it is to be checkpointed and cannot be.
    """
    # A progress bar per load and a warning about the new head would bury the run's own lines.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model, missing = _loaded(spec, meta=meta) if config is None else (_from_config(spec, config), set())
    heads = head_names(model, missing) if spec.headed else []
    lacking = sorted(key for key in missing if not _belongs_to_head(model, key, heads))
    if lacking:
        raise ValueError(
            f"its files lack {', '.join(lacking[:3])}, or hold it in another size; it would be random and is not part "
            "of the adapter: take a model that was saved whole"
        )
    dtype = getattr(torch, spec.dtype)
    if spec.quantize != "none" and not meta:
        quantise_layers(model, spec.quantize, dtype, heads, spec.device)
    if spec.head_rows:
        model.set_submodule(heads[-1], _of_rows(cast(nn.Linear, model.get_submodule(heads[-1])), spec.head_rows))
    module = with_head(model, heads)
    for layer in list(head_layers(module).values())[-1:] if not spec.head_rows else ():
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for quantised_layer in filter(is_quantised, module.modules()):
        multiply_plainly(quantised_layer, dtype)  # also those of a model that was saved so
    if spec.checkpointed:
        run_again(module)
    module.eval().requires_grad_(False)
    module = module if meta else module.to(spec.device)
    unfuse(module)  # last of all: what changes a tensor after it would part it from the layers that are views of it
    return module


def _of_rows(layer: nn.Linear, rows: tuple[int, ...]) -> nn.Linear:
    """A layer of these rows of another, in their order."""
    weight, bias = layer.weight.detach(), layer.bias
    chosen = nn.Linear(layer.in_features, len(rows), bias is not None, device=weight.device, dtype=weight.dtype)
    chosen.weight = nn.Parameter(weight[list(rows)].clone())
    if bias is not None:
        chosen.bias = nn.Parameter(bias.detach()[list(rows)].clone())
    return chosen


def _mean_pooled(spec: ModelSpec) -> bool:
    return spec.headed and spec.mean_pooled


def _class_of(spec: ModelSpec) -> Any:
    """transformers' class of a base that is not the caller's own; of a sentence encoder without what reads it out."""
    if not spec.headed:
        return AutoModelForCausalLM
    return AutoModel if spec.mean_pooled else AutoModelForSequenceClassification


def _from_config(spec: ModelSpec, config: Any) -> nn.Module:
    config.num_labels = spec.labels
    with torch.device("meta"):
        model: nn.Module = _class_of(spec).from_config(config, attn_implementation=PLAIN_ATTENTION)
        return MeanPooledClassifier(model, spec.labels) if _mean_pooled(spec) else model


def _loader(spec: ModelSpec, *, meta: bool) -> tuple[Any, dict[str, Any]]:
    """The class that loads a base, and what its `from_pretrained` is told besides the folder."""
    options: dict[str, Any] = {"device_map": "meta"} if meta else {}
    loader = _class_of(spec)
    if spec.headed and not _mean_pooled(spec):
        options |= {"num_labels": spec.head_labels or spec.labels, "pad_token_id": spec.pad_id}
    saved_form = form_of_weights(Path(spec.path))
    if saved_form != "none" and not meta:
        options["device_map"] = {"": spec.device}  # else they would go to a GPU wherever there is one
    if spec.code is not None:
        loader = import_class(spec.code, spec.code_folder)
    if spec.code is not None or (meta and saved_form != "none"):
        config = (AutoConfig if spec.code is None else loader.config_class).from_pretrained(
            spec.path, local_files_only=True
        )
        if meta:  # where nothing can be dequantised
            vars(config).pop("quantization_config", None)
        # Put in here: what a configuration of one's own does not know would be handed to the class.
        for name in tuple(options.keys() & {"num_labels", "pad_token_id"}):
            setattr(config, name, options.pop(name))
        options["config"] = config
    return loader, options


def _loaded(spec: ModelSpec, *, meta: bool) -> tuple[nn.Module, set[str]]:
    """A base as its files have it, and the names of the tensors that they lack, or hold in another size."""
    loader, options = _loader(spec, meta=meta)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(0, "missing weights"))
        load = partial(
            loader.from_pretrained,
            spec.path,
            # As saved, weights are not read before they are quantised, each layer's by itself.
            dtype="auto" if spec.quantize != "none" and not meta else getattr(torch, spec.dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of a head for other labels; any other is refused below
            **options,
        )
        try:
            model, found = load(attn_implementation=ATTENTION[spec.dtype])
        except ValueError as error:
            if PLAIN_ATTENTION not in str(error):
                raise
            model, found = load(attn_implementation=PLAIN_ATTENTION)  # Gemma 2, DeBERTa: they have no other
        packed = form_of_weights(Path(spec.path)) == "4bit"  # whose tensors have a shape of their own
        mismatched = {key for key, saved, _ in found["mismatched_keys"] if not packed or saved[-1] != 1}
        missing = {*found["missing_keys"], *mismatched}
        if _mean_pooled(spec):
            with torch.device("meta" if meta else "cpu"):
                model = MeanPooledClassifier(model, spec.labels)
            # Read out by the mean, the encoder's pooler is not used.
            missing = {f"encoder.{key}" for key in missing if "pooler" not in key.split(".")}
    return model, missing


def quantise_layers(
    model: nn.Module, form: str, dtype: torch.dtype, heads: Collection[str], device: str = "cpu"
) -> None:
    """Keep the weights of a model's linear layers in few bits, but the head's and the output embedding's, in place.

    They go to the device one by one. All others are brought to `dtype`.
    """
    for name in linear_layers(model):
        if name not in heads:
            model.set_submodule(name, quantise(model.get_submodule(name), form, dtype, device))
    for module in model.modules():
        if not is_quantised(module):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model's parameters, whatever they are stored in."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    quantised = [layer for layer in model.modules() if is_quantised(layer)]
    return numbers + sum(math.prod(widths(layer)) - cast(torch.Tensor, layer.weight).numel() for layer in quantised)


def head_names(model: nn.Module, missing: Collection[str] = ()) -> list[str]:
    """The linear layers that are the head's, in the order of the model: the last one makes the logits.

    missing: tensors that the model's files lack, and that are the head's therefore.
    """
    trunk = getattr(model, "base_model_prefix", "encoder")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (
            name.split(".")[0] in HEADS
            # DistilBERT's pre_classifier, which PEFT takes for a part of `classifier` by the end of its name.
            or name.endswith(HEADS[0])
            or (f"{name}.weight" in missing and (name.split(".")[0] != trunk or "pooler" in name.split(".")))
        )
    ]


def with_head(model: nn.Module, heads: Collection[str]) -> nn.Module:
    """The same model, whose head's layers take copies."""
    for name in heads:
        parent, _, leaf = name.rpartition(".")
        # The head is trained: it stays in float32 whatever the base is, and so does a norm beside its layers.
        (model.get_submodule(parent) if parent else model.get_submodule(name)).float()
        setattr(model.get_submodule(parent), leaf, CopiesLinear.around(cast(nn.Linear, model.get_submodule(name))))
    return model


def _belongs_to_head(model: nn.Module, key: str, heads: Collection[str]) -> bool:
    """Whether a tensor is a head layer's, or of a norm beside one, which starts as it always does: at one and zero."""
    layer, _, _ = key.rpartition(".")
    beside = layer.rpartition(".")[0]
    norm = beside and type(model.get_submodule(layer)).__name__.endswith("Norm")
    return layer in heads or bool(norm and any(name.rpartition(".")[0] == beside for name in heads))


def head_layers(model: nn.Module) -> dict[str, CopiesLinear]:
    """The linear layers of the classification head by name; the last one makes the logits. Empty without a head."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CopiesLinear)}


def adaptable_layers(model: nn.Module, targets: str) -> list[str]:
    """Names of the linear layers to adapt: `all-linear`, or those that `targets.matches`.

    Never adapted: the head, the output embedding, under mean pooling the pooler, which is not used, layers that no text
    goes through, routers, experts that cannot be unfused, and `UNBATCHED`. Raises ValueError where nothing matches, or
    one of several alternatives does not, with the reason, or some names that would.
    """
    unbatched = unbatched_layers(model, targets)
    linear = [name for name in linear_layers(model) if name not in unbatched and why_left(model, name) is None]
    chosen = meant(targets, linear, unbatched, refused(model))
    if not chosen and unbatched:
        raise ValueError(
            f"it matches {', '.join(unbatched[:3])} alone, which cannot be adapted: they also meet an input without a "
            "batch axis; match others too"
        )
    if not chosen:
        raise ValueError(
            f"no linear layer that can be adapted is matched by {targets!r}; names are like "
            f"{', '.join(linear[:3]) or '(none)'}"
            f"{f'; {nearest_types(targets, linear)}' if linear else ''}"
        )
    return chosen


def refused(model: nn.Module) -> dict[str, str]:
    """What is never adapted by name, with the reason that a message gives."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = head_layers(model)
    left = {
        name: f"it cannot be adapted, {reason}" for name in linear_layers(model) if (reason := why_left(model, name))
    }
    outputs = {name: OUTPUT for name, module in model.named_modules() if module is output and name not in heads}
    head = dict.fromkeys(heads, "the head is trained whole, so it takes no adapter")
    return {**left, **outputs, **head, **dict.fromkeys(expert_tensors(model), EXPERTS)}


def why_left(model: nn.Module, name: str) -> str | None:
    """Why a linear layer beside the head is never adapted, whatever is asked for; None where it can be."""
    if isinstance(model, MeanPooledClassifier) and "pooler" in name.split("."):
        return "not used where tokens are averaged"
    if routes(model, name):
        return "a router stays as it is"
    return "no text goes through them" if reads_no_text(name) else None


def reads_no_text(name: str) -> bool:
    """Whether a module is part of what reads something else than texts, by its name."""
    return NOT_TEXT.search(name) is not None


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers but the head and the output embedding."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, CopiesLinear) and module is not output
    ]


def unbatched_layers(model: nn.Module, targets: str) -> list[str]:
    """The layers that `targets` names, as for `adaptable_layers`, and that are left out since they are `UNBATCHED`."""
    parts = UNBATCHED.get(str(getattr(model.config, "model_type", "")), ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in parts and matches(targets, name)
    ]
