"""What a model can take: how many positions it has, and which token ids; told by looking at its tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedlotr.models.loading import MeanPooledClassifier, reads_no_text

POSITIONS = ("position_embeddings", "embed_positions", "position_embedding", "positions_embed", "wpe")
"""What modules with a vector for each position are called."""
COUNTED = "create_position_ids_from_input_ids"
"""The function of RoBERTa and its kin that counts positions from behind the padding id on."""


def most_positions(model: nn.Module) -> int | None:
    """The longest text, in tokens, that the tables of positions have room for; None where there is no table."""
    return min((rows - offset - first for rows, offset, first in _tables(model)), default=None)


def first_positions(model: nn.Module) -> list[int]:
    """What the position of a text's first token may be: 0, or where positions are counted from behind padding."""
    return sorted({0, *(first for _, _, first in _tables(model))})


def _tables(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Of each table of positions its rows, how many it leaves out by itself, and the first position, without those."""
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        table = getattr(module, "weight", None)
        if leaf not in POSITIONS or table is None or table.dim() != 2 or reads_no_text(name):
            continue
        offset = int(getattr(module, "offset", 0) or 0)  # OPT and its kin
        padding = getattr(module, "padding_idx", None)
        above = model.get_submodule(parent)
        if padding is None and (hasattr(above, COUNTED) or hasattr(sys.modules[type(above).__module__], COUNTED)):
            padding = getattr(above, "padding_idx", None)
        yield table.shape[0], offset, 0 if padding is None or offset else int(padding) + 1


def known_tokens(model: nn.Module) -> int | None:
    """The number of token ids that a model has an embedding for; None where it does not tell."""
    try:
        inner: Any = model.encoder if isinstance(model, MeanPooledClassifier) else model
        table = inner.get_input_embeddings().weight
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return int(table.shape[0])


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[int, str]:
    """The tokens of a tokenizer whose ids are none of the first `rows`."""
    return {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
