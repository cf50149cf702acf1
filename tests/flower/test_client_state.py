"""What a client keeps between rounds is its own, is found again however long it was absent, and survives kill -9."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.numpy import load_file

from fedlotr import SimulationConfig, run_simulation, simulate
from fedlotr.adapters import CoreConfig
from fedlotr.communication.ledger import read_ledger
from fedlotr.errors import InputError
from fedlotr.evaluation.scores import evaluate
from fedlotr.evaluation.spreads import spread_of
from fedlotr.fleet.draws import EVEN
from fedlotr.flower.link import Reply
from fedlotr.flower.links.moments import MOMENTS, Moments
from fedlotr.flower.round import Federation, sample_clients
from fedlotr.flower.serialize import unpack
from fedlotr.flower.state import load_clients
from fedlotr.run.checking import check, hold_back
from fedlotr.run.directory import RunDirectory
from fedlotr.run.federation import federation
from fedlotr.run.simulation import check_all, resolve
from fedlotr.streams import generator
from fedlotr.training.cohort import ClientWork, client_batches
from tests.run.test_simulation import assert_same_results, flags, timeless
from tests.support import Simulate, prepare_again, read_run

CLIENTS, ROUNDS, R = 6, 7, 4
LR = 5.0
"""So large that A moves by more than the rounding of float32, though B starts at zero."""


def options(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": CLIENTS,
        "sample": 2,
        "rank": R,
        "public_examples": 16,
        "eval_examples": 12,
        "max_examples": 15,
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
    }


def asked(seed: int) -> list[list[int]]:
    """The clients of each round, as a run of that seed samples them."""
    values: Any = dict.fromkeys(Federation.__dataclass_fields__)
    run = Federation(**{**values, "clients": CLIENTS, "sampled": 2, "seed": seed, "sampler": EVEN})
    return [list(sample_clients(run, number)) for number in range(1, ROUNDS + 1)]


def returns(seed: int) -> set[int]:
    """Who takes part in the first round and the last, and in none between."""
    first, *between, last = asked(seed)
    return (set(first) & set(last)).difference(*between)


SEED = next(seed for seed in range(1000) if returns(seed))
(RETURNS, *_) = returns(SEED)


@pytest.fixture(scope="module")
def personal_options(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """FedSA-LoRA with an optimizer that is kept: factors and moments are in every client's state."""
    return {
        **options(tiny_bert, animals),
        "seed": SEED,
        "rounds": ROUNDS,
        "method": "fedsa-lora",
        "optimizer": "sgd",
        "momentum": 0.9,
        "optimizer_state": "keep",
        "lr": LR,
        "head_lr": 0.1,
        "local_epochs": 1,
    }


@pytest.fixture(scope="module")
def personal_run(personal_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run with the checkpoint of every round, and an adapter of every client."""
    out = tmp_path_factory.mktemp("personal") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlotr.run.directory.KEPT_CHECKPOINTS", ROUNDS)
        run_simulation(SimulationConfig(**personal_options, client_adapters=True, out=out))
    yield out


def states(run: Path, number: int) -> dict[int, RecordDict]:
    """What the clients have kept after a round."""
    checkpoint = RunDirectory(run)._read_checkpoint(run / "checkpoints" / f"round-{number:05d}.json")
    return load_clients(checkpoint.extra["clients"], checkpoint.arrays)


def test_a_client_that_returns_after_five_rounds_finds_what_it_kept(personal_run: Path) -> None:
    first, before, after = (states(personal_run, number)[RETURNS] for number in (1, ROUNDS - 1, ROUNDS))
    assert first == before != after
    assert set(first) == {"personal", "moments"}
    assert set(states(personal_run, 1)) == set(asked(SEED)[0]), "who was not asked keeps nothing"


def test_personal_factors_equal_a_plain_sequential_loop(
    personal_options: dict[str, Any], personal_run: Path, tmp_path: Path
) -> None:
    """A, B and the velocities of every client by torch's own SGD, one client after the other, round by round."""
    config = resolve(SimulationConfig(**personal_options))
    prepared = prepare_again(check(config), tmp_path / "work")
    model, run, place = prepared.model, federation(config, prepared), prepared.workplace
    begun = {name: model.parameter(name).detach().clone() for name in model.trained}
    shared = {name: value.double() for name, value in begun.items() if not name.endswith("core_B")}
    own = [{n: v.clone() for n, v in begun.items() if n.endswith("core_B")} for _ in range(CLIENTS)]
    velocity: list[dict[str, Any]] = [{} for _ in range(CLIENTS)]
    for number, clients in enumerate(asked(SEED), start=1):
        ends = []
        for k in clients:
            with torch.no_grad():
                for name in model.trained:
                    model.parameter(name).copy_(own[k][name] if name in own[k] else shared[name])
            parameters = {name: model.parameter(name).requires_grad_() for name in model.trained}
            groups = [
                {"params": [p], "lr": (0.1 if n in model.head_names else LR) * run.lr_factor(number)}
                for n, p in parameters.items()
            ]
            oracle = torch.optim.SGD(groups, momentum=0.9)
            for name, p in parameters.items():
                if name in velocity[k]:
                    oracle.state[p]["momentum_buffer"] = velocity[k][name]
            work = ClientWork(place.rows(k), generator(SEED, "shuffle", number, k))
            for rows in client_batches(work, prepared.checked.training):
                oracle.zero_grad()
                model.losses(place.train.batch(rows)).mean().backward()
                oracle.step()
            velocity[k] = {name: oracle.state[p]["momentum_buffer"].clone() for name, p in parameters.items()}
            ends.append({name: p.detach().clone() for name, p in parameters.items()})
            own[k] = {name: ends[-1][name] for name in own[k]}
            for p in parameters.values():
                p.requires_grad_(False)
        weights = np.array([len(place.rows(k)) for k in clients]) / sum(len(place.rows(k)) for k in clients)
        shared = {n: sum(w * end[n].double() for w, end in zip(weights, ends, strict=True)) for n in shared}
    found = load_file(personal_run / "checkpoints" / f"round-{ROUNDS:05d}.safetensors")
    kept = states(personal_run, ROUNDS)

    def close(found: Any, wanted: Any, start: Any) -> None:
        # Gradients of about 1e-7 in float32, and A as large as 0.1 in float32 messages: 1e-5 is their own rounding.
        rounding = np.finfo(np.float32).eps * np.linalg.norm(wanted)
        assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted - start) + rounding

    for name, value in shared.items():
        close(found[name], value.numpy(), begun[name].numpy())
    for k, state in kept.items():
        for name, array in state["personal"].items():  # type: ignore[union-attr]
            close(array.numpy(), own[k][name].numpy(), begun[name].numpy())

    # The scores of every client by itself, on rows that it has not trained on.
    losses, scores = [], []
    for k in range(CLIENTS):
        rows = place.held_back(k)
        assert len(rows) and not set(rows) & set(place.rows(k))
        model.assign({**{n: v.float() for n, v in shared.items()}, **own[k]})
        one = evaluate(model, place.train, rows)
        losses.append(one.mean_loss)
        scores.append(one.accuracy)
    row = read_run(personal_run)[1][-1]
    reported = row["client_evaluation"]
    assert reported["loss"] == pytest.approx(np.mean(losses), rel=1e-4) == pytest.approx(row["loss"])
    assert (reported["mean"], reported["spread"]) == pytest.approx((np.mean(scores), np.std(scores)))
    assert row["accuracy"] == reported["mean"] and reported["worst_tenth"] == min(scores)


def test_what_stays_with_a_client_never_crosses_the_wire(personal_run: Path) -> None:
    saved = load_file(personal_run / "checkpoints" / f"round-{ROUNDS:05d}.safetensors")
    shared = sum(array.nbytes for name, array in saved.items() if not name.startswith("client-state"))
    assert not any(name.endswith("core_B") for name in saved)
    for entry in read_ledger(personal_run / "ledger"):
        assert entry.payload_bytes == shared or entry.kind in ("control", "basis")
    summary, rows = read_run(personal_run)
    assert all(row["aggregation_error"] is None for row in rows)
    assert summary["aggregation_error_reason"].startswith("B of every client stays with it")


def test_every_client_has_an_adapter_of_its_own(personal_run: Path) -> None:
    kept = states(personal_run, ROUNDS)
    folders = {k: personal_run / "adapters" / f"client-{k:05d}" for k in range(CLIENTS)}
    shared = load_file(personal_run / "adapter" / "adapter_model.safetensors")
    scale = CoreConfig(method="fedsa-lora", r=R).scaling_of("any")
    for k, folder in folders.items():
        tensors = load_file(folder / "adapter_model.safetensors")
        own = kept[k]["personal"] if k in kept else {}
        for name, value in tensors.items():
            if name.endswith("lora_B.weight"):
                key = f"{name.removesuffix('.lora_B.weight')}.core_B"
                wanted = own[key].numpy() if own else np.zeros_like(value)  # type: ignore[index,union-attr]
                np.testing.assert_allclose(value, wanted * scale)
            else:
                np.testing.assert_array_equal(value, shared[name])
        assert f"that of client {k}" in (folder / "README.md").read_text(encoding="utf-8")
    assert "what the clients share" in (personal_run / "adapter" / "README.md").read_text(encoding="utf-8")


MORTAL = """
import os, signal
from pathlib import Path
from fedlotr.strategies.fedsa import FedSA


class Mortal(FedSA):
    def combine(self, updates, server_round):
        flag = Path(os.environ["MORTAL_FLAG"])
        if server_round == 7 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().combine(updates, server_round)
"""


def test_it_finds_it_also_after_kill_and_resume(
    personal_options: dict[str, Any],
    personal_run: Path,
    simulate: Simulate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    monkeypatch.setenv("MORTAL_FLAG", str(tmp_path / "flag"))
    given = {**personal_options, "strategy": f"{tmp_path}/mortal.py:Mortal", "codec": "float32"}
    died = simulate(*flags(given), "--out", tmp_path / "run")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    run_simulation(SimulationConfig(**given, out=tmp_path / "run", resume=True))
    assert states(tmp_path / "run", ROUNDS) == states(personal_run, ROUNDS)
    (found, rows), (wanted, expected) = read_run(tmp_path / "run"), read_run(personal_run)
    assert found["trained_sha256"] == wanted["trained_sha256"] and timeless(rows) == timeless(expected)


@pytest.fixture(scope="module")
def corrected(
    tiny_bert: Path, animals: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SimulationConfig, Path]:
    """SCAFFOLD under AdamW with mean-v: c and c_i, and means of moments, all in one run."""
    out = tmp_path_factory.mktemp("corrected") / "run"
    config = SimulationConfig(
        **options(tiny_bert, animals),
        rounds=4,
        method="lotr",
        strategy="scaffold",
        optimizer_state="mean-v",
        client_eval=0.3,
        out=out,
    )
    run_simulation(config)
    return config, out


def test_control_variates_and_mean_moments_are_priced(corrected: tuple[SimulationConfig, Path]) -> None:
    config, run = corrected
    tensors = 13 + 2  # the adapted layers' cores; the head's weight and bias
    numbers = 13 * R * R + 2 * 32 + 2
    rows = [entry for entry in read_ledger(run / "ledger") if entry.kind == "control"]

    def sizes(number: int, direction: str) -> list[int]:
        first = next(entry.client for entry in rows if entry.round == number)
        return [e.payload_bytes for e in rows if (e.round, e.client, e.direction) == (number, first, direction)]

    for number in range(1, config.rounds + 1):
        assert 4 * numbers in sizes(number, "up"), "Δc_i"
        assert 4 * numbers in sizes(number, "down"), "c"
        assert 8 * tensors in sizes(number, "up"), "the mean of v and its weight, two numbers a tensor"
        assert (8 * tensors in sizes(number, "down")) == (number > 1), "there is none before the first round"
    summary = read_run(run)[0]
    assert summary["communication"]["upload_payload_bytes_per_client_round"] == 4 * numbers
    assert summary["aggregation_error_max"] <= 1e-6, "the mean of corrected clients is exact too"
    assert summary["client_evaluation"]["clients"] == CLIENTS and "loss" in summary["final"]


def test_a_run_with_both_goes_on_to_the_same_bytes(corrected: tuple[SimulationConfig, Path], tmp_path: Path) -> None:
    config, whole = corrected
    shutil.copytree(whole, tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").glob("round-00004.*"):
        path.unlink()
    run_simulation(config.model_copy(update={"out": tmp_path / "cut", "resume": True}))
    assert_same_results(tmp_path / "cut", whole)
    assert states(tmp_path / "cut", 4) == states(whole, 4)


def test_means_of_moments_go_on_from_round_to_round(corrected: tuple[SimulationConfig, Path]) -> None:
    _, run = corrected
    directory = RunDirectory(run)
    third, last = (directory._read_checkpoint(run / "checkpoints" / f"round-{n:05d}.json") for n in (3, 4))
    before, then = (unpack(c.extra["links"]["moments"], c.arrays)["means"] for c in (third, last))
    assert before
    for name, (mean, weight) in before.items():
        after, more = then[name]
        assert mean > 0 and after > 0, name
        assert 0 < weight < more < 1, "every round the averages are over more steps"
    assert "moments" not in states(run, 4)[next(iter(states(run, 4)))], "nothing of it stays with a client"


def test_means_of_moments_are_weighted_as_the_updates_and_stay_where_nothing_moved() -> None:
    link = Moments("mean-v")
    link.means = {"B": np.array([9.0, 0.9])}

    def reply(client: int, weight: float, *pair: float) -> Reply:
        moments = ArrayRecord({"A": Array(np.float32(pair))})
        return Reply(client=client, arrays=ArrayRecord(), weight=weight, examples=1, records={MOMENTS: moments})

    link.commit([reply(0, 1.0, 0.1, 0.5), reply(1, 3.0, 0.5, 0.7)])
    np.testing.assert_allclose(link.means["A"], [0.4, 0.65], rtol=1e-6)
    np.testing.assert_array_equal(link.means["B"], [9.0, 0.9])


def test_a_share_of_each_clients_rows_is_held_back() -> None:
    parts = [np.arange(0, 20), np.arange(20, 22), np.arange(22, 23)]
    kept, held = hold_back(parts, 0.25, 0)
    assert [len(rows) for rows in held] == [5, 1, 0], "who has one example trains on it"
    for part, one, other in zip(parts, kept, held, strict=True):
        assert sorted([*one, *other]) == list(part)
    assert [list(rows) for rows in hold_back(parts, 0.25, 0)[1]] == [list(rows) for rows in held]
    assert [list(rows) for rows in hold_back(parts, 0.25, 1)[1]] != [list(rows) for rows in held]
    assert [list(rows) for rows in hold_back(parts, 0.0, 0)[0]] == [list(part) for part in parts]


def test_the_worst_tenth_are_the_lowest_accuracies_and_the_largest_perplexities() -> None:
    scores = [float(k) for k in range(20)]
    assert spread_of("accuracy", scores)["worst_tenth"] == 0.5
    found = spread_of("perplexity", scores)
    assert (found["worst_tenth"], found["mean"]) == (18.5, 9.5)
    assert spread_of("accuracy", [0.3])["worst_tenth"] == 0.3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optimizer sgd --optimizer-state mean-v", "second moments belong to the optimizer 'adamw'"),
        ("--optimizer sgd --optimizer-state keep", "sgd without momentum has nothing to keep"),
        ("--optimizer-state kep", "did you mean 'keep'"),
        ("--method fedsa-lora --client-eval 0", "can only be scored on rows of their own"),
        ("--method lotr --client-adapters", "no factors stay with the clients"),
        ("--method personal-core --basis lora", "nothing would learn"),
        ("--method personal-core --tie type", "no layers can share them"),
        ("--method personal-core --core mix", "this method trains B and A"),
        ("--method lotr --client-eval 1", "expected less than 1"),
    ],
)
def test_what_does_not_go_together_is_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main([*words.split(), "--clients", "5"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "ravan", "strategy": "scaffold"}, "scales start again in every round"),
        ({"strategy": "fedprox", "strategy_arg": {"mu": -1}}, "mu is -1; expected a number, 0 or more"),
        ({"clients": 104, "method": "fedsa-lora", "partition": "iid"}, "no client has more than one example"),
    ],
)
def test_what_the_strategy_or_the_data_cannot_do_is_refused(
    changed: dict[str, Any], said: str, tiny_bert: Path, animals: Path
) -> None:
    with pytest.raises(InputError, match=said):
        check_all(resolve(SimulationConfig(**{**options(tiny_bert, animals), **changed})))


@pytest.mark.parametrize(
    "changed",
    [{"strategy": "scaffold", "method": "lotr"}, {"method": "fedsa-lora"}, {"optimizer_state": "keep"}],
)
def test_flowers_own_engine_is_refused_where_clients_keep_something(
    changed: dict[str, Any], tiny_bert: Path, animals: Path
) -> None:
    given = {**options(tiny_bert, animals), **changed, "engine": "flower"}
    with pytest.raises(InputError, match="Flower does not show what its clients keep"):
        check_all(resolve(SimulationConfig(**given)))
