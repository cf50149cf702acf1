"""What a model made of each test row: what a metric of one's own is computed from, on the server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Whole = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Results:
    """One entry a row, in the rows' order.

    losses: nats, summed over a row's targets. targets: how many it has: the target tokens of a language model, 1 of a
    classifier. correct: how many of them are predicted rightly. labels, predictions: of a classifier the class indices;
    of a language model zeros.
    """

    losses: npt.NDArray[np.float64]
    targets: Whole
    correct: Whole
    labels: Whole
    predictions: Whole

    @classmethod
    def empty(cls, rows: int) -> "Results":
        """Room for so many rows."""
        return cls(np.zeros(rows), *(np.zeros(rows, np.int64) for _ in range(4)))

    def put(self, at: npt.NDArray[np.int64], **values: npt.ArrayLike) -> None:
        """Note what came of some rows; `values` are named as the fields are."""
        for name, value in values.items():
            getattr(self, name)[at] = value

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """By name, as they travel."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, npt.NDArray[np.generic]]]) -> "Results":
        """All rows of the parts, in the given order. Raises ValueError where nothing was noted of a row."""
        whole = cls(**{field.name: np.concatenate([part[field.name] for part in parts]) for field in fields(cls)})
        if not whole.targets.all():  # every example has one
            raise ValueError(f"no result for {int((whole.targets == 0).sum())} of {len(whole.targets)} test rows")
        return whole
