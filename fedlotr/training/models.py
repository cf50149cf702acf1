"""A frozen base with the few tensors that clients train: loading it, finding its layers, naming what moves."""

import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.layer import TRAINABLE, CopiesLinear, FactoredLayer, widths
from fedlotr.adapters.quantised import is_quantised, multiply_plainly, quantise
from fedlotr.adapters.tuner import CoreConfig, factored_layers
from fedlotr.streams import stream_key
from fedlotr.training.checkpointing import run_again
from fedlotr.training.examples import IGNORED, Batch
from fedlotr.training.own_class import import_class
from fedlotr.training.prefix import FrozenPrefix
from fedlotr.training.ragged import Ragged, attending
from fedlotr.training.supported import form_of_weights
from fedlotr.training.token_losses import CHUNK_LOGITS, last_hidden, plain_output, predictions, sequence_losses

Kind = Literal["classification", "causal-lm"]
Tensors = dict[str, torch.Tensor]

HEADS = ("classifier", "score")
"""What transformers calls the module that turns features into class logits."""

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

LOGITS = 2**26
"""Numbers in the logits of one pass of a language model whose loss needs all of them: 256 MB in float32."""


@dataclass(frozen=True)
class ModelSpec:
    """What a worker needs to build the same base as everyone else.

    path: a local folder in the Hugging Face layout. labels: number of classes (0 for a language model).
    mean_pooled: a sentence encoder, read out by the mean of its token vectors. dtype: of the frozen base.
    code, code_folder: module:Class of a class that is not part of transformers, and the folder of that module.
    checkpointed: whether its blocks run again in backward instead of keeping what is inside them.
    quantize: 8bit or 4bit, the form that the weights of the linear layers are kept in; none: in `dtype`.
    device: cpu, or cuda: the first GPU that a process sees.
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


RAGGED = ("bert",)
"""Architectures whose encoder takes packed sequences: told each token's position, only its attention mixes tokens."""


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

    def ragged(self, averages: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Packed token ids (1, tokens) to logits (rows, labels). averages: (rows, tokens)."""
        return self.pooled(averages, self.encoder(**inputs).last_hidden_state)

    def pooled(self, averages: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The encoder's last hidden states of packed tokens (1, tokens, size) to logits (rows, labels)."""
        logits: torch.Tensor = self.classifier(averages @ hidden[0].float())
        return logits


def load_base(spec: ModelSpec, *, meta: bool = False) -> nn.Module:
    """The frozen base in eval mode (no dropout), its weights memory-mapped from safetensors; its logits are zero.

    The layers of the classification head are `CopiesLinear`: `classifier` or `score`, and the linear layers before it
    that the files lack, as nearly every checkpoint on the hub lacks RoBERTa's `classifier.dense`, DistilBERT's
    `pre_classifier` or BERT's pooler. Those are drawn, alike in every process.
    meta: on the meta device, without reading the weights.
    Raises OSError or ValueError as transformers does where the folder holds no such model, and ValueError where
    weights other than the head's are missing, or where it is to be checkpointed and cannot be.
    """
    # A progress bar per load and a warning about the new head would bury the run's own lines.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    mean_pooled = spec.kind == "classification" and spec.mean_pooled
    options: dict[str, Any] = {"device_map": "meta"} if meta else {}
    dtype, quantised = getattr(torch, spec.dtype), spec.quantize != "none" and not meta
    loader: Any = AutoModel if mean_pooled else AutoModelForCausalLM
    if spec.kind == "classification" and not mean_pooled:
        loader = AutoModelForSequenceClassification
        options |= {"num_labels": spec.labels, "pad_token_id": spec.pad_id}
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(0, "missing weights"))
        load = partial(
            loader.from_pretrained,
            spec.path,
            # As saved, weights are not read before they are quantised, each layer's by itself.
            dtype="auto" if quantised else dtype,
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
        mismatched = {key for key, saved, _ in found["mismatched_keys"] if saved_form != "4bit" or saved[-1] != 1}
        missing = {*found["missing_keys"], *mismatched}
        if mean_pooled:
            with torch.device("meta" if meta else "cpu"):
                model = MeanPooledClassifier(model, spec.labels)
            # Read out by the mean, the encoder's pooler is not used.
            missing = {f"encoder.{key}" for key in missing if "pooler" not in key.split(".")}
    heads = [] if spec.kind == "causal-lm" else head_names(model, missing)
    lacking = sorted(key for key in missing if not _belongs_to_head(model, key, heads))
    if lacking:
        raise ValueError(
            f"its files lack {', '.join(lacking[:3])}, or hold it in another size; it would be random and is not part "
            "of the adapter: take a model that was saved whole"
        )
    if quantised:
        quantise_layers(model, spec.quantize, dtype, heads, spec.device)
    module = with_head(model, heads)
    for layer in list(head_layers(module).values())[-1:]:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for quantised_layer in filter(is_quantised, module.modules()):
        multiply_plainly(quantised_layer, dtype)  # also those of a model that was saved so
    if spec.checkpointed:
        run_again(module)
    module.eval().requires_grad_(False)
    return module if meta else module.to(spec.device)


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
    """Names of the linear layers to adapt: `all-linear`, or those whose name a regular expression fully matches.

    Never adapted: the head, the output embedding, under mean pooling the pooler, which is not used, and `UNBATCHED`.
    Raises ValueError where nothing matches, with some names that would.
    """
    unbatched = unbatched_layers(model, targets)
    linear = [
        name
        for name in linear_layers(model)
        if name not in unbatched and not (isinstance(model, MeanPooledClassifier) and "pooler" in name.split("."))
    ]
    chosen = linear if targets == "all-linear" else [name for name in linear if re.fullmatch(targets, name)]
    if not chosen and unbatched:
        raise ValueError(
            f"it matches {', '.join(unbatched[:3])} alone, which cannot be adapted: they also meet an input without a "
            "batch axis; match others too"
        )
    if not chosen:
        raise ValueError(
            f"no linear layer's name is matched by {targets!r}; names are like {', '.join(linear[:3]) or '(none)'}"
        )
    return chosen


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
        if isinstance(module, nn.Linear)
        and name.split(".")[-1] in parts
        and (targets == "all-linear" or re.fullmatch(targets, name))
    ]


class TrainableModel:
    """A base whose trained tensors have names, initial values, and copies for a cohort.

    Names are PEFT's: `base_model.model.<module>.core_C` for factors, `base_model.model.<head>.weight` for the head.
    """

    def __init__(
        self, base: nn.Module, spec: ModelSpec, core: CoreConfig | None, carry: Mapping[str, Factors] | None = None
    ) -> None:
        """carry: by layer the pair of an adapter that training starts from: version 0 of the carried term."""
        self.heads = list(head_layers(base))
        if core is not None:
            with warnings.catch_warnings():
                # PEFT asks transformers for a property that transformers is about to rename: no user's concern.
                warnings.simplefilter("ignore", FutureWarning)
                get_peft_model(base, core)  # wraps the layers of `base` in place
        self.module, self.spec, self.core = base.requires_grad_(False), spec, core
        self._first = {name: self.parameter(name).detach().clone() for name in self.personal}
        self.carry(Carry.start(carry or {}))

    @cached_property
    def trained(self) -> dict[str, tuple[str, str]]:
        """Trained tensor -> (module's name, the name under which that module takes its copies), sorted by tensor."""
        found: dict[str, tuple[str, str]] = {
            f"base_model.model.{name}.core_{factor}": (name, factor)
            for name, layer in factored_layers(self.module).items()
            for factor in TRAINABLE
            if "default" in getattr(layer, f"core_{factor}")
        }
        for name in self.heads:
            for part in ("weight", "bias"):
                if getattr(self.module.get_submodule(name), part) is not None:
                    found[f"base_model.model.{name}.{part}"] = (name, part)
        return dict(sorted(found.items()))

    @cached_property
    def matrices(self) -> frozenset[str]:
        """The trained tensors that are whole matrices of a layer."""
        return frozenset(name for name, (module, part) in self.trained.items() if part == "D")

    @cached_property
    def published(self) -> list[str]:
        """The trained tensors that travel; a core's scales stay on the client, and its personal factors."""
        own = set(self.personal)
        return [name for name, where in self.trained.items() if where[1] != "S" and name not in own]

    @cached_property
    def personal(self) -> list[str]:
        """The trained tensors that stay with the client, who goes on with them in its next round."""
        parts: frozenset[str] = frozenset() if self.core is None else self.core.row.personal
        return [name for name, (module, part) in self.trained.items() if module not in self.heads and part in parts]

    def moving(self, server_round: int) -> frozenset[str]:
        """The trained tensors that move in a round, counted from 1; what of them is published is sent."""
        factors = () if self.core is None else self.core.row.moving(server_round)
        parts = {*factors, "S"} if "C" in factors else set(factors)
        return frozenset(name for name, (module, part) in self.trained.items() if module in self.heads or part in parts)

    def publish(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """What leaves the client of some of its trained tensors, by name."""
        return {name: value for name, value in self._settled(tensors).items() if name not in self.personal}

    def keep(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """What of some of its trained tensors stays with the client for its next round, by name."""
        return {name: value for name, value in self._settled(tensors).items() if name in self.personal}

    def _settled(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """At the end of a round: a core's scales are multiplied into it."""
        if not tensors:
            return {}
        sent: Tensors = {}
        for module, parts in self.as_copies(tensors).items():
            layer = self.module.get_submodule(module)
            if isinstance(layer, FactoredLayer) and "C" in parts:
                parts = {**parts, **layer.core["default"].publish(parts)}
            sent |= {self._names[module, part]: value for part, value in parts.items() if part != "S"}
        return dict(sorted(sent.items()))

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        return {where: name for name, where in self.trained.items()}

    @cached_property
    def head_names(self) -> frozenset[str]:
        """The trained tensors that belong to the classification head."""
        return frozenset(tensor for tensor, (module, _) in self.trained.items() if module in self.heads)

    def parameter(self, tensor: str) -> torch.Tensor:
        """The tensor that training moves, itself."""
        module, part = self.trained[tensor]
        layer = self.module.get_submodule(module)
        if module in self.heads:
            parameter: torch.Tensor = getattr(layer, part)
        else:
            parameter = getattr(layer, f"core_{part}")["default"]
        return parameter

    def values(self) -> Tensors:
        """The published tensors as they are now, cloned, float32."""
        return self.publish({name: self.parameter(name).detach().clone() for name in self.trained})

    def sizes(self) -> dict[str, int]:
        """How many numbers a client trains, by tensor: what travels, and what stays with it."""
        return {name: self.parameter(name).numel() for name in sorted([*self.published, *self.personal])}

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write the published tensors, or leading blocks of them among zeros, and a client's personal ones, if given.

        Scales start again. Personal tensors that are not given are as before any training. Raises KeyError for a
        published one that is missing.
        """
        with torch.no_grad():
            for name, value in self.start(values).items():
                parameter = self.parameter(name)
                if parameter.shape != value.shape:
                    parameter.zero_()
                parameter[tuple(slice(size) for size in value.shape)] = value

    def start(self, values: Mapping[str, torch.Tensor]) -> Tensors:
        """The trained tensors at the start of a round: the published ones, the client's own, and scales of one."""
        sent = set(self.published)
        own = {name: values.get(name, first).cpu() for name, first in self._first.items()}
        return {
            name: values[name] if name in sent else own[name] if name in own else torch.ones(self.parameter(name).shape)
            for name in self.trained
        }

    def carry(self, carry: Carry) -> None:
        """Let the layers carry these terms, and no others. Raises KeyError for a layer that is not adapted."""
        self.carried = carry
        layers = factored_layers(self.module)
        for name, term in carry.terms.items():
            layers[name].add_carry("default", *term.tensors())

    def as_copies(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Trained tensors with copies axes, arranged for `adapters.copies`."""
        arranged: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            module, part = self.trained[name]
            arranged.setdefault(module, {})[part] = tensor
        return arranged

    def logits(self, batch: Batch) -> torch.Tensor:
        """(rows, labels) of a classifier, (rows, length, vocabulary) of a language model; float32."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        output = self.module(**inputs) if self.spec.kind == "classification" else self.module(**inputs, use_cache=False)
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits.float()

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return next(self.module.parameters()).device

    @cached_property
    def takes_ragged(self) -> bool:
        """Whether the model takes packed sequences."""
        # Run again in backward, attention would no longer be told of the packed sequences.
        known = self.spec.code is None and not self.spec.checkpointed
        known = known and getattr(self.module.config, "model_type", "") in RAGGED
        return known and isinstance(self.module, MeanPooledClassifier) and not self.matrices

    @cached_property
    def prefix(self) -> FrozenPrefix | None:
        """The blocks below all that is trained, where packed sequences are taken and there are any."""
        return FrozenPrefix.of(cast(MeanPooledClassifier, self.module).encoder) if self.takes_ragged else None

    def ragged_logits(self, batch: Ragged, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, labels), float32; inside `adapters.packed`. hidden: what `prefix` made of the batch, if it did."""
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        model = cast(MeanPooledClassifier, self.module)
        with attending(model.encoder, batch.attendance):
            if hidden is None or self.prefix is None:
                return model.ragged(batch.averages, **inputs)
            return model.pooled(batch.averages, self.prefix.above(hidden))

    @cached_property
    def output(self) -> nn.Linear | None:
        """The layer that makes a language model's logits, where its loss can do without having all of them at once.

        To be asked for outside of `adapters.copies`: it is found by trying.
        """
        return plain_output(self.module) if self.spec.kind == "causal-lm" else None

    @property
    def held_logits(self) -> int:
        """The most numbers in the logits of a language model that exist at a time."""
        return 0 if self.spec.kind != "causal-lm" else LOGITS if self.output is None else CHUNK_LOGITS

    def pass_tokens(self, most: int) -> int:
        """At most so many padded tokens in one pass; fewer where a language model's logits would fill the memory."""
        if self.spec.kind != "causal-lm" or self.output is not None:
            return most
        vocabulary = int(getattr(self.module.config, "vocab_size", 0))
        return min(most, max(LOGITS // vocabulary, 1)) if vocabulary else most

    def losses(self, batch: Batch) -> torch.Tensor:
        """(rows,) the loss of each example: cross-entropy of its class, or the mean over its target tokens.

        A sequence's loss does not depend on its batch, so that examples weigh the same in any batch and any client.
        """
        if self.output is None:
            return example_losses(self.logits(batch), batch.labels)
        return sequence_losses(self._hidden(batch), batch.labels, self.output)

    def scored(self, batch: Batch, *, predict: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(`losses`, and where `predict` the likeliest class of each row, or token at each place with a target)."""
        if self.output is None:
            logits = self.logits(batch)
            return example_losses(logits, batch.labels), logits.argmax(-1) if predict else None
        hidden = self._hidden(batch)
        likeliest = predictions(hidden, batch.labels, self.output) if predict else None
        return sequence_losses(hidden, batch.labels, self.output), likeliest

    def _hidden(self, batch: Batch) -> torch.Tensor:
        return last_hidden(self.module, input_ids=batch.input_ids, attention_mask=batch.attention_mask)  # type: ignore[arg-type]


def example_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows,) cross-entropy; for token logits the mean over the tokens that are targets (0 where there is none)."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return tokens.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
