"""The model on held-out examples: sums that add up over shards, whatever process computed each."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from fedlotr.evaluation.results import Results
from fedlotr.models.kinds import TASK_KINDS
from fedlotr.training.examples import IGNORED, Batch, Examples
from fedlotr.training.model import TrainableModel
from fedlotr.training.packing import EVALUATION_TOKENS, Rows, pack
from fedlotr.training.varlen import Ragged
from fedlotr.training.varlen_pass import branched_batches, ragged_batches

NO_MOMENTS = (0.0,) * 5
ALIKE = 1e-12
"""Variance over mean square below which numbers are all alike but for the rounding of their sums."""


@dataclass(frozen=True)
class Scores:
    """Sums over some examples. units: examples, or target tokens of a language model.

    moments: of a regression's predictions p and labels y, in the model's own unit, Σp, Σy, Σp², Σy² and Σpy.
    """

    loss: float = 0.0
    units: int = 0
    correct: int = 0
    moments: tuple[float, ...] = NO_MOMENTS

    def __add__(self, other: "Scores") -> "Scores":
        moments = tuple(one + two for one, two in zip(self.moments, other.moments, strict=True))
        return Scores(self.loss + other.loss, self.units + other.units, self.correct + other.correct, moments)

    @property
    def mean_loss(self) -> float:
        """Nats an example (classifier) or a token (language model); a regression's mean squared error, in its labels'
        unit.
        """
        return self.loss / max(self.units, 1)

    @property
    def accuracy(self) -> float:
        """Share of examples classified rightly."""
        return self.correct / max(self.units, 1)

    @property
    def perplexity(self) -> float:
        """Of a language model; bounded, where the loss is past all bounds."""
        return math.exp(min(self.mean_loss, 700))

    @property
    def rmse(self) -> float:
        """Of a regression: the root of its mean squared error, in its labels' unit."""
        return math.sqrt(self.mean_loss)

    @property
    def pearson(self) -> float | None:
        """Of a regression: the correlation of its predictions and labels; None where either are all alike."""
        p, y, pp, yy, py = (moment / max(self.units, 1) for moment in self.moments)
        spread = (pp - p * p, yy - y * y)
        if not all(one > ALIKE * whole for one, whole in zip(spread, (pp, yy), strict=True)):
            return None
        return max(-1.0, min(1.0, (py - p * y) / math.sqrt(spread[0] * spread[1])))

    def metrics(self, task: str) -> dict[str, float | None]:
        """What a model for this task is judged by beside the loss, by name."""
        return {name: getattr(self, name) for name in TASK_KINDS[task].metrics}


def evaluate(model: TrainableModel, examples: Examples, rows: Rows, found: Results | None = None) -> Scores:
    """Scores of the model, with its trained tensors as assigned, on the given rows.

    found: where to note what came of each of them.
    """
    total = Scores()
    with torch.inference_mode():
        for chosen, batch, losses, predictions in _passes(model, examples, rows, found is not None):
            losses, labels = losses.double(), batch.labels
            if examples.causal:
                targets = batch.sums(labels != IGNORED)
                losses *= targets
                total += Scores(float(losses.sum()), int(targets.sum()))
                if found is not None:
                    right = batch.sums((predictions == labels) & (labels != IGNORED))
                    found.put(chosen, losses=losses.cpu(), targets=targets.cpu(), correct=right.cpu())
            elif model.spec.scale:
                p, y = predictions.double(), labels.double()
                losses *= model.spec.step**2
                sums = [float(one.sum()) for one in (p, y, p * p, y * y, p * y)]
                total += Scores(float(losses.sum()), len(chosen), moments=tuple(sums))
                if found is not None:
                    numbers = {"labels": in_unit(model, y), "predictions": in_unit(model, p)}
                    found.put(chosen, losses=losses.cpu(), targets=1, correct=0, **numbers)
            else:
                right = predictions == labels
                total += Scores(float(losses.sum()), len(chosen), int(right.sum()))
                if found is not None:
                    classes = {"labels": labels.cpu(), "predictions": predictions.cpu()}
                    found.put(chosen, losses=losses.cpu(), targets=1, correct=right.cpu(), **classes)
    return total


def mean_loss(model: TrainableModel, examples: Examples, rows: Rows) -> float:
    """The mean of what training makes small, over these examples, of the model with its tensors as assigned."""
    with torch.inference_mode():
        total = sum(float(losses.double().sum()) for _, _, losses, _ in _passes(model, examples, rows, tokens=False))
    return total / max(len(rows), 1)


def in_unit(model: TrainableModel, numbers: torch.Tensor) -> torch.Tensor:
    """Numbers on the model's own scale in the labels' unit."""
    return (numbers * model.spec.step + model.spec.shift).cpu()


def _passes(
    model: TrainableModel, examples: Examples, rows: Rows, tokens: bool
) -> Iterator[tuple[npt.NDArray[np.int64], Batch | Ragged, torch.Tensor, torch.Tensor]]:
    """Of each pass the places of its examples among `rows`, itself, their losses, and what the model predicts.

    tokens: whether a language model's predictions are wanted too; else they are its labels.
    """
    most, predict = model.pass_tokens(EVALUATION_TOKENS), tokens or not examples.causal
    if model.takes_ragged:
        batches = branched_batches if examples.causal else ragged_batches
        for chosen, ragged in batches(model, examples, rows, most):
            with model.taking(ragged):
                losses, predictions = model.scored(ragged, predict=predict)
            yield chosen, ragged, losses, ragged.labels if predictions is None else predictions
        return
    for chosen in pack(examples.lengths[rows], most):
        batch = examples.batch(rows[chosen], model.spec.pad_id).to(model.device)
        losses, predictions = model.scored(batch, predict=predict)
        yield chosen, batch, losses, batch.labels if predictions is None else predictions


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
