"""A round of many clients needs no more memory than one of few: replies go to disk, and nothing else changes by it."""

import copy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedlotr.engines import LocalGrid
from fedlotr.flower import Strategy
from fedlotr.flower.blame import StrategyError
from fedlotr.flower.certificate import Layer
from fedlotr.flower.lazy import LazyRecord, Spill
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.private import identify_process
from fedlotr.flower.round import Federation, Round, State, run_round
from fedlotr.flower.serialize import pack, unpack

CLIENTS = 6


class EchoApp(ClientApp):
    """Adds to what it was sent the client's number, in arrays of its own."""

    def run_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """One reply a message, in order."""
        return [answer(message, context) for message, context in zip(messages, contexts, strict=True)]


def answer(message: Message, context: Context) -> Message:
    content: Any = message.content
    client = int(context.node_config["partition-id"])
    moved = {name: Array(array.numpy() + np.float32(0.1 * client)) for name, array in content["arrays"].items()}
    metrics = MetricRecord({"num-examples": client + 1, "weight": client + 1.0, "loss": 0.5})
    identity = ConfigRecord({"client": client, "bases-sha256": "bases"})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics, "client": identity}), reply_to=message)


def a_round(strategy: Any, most: int, clients: int = CLIENTS, d: int = 4, r: int = 2) -> tuple[Round, State]:
    """With at most so many bytes of replies in memory."""
    rng = np.random.default_rng(0)
    factors = {"A": (r, d), "B": (d, r), "head": (3,)}
    arrays = {name: Array(rng.normal(size=shape).astype(np.float32)) for name, shape in factors.items()}
    state = State(ArrayRecord(arrays))
    told = Federation(
        clients=clients,
        sampled=clients,
        rounds=3,
        seed=0,
        max_failed=0.0,
        lr_factor=lambda server_round: 1.0,
        basis=None,
        bases_sha256="bases",
        layers=[Layer({"A": "A", "B": "B"}, None, None, 0.5)],
        held_out=0,
        task="classification",
        method="lora",
    )
    with LocalGrid(EchoApp(), clients, run_config={}) as grid:
        grid.reply_bytes = most
        return run_round(grid, strategy, told, state), state


class Popping(FedAvg):
    """Takes arrays out of the replies, as some of Flower's strategies do."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """FedAvg, the head set aside and put back."""
        for reply in replies:
            head = reply.content["arrays"].pop("head")
            reply.content["arrays"]["head"] = Array(head.numpy())
        return super().aggregate_train(server_round, replies)


def flowers(kind: type[FedAvg]) -> FedAvg:
    return kind(fraction_train=1.0, min_train_nodes=2, min_available_nodes=2, weighted_by_key="weight")


STRATEGIES: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: load_strategy(name, {}, CLIENTS) for name in ("fedit", "flora", "median")},
    "FedAvg": lambda: flowers(FedAvg),
    "Popping": lambda: flowers(Popping),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_replies_on_disk_give_equal_bytes(name: str) -> None:
    (done, state), (spilled, other) = (a_round(STRATEGIES[name](), most) for most in (2**30, 200))
    assert {n: a.data for n, a in state.arrays.items()} == {n: a.data for n, a in other.arrays.items()}
    assert state.carry.sha256 == other.carry.sha256
    assert done.entries == spilled.entries, "the ledger counts the same"
    times = {"train_seconds"}
    assert {k: v for k, v in done.metrics.items() if k not in times} == {
        k: v for k, v in spilled.metrics.items() if k not in times
    }


@pytest.mark.parametrize("name", ["fedit", "FedAvg"])
def test_memory_does_not_grow_with_the_clients_of_a_round(name: str) -> None:
    """48 replies of 128 kB are 6 MB, and twice that in float64; what is measured is the most that a round holds."""
    peaks = []
    for clients in (12, 48):
        strategy = STRATEGIES[name]()
        tracemalloc.start()
        a_round(strategy, 2**19, clients, d=256, r=64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**20, peaks


def test_the_arrays_of_an_update_cannot_be_changed_in_place() -> None:
    """It would be lost without a word, since they are decoded anew whenever they are asked for."""

    class Careless(Strategy):
        def combine(self, updates: Any, server_round: int) -> Any:
            """Halve the head of the first."""
            updates[0].arrays["head"][:] /= 2
            return dict(updates[0].arrays)

    with pytest.raises(StrategyError, match="read-only"):
        a_round(Careless(), 2**30)


def spilled(folder: Path | None) -> LazyRecord:
    """A record that lies on disk."""
    identify_process()
    arrays = {"a": Array(np.arange(3.0)), "b": Array(np.ones((2, 2), np.float32))}
    message = Message(RecordDict({"arrays": ArrayRecord(arrays)}), 1, "train")
    Spill(folder, 0).keep(message)
    record = message.content["arrays"]
    assert isinstance(record, LazyRecord)
    return record


def test_a_record_on_disk_is_used_like_any_other(tmp_path: Path) -> None:
    record = spilled(tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name: nothing is left behind, however the process ends"
    np.testing.assert_array_equal(record["a"].numpy(), np.arange(3.0))
    assert list(record) == ["a", "b"] and len(record) == 2 and "b" in record and "c" not in record
    with pytest.raises(KeyError):
        record["c"]
    same = record.plain()
    assert type(same) is ArrayRecord and same == record and record.count_bytes() == same.count_bytes()
    changed = record.copy()
    changed["a"] = Array(np.zeros(1))
    changed["c"] = Array(np.zeros(2))
    del changed["b"]
    assert list(changed) == ["a", "c"] and list(changed["a"].numpy()) == [0] and list(record) == ["a", "b"]
    assert type(copy.deepcopy(record)) is ArrayRecord and copy.deepcopy(record) == same
    arrays: Any = {}
    assert unpack(pack({"kept": record, "one": record["a"]}, arrays, "x"), arrays) == {"kept": same, "one": same["a"]}
