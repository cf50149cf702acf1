"""A frozen base with the few tensors that clients train: loading it, finding its layers, naming what moves."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedlotr.adapters.layer import CopiesLinear, FactoredLayer
from fedlotr.adapters.tuner import CoreConfig, factored_layers
from fedlotr.streams import stream_key
from fedlotr.training.examples import IGNORED, Batch

Kind = Literal["classification", "causal-lm"]
Tensors = dict[str, torch.Tensor]

HEADS = ("classifier", "score")
"""What transformers calls the module that turns features into class logits."""

ATTENTION = {"float32": "sdpa", "bfloat16": "eager"}
"""Named, since they differ in bits. In bfloat16 the backward of torch's fused attention took a third of a whole
training step of MiniLM on a CPU (in float32 a twentieth)."""


LOGITS = 2**26
"""Numbers in the logits of one pass of a language model: 256 MB in float32."""


@dataclass(frozen=True)
class ModelSpec:
    """What a worker needs to build the same base as everyone else.

    path: a local folder in the Hugging Face layout. labels: number of classes (0 for a language model).
    mean_pooled: a sentence encoder, read out by the mean of its token vectors. dtype: of the frozen base.
    """

    path: str
    kind: Kind
    labels: int
    mean_pooled: bool
    pad_id: int
    dtype: str = "float32"


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


def is_sentence_encoder(path: Path) -> bool:
    """Whether a folder is in the sentence-transformers layout with mean pooling."""
    pooling = path / "1_Pooling" / "config.json"
    if not pooling.is_file():
        return False
    found = json.loads(pooling.read_text(encoding="utf-8"))
    return bool(found.get("pooling_mode_mean_tokens") or found.get("pooling_mode") == "mean")


def load_base(spec: ModelSpec, *, meta: bool = False) -> nn.Module:
    """The frozen base in eval mode (no dropout), its weights memory-mapped from safetensors; the head is zero.

    meta: only the architecture, without weights, to look at its layers.
    Raises OSError or ValueError as transformers does where the folder holds no such model, and ValueError where
    weights other than the head's are missing.
    """
    # A progress bar per load and a warning about the new head would bury the run's own lines.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    mean_pooled = spec.kind == "classification" and spec.mean_pooled
    loader: Any = AutoModelForCausalLM if spec.kind == "causal-lm" else AutoModelForSequenceClassification
    options: dict[str, Any] = {"num_labels": spec.labels, "pad_token_id": spec.pad_id}
    if mean_pooled:
        loader = AutoModel
    if loader is not AutoModelForSequenceClassification:
        options = {}
    with torch.random.fork_rng(devices=[]):
        # Weights that the file lacks (a pooler, a head's first layer) are drawn alike in every process.
        torch.manual_seed(stream_key(0, "missing weights"))
        if meta:
            with torch.device("meta"):
                architecture = AutoConfig.from_pretrained(spec.path, **options)
                model = loader.from_config(architecture, attn_implementation=ATTENTION[spec.dtype])
                model = MeanPooledClassifier(model, spec.labels) if mean_pooled else model
        else:
            model, found = loader.from_pretrained(
                spec.path,
                dtype=getattr(torch, spec.dtype),
                attn_implementation=ATTENTION[spec.dtype],
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            drawn = sorted(key for key in found["missing_keys"] if key.split(".")[0] not in HEADS)
            if drawn and not mean_pooled:
                raise ValueError(
                    f"its files lack {', '.join(drawn[:3])}, which would be random and is not part of the adapter; "
                    "take a model that was saved whole"
                )
            model = MeanPooledClassifier(model, spec.labels) if mean_pooled else model
    module: nn.Module = model
    heads = head_layers(module)
    for name, layer in heads.items():
        layer.float()  # the head is trained: it stays in float32 whatever the base is
        if name == list(heads)[-1]:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module.eval().requires_grad_(False)


def head_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the classification head by name; the last one makes the logits. Empty without a head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in HEADS
    }


def adaptable_layers(model: nn.Module, targets: str) -> list[str]:
    """Names of the linear layers to adapt: `all-linear`, or those whose name a regular expression fully matches.

    Left out of all-linear: the head, the output embedding, and under mean pooling the pooler, which is not used.
    Raises ValueError where nothing matches, with some names that would.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.split(".")[0] not in HEADS
        and module is not output
        and not (isinstance(model, MeanPooledClassifier) and "pooler" in name.split("."))
    ]
    chosen = linear if targets == "all-linear" else [name for name in linear if re.fullmatch(targets, name)]
    if not chosen:
        raise ValueError(
            f"no linear layer's name is matched by {targets!r}; names are like {', '.join(linear[:3]) or '(none)'}"
        )
    return chosen


class TrainableModel:
    """A base whose trained tensors have names, initial values, and copies for a cohort.

    Names are PEFT's: `base_model.model.<module>.core_C` for factors, `base_model.model.<head>.weight` for the head.
    """

    def __init__(self, base: nn.Module, spec: ModelSpec, core: CoreConfig | None) -> None:
        for name, layer in head_layers(base).items():
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, CopiesLinear.around(layer))
        self.heads = list(head_layers(base))
        if core is not None:
            with warnings.catch_warnings():
                # PEFT asks transformers for a property that transformers is about to rename: no user's concern.
                warnings.simplefilter("ignore", FutureWarning)
                get_peft_model(base, core)  # wraps the layers of `base` in place
        self.module, self.spec, self.core = base.requires_grad_(False), spec, core

    @cached_property
    def trained(self) -> dict[str, tuple[str, str]]:
        """Trained tensor -> (module's name, the name under which that module takes its copies), sorted by tensor."""
        found: dict[str, tuple[str, str]] = {
            f"base_model.model.{name}.core_{factor}": (name, factor)
            for name, layer in factored_layers(self.module).items()
            for factor in "ABCS"
            if "default" in getattr(layer, f"core_{factor}")
        }
        for name in self.heads:
            for part in ("weight", "bias"):
                if getattr(self.module.get_submodule(name), part) is not None:
                    found[f"base_model.model.{name}.{part}"] = (name, part)
        return dict(sorted(found.items()))

    @cached_property
    def published(self) -> list[str]:
        """The trained tensors that travel; a core's scales stay on the client."""
        return [name for name, (module, part) in self.trained.items() if module in self.heads or part != "S"]

    def moving(self, server_round: int) -> frozenset[str]:
        """The trained tensors that move in a round, counted from 1; what of them is published is sent."""
        factors = () if self.core is None else self.core.row.moving(server_round)
        parts = {*factors, "S"} if "C" in factors else set(factors)
        return frozenset(name for name, (module, part) in self.trained.items() if module in self.heads or part in parts)

    def publish(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """What leaves the client of some of its trained tensors, by name."""
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

    def _parameter(self, tensor: str) -> torch.Tensor:
        module, part = self.trained[tensor]
        layer = self.module.get_submodule(module)
        if module in self.heads:
            parameter: torch.Tensor = getattr(layer, part)
        else:
            parameter = getattr(layer, f"core_{part}")["default"]
        return parameter

    def values(self) -> Tensors:
        """The published tensors as they are now, cloned, float32."""
        return self.publish({name: self._parameter(name).detach().clone() for name in self.trained})

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write the published tensors; scales start again. Raises KeyError for a missing one."""
        with torch.no_grad():
            for name, value in self.start(values).items():
                self._parameter(name).copy_(value)

    def start(self, values: Mapping[str, torch.Tensor]) -> Tensors:
        """The trained tensors at the start of a round: the published ones, and scales of one."""
        sent = set(self.published)
        return {name: values[name] if name in sent else torch.ones_like(self._parameter(name)) for name in self.trained}

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

    def pass_tokens(self, most: int) -> int:
        """At most so many padded tokens in one pass; fewer where a language model's logits would fill the memory."""
        vocabulary = getattr(self.module.config, "vocab_size", 0) if self.spec.kind == "causal-lm" else 0
        return min(most, max(LOGITS // int(vocabulary), 1)) if vocabulary else most

    def losses(self, batch: Batch) -> torch.Tensor:
        """(rows,) the loss of each example: cross-entropy of its class, or the mean over its target tokens.

        A sequence's loss does not depend on its batch, so that examples weigh the same in any batch and any client.
        """
        return example_losses(self.logits(batch), batch.labels)


def example_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows,) cross-entropy; for token logits the mean over the tokens that are targets (0 where there is none)."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return tokens.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
