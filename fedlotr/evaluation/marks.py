"""What a model made of the test rows, as metrics are computed from it: one entry a row, any of them taken apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedlotr.evaluation.results import Results

Indices = npt.NDArray[np.int64]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Chosen:
    """Multiple choice. losses: (rows, choices) nats, summed over a choice's tokens; inf where a row has fewer.

    lengths: (rows, choices) characters of each. right: (rows,) the index of the right one.
    """

    losses: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.float64]
    right: Indices

    def __len__(self) -> int:
        return len(self.right)

    def take(self, rows: Indices) -> "Chosen":
        """These rows."""
        return Chosen(self.losses[rows], self.lengths[rows], self.right[rows])

    @classmethod
    def of(cls, losses: npt.NDArray[np.float64], choices: Sequence[Sequence[str]], right: Indices) -> "Chosen":
        """From the losses of all choices, end to end."""
        width = max(map(len, choices))
        whole, lengths = np.full((len(choices), width), np.inf), np.ones((len(choices), width))
        at = 0
        for row, texts in enumerate(choices):
            whole[row, : len(texts)] = losses[at : at + len(texts)]
            lengths[row, : len(texts)] = [max(len(text), 1) for text in texts]
            at += len(texts)
        return cls(whole, lengths, right)


@dataclass(frozen=True)
class Said:
    """Answers in words. wanted: the row's own; said: the model's; both as they are compared exactly beside them."""

    wanted: Sequence[str]
    said: Sequence[str]
    wanted_extract: Sequence[str | None]
    said_extract: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.said)

    def take(self, rows: Indices) -> "Said":
        """These rows."""
        fields = (self.wanted, self.said, self.wanted_extract, self.said_extract)
        return Said(*([field[row] for row in rows] for field in fields))

    @classmethod
    def of(cls, wanted: Sequence[str], said: Sequence[str], extract: Callable[[str], str | None]) -> "Said":
        """With what `extract` takes of each."""
        return cls(wanted, said, [*map(extract, wanted)], [*map(extract, said)])


Marks = Results | Chosen | Said


def mean_and_error(each: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """The mean of a number a row, and its standard error; None for a single row."""
    error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else None
    return float(each.mean()), error


RESAMPLES = 200
"""Of a bootstrap: the error of a standard error is then a twentieth of it."""


def whole_and_error(
    marks: Marks, score: Callable[[Marks], float | None], random: np.random.Generator
) -> tuple[float | None, float | None]:
    """A score that is not a mean over rows, and its standard error by the bootstrap (Efron, 1979) over rows."""
    value = score(marks)
    if value is None or len(marks) < 2:
        return value, None
    drawn = (score(marks.take(random.integers(len(marks), size=len(marks)))) for _ in range(RESAMPLES))
    found = np.array([one for one in drawn if one is not None])
    return value, float(found.std(ddof=1)) if len(found) > 1 else None
