"""Clients that are kept from drifting apart: FedProx and SCAFFOLD do in a cohort what their papers say."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedlotr import SimulationConfig
from fedlotr.engines import LocalGrid
from fedlotr.flower.client_app import worker
from fedlotr.flower.link import Cohort, Job
from fedlotr.flower.links.objectives import Objectives
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import to_record, to_tensors
from fedlotr.flower.round import Federation, State, run_round, sample_clients
from fedlotr.run.checking import check
from fedlotr.run.federation import federation
from fedlotr.run.simulation import resolve
from fedlotr.streams import generator
from fedlotr.training.cohort import ClientWork, client_batches
from tests.quadratic_app import CENTRE, CURVATURE, RATE, STEPS, WEIGHT
from tests.support import prepare_again

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def quadratics(strategy: str, clients: int, sampled: int, rounds: int, **trouble: Any) -> tuple[float, Any, Any]:
    """The model after some rounds on `quadratic_app`, the strategy, and the clients' store."""
    run = Federation(
        clients=clients,
        sampled=sampled,
        rounds=rounds,
        seed=0,
        max_failed=0.5,
        lr_factor=lambda server_round: 1.0,
        basis=None,
        bases_sha256="bases",
        layers=[],
        held_out=0,
        task="classification",
        method="lotr",
    )
    state = State(ArrayRecord({"x": Array(np.full(1, 5.0, np.float32))}))
    made = load_strategy(strategy, {}, sampled, clients=clients)
    run_config: Any = {name.replace("_", "-"): value for name, value in trouble.items()}
    with LocalGrid("tests.quadratic_app:app", clients, run_config=run_config) as grid:
        for _ in range(rounds):
            run_round(grid, made, run, state)
        return float(state.arrays["x"].numpy()[0]), made, grid.client_states


def optimum(clients: int) -> float:
    """Of Σ w_k a_k/2 (x - b_k)²."""
    a, b, w = (np.array(values[:clients]) for values in (CURVATURE, CENTRE, WEIGHT))
    return float((w * a * b).sum() / (w * a).sum())


def test_scaffold_finds_the_optimum_of_two_quadratic_clients_and_fedavg_does_not() -> None:
    found, averaged = (quadratics(name, 2, 2, 80)[0] for name in ("scaffold", "exact-average"))
    # K plain steps shrink client k's distance by s_k = (1 - η a_k)^K: the fixed point of the mean, by hand.
    shrink = (1 - RATE * np.array(CURVATURE[:2])) ** STEPS
    weights = np.array(WEIGHT[:2]) * (1 - shrink)
    assert averaged == pytest.approx(float((weights * CENTRE[:2]).sum() / weights.sum()), abs=1e-5)
    assert abs(averaged - optimum(2)) > 0.05
    assert found == pytest.approx(optimum(2), abs=1e-5)


def test_scaffold_finds_it_though_half_of_the_clients_are_absent_in_each_round() -> None:
    found, made, states = quadratics("scaffold", 4, 2, 300)
    assert found == pytest.approx(optimum(4), abs=1e-4)
    # What the server took together from changes is the weighted sum of what the clients keep.
    own = sum(w * states[k]["control"]["x"].numpy()[0] for k, w in enumerate(WEIGHT))
    assert made.sums["x"][0] == pytest.approx(own, abs=1e-4)


def test_a_client_whose_reply_is_refused_keeps_what_it_had() -> None:
    trouble = {"nan_1": [2, 3]}
    _, made, states = quadratics("scaffold", 2, 2, 2, **trouble)
    _, _, before = quadratics("scaffold", 2, 2, 1)
    assert states[1] == before[1] and states[0] != before[0]
    assert made.sums["x"][0] == pytest.approx(
        sum(w * states[k]["control"]["x"].numpy()[0] for k, w in enumerate(WEIGHT[:2])), abs=1e-5
    )
    assert 1 not in quadratics("scaffold", 2, 2, 1, nan_1=[1])[2], "it has taken part in no round"


def test_what_a_cohort_asked_holds_no_stacks_once_all_of_it_has_sent() -> None:
    link, start = Objectives(), torch.zeros(2, 3)
    held = weakref.ref(start)
    link.gradient(Cohort({"config": {"proximal-mu": 0.1}}, [{}, {}], {"x": start}))
    del start
    for client in (0, 1):
        assert held() is not None
        link.send(Job(client=client, records={}, memory={}, row=client))
    assert held() is None


def configuration(tiny_bert: Path, animals: Path, **options: Any) -> SimulationConfig:
    base: dict[str, Any] = {
        "model": str(tiny_bert),
        "data": str(animals),
        "method": "lotr",
        "rank": 4,
        "clients": 4,
        "sample": 3,
        "rounds": 3,
        "max_examples": 40,
        "public_examples": 16,
        "local_epochs": 2,
        "optimizer": "sgd",
        "lr": 0.5,
        "head_lr": 0.1,
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
        "cohort": 3,
    }
    return SimulationConfig(**{**base, **options})


def sequential(config: SimulationConfig, prepared: Any, mu: float, scaffold: bool) -> Mapping[str, Any]:
    """FedProx or SCAFFOLD, one client after the other, with torch's own SGD; option II from the distance travelled."""
    model, parts = prepared.model, prepared.checked.parts
    run = federation(config, prepared)
    x = {name: value.double() for name, value in model.values().items()}
    start = model.values()
    c = {name: torch.zeros_like(value) for name, value in x.items()}
    own = [{name: torch.zeros_like(value) for name, value in x.items()} for _ in parts]
    total = sum(len(part) for part in parts)
    seen: dict[int, int] = {}
    for number in range(1, config.rounds + 1):
        clients = sample_clients(run, number)
        seen |= {k: len(parts[k]) for k in clients}
        everybody = len(parts) * sum(seen.values()) / len(seen)
        ends = []
        for k in clients:
            model.assign({name: value.float() for name, value in x.items()})
            parameters = {name: model.parameter(name).requires_grad_() for name in model.trained}
            rates = {n: (config.head_lr if n in model.head_names else config.lr) * run.lr_factor(number) for n in x}
            oracle = torch.optim.SGD([{"params": [p], "lr": rates[name]} for name, p in parameters.items()])
            work = ClientWork(prepared.workplace.rows(k), generator(config.seed, "shuffle", number, k))
            batches = client_batches(work, prepared.checked.training)
            for rows in batches:
                oracle.zero_grad()
                loss = model.losses(prepared.workplace.train.batch(rows)).mean()
                for name, p in parameters.items():
                    loss = loss + mu / 2 * (p - x[name].float()).square().sum()
                    if scaffold:
                        loss = loss + (p * (c[name] - own[k][name]).float()).sum()
                loss.backward()
                oracle.step()
            y = {name: p.detach().double().clone() for name, p in parameters.items()}
            for p in parameters.values():
                p.requires_grad_(False)
            new = {n: own[k][n] - c[n] + (x[n] - y[n]) / (len(batches) * rates[n]) for n in x}
            ends.append((k, y, {name: new[name] - own[k][name] for name in x}))
            own[k] = new
        weights = {k: len(parts[k]) / sum(len(parts[j]) for j in clients) for k in clients}
        x = {name: sum(weights[k] * y[name] for k, y, _ in ends) for name in x}
        if scaffold:
            sums = {n: sum(len(parts[k]) * own[k][n] for k in range(len(parts))) for n in x}
            c = {name: value / everybody for name, value in sums.items()}
    assert everybody == total, "all clients were seen, so that the weights of c are exact"
    model.assign(start)
    return x


@pytest.mark.parametrize(
    ("strategy", "arguments", "mu", "scaffold"),
    [
        ("fedprox", {"mu": 0.3}, 0.3, False),
        ("flwr.serverapp.strategy:FedProx", {"proximal_mu": 0.3}, 0.3, False),
        ("scaffold", {}, 0.0, True),
    ],
)
def test_in_a_cohort_as_in_a_plain_sequential_loop(
    strategy: str, arguments: Any, mu: float, scaffold: bool, tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_bert, animals)
    prepared = prepare_again(check(resolve(config)), tmp_path / "work")
    sizes = {len(part) for part in prepared.checked.parts}
    assert len(sizes) > 1, "clients take different numbers of steps"
    wanted = sequential(config, prepared, mu, scaffold)
    plain = sequential(config, prepared, 0.0, False)
    run, state = federation(config, prepared), State(to_record(prepared.model.values()))
    before = to_tensors(state.arrays)
    made = load_strategy(strategy, arguments, 3, clients=4)
    cohorts: Any = lambda partitions: [list(partitions)]  # noqa: E731
    with LocalGrid(
        "fedlotr.flower.client_app:app", 4, run_config={"fedlotr.work": str(tmp_path / "work")}, cohorts=cohorts
    ) as grid:
        for _ in range(config.rounds):
            assert not run_round(grid, made, run, state).failures
    worker.cache_clear()
    found = to_tensors(state.arrays)

    def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        return float(np.sqrt(sum(float((one[k].double() - other[k].double()).square().sum()) for k in one)))

    moved = distance(wanted, before)
    assert distance(found, wanted) < 1e-5 * moved
    assert distance(plain, wanted) > 1e-2 * moved, "and it is not what plain averaging gives"
