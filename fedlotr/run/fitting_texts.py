"""Whether a model can take the texts at hand: the ids of their tokens."""

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import Source, Task, encode
from fedlotr.errors import InputError, shorten
from fedlotr.models.limits import known_tokens, tokens_beyond


def check_tokens(
    config: SimulationConfig, source: Source, task: Task, tokenizer: PreTrainedTokenizerBase, model: nn.Module
) -> None:
    """Raise InputError where a text has a token that the model has no embedding for.

    Tokens that no text has do no harm, such as an image's. Texts are looked at only where the tokenizer has such a one.
    """
    rows = known_tokens(model)
    beyond = {} if rows is None else tokens_beyond(tokenizer, rows)
    if rows is None or not beyond:
        return
    for where, held in (("train", source.train), (source.test_split, source.test)):
        examples = encode(task, held, tokenizer, config.max_length)
        found = np.flatnonzero(examples.tokens >= rows)
        if len(found):
            token = shorten(beyond.get(int(examples.tokens[found[0]]), str(examples.tokens[found[0]])))
            row = int(np.searchsorted(examples.offsets, found[0], side="right"))
            of = f"{where}, row {row}: its token {token}" if config.privacy == "none" else f"{where}: some row's token"
            raise InputError(
                f"--model {config.model}: {of} has no embedding: the tokenizer has {len(beyond):,} tokens beyond the "
                f"model's {rows:,}; give the tokenizer that belongs to the model, or enlarge the model first "
                "(model.resize_token_embeddings(len(tokenizer))) and save it again"
            )
