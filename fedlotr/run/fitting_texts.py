"""Whether a model can take the texts at hand, and how much of them it sees."""

from collections.abc import Sequence

import numpy as np

from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import Encoded
from fedlotr.reporting.documents import TextShares, TextsSeen
from fedlotr.training.packing import Rows

MUCH = 0.1
"""The share of unknown or cut text from which on it is warned of."""


def what_is_seen(config: SimulationConfig, train: Encoded, parts: Sequence[Rows], test: Encoded) -> TextsSeen:
    """The shares of unknown tokens, cut rows and cut tokens: of all clients' rows, of the worst client's, and of test.

    parts: each client's examples of `train`. Where data are hidden, of test alone, which is public.
    """
    found: TextsSeen = {"max_length": config.longest, "left_out": {"test": test.left_out}, "test": _of(test)}
    if config.privacy == "none":
        found["left_out"] = {"train": train.left_out, "test": test.left_out}
        each = [_of(train, rows) for rows in parts]
        worst = max(range(len(each)), key=lambda client: max(_all_of(each[client])))
        found["train"] = _of(train, np.concatenate(parts))
        found["worst_client"] = {"client": worst, **each[worst]}
    return found


def _of(encoded: Encoded, rows: Rows | None = None) -> TextShares:
    shares = encoded.seen.shares(rows)
    found: TextShares = {"unknown": shares.unknown, "rows_cut": shares.rows_cut, "tokens_cut": shares.tokens_cut}
    if encoded.examples.causal:
        found["answers_cut"] = shares.answers_cut
    return found


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
    answers = {name: shares["answers_cut"] for name, shares in known.items() if shares.get("answers_cut")}
    # One row of a small client is much of it, so of a client alone it is tokens that count.
    much = max(*few.values(), *(rows[name] for name in rows if name in ("train", "test"))) > MUCH
    if much or answers:
        learnt = f"; {_all(answers)} lose the end of what is learnt" if answers else ""
        lines.append(
            f"--max-length {seen['max_length']} cuts {_all(rows)} of the rows, and with that {_all(few)} of the "
            f"tokens{learnt}: a larger one shows the model more, for more time and memory"
        )
    if any(seen["left_out"].values()):
        of = " and ".join(f"{count:,} of {split}" for split, count in seen["left_out"].items() if count)
        lines.append(f"rows left out, since --max-length {seen['max_length']} has no room for prompt and answer: {of}")
    return lines


def _words(shares: TextShares) -> str:
    unknown, rows, tokens = _all_of(shares)
    return f"{unknown:.1%} of the tokens unknown, {tokens:.1%} cut ({rows:.1%} of the rows)"


def _all(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.1%} (of {name})" for name, share in shares.items())
