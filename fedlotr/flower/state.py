"""A strategy's state as plain JSON with arrays set apart, so that a checkpoint needs no pickle.

Ours say what it is by `state()`. Of any other, the arrays, records and plain values among its attributes are kept:
that brings Flower's FedAdam and FedAvgM back to equal bytes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy as FlowerStrategy

Arrays = dict[str, npt.NDArray[Any]]


class _LeftOutError(TypeError):
    """A value that is no state: a function, a logger, an object of some other kind."""


def save_strategy(strategy: FlowerStrategy) -> tuple[Any, Arrays]:
    """(JSON value, arrays by reference) of the strategy's state.

    Raises TypeError where `state()` gives something that cannot be written; attributes that cannot are left out.
    """
    arrays: Arrays = {}
    if hasattr(strategy, "state"):
        return _pack(strategy.state(), arrays), arrays
    kept = []
    for name, value in vars(strategy).items():
        try:
            kept.append([name, _pack(value, arrays)])
        except _LeftOutError:
            continue
    return {"dict": kept}, arrays


def load_strategy_state(strategy: FlowerStrategy, packed: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Give a strategy back what `save_strategy` took."""
    state = _unpack(packed, arrays)
    if hasattr(strategy, "load_state"):
        strategy.load_state(state)
    else:
        vars(strategy).update(state)


def _pack(value: Any, arrays: Arrays) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        name = f"strategy.{len(arrays)}"
        arrays[name] = np.ascontiguousarray(value)
        return {"array": name, "shape": list(value.shape)}
    if isinstance(value, ArrayRecord):
        return {"records": [[name, _pack(array.numpy(), arrays)] for name, array in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(item, arrays) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, arrays), _pack(item, arrays)] for key, item in value.items()]}
    raise _LeftOutError(f"a {type(value).__name__} cannot be part of a checkpoint; give arrays and plain values")


def _unpack(packed: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
    match packed:
        case {"array": name, "shape": shape}:
            return arrays[name].reshape(shape)
        case {"records": items}:
            return ArrayRecord({name: Array(np.atleast_1d(_unpack(item, arrays))) for name, item in items})
        case {"list": items}:
            return [_unpack(item, arrays) for item in items]
        case {"tuple": items}:
            return tuple(_unpack(item, arrays) for item in items)
        case {"dict": items}:
            return {_unpack(key, arrays): _unpack(item, arrays) for key, item in items}
    return packed
