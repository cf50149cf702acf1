"""Whether a model takes packed sequences, found by trying: packed against one by one, on the frozen base itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.packed import Spans, packed
from fedlotr.training.examples import Examples
from fedlotr.training.varlen import Ragged
from fedlotr.training.varlen_attention import attending

LENGTHS = (9, 23, 1, 14, 9)
"""Tokens of the sequences that are tried: of several groups in attention, and some longer than `WINDOW`."""
WINDOW = 5
"""What a longer window is while a model is tried; shorter than most sequences, so that it is seen to be kept."""
WINDOWS = ("window", "local_attention", "chunk_size")
"""In the name of what says how far a token sees, in tokens, in a configuration or in an attention layer."""
HARDEST = 1024
"""Token ids that are tried are below this: any vocabulary's beginning."""


def keeps_apart(model: nn.Module, states: Callable[..., torch.Tensor]) -> bool:
    """Whether packed sequences have the states that each has alone, up to rounding, in a model without its adapters.

    states(model, **inputs): (rows, length, d). The same in every process: it depends on the frozen base alone. On the
    meta device, which has no values, a model whose attention is asked to keep sequences apart is taken at its word.
    """
    examples = _sequences(model)
    if examples is None:
        return False
    batch = Ragged.of(examples, np.arange(len(LENGTHS)))
    weight = next(model.parameters())
    batch = batch.to(weight.device)
    with torch.no_grad(), _bare(model), _short_windows(model):
        try:
            with packed(Spans([batch.tokens])), attending(model, batch.attendance):
                found = states(model, input_ids=batch.input_ids, position_ids=batch.position_ids)
            if not batch.attendance.asked or weight.is_meta:
                return batch.attendance.asked > 0
            each = torch.split(found[0], [*LENGTHS, batch.filler])
            for row, packed_states in zip(range(len(LENGTHS)), each, strict=False):
                alone = examples.batch([row]).to(weight.device)
                wanted = states(model, input_ids=alone.input_ids, attention_mask=alone.attention_mask)[0].float()
                # The root of a rounding: far above what roundings add up to, far below what another token changes.
                bound = torch.finfo(found.dtype).eps ** 0.5 * wanted.norm()
                if not (packed_states.float() - wanted).norm() <= bound:
                    return False
        except Exception:  # whatever a model of anyone's does not like about packed sequences, it is given padded rows
            return False
    return True


def _sequences(model: nn.Module) -> Examples | None:
    """Some sequences of random tokens; None for a model that does not read tokens."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    words = getattr(embedding, "num_embeddings", 0)
    if not words or not hasattr(model, "config"):
        return None
    offsets = np.cumsum([0, *LENGTHS])
    tokens = np.random.default_rng(0).integers(min(3, words - 1), min(words, HARDEST), offsets[-1])
    return Examples(tokens.astype(np.int32), offsets, np.ones(len(LENGTHS), np.int64), causal=True)


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The base alone: adapters may not be filled yet, and are another's in every process."""
    layers = [layer for layer in model.modules() if isinstance(layer, FactoredLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Windows that no sequence here would fill are shorter meanwhile, in the configuration and in the layers."""
    changed: list[tuple[dict[str, Any], str, int]] = []
    for holder in (vars(model.config), *(vars(module) for module in model.modules())):
        for name, value in holder.items():
            if any(word in name for word in WINDOWS) and type(value) is int and value > WINDOW:
                changed.append((holder, name, value))
    try:
        for holder, name, _ in changed:
            holder[name] = WINDOW
        yield
    finally:
        for holder, name, value in changed:
            holder[name] = value
