"""From the last hidden states of packed sequences to their logits: a classification head sees one vector of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from fedlotr.adapters.packed import Spans, current_spans, packed
from fedlotr.models.loading import MeanPooledClassifier
from fedlotr.training.varlen import Ragged


def trunk_of(model: nn.Module) -> nn.Module:
    """The part of a model that makes its last hidden states; itself, where that is not told apart."""
    if isinstance(model, MeanPooledClassifier):
        return model.encoder
    return model.base_model if isinstance(model, PreTrainedModel) else model


def trunk_states(trunk: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """(rows, length, d) the last hidden states, without what pools them, or keeps them for generation."""
    parts: dict[str, Any] = trunk._modules
    pooler = parts.get("pooler")
    if pooler is not None:
        parts["pooler"] = None  # as a model has it that was built without one
    uncached: dict[str, Any] = {"use_cache": False} if "use_cache" in signature(trunk.forward).parameters else {}
    try:
        found: torch.Tensor = trunk(**inputs, **uncached).last_hidden_state
    finally:
        if pooler is not None:
            parts["pooler"] = pooler
    return found


def head_logits(model: nn.Module, hidden: torch.Tensor, batch: Ragged) -> torch.Tensor:
    """(rows, labels) of what the trunk of a model with a head made of packed sequences: (1, tokens, d).

    The model's own forward, of rows of one token each, around a trunk that has their states already.
    """
    vectors = batch.vectors(hidden)
    if isinstance(model, MeanPooledClassifier):
        mean_pooled: torch.Tensor = model.classifier(vectors)
        return mean_pooled
    ids = batch.input_ids.new_full((len(vectors), 1), 0)
    with packed(Spans(_rows_of(current_spans(), batch))), _standing_in(trunk_of(model), vectors.to(hidden.dtype)):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


def _rows_of(spans: Spans | None, batch: Ragged) -> list[int]:
    """How many sequences in a row meet each copy, by how many tokens do."""
    assert spans is not None
    ends = np.searchsorted(np.cumsum(batch.lengths), np.cumsum(spans.counts), side="right")
    counts: list[int] = np.diff(ends, prepend=0).tolist()
    return counts


@contextmanager
def _standing_in(trunk: nn.Module, vectors: torch.Tensor) -> Iterator[None]:
    """Have a trunk give these vectors (rows, d) as the states of rows of one token, and what its pooler makes of them.

    Raises TypeError where the trunk is the whole model, whose head is not told apart.
    """
    states = vectors.unsqueeze(1)

    def forward(*_: Any, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        pooler = getattr(trunk, "pooler", None)
        pooled = None if pooler is None else pooler(states)
        if pooled is not None and pooled.dim() == 3:  # ALBERT's, a layer and a function
            pooled = getattr(trunk, "pooler_activation", nn.Identity())(pooled[:, 0])
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=pooled)

    before = trunk.__dict__.get("forward")
    trunk.forward = forward
    try:
        yield
    finally:
        if before is None:
            del trunk.forward
        else:
            trunk.forward = before
