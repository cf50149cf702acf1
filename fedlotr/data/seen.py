"""How much of the texts a model sees: what its tokenizer does not know, and what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shares:
    """unknown: of the tokens that are seen, those that stand for what the tokenizer does not know. rows_cut,
    tokens_cut: of all rows, and of all their tokens, what is beyond the length that is taken. answers_cut: of all rows,
    those that lose some of what a language model would learn."""

    unknown: float
    rows_cut: float
    tokens_cut: float
    answers_cut: float = 0.0


@dataclass(frozen=True)
class Seen:
    """Counts of each row: its tokens that are seen, special ones left out; those of them unknown; those that are cut.

    A text of which no token is left counts as one that is unknown. answers: of those that are cut, the ones that would
    be learnt (None: there are no such).
    """

    tokens: Counts
    unknown: Counts
    cut: Counts
    answers: Counts | None = None

    def shares(self, rows: Counts | None = None) -> Shares:
        """Of these rows, or of all."""
        answers = np.zeros_like(self.cut) if self.answers is None else self.answers
        tokens, unknown, cut, answers = (
            counts if rows is None else counts[rows] for counts in (self.tokens, self.unknown, self.cut, answers)
        )
        seen, lost = int(tokens.sum()), int(cut.sum())
        return Shares(
            unknown=int(unknown.sum()) / max(1, seen),
            rows_cut=float((cut > 0).mean()) if len(cut) else 0.0,
            tokens_cut=lost / max(1, seen + lost),
            answers_cut=float((answers > 0).mean()) if len(answers) else 0.0,
        )


def look(
    tokens: Sequence[Sequence[int]],
    cut: Sequence[int],
    empty: Sequence[bool],
    texts: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
) -> Seen:
    """What is seen of rows. tokens: as they are taken. cut: how many more there were. empty: whether those are
    fillers alone. texts: by column.
    """
    unknown_id = tokenizer.unk_token_id
    framing = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    if unknown_id in framing:  # byte by byte everything is known
        unknown_id = None
    special = np.array([index for index in tokenizer.all_special_ids if index != unknown_id], np.int64)
    flat = np.fromiter((token for row in tokens for token in row), np.int64)
    starts = np.cumsum([0, *map(len, tokens)])
    held = _sums(~np.isin(flat, special), starts)
    unknown = _sums(flat == (-1 if unknown_id is None else unknown_id), starts)
    visible = np.array([any(text.strip() for text in row) for row in zip(*texts, strict=True)], bool)
    nothing = (held - unknown == 0) | np.array(empty, bool)
    held = np.where(nothing, np.where(visible, np.where(empty, 1, np.maximum(held, 1)), 0), held)
    unknown = np.where(nothing, held, unknown)
    return Seen(held, unknown, np.array(cut, np.int64))


def _sums(flags: npt.NDArray[np.bool_], starts: Counts) -> Counts:
    """Of each row."""
    sums: Counts = np.diff(np.concatenate([[0], np.cumsum(flags)])[starts])
    return sums
