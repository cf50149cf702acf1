"""FlexLoRA's truncation, and clients of different ranks: blocks on the wire, two estimators, what they cost."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlotr import CoreConfig, SimulationConfig, run_simulation
from fedlotr.commands import doctor, simulate
from fedlotr.communication.ledger import read_ledger
from fedlotr.config.configuration import load
from fedlotr.errors import InputError
from fedlotr.flower import Update
from fedlotr.flower.certificate import Layer, Weighted, aggregation_error
from fedlotr.flower.links.ranks import block, client_ranks
from fedlotr.flower.plugins import load_strategy
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.testing import check_strategy
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel
from fedlotr.training.penalties import tail_penalty
from tests.flower.test_carry import WIDTHS
from tests.run.test_simulation import flags
from tests.support import UNIT, assert_within, float32_bound, read_run, rounding

A, B, C = (f"base_model.model.q.core_{factor}" for factor in "ABC")


def updates(clients: int, r: int) -> list[Update]:
    rng = np.random.default_rng(3)
    return [Update(k, {A: rng.normal(size=(r, 7)), B: rng.normal(size=(5, r))}, k + 1.0) for k in range(clients)]


@pytest.mark.parametrize(("clients", "r"), [(3, 2), (1, 2), (4, 1), (3, 5), (2, 3)])
def test_flexloras_error_is_the_discarded_singular_values(clients: int, r: int) -> None:
    sent = updates(clients, r)
    shares = [u.weight / sum(u.weight for u in sent) for u in sent]
    mean = sum(p * u.arrays[B] @ u.arrays[A] for p, u in zip(shares, sent, strict=True))
    strategy: Any = load_strategy("flexlora", {}, clients)
    found = strategy.combine(sent, 1)
    discarded = np.linalg.svd(mean)[1][r:]
    lost = float(np.linalg.norm(found[B] @ found[A] - mean))
    assert lost == pytest.approx(float(np.linalg.norm(discarded)), abs=1e-12)
    assert (lost < 1e-12) == (r == 5 or clients == 1), "exact where the rank is full"
    start = {A: np.zeros((r, 7)), B: np.zeros((5, r))}
    replies = [Weighted(u.arrays, p) for u, p in zip(sent, shares, strict=True)]
    certified = aggregation_error([Layer({"A": A, "B": B}, None, None, 2.0)], start, found, replies)
    assert certified == pytest.approx(lost / np.linalg.norm(mean), abs=1e-12)
    np.testing.assert_allclose(found[A] @ found[A].T, np.eye(r), atol=1e-12, err_msg="in order, so that ranks nest")
    assert np.all(np.diff(np.linalg.norm(found[B], axis=0)) <= 1e-12)


def test_hetlora_weighs_by_what_was_learnt_and_prunes_by_the_tail() -> None:
    """By hand: one layer of rank 2; the second client's last row and column have become smaller, γ r is 1."""
    sent = {A: np.array([[1.0, 0.0], [0.0, 1.0]]), B: np.array([[1.0, 0.0], [0.0, 1.0]]), "head": np.zeros(1)}
    grown = Update(3, {A: sent[A], B: 3 * sent[B], "head": np.ones(1)}, 1.0)
    shrunk = Update(5, {A: sent[A], B: np.diag([4.0, 0.5]), "head": np.zeros(1)}, 3.0)
    strategy: Any = load_strategy("hetlora", {"gamma": 0.5}, 2)
    strategy.current = sent
    found = strategy.combine([grown, shrunk], 1)
    assert found.ranks == {5: 1} and found.arrays["head"].tolist() == [0.25]
    one, two = np.sqrt(18), 4.0
    np.testing.assert_allclose(found.arrays[B], (one * 3 * sent[B] + two * np.diag([4.0, 0.0])) / (one + two))
    again: Any = load_strategy("hetlora", {"gamma": 0.5}, 2)
    strategy.ranks |= found.ranks
    again.load_state(strategy.state())
    assert again.ranks == {5: 1}
    plain: Any = load_strategy("hetlora", {"gamma": 1, "sparsity_weights": False}, 2)
    plain.current = sent
    found = plain.combine([grown, shrunk], 1)
    np.testing.assert_allclose(found.arrays[B], (3 * sent[B] + 3 * shrunk.arrays[B]) / 4)
    assert found.ranks == {}


def test_the_tail_penaltys_gradient_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    values = {A: torch.randn(3, 4, 7, requires_grad=True), B: torch.randn(3, 5, 4, requires_grad=True)}
    tails = [torch.linalg.matrix_norm(values[A][:, 3:]), torch.linalg.matrix_norm(values[B][:, :, 3:])]
    wanted = torch.autograd.grad(0.3 * (tails[0] * tails[1]).sum(), list(values.values()))
    gradients = {name: torch.ones_like(value) for name, value in values.items()}
    with torch.no_grad():
        found = tail_penalty({"q": {"A": A, "B": B}}, 0.3, 3)(gradients, values)
        for name, gradient in zip(values, wanted, strict=True):
            # Two norms of 7 and 5 numbers, a quotient, two products and a sum, of which none cancels.
            assert_within(found[name], 1 + gradient, float32_bound(7 + 5 + 6, 1 + gradient.abs()))
            assert torch.equal(gradients[name], torch.ones_like(gradient)), "what was given stays as it was"
        zero = {A: torch.zeros(1, 4, 7), B: torch.ones(1, 5, 4)}
        assert all(t.isfinite().all() for t in tail_penalty({"q": {"A": A, "B": B}}, 0.3, 3)(zero, zero).values())


def test_a_pruned_client_is_sent_less_from_then_on_also_after_a_resume(small: dict[str, Any], tmp_path: Path) -> None:
    options = {**small, "method": "lora", "strategy": "hetlora", "rounds": 6, "lr": 0.01, "client_rank": None}
    options["strategy_arg"] = {"gamma": 0.5, "penalty": 1.0}
    whole = run_simulation(SimulationConfig(**options, out=tmp_path / "whole"))
    again = {**options, "out": tmp_path / "again"}
    run_simulation(SimulationConfig(**again | {"rounds": 4}))
    resumed = run_simulation(SimulationConfig(**again | {"resume": True}))
    assert resumed.summary["trained_sha256"] == whole.summary["trained_sha256"]
    ledger = read_ledger(tmp_path / "whole" / "ledger")
    assert ledger == read_ledger(tmp_path / "again" / "ledger")
    sizes = {4 * (r * sum(map(sum, WIDTHS)) + HEAD): r for r in (1, 2, 4)}
    sent: dict[int, list[int]] = {}
    for row in ledger:
        if row.kind == "broadcast":
            sent.setdefault(row.client, []).append(sizes[row.payload_bytes])
    assert all(ranks == sorted(ranks, reverse=True) for ranks in sent.values()), "never more than before"
    assert min(map(min, sent.values())) < 4, "some client was pruned"
    assert whole.summary["failed_clients"] == 0 and whole.summary["aggregation_error_max"] is None


def test_ranks_are_dealt_in_turn_or_drawn_by_shares() -> None:
    assert client_ranks("4,8,16", 5, seed=0) == [4, 8, 16, 4, 8]
    drawn = client_ranks("2:3,4:1", 4000, seed=1)
    assert drawn == client_ranks("2:3,4:1", 4000, seed=1) != client_ranks("2:3,4:1", 4000, seed=2)
    assert Counter(drawn)[4] == pytest.approx(1000, abs=100)


def test_the_two_estimators_by_hand() -> None:
    """Weights 1 and 3; the second client owns one entry of four."""
    one = Update(0, {C: np.array([[2.0, 4.0], [6.0, 8.0]]), "head": np.ones(1)}, 1.0, rank=2)
    two = Update(1, {C: np.array([[10.0, 0.0], [0.0, 0.0]]), "head": np.zeros(1)}, 3.0, rank=1)
    zero_padding: Any = load_strategy("exact-average", {}, 2)
    owners: Any = load_strategy("exact-average", {"estimator": "owners"}, 2)
    owners.current = {C: np.full((2, 2), 5.0), "head": np.zeros(1)}
    assert zero_padding.combine([one, two], 1)[C].tolist() == [[8.0, 1.0], [1.5, 2.0]]
    found = owners.combine([one, two], 1)
    assert found[C].tolist() == [[8.0, 4.0], [6.0, 8.0]] and found["head"].tolist() == [0.25]
    assert owners.combine([two], 1)[C].tolist() == [[10.0, 5.0], [5.0, 5.0]], "what nobody owns stays"
    with pytest.raises(InputError, match="estimator is 'mean'; expected one of zero-padding, owners"):
        load_strategy("exact-average", {"estimator": "mean"}, 2)


@pytest.mark.parametrize(
    ("method", "strategy"),
    [("lotr", "exact-average"), ("loldu", "exact-average"), ("ffa-lora", "ffa-lora"), ("rolora", "rolora")]
    + [("lora", name) for name in ("fedit", "flora", "fedex-lora", "flexlora", "hetlora")],
)
def test_strategies_pass_the_suite_with_ranks_that_differ(method: str, strategy: str) -> None:
    check_strategy(strategy, method=method, ranks=(4, 2, 1, 3))


def test_the_owners_mean_is_not_the_mean_of_the_updates_and_the_certificate_says_so() -> None:
    with pytest.raises(AssertionError, match="round 1: what is published is not the mean of the updates"):
        check_strategy("exact-average", {"estimator": "owners"}, ranks=(4, 2, 1, 3))
    check_strategy("exact-average", {"estimator": "owners"})


@pytest.mark.parametrize("method", ["lora-xs", "lora", "ffa-lora"])
def test_a_client_of_rank_k_trains_what_it_would_in_a_model_of_rank_k(method: str, tiny_gpt2: Path) -> None:
    """Bases nest: the leading k of r vectors are those of rank k."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 500, 30).astype(np.int32)
    data = Examples(tokens, np.arange(0, 31, 5), np.ones(6, np.int64), causal=True)
    found = []
    start: dict[str, torch.Tensor] = {}
    for rank in (4, 2):
        spec = ModelSpec(str(tiny_gpt2), "causal-lm", 0, False, 0)
        base = load_base(spec)
        config = CoreConfig(method=method, r=rank, target_modules=adaptable_layers(base, "all-linear"))
        if method == "ffa-lora":
            config.basis = "svd"
        model = TrainableModel(base, spec, config)
        start = start or {name: block(name, value, 2) for name, value in model.values().items()}
        work = [ClientWork(np.arange(3), np.random.default_rng(k)) for k in range(2)]
        # eps: an entry whose gradient is rounding noise must not take a full step of it (as in test_training).
        training = LocalTraining(batch_size=2, lr=0.05, weight_decay=0.1, clip_norm=0.5, epochs=2, eps=1e-4)
        found.append(train_cohort(model, start, data, work, training))
    for ours, theirs in zip(*found, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=rounding(model.module))
        for name, value in theirs.tensors.items():
            assert not torch.equal(value, start[name])
            moved = float((value - start[name]).norm())
            assert float((ours.tensors[name] - value).norm()) <= rounding(model.module) * moved + UNIT * value.norm()


@pytest.fixture(scope="session")
def small(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """Five clients of ranks 4, 2, 1, 4, 2."""
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 5,
        "sample": 3,
        "rounds": 3,
        "rank": 4,
        "client_rank": "4,2,1",
        "lr_schedule": "constant",
        "partition": "iid",
        "max_examples": 9,
        "public_examples": 16,
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
    }


HEAD = 2 * 32 + 2


@pytest.mark.parametrize(
    ("method", "strategy"),
    [("lora-xs", "exact-average"), ("lora", "flora"), ("lora", "flexlora"), ("loldu", "fedavgm")],
)
def test_only_a_clients_block_crosses_and_doctor_knows(
    method: str, strategy: str, small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, and resumed to the same bytes."""
    words = flags({**small, "method": method, "strategy": strategy, "out": tmp_path / "run"})
    doctor.main([*words, "--json"])
    needs = json.loads(capsys.readouterr().out)["needs"]
    assert simulate.main([*words, "--quiet"]) == 0
    summary, rows = read_run(tmp_path / "run")
    ranks = [4, 2, 1, 4, 2]
    ledger = read_ledger(tmp_path / "run" / "ledger")
    for row in ledger:
        if row.kind in ("update", "broadcast"):
            r = ranks[row.client]
            numbers = {"lora-xs": 13 * r * r, "loldu": 13 * r, "lora": r * sum(map(sum, WIDTHS))}[method]
            assert row.payload_bytes == 4 * (numbers + HEAD), row
    communication = summary["communication"]
    assert needs["upload_bytes"] == pytest.approx(communication["upload_payload_bytes_per_client_round"], rel=1e-12)
    assert needs["download_bytes"] == pytest.approx(communication["download_payload_bytes_per_client_round"], rel=1e-12)
    assert needs["total_bytes"] == sum(row.payload_bytes for row in ledger if row.kind != "control")
    errors = [row["aggregation_error"] for row in rows]
    assert all((error > 1e-6) == (strategy == "flexlora") for error in errors), errors
    assert summary["failed_clients"] == 0
    again = {**small, "method": method, "strategy": strategy, "out": tmp_path / "again"}
    run_simulation(SimulationConfig(**again | {"rounds": 1}))
    resumed = run_simulation(SimulationConfig(**again | {"resume": True}))
    assert resumed.summary["trained_sha256"] == summary["trained_sha256"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--client-rank 4,8", "--client-rank 4,8 with --rank 16: the largest must be --rank; give --rank 8"),
        ("--client-rank 16,0", "--client-rank 16,0: expected ranks with commas, such as '4,8,16'"),
        ("--client-rank 16:0,8:0", "expected ranks with commas"),
        ("--client-rank 16:1,8", "expected ranks with commas"),
        ("--client-rank 16,8 --method ravan", "--client-rank 16,8 with --method ravan: the core 'heads' has no"),
        ("--client-rank 16,8 --method full", "with --method full: this method trains whole matrices"),
        ("--client-rank 16,8 --method head", "with --method head: this method adapts no layer"),
        ("--method full --alpha 2", "--alpha 2.0 with --method full: this method trains whole matrices"),
    ],
)
def test_what_goes_together_and_what_does_not(words: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load(words.split())
