"""A frozen base with the few tensors that clients train: their names, what moves, what is published, losses."""

import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from peft import get_peft_model
from torch import nn

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.layer import TRAINABLE, FactoredLayer
from fedlotr.adapters.tuner import CoreConfig, factored_layers
from fedlotr.models.loading import MeanPooledClassifier, ModelSpec, head_layers
from fedlotr.training.examples import IGNORED, Batch
from fedlotr.training.frozen_prefix import FrozenPrefix
from fedlotr.training.token_losses import CHUNK_LOGITS, last_hidden, plain_output, predictions, sequence_losses
from fedlotr.training.varlen import Ragged, attending

Tensors = dict[str, torch.Tensor]

LOGITS = 2**26
"""Numbers in the logits of one pass of a language model whose loss needs all of them: 256 MB in float32."""
RAGGED = ("bert",)
"""Architectures whose encoder takes packed sequences: told each token's position, only its attention mixes tokens."""


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
        """Trained tensor -> (module's name, the name under which that module takes its copies), sorted by tensor.

        One that the layers of a tie share has the name of the first of them; see `shared`.
        """
        return {name: (modules[0], part) for name, (modules, part) in self._holders.items()}

    @cached_property
    def shared(self) -> dict[str, list[str]]:
        """Trained tensor -> all modules that compute with it."""
        return {name: modules for name, (modules, _) in self._holders.items()}

    @cached_property
    def _holders(self) -> dict[str, tuple[list[str], str]]:
        found: dict[str, tuple[list[str], str]] = {}
        names: dict[int, str] = {}
        for module, layer in factored_layers(self.module).items():
            for factor in TRAINABLE:
                if "default" in (parameters := getattr(layer, f"core_{factor}")):
                    name = names.setdefault(id(parameters["default"]), f"base_model.model.{module}.core_{factor}")
                    found.setdefault(name, ([], factor))[0].append(module)
        for module in self.heads:
            for part in ("weight", "bias"):
                if getattr(self.module.get_submodule(module), part) is not None:
                    found[f"base_model.model.{module}.{part}"] = ([module], part)
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
            sent |= {self.names[module, part]: value for part, value in parts.items() if part != "S"}
        return dict(sorted(sent.items()))

    @cached_property
    def names(self) -> dict[tuple[str, str], str]:
        """(module's name, the name of a copy there) -> the trained tensor; of a tie, every layer's."""
        return {(module, part): name for name, (modules, part) in self._holders.items() for module in modules}

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
        for name in layers.keys() - carry.terms.keys():
            layers[name].drop_carry("default")
        for name, term in carry.terms.items():
            layers[name].add_carry("default", *term.tensors())

    def as_copies(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Trained tensors with copies axes, arranged for `adapters.copies`."""
        arranged: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            for module in self.shared[name]:
                arranged.setdefault(module, {})[self.trained[name][1]] = tensor
        return arranged

    def logits(self, batch: Batch) -> torch.Tensor:
        """(rows, labels) of a classifier, (rows, length, vocabulary) of a language model; float32."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        output = self.module(**inputs) if self.spec.headed else self.module(**inputs, use_cache=False)
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
        return None if self.spec.headed else plain_output(self.module)

    @property
    def held_logits(self) -> int:
        """The most numbers in the logits of a language model that exist at a time."""
        return 0 if self.spec.headed else LOGITS if self.output is None else CHUNK_LOGITS

    def pass_tokens(self, most: int) -> int:
        """At most so many padded tokens in one pass; fewer where a language model's logits would fill the memory."""
        if self.spec.headed or self.output is not None:
            return most
        vocabulary = int(getattr(self.module.config, "vocab_size", 0))
        return min(most, max(LOGITS // vocabulary, 1)) if vocabulary else most

    def losses(self, batch: Batch) -> torch.Tensor:
        """(rows,) the loss of each example, as `example_losses` has it.

        A sequence's loss does not depend on its batch, so that examples weigh the same in any batch and any client.
        """
        if self.output is None:
            return example_losses(self.logits(batch), batch.labels)
        return sequence_losses(self._hidden(batch), batch.labels, self.output)

    def scored(self, batch: Batch, *, predict: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(`losses`, and where `predict` what is `predicted` of each row, or of each place with a target)."""
        if self.output is None:
            logits = self.logits(batch)
            return example_losses(logits, batch.labels), predicted(logits, batch.labels) if predict else None
        hidden = self._hidden(batch)
        likeliest = predictions(hidden, batch.labels, self.output) if predict else None
        return sequence_losses(hidden, batch.labels, self.output), likeliest

    def _hidden(self, batch: Batch) -> torch.Tensor:
        return last_hidden(self.module, input_ids=batch.input_ids, attention_mask=batch.attention_mask)  # type: ignore[arg-type]


def example_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows,) cross-entropy; for token logits the mean over the tokens that are targets (0 where there is none).

    Where labels are no indices but numbers on a scale: (logit - label)², in the model's own unit.
    """
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1), labels.to(logits.dtype), reduction="none")
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return tokens.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest class or token; where labels are numbers on a scale the number, in the model's own unit."""
    return logits.squeeze(1) if labels.is_floating_point() else logits.argmax(-1)
