"""What a checkpoint keeps besides the trained tensors: the strategy's own state, and that of the clients that have one.

Our strategies say what theirs is by `state()`. Of any other, the arrays, records, generators and plain values among
its attributes are kept, also those of a strategy inside it: that brings Flower's FedAdam back to equal bytes.
"""

import contextlib
import logging
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.flower.serialize import Arrays, NotPlainError, from_blob, pack, to_blob, unpack

STRATEGY, CLIENT = "strategy", "client-state"
"""What the names of a checkpoint's arrays begin with, where they are not the trained tensors."""


def save_strategy(strategy: FlowerStrategy) -> tuple[Any, Arrays, dict[str, str]]:
    """(JSON value, arrays by reference, why which attribute is left out) of the strategy's state.

    Functions, classes, modules and loggers are no state, and left out without a word. Raises TypeError where `state()`
    gives something that cannot be written.
    """
    arrays: Arrays = {}
    if callable(state := getattr(strategy, "state", None)):
        return pack(state(), arrays, STRATEGY), arrays, {}
    left_out: dict[str, str] = {}
    return _pack_attributes(strategy, arrays, left_out, ""), arrays, left_out


def load_strategy_state(strategy: FlowerStrategy, packed: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Give a strategy back what `save_strategy` took."""
    if isinstance(packed, dict) and "attributes" in packed:
        _unpack_attributes(strategy, packed["attributes"], arrays)
    elif callable(load := getattr(strategy, "load_state", None)):
        load(unpack(packed, arrays))
    else:
        vars(strategy).update(unpack(packed, arrays))


def not_finite(strategy: FlowerStrategy) -> set[str]:
    """The attributes of a strategy with numbers in arrays that are not finite."""
    found = set()
    for name, value in vars(strategy).items():
        arrays: Arrays = {}
        with contextlib.suppress(NotPlainError, RecursionError):
            pack(value, arrays, name)
        if not all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f"):
            found.add(name)
    return found


class ClientStates:
    """What a round's clients have kept before it, to give it back to those whose reply is refused.

    Else a client would go on from a round that nobody else knows of: its control variate, say, would be in no mean.
    """

    def __init__(self, grid: Grid) -> None:
        self._store: dict[int, RecordDict] = getattr(grid, "client_states", {})
        self._before: dict[int, RecordDict] = {}

    def remember(self, clients: Iterable[int]) -> None:
        """These are about to train."""
        for client in clients:
            self._before.pop(client, None)
            if client in self._store:
                self._before[client] = self._store[client]

    def before(self, client: int) -> Any:
        """What a client had kept before the round; empty where that was nothing."""
        return self._before.get(client, {})

    def now(self, client: int) -> Any:
        """What it keeps now; empty where that is nothing, or the engine does not show it."""
        return self._store.get(client, {})

    def restore(self, clients: Iterable[int]) -> None:
        """Put back what these clients had, or that they had nothing."""
        for client in clients:
            self._store.pop(client, None)
            if client in self._before:
                self._store[client] = self._before[client]


class SavedClients:
    """What checkpoints keep of the sparse store, client -> its `Context.state`; a client without one costs nothing.

    Each client's is one array of bytes, made anew where it has another state than in the last checkpoint: engines
    replace states and never change them.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[RecordDict, npt.NDArray[np.uint8]]] = {}

    def save(self, states: Mapping[int, RecordDict]) -> tuple[list[int], Arrays]:
        """(which clients, their arrays by name)."""
        known = self._known
        self._known = {
            client: known[client] if client in known and known[client][0] is state else (state, to_blob(state))
            for client, state in sorted(states.items())
        }
        return list(self._known), {f"{CLIENT}.{client}": blob for client, (_, blob) in self._known.items()}


def load_clients(clients: Iterable[Any], arrays: Mapping[str, npt.NDArray[Any]]) -> dict[int, RecordDict]:
    """What `SavedClients.save` was given; also of runs that are older than it, which have records as JSON there."""
    found = {}
    for one in clients:
        if isinstance(one, list):
            found[one[0]] = unpack(one[1], arrays)
        else:
            found[one] = from_blob(arrays[f"{CLIENT}.{one}"])
    return found


def _pack_attributes(strategy: FlowerStrategy, arrays: Arrays, left_out: dict[str, str], path: str) -> Any:
    kept = []
    for name, value in vars(strategy).items():
        if isinstance(value, FlowerStrategy):  # one that wraps another: Flower's differential privacy does
            kept.append([name, _pack_attributes(value, arrays, left_out, f"{path}{name}.")])
            continue
        added: Arrays = dict(arrays)
        try:
            packed = pack(value, added, STRATEGY)
        except (NotPlainError, RecursionError) as error:
            if not callable(value) and not isinstance(value, logging.Logger | ModuleType):
                left_out[path + name] = str(error)
        else:
            kept.append([name, packed])
            arrays.update(added)
    return {"attributes": kept}


def _unpack_attributes(strategy: FlowerStrategy, kept: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    for name, packed in kept:
        if isinstance(packed, dict) and "attributes" in packed:
            _unpack_attributes(vars(strategy)[name], packed["attributes"], arrays)
        else:
            vars(strategy)[name] = unpack(packed, arrays)
