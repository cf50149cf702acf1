"""For authors of strategies: `check_strategy("my_strategies.py:Mine")` puts one through what ours must keep.

Small models with square and rectangular, Linear and Conv1D layers, r equal to a width and α ≠ r are trained by
clients that add seeded noise; the round loop is the real one, and a dense oracle stands beside the certificate.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters.carry import Carry
from fedlotr.adapters.gradient_bases import initialize_basis
from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.tuner import CoreConfig, bases_sha256, factored_layers
from fedlotr.engines import LocalGrid
from fedlotr.flower.certificate import Layer, layers_of
from fedlotr.flower.federation import Federation
from fedlotr.flower.links.carry import STATE, parts_of
from fedlotr.flower.links.first_loss import FIRST_LOSS, recorded
from fedlotr.flower.links.objectives import CONTROL
from fedlotr.flower.links.ranks import block, padded
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import to_arrays, to_record, to_tensors
from fedlotr.flower.round import Round, State, run_round, sample_clients
from fedlotr.flower.traits import traits_of
from fedlotr.models.loading import ModelSpec
from fedlotr.streams import generator
from fedlotr.training.model import TrainableModel

CLIENTS = 5
RANK, ALPHA = 4, 6.0
WIDE = 40
EXACT = 1e-6
HEAD = "head.weight"

app = ClientApp()


def _reply(arrays: Mapping[str, Any], method: str, client: int, server_round: int) -> dict[str, Any]:
    """What a client sends: the tensors that move in this round, with noise of its own (float32)."""
    moving = METHODS[method].moving(server_round)
    stream = generator(7, "conformance", server_round, client)
    return {
        name: (value + 0.1 * stream.standard_normal(value.shape)).astype(np.float32)
        for name, value in sorted(arrays.items())
        if name == HEAD or name[-1] in moving
    }


@app.train()
def _train(message: Message, context: Context) -> Message:
    content: Any = message.content
    client = int(context.node_config["partition-id"])
    if client == context.run_config["dropped"]:
        raise RuntimeError("this client is dropped")
    sent = _reply(to_arrays(content["arrays"]), str(context.run_config["method"]), client, _round(content))
    carried = _follow(content, context)
    records: dict[str, Any] = {
        "arrays": to_record(sent),
        "metrics": MetricRecord({"num-examples": client + 1, "weight": float(client + 1), "loss": 1.0}),
        "client": ConfigRecord({"client": client, "bases-sha256": str(context.run_config["bases"]), **carried}),
    }
    if FIRST_LOSS in content["config"]:
        records[FIRST_LOSS] = recorded(1.0 + client)
    if CONTROL in content:  # the change of its control variates, noise too
        records[CONTROL] = to_record({name: sent[name] - content["arrays"][name].numpy() for name in sent})
    return Message(RecordDict(records), reply_to=message)


def _follow(content: Any, context: Context) -> dict[str, str]:
    """Grow the carried term from what this client itself was sent, in this message and in earlier ones."""
    if STATE not in content:
        return {}
    own: Any = context.state
    held = Carry.restored(to_tensors(own["held"]), json.loads(own["about"]["json"])) if "held" in own else Carry()
    if held.version < content[STATE]["since"]:
        raise RuntimeError(f"it has version {held.version}, and the server takes it to have {content[STATE]['since']}")
    held = held.caught_up(int(content[STATE]["version"]), parts_of(content))
    tensors, about = held.saved()
    own["held"], own["about"] = to_record(tensors), ConfigRecord({"json": json.dumps(about)})
    return {"carry-sha256": held.sha256}


def _round(content: Any) -> int:
    return int(content["config"]["server-round"])


class _Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(width, width),
                    "up": nn.Linear(width, 2 * width + 1),
                    "conv": Conv1D(width + 1, width),  # type: ignore[no-untyped-call]
                }
            )
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.blocks:
            x = part["q"](x) + part["up"](x).square().mean() + part["conv"](x).sin().mean()  # type: ignore[index]
        return x


def _model(method: str, tie: str, dtype: torch.dtype, width: int = RANK) -> TrainableModel:
    net = _Net(width)
    stream = generator(7, "conformance")
    for parameter in net.parameters():
        parameter.data = torch.from_numpy(stream.standard_normal(parameter.shape)).to(dtype)
    scale: Any = {"alpha": ALPHA, "tie": tie} if METHODS[method].factored else {}
    config = CoreConfig(method=method, r=RANK, target_modules=r".*\.(q|up|conv)", **scale)
    if config.basis_kind.made_of == "gradient":
        x = torch.from_numpy(stream.standard_normal((8, width))).to(dtype)
        config = initialize_basis(net, [x], lambda model, batch: model(batch).square().sum(), config)
    return TrainableModel(net, ModelSpec(path="", kind="causal-lm", labels=0, mean_pooled=False, pad_id=0), config)


def _dense(model: TrainableModel | None, arrays: Mapping[str, Any]) -> list[Any]:
    """Every layer's ΔW, multiplied out in float64."""
    if model is None:
        return []
    named = {name: torch.from_numpy(np.asarray(value)).double() for name, value in arrays.items()}
    found = []
    for name, layer in factored_layers(model.module).items():
        found.append(_product(layer, {f: named.get(model.names.get((name, f), "")) for f in "ABCD"}))
    return found


def _product(layer: FactoredLayer, sent: Mapping[str, torch.Tensor | None]) -> Any:
    if sent["D"] is not None:
        return sent["D"].numpy()
    pair = layer.basis("default")
    a = sent["A"] if sent["A"] is not None else pair.A.double()  # type: ignore[union-attr]
    b = sent["B"] if sent["B"] is not None else pair.B.double()  # type: ignore[union-attr]
    if sent["C"] is None:
        return (layer.scaling["default"] * b @ a).numpy()
    mixed = None if pair is None or pair.P is None else pair.P.double()
    core = layer.core["default"].expand({"C": sent["C"]}, mixed)
    return (layer.scaling["default"] * b @ core @ a).numpy()


def _change(model: TrainableModel | None, before: Carry, after: Carry) -> list[Any]:
    """By how much the carried term of every layer has changed."""
    if model is None:
        return []
    held = [{name: term.matrix().numpy() for name, term in carry.terms.items()} for carry in (before, after)]
    return [held[1].get(name, 0.0) - held[0].get(name, 0.0) for name in factored_layers(model.module)]


class _Reversed(LocalGrid):
    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        return list(super().send_and_receive(messages, timeout=timeout))[::-1]


class _Case:
    """One model and one strategy, driven round by round."""

    def __init__(
        self,
        make: Callable[[int], Any],
        method: str,
        model: TrainableModel | None,
        sampled: int,
        clients: int | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """clients: of whom so many are `sampled` in a round (default: all). ranks: of them in turn."""
        self.client_states: dict[int, RecordDict] = {}
        self.method, self.model, self.strategy = method, model, make(sampled)
        self.layers: list[Layer] = [] if model is None else layers_of(model)
        self.bases = "none" if model is None else bases_sha256(model.module)
        arrays = {} if model is None else {name: value.numpy() for name, value in model.values().items()}
        self.state = State(to_record({**arrays, HEAD: np.ones((3, 2), np.float32)}))
        names = frozenset(self.state.arrays)
        row = METHODS[method]
        self.federation = Federation(
            clients=clients or sampled,
            sampled=sampled,
            rounds=3,
            seed=0,
            max_failed=0.5,
            lr_factor=lambda server_round: 1.0,
            basis=None,
            bases_sha256=self.bases,
            layers=self.layers,
            held_out=0,
            task="classification",
            method=method,
            ranks=None if ranks is None else [ranks[k % len(ranks)] for k in range(clients or sampled)],
            rank=RANK,
            root=lambda n, sent, carry: {
                k: x.astype(np.float64) for k, x in _reply(to_arrays(sent), method, -1, n).items()
            },
            moving=lambda n: frozenset(name for name in names if name == HEAD or name[-1] in row.moving(n)),
        )

    def _sent(self, before: Mapping[str, Any], client: int, number: int) -> dict[str, Any]:
        """What a client sends, in the run's shapes."""
        if (ranks := self.federation.ranks) is None:
            return _reply(before, self.method, client, number)
        rank = ranks[client]
        reply = _reply({name: block(name, value, rank) for name, value in before.items()}, self.method, client, number)
        return {name: padded(value, before[name].shape) for name, value in reply.items()}

    def round(self, kind: type[LocalGrid] = LocalGrid, dropped: int = -1) -> Round:
        """One round; for a strategy that averages, its certificate is compared with the dense oracle."""
        before, number, carry = to_arrays(self.state.arrays), self.state.round + 1, self.state.carry
        config: Any = {"method": self.method, "bases": self.bases, "dropped": dropped}
        with kind("fedlotr.testing:app", self.federation.clients, run_config=config) as grid:
            grid.client_states = self.client_states
            done = run_round(grid, self.strategy, self.federation, self.state)
        asked = sample_clients(self.federation, number)
        assert set(done.failures) == {dropped}.intersection(asked), f"failures {done.failures}"
        if not traits_of(self.strategy).averages or METHODS[self.method].personal:
            return done
        clients = [k for k in asked if k != dropped]
        shares = [(k + 1) / sum(k + 1 for k in clients) for k in clients]
        sent = [before | self._sent(before, k, number) for k in clients]
        found = to_arrays(self.state.arrays) if done.mean is None else before | dict(done.mean)
        head = sum(p * arrays[HEAD] for p, arrays in zip(shares, sent, strict=True))
        np.testing.assert_allclose(found[HEAD], head, rtol=EXACT, err_msg="the head is not the mean of the updates")
        dense = [_dense(self.model, arrays) for arrays in sent]
        mean = [sum(p * w for p, w in zip(shares, layer, strict=True)) for layer in zip(*dense, strict=True)]
        merged = _change(self.model, carry, self.state.carry)
        published = [a + b for a, b in zip(_dense(self.model, found), merged, strict=True)]
        gaps = [np.square(a - b).sum() for a, b in zip(published, mean, strict=True)]
        moves = [np.square(b - a).sum() for a, b in zip(_dense(self.model, before), mean, strict=True)]
        error = done.metrics["aggregation_error"]
        if not moves:
            assert error is None
            return done
        assert error is not None
        oracle = float(np.sqrt(sum(gaps) / sum(moves)))
        assert abs(error - oracle) <= EXACT, f"the certificate says {error:.3g}, a dense oracle {oracle:.3g}"
        if traits_of(self.strategy).exact or len(METHODS[self.method].moving(number)) == 1:
            assert error <= EXACT, f"round {number}: what is published is not the mean of the updates: {error:.3g}"
        return done


@contextmanager
def _dropped_in_silence() -> Iterator[None]:
    """Without a warning of each client that is dropped on purpose."""
    log = logging.getLogger("fedlotr")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@_dropped_in_silence()
def check_strategy(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    method: str = "lotr",
    ranks: Sequence[int] | None = None,
) -> None:
    """Put a strategy, named as on the command line, through the conformance suite; raises AssertionError.

    For every strategy: unequal weights, rounds that differ, one client, a dropped client, replies in another order
    (equal bytes), layers tied and untied, a base in bfloat16. Where it says that it `averages`: the certificate equals
    a dense oracle, and is at most 1e-6 where one factor moves or the strategy says that it is `exact`. Where it merges
    into the carried term: ten rounds with absent clients. ranks: of the clients, in turn, where they are to differ.
    """

    def make(clients: int) -> Any:
        return load_strategy(name, dict(arguments or {}), clients)

    for model in _models(method):
        here, turned = (_Case(make, method, model, CLIENTS, ranks=ranks) for _ in range(2))
        before = here.state.arrays
        for dropped in (-1, -1, 1):
            here.round(dropped=dropped)
            turned.round(_Reversed, dropped=dropped)
            assert _bytes(here.state.arrays) != _bytes(before), "the round changed nothing"
            assert _bytes(here.state.arrays) == _bytes(turned.state.arrays), "the order of the replies shows"
            before = here.state.arrays
        alone = _Case(make, method, model, 1, ranks=ranks)
        alone.round()
        alone.round()
    if here.state.carry.version:
        _carries_on(make, method, ranks)


def _carries_on(make: Callable[[int], Any], method: str, ranks: Sequence[int] | None) -> None:
    """Ten rounds with three of seven clients: what all have learnt is in the model, however often one was absent.

    Layers wide enough that the carried term begins as factors; a client grows its own from its own messages alone.
    """
    model = _model(method, METHODS[method].tie, torch.float32, WIDE)
    case = _Case(make, method, model, 3, clients=7, ranks=ranks)
    total = _dense(model, to_arrays(case.state.arrays))
    for _ in range(10):
        before = to_arrays(case.state.arrays)
        case.round()
        asked = sample_clients(case.federation, case.state.round)
        shares = [(k + 1) / sum(k + 1 for k in asked) for k in asked]
        dense = [_dense(model, before | case._sent(before, k, case.state.round)) for k in asked]
        means = [sum(p * w for p, w in zip(shares, layer, strict=True)) for layer in zip(*dense, strict=True)]
        total = [t + m - w for t, m, w in zip(total, means, _dense(model, before), strict=True)]
    carried = _change(model, Carry(), case.state.carry)
    found = [w + c for w, c in zip(_dense(model, to_arrays(case.state.arrays)), carried, strict=True)]
    gap = sum(np.square(a - b).sum() for a, b in zip(found, total, strict=True))
    error = float(np.sqrt(gap / sum(np.square(t).sum() for t in total)))
    exact = traits_of(case.strategy).exact
    assert error <= EXACT or not exact, f"after ten rounds the model is off what was learnt by {error:.3g}"


def _models(method: str) -> Iterator[TrainableModel | None]:
    row = METHODS[method]
    if not row.adapts:
        yield None
        return
    yield _model(method, row.tie, torch.float32)
    yield _model(method, row.tie, torch.bfloat16)
    if row.may_tie and not row.basis_kind().one_layer:
        yield _model(method, "type" if row.tie == "layer" else "layer", torch.float32)


def _bytes(arrays: ArrayRecord) -> bytes:
    return b"".join(arrays[name].numpy().tobytes() for name in sorted(arrays))
