"""What a model made of each test row: what a metric of one's own is computed from, on the server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Whole = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int64] | npt.NDArray[np.float64]
TRAVEL = ("losses", "targets", "correct", "labels", "predictions")
"""What a client process tells of each row; the rest is known to the server alone."""


@dataclass(frozen=True)
class Evaluated:
    """A model on the test rows. choices: one entry for each choice, end to end; answers: of each prompt the tokens."""

    results: "Results"
    choices: "Results | None" = None
    answers: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Results:
    """One entry a row, in the rows' order.

    losses: nats, summed over a row's targets. targets: how many it has: the target tokens of a language model, 1 of a
    classifier. correct: how many of them are predicted rightly. labels, predictions: of a classifier the class indices;
    of a regression numbers in the labels' unit; of a language model zeros.
    rows: which row of the test split each is, from 0. said: of a language model that was asked (`--score exact_match`
    and the like) its answers, else empty.
    """

    losses: npt.NDArray[np.float64]
    targets: Whole
    correct: Whole
    labels: Numbers
    predictions: Numbers
    rows: Whole = field(default_factory=lambda: np.zeros(0, np.int64))
    said: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.losses)

    @classmethod
    def empty(cls, rows: int, *, scale: bool = False) -> "Results":
        """Room for so many rows. scale: whether labels are numbers on one."""
        form: Any = np.float64 if scale else np.int64
        counts = [np.zeros(rows, np.int64) for _ in range(2)]
        return cls(np.zeros(rows), counts[0], counts[1], np.zeros(rows, form), np.zeros(rows, form))

    def take(self, rows: Whole) -> "Results":
        """These entries."""
        taken: dict[str, Any] = {name: array[rows] for name, array in self.arrays().items()}
        return replace(
            self,
            **taken,
            rows=self.rows[rows] if len(self.rows) else self.rows,
            said=[self.said[row] for row in rows] if self.said else self.said,
        )

    def put(self, at: npt.NDArray[np.int64], **values: npt.ArrayLike) -> None:
        """Note what came of some rows; `values` are named as the fields are."""
        for name, value in values.items():
            getattr(self, name)[at] = value

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """By name, as they travel."""
        return {name: getattr(self, name) for name in TRAVEL}

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, npt.NDArray[np.generic]]]) -> "Results":
        """All rows of the parts, in the given order. Raises ValueError where nothing was noted of a row."""
        joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in TRAVEL}
        whole = cls(**joined)
        if not whole.targets.all():  # every example has one
            raise ValueError(f"no result for {int((whole.targets == 0).sum())} of {len(whole.targets)} test rows")
        return whole
