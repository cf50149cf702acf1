"""A frozen base with the few tensors that clients train: their names, what moves, what is published, losses."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from peft import get_peft_model
from torch import nn

from fedlotr.adapters.bases import Factors, stacked
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.layer import TRAINABLE, FactoredLayer
from fedlotr.adapters.packed import Spans, packed
from fedlotr.adapters.tuner import CoreConfig, factored_layers
from fedlotr.models.loading import MeanPooledClassifier, ModelSpec, head_layers
from fedlotr.training.examples import IGNORED, Batch, Examples
from fedlotr.training.frozen_prefix import FrozenPrefix
from fedlotr.training.packing import Rows
from fedlotr.training.readout import head_logits, trunk_of, trunk_states
from fedlotr.training.token_losses import CHUNK_LOGITS, last_hidden, plain_output, predictions, target_losses
from fedlotr.training.varlen import Ragged, Reading
from fedlotr.training.varlen_attention import attending
from fedlotr.training.varlen_trial import reading_of

Tensors = dict[str, torch.Tensor]

LOGITS = 2**26
"""Numbers in the logits of one pass of a language model whose loss needs all of them: 256 MB in float32."""


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
        carry = dict(carry or {})
        if core is not None and core.row.residual:
            for name, layer in factored_layers(self.module).items():
                taken_off = layer.taken_off("default")
                carry[name] = stacked(carry[name], taken_off) if name in carry else taken_off
        self.carry(Carry.start(carry))

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
        """Let the layers carry these terms, and no others; where bases move, between those that go with them.

        Raises KeyError for a layer that is not adapted.
        """
        self.carried = carry
        layers = factored_layers(self.module)
        for name, pair in carry.bases.items():
            basis = layers[name].basis("default")
            assert basis is not None
            basis.A.copy_(pair.A)
            basis.B[:, : pair.B.shape[1]].copy_(pair.B)  # none of a B that is trained
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

    def logits(self, batch: Batch | Ragged, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, labels) of a classifier, (rows, length, vocabulary) of a language model; float32.

        hidden: what `prefix` made of a packed batch, if it did.
        """
        inputs = _inputs(batch)
        if isinstance(batch, Ragged) and self.spec.headed:
            if hidden is None or self.prefix is None:
                states = trunk_states(trunk_of(self.module), **inputs)
            else:
                states = self.prefix.above(hidden)
            return head_logits(self.module, states, batch).float()
        output = self.module(**inputs) if self.spec.headed else self.module(**inputs, use_cache=False)
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits.float()

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return next(self.module.parameters()).device

    @cached_property
    def reading(self) -> Reading | None:
        """How the model is shown packed sequences; None where it does not take them: tried, on its frozen base.

        To be asked for outside of `adapters.copies`, and of `adapters.packed`.
        """
        # Where a GPU's blocks run again, they do so in a thread of their own, which is not told of packed sequences.
        if self.matrices or (self.spec.checkpointed and self.device.type != "cpu"):
            return None
        whole = not self.spec.headed and self.output is None
        return reading_of(self.module, self.spec.pad_id, headed=self.spec.headed, whole=whole)

    @cached_property
    def takes_ragged(self) -> bool:
        """Whether the model takes packed sequences; to be asked for where `reading` is."""
        return self.reading is not None

    @property
    def branches(self) -> bool:
        """Whether packed sequences may share their beginning; to be asked for where `reading` is."""
        return self.reading is not None and self.reading.branches

    def ragged(self, examples: Examples, rows: Rows, families: Sequence[int] | None = None) -> Ragged:
        """The given examples, packed, as the model reads them, where it is; for a model that takes them.

        families: as `Ragged.of` has it.
        """
        assert self.reading is not None
        return Ragged.of(examples, rows, self.reading, families).to(self.device)

    @cached_property
    def prefix(self) -> FrozenPrefix | None:
        """The blocks below all that is trained, where packed sequences are taken and there are any."""
        if self.reading is None or not isinstance(self.module, MeanPooledClassifier):
            return None
        return FrozenPrefix.of(self.module.encoder, self.reading)

    @contextmanager
    def taking(self, batch: Ragged, owner: Rows | None = None) -> Iterator[None]:
        """Let the model take these packed sequences, forward and backward.

        owner: which copy of what is trained each sequence meets, in order; None: one copy, or none, meets all.
        """
        with packed(Spans(batch.counts(owner))), attending(self.module, batch.attendance):
            yield

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

    def losses(self, batch: Batch | Ragged, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """(rows,) the loss of each example: of its label (`example_losses`), or the mean over its target tokens.

        A sequence's loss does not depend on its batch, so that examples weigh the same in any batch and any client.
        """
        return self.scored(batch, hidden, predict=False)[0]

    def scored(
        self, batch: Batch | Ragged, hidden: torch.Tensor | None = None, *, predict: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(`losses`, and where `predict` what is `predicted` of each row, or the likeliest token where a target is)."""
        labels = batch.labels
        if self.output is None:
            logits = self.logits(batch, hidden)
            losses, found = example_losses(logits, labels), predicted(logits, labels) if predict else None
        else:
            states = last_hidden(self.module, **_inputs(batch))  # type: ignore[arg-type]
            losses = target_losses(states, labels, self.output)
            found = predictions(states, labels, self.output) if predict else None
        if labels.dim() == 2:
            losses = batch.sums(losses) / batch.sums(labels != IGNORED).clamp(min=1)
        return losses, found


def _inputs(batch: Batch | Ragged) -> Tensors:
    """What a model is shown of a batch, by the names that it has for it."""
    if isinstance(batch, Ragged):
        inputs = {"position_ids": batch.position_ids}
    else:
        inputs = {"attention_mask": batch.attention_mask}
    if batch.token_type_ids is not None:
        inputs["token_type_ids"] = batch.token_type_ids
    return {"input_ids": batch.input_ids, **inputs}


def example_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the labels' shape: cross-entropy; of a token that is no target 0.

    Where labels are no indices but numbers on a scale: (logit - label)², in the model's own unit.
    """
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1), labels.to(logits.dtype), reduction="none")
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return each.view(labels.shape)


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest class or token; where labels are numbers on a scale the number, in the model's own unit."""
    return logits.squeeze(1) if labels.is_floating_point() else logits.argmax(-1)
