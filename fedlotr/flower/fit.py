"""Whether what a strategy gives back can be a model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord


def published(aggregated: ArrayRecord | None, before: ArrayRecord, cause: str) -> ArrayRecord:
    """The strategy's result. None means that the model stays. Raises ValueError for one that cannot be a model.

    cause: what else is to be said of one that is not finite.
    """
    if aggregated is None:
        return before
    if set(aggregated) != set(before):
        raise ValueError(f"it gave back tensors {sorted(aggregated)[:3]}…, expected {sorted(before)[:3]}…")
    for name, array in aggregated.items():
        if tuple(array.shape) != tuple(before[name].shape):
            raise ValueError(f"it gave {name} the shape {tuple(array.shape)}, expected {tuple(before[name].shape)}")
        _check_finite(f"it gave {name}", array.numpy(), before[name].dtype, cause)
    return aggregated


def check_controls(controls: Mapping[str, npt.NDArray[Any]], cause: str) -> None:
    """Raises ValueError for control variates that are not finite in the numbers that travel."""
    for name, value in controls.items():
        _check_finite(f"its control variates have in {name}", value, "float32", cause)


def _check_finite(whose: str, value: npt.NDArray[Any], dtype: str, cause: str) -> None:
    """Raises ValueError for numbers that are not finite, or would not be in the dtype that travels."""
    if not np.isfinite(value).all():
        raise ValueError(f"{whose} values that are not finite{cause}")
    with np.errstate(over="ignore"):
        fits = np.isfinite(value.astype(dtype)).all()
    if not fits:
        raise ValueError(f"{whose} values up to {np.abs(value).max():.3g}, which {dtype} has no room for{cause}")
