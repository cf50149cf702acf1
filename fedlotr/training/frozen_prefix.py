"""The blocks of a mean-pooled BERT below the first adapted layer run once an example, whatever trains above them."""

from collections.abc import Sequence

import torch
from torch import nn

from fedlotr.adapters.layer import FactoredLayer
from fedlotr.training.examples import Examples
from fedlotr.training.packing import PASS_TOKENS, Rows, runs
from fedlotr.training.varlen import Ragged, Reading
from fedlotr.training.varlen_attention import attending

KEPT_BYTES = 2**28
"""Hidden states that a process keeps; a cohort whose own are more is trained without."""
FULL_PASS = 512
"""Tokens of a cohort's average client from which on a pass over each client alone pays; one of fewer takes longer than
its share of a pass over many clients, which a client that is trained once would not earn back."""


class FrozenPrefix:
    """The first blocks of a BERT and its embeddings, for packed sequences.

    An example's hidden states always come of the same passes, over the examples of its client. So they have the same
    bits in any worker, whatever that has seen before.
    """

    def __init__(self, encoder: nn.Module, reading: Reading, depth: int) -> None:
        """depth: how many blocks have nothing in them that is trained."""
        self.encoder, self.reading, self.depth = encoder, reading, depth
        self._examples: Examples | None = None
        self._kept: dict[int, torch.Tensor] = {}  # by row (length, hidden size)
        self._used = False  # by the present cohort, which decides by its own clients alone

    @classmethod
    def of(cls, encoder: nn.Module, reading: Reading) -> "FrozenPrefix | None":
        """None where the first block is adapted already, or where there is more in the encoder than a BERT's parts."""
        parts = dict(encoder.named_children())
        inner = [name for name, _ in parts["encoder"].named_children()] if "encoder" in parts else []
        if inner != ["layer"] or parts.keys() - {"embeddings", "encoder", "pooler"}:
            return None
        adapted = [any(isinstance(part, FactoredLayer) for part in block.modules()) for block in _blocks(encoder)]
        depth = [*adapted, True].index(True)
        return cls(encoder, reading, depth) if depth else None

    def begin(self, examples: Examples, clients: Sequence[Rows]) -> None:
        """Have the hidden states of a cohort's examples, if that pays; clients: all that each holds, or nobody."""
        tokens = sum(int(examples.lengths[rows].sum()) for rows in clients)
        weight = next(self.encoder.parameters())
        each = int(self.encoder.config.hidden_size) * weight.element_size()  # type: ignore[union-attr,arg-type]
        self._used = tokens >= FULL_PASS * max(len(clients), 1) and each * tokens <= KEPT_BYTES
        if not self._used:
            return
        if self._examples is not examples:
            self._examples, self._kept = examples, {}
        room = KEPT_BYTES - sum(each * len(states) for states in self._kept.values())
        wanted = [rows for rows in clients if len(rows) and int(rows[0]) not in self._kept]
        if each * sum(int(examples.lengths[rows].sum()) for rows in wanted) > room:
            self._kept, wanted = {}, list(clients)
        for rows in wanted:
            for run in runs(examples.lengths[rows], PASS_TOKENS) if len(rows) else ():
                batch = Ragged.of(examples, rows[run], self.reading).to(weight.device)
                lengths = [*examples.lengths[rows[run]].tolist(), batch.filler]
                states = torch.split(self._computed(batch)[0], lengths)
                self._kept |= {int(row): part for row, part in zip(rows[run], states[:-1], strict=True)}

    def states(self, examples: Examples, rows: Rows, filler: int) -> torch.Tensor | None:
        """(1, tokens, hidden size) of these examples end to end, and zeros behind; None where the cohort has none."""
        if not self._used or self._examples is not examples or not all(int(row) in self._kept for row in rows):
            return None
        parts = [self._kept[int(row)] for row in rows]
        return torch.cat([*parts, parts[0].new_zeros(filler, parts[0].shape[1])]).unsqueeze(0)

    def above(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the other blocks make of it; inside `attending`."""
        for block in _blocks(self.encoder)[self.depth :]:
            hidden = block(hidden)
        return hidden

    @torch.no_grad()
    def _computed(self, batch: Ragged) -> torch.Tensor:
        with attending(self.encoder, batch.attendance):
            hidden: torch.Tensor = self.encoder.get_submodule("embeddings")(
                input_ids=batch.input_ids, position_ids=batch.position_ids, token_type_ids=batch.token_type_ids
            )
            for block in _blocks(self.encoder)[: self.depth]:
                hidden = block(hidden)
        return hidden


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    return list(encoder.get_submodule("encoder.layer").children())
