"""Whether a model can take the texts at hand, and how much of them it sees."""

from collections.abc import Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import Seen, Shares, Source, Task, encode
from fedlotr.errors import InputError, shorten
from fedlotr.models.limits import known_tokens, tokens_beyond
from fedlotr.reporting.documents import TextShares, TextsSeen
from fedlotr.training.packing import Rows

MUCH = 0.1
"""The share of unknown or cut text from which on it is warned of."""


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
    for split, held in (("train", source.train), ("test", source.test)):
        examples = encode(task, held, tokenizer, config.max_length)
        found = np.flatnonzero(examples.tokens >= rows)
        if len(found):
            token = shorten(beyond.get(int(examples.tokens[found[0]]), str(examples.tokens[found[0]])))
            row = int(np.searchsorted(examples.offsets, found[0], side="right")) - 1
            where = "train" if split == "train" else source.test_split
            told = config.privacy == "none"
            of = f"{source.place(split, row)}: its token {token}" if told else f"{where}: some row's token"
            raise InputError(
                f"--model {config.model}: {of.removeprefix('--data: ')} has no embedding: the tokenizer has "
                f"{len(beyond):,} tokens beyond the model's {rows:,}; give the tokenizer that belongs to the model, or "
                "enlarge the model first (model.resize_token_embeddings(len(tokenizer))) and save it again"
            )


def what_is_seen(config: SimulationConfig, train: Seen, parts: Sequence[Rows], test: Seen) -> TextsSeen:
    """The shares of unknown tokens, cut rows and cut tokens: of all clients' rows, of the worst client's, and of test.

    parts: each client's rows of `train`. Where data are hidden, of test alone, which is public.
    """
    found: TextsSeen = {"max_length": config.max_length, "test": _of(test.shares())}
    if config.privacy == "none":
        each = [_of(train.shares(rows)) for rows in parts]
        worst = max(range(len(each)), key=lambda client: max(_all_of(each[client])))
        found["train"] = _of(train.shares(np.concatenate(parts)))
        found["worst_client"] = {"client": worst, **each[worst]}
    return found


def _of(shares: Shares) -> TextShares:
    return {"unknown": shares.unknown, "rows_cut": shares.rows_cut, "tokens_cut": shares.tokens_cut}


def _all_of(shares: TextShares) -> tuple[float, float, float]:
    return shares["unknown"], shares["rows_cut"], shares["tokens_cut"]


def seen_in_words(seen: TextsSeen) -> str:
    """One line."""
    words = f"train: {_words(seen['train'])}" if "train" in seen else f"test: {_words(seen['test'])}"
    if "worst_client" in seen:
        words += f"; worst client {seen['worst_client']['client']}: {_words(seen['worst_client'])}"
    return words


def unseen(seen: TextsSeen) -> list[str]:
    """Lines that warn of much text that the model cannot see."""
    lines = []
    known: dict[str, TextShares] = {"train": seen["train"]} if "train" in seen else {}
    if "worst_client" in seen:
        known[f"client {seen['worst_client']['client']}, the worst"] = seen["worst_client"]
    known["test"] = seen["test"]
    unknown = {name: shares["unknown"] for name, shares in known.items() if shares["unknown"] > MUCH}
    if unknown:
        lines.append(
            f"the tokenizer does not know {_all(unknown)} of the tokens, which the model cannot tell apart: take a "
            "model for this language or script"
        )
    few = {name: shares["tokens_cut"] for name, shares in known.items()}
    rows = {name: shares["rows_cut"] for name, shares in known.items()}
    # One row of a small client is much of it, so of a client alone it is tokens that count.
    if max(*few.values(), *(rows[name] for name in rows if name in ("train", "test"))) > MUCH:
        lines.append(
            f"--max-length {seen['max_length']} cuts {_all(rows)} of the rows, and with that {_all(few)} of the "
            "tokens: a larger one shows the model more, for more time and memory"
        )
    return lines


def _words(shares: TextShares) -> str:
    unknown, rows, tokens = _all_of(shares)
    return f"{unknown:.1%} of the tokens unknown, {tokens:.1%} cut ({rows:.1%} of the rows)"


def _all(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.1%} (of {name})" for name, share in shares.items())
