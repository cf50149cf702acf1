"""The model on held-out examples: sums that add up over shards, whatever process computed each."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from fedlotr.training.cohort import Rows, pack
from fedlotr.training.examples import IGNORED, Examples
from fedlotr.training.models import TrainableModel, example_losses
from fedlotr.training.results import Results

EVALUATION_TOKENS = 4096
"""Padded tokens in one forward: no activations are kept, so passes may be larger than in training."""


@dataclass(frozen=True)
class Scores:
    """Sums over some examples. units: examples of a classifier, target tokens of a language model."""

    loss: float = 0.0
    units: int = 0
    correct: int = 0

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(self.loss + other.loss, self.units + other.units, self.correct + other.correct)

    @property
    def mean_loss(self) -> float:
        """Nats an example (classifier) or a token (language model)."""
        return self.loss / max(self.units, 1)

    @property
    def accuracy(self) -> float:
        """Share of examples classified rightly."""
        return self.correct / max(self.units, 1)


def evaluate(model: TrainableModel, examples: Examples, rows: Rows, found: Results | None = None) -> Scores:
    """Scores of the model, with its trained tensors as assigned, on the given rows.

    found: where to note what came of each of them.
    """
    total = Scores()
    with torch.inference_mode():
        for chosen in pack(examples.lengths[rows], model.pass_tokens(EVALUATION_TOKENS)):
            batch = examples.batch(rows[chosen], model.spec.pad_id)
            logits = model.logits(batch)
            if examples.causal:
                targets = batch.labels != IGNORED
                losses = example_losses(logits, batch.labels).double() * targets.sum(1)
                total += Scores(float(losses.sum()), int(targets.sum()))
                if found is not None:
                    right = (logits.argmax(-1) == batch.labels) & targets
                    found.put(chosen, losses=losses, targets=targets.sum(1), correct=right.sum(1))
            else:
                losses = example_losses(logits, batch.labels).double()
                predictions = logits.argmax(-1)
                right = predictions == batch.labels
                total += Scores(float(losses.sum()), len(chosen), int(right.sum()))
                if found is not None:
                    found.put(
                        chosen,
                        losses=losses,
                        targets=1,
                        correct=right,
                        labels=batch.labels,
                        predictions=predictions,
                    )
    return total


def shards(count: int, size: int) -> list[slice]:
    """Equal slices of at most `size` out of `count`: a rule of data alone, so that sums have the same bits."""
    pieces = -(-count // size)
    edges = np.linspace(0, count, pieces + 1).astype(int).tolist()
    return [slice(a, b) for a, b in pairwise(edges)]


def sum_scores(parts: Iterable[Scores]) -> Scores:
    """The sum, in the given order."""
    total = Scores()
    for part in parts:
        total += part
    return total
