"""Whose fault an exception is: one that a strategy raised says so, with the method it came out of."""

import traceback

from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.errors import FedlotrError

INTERFACE = frozenset({"configure_train", "aggregate_train", "combine", "state", "load_state"})
"""The methods of a strategy that a run calls, or that call each other."""


class StrategyError(FedlotrError):
    """A strategy raised, or gave back what cannot be a model; the message names it, the round and the method."""


class blaming:  # noqa: N801 (reads as a statement)
    """Turn an exception of the strategy into a StrategyError that says whose it is and where."""

    def __init__(self, strategy: FlowerStrategy, server_round: int, method: str, stage: str) -> None:
        self._strategy, self._stage = strategy, stage
        self._round, self._method = server_round, method

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):
            stage = _raised_in(self._strategy, error) or self._stage
            where = f"strategy {type(self._strategy).__name__}, {stage}, round {self._round}, method {self._method}"
            raise StrategyError(f"{where}: {type(error).__name__}: {error}") from error


def _raised_in(strategy: FlowerStrategy, error: Exception) -> str | None:
    """The innermost method of a strategy's interface that an exception came out of, if it came through one."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        first = frame.f_code.co_varnames[:1]
        if frame.f_code.co_name in INTERFACE and first and frame.f_locals.get(first[0]) is strategy:
            found = frame.f_code.co_name
    return found
