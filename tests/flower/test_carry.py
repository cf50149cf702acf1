"""The carried term: exact as factors and as a matrix, followed by absent clients, priced, saved and exported."""

import copy
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlotr import CoreConfig, SimulationConfig, run_simulation, simulate
from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.export import whole
from fedlotr.communication.ledger import read_ledger
from fedlotr.flower import Update, WithCarry
from fedlotr.flower.blame import StrategyError
from fedlotr.flower.client_app import Worker
from fedlotr.flower.link import Job, Refused, Reply
from fedlotr.flower.links.carry import SAYS, CarriedTerm, carry_records, model_sha256
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import to_record
from fedlotr.flower.round import sample_clients
from fedlotr.flower.workplace import Workplace
from fedlotr.run.checking import check
from fedlotr.run.federation import federation
from fedlotr.run.preparation import prepare
from fedlotr.run.resumption import saved_configuration
from fedlotr.run.simulation import resolve
from fedlotr.testing import check_strategy
from tests.run.test_simulation import flags
from tests.support import (
    TEXTS,
    Simulate,
    assert_logits,
    assert_within,
    deadly,
    float32_bound,
    our_logits,
    plain_logits,
    prepare_again,
    read_run,
)

STRATEGIES = ("flora", "fedex-lora")
WIDTHS = [(32, 32)] * 9 + [(32, 48)] * 2 + [(48, 32)] * 2
"""(d_in, d_out) of the tiny BERT's layers: in each of two blocks four square ones, one up, one down; the pooler."""


def pair(version: int, k: int, d_out: int = 6, d_in: int = 8) -> Factors:
    stream = torch.Generator().manual_seed(version)
    return Factors(torch.randn(k, d_in, generator=stream), torch.randn(d_out, k, generator=stream))


def grown(*ranks: int) -> list[Carry]:
    """Versions 0, 1, ... with a part of each rank in layer "a", and in "b" in odd versions alone."""
    found = [Carry()]
    for version, k in enumerate(ranks, start=1):
        parts = {"a": pair(version, k)} | ({"b": pair(-version, 1)} if version % 2 else {})
        found.append(found[-1].grown(parts))
    return found


def test_a_term_is_its_parts_stacked_until_their_rank_passes_the_layers_and_then_one_matrix() -> None:
    versions = grown(2, 2, 2, 1, 2)
    total = torch.zeros(6, 8, dtype=torch.float64)
    for version, k in enumerate((2, 2, 2, 1, 2), start=1):
        part = pair(version, k)
        total += part.B.double() @ part.A.double()
        term = versions[version].terms["a"]
        assert (term.dense is None) == (version <= 3), "rank 6 of a 6 × 8 layer fits, 7 does not"
        assert term.rank == min(2 * version, 6)
        torch.testing.assert_close(term.matrix(), total, atol=1e-12 if version <= 3 else 1e-5, rtol=0)
    assert versions[0].terms == {}, "a version never changes"


def test_a_client_that_trained_beside_another_carried_term_is_refused() -> None:
    none, one, two = grown(2, 1)
    for carry, said, fits in (
        *((none, "", True), (none, one.sha256, False)),
        *((two, two.sha256, True), (two, one.sha256, False), (two, "", False)),
    ):
        identity = {SAYS: said} if said else {}
        reply = Reply(client=0, arrays=to_record({}), weight=1.0, examples=1, identity=identity)
        if fits:
            CarriedTerm(carry).verify(reply)
        else:
            with pytest.raises(Refused, match="it trained beside another carried term"):
                CarriedTerm(carry).verify(reply)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 2, 2, 1, 1, 2, 3, 2), (7, 1, 1), (3, 3, 3, 3)])
def test_whoever_missed_whatever_catches_up_to_equal_bytes(ranks: tuple[int, ...]) -> None:
    versions = grown(*ranks)
    for since, before in enumerate(versions):
        for until in versions[since:]:
            received = until.missed(since)
            assert sum(t.numel() for t in received.values()) <= 2 * 2 * 6 * 8, "flat once dense"
            assert before.caught_up(until.version, received).sha256 == until.sha256
            tensors, about = until.saved()
            again = Carry.restored(tensors, json.loads(json.dumps(about)))
            assert again.sha256 == until.sha256
            assert list(again.missed(since)) == list(received), "a server that was resumed sends the same"
            nearer = versions[(since + until.version + 1) // 2]
            assert nearer.caught_up(until.version, received).sha256 == until.sha256, "parts it has are passed over"


def test_an_absent_client_is_sent_parts_while_they_are_less_than_the_matrix() -> None:
    last = grown(3, 3, 1, 1, 1)[-1]
    numbers = [sum(t.numel() for name, t in last.missed(since).items() if name[0] == "a") for since in range(6)]
    assert numbers == [48, 48, 42, 28, 14, 0], "48 is the matrix, 14 a part of rank 1"


def test_the_export_of_a_matrix_is_exact_to_the_bit() -> None:
    for shape in ((3, 5), (5, 3), (4, 4)):
        delta = torch.randn(shape)
        lora_a, lora_b = whole(delta)
        assert torch.equal(lora_b @ lora_a, delta) and lora_a.shape[0] == min(shape)


# --- the strategies ---------------------------------------------------------------------------------------------------

A, B = "base_model.model.q.core_A", "base_model.model.q.core_B"


def updates(clients: int, r: int = 2) -> list[Update]:
    rng = np.random.default_rng(3)
    return [Update(k, {A: rng.normal(size=(r, 7)), B: rng.normal(size=(5, r))}, k + 1.0) for k in range(clients)]


@pytest.mark.parametrize("clients", [1, 2, 4])
def test_the_strategies_are_their_papers_formulas(clients: int) -> None:
    sent = updates(clients)
    mean = sum(u.weight * u.arrays[B] @ u.arrays[A] for u in sent) / sum(u.weight for u in sent)
    for name, rank in (("flora", clients * 2), ("fedex-lora", (clients - 1) * 2)):
        strategy: Any = load_strategy(name, {}, clients, seed=4)
        found = strategy.combine(sent, 1)
        assert isinstance(found, WithCarry)
        left, right = found.carry.get("q", (np.zeros((5, 0)), np.zeros((0, 7))))
        np.testing.assert_allclose(found.arrays[B] @ found.arrays[A] + left @ right, mean, atol=1e-12)
        assert left.shape[1] == rank, "what a round adds to the rank"


def test_flora_begins_anew_each_round_and_the_same_again_after_a_resume() -> None:
    made: Any = load_strategy("flora", {}, 2, seed=4)
    first, second = (made.combine(updates(2), number).arrays for number in (1, 2))
    assert not first[B].any() and np.abs(first[A]).max() <= 7**-0.5 and not np.array_equal(first[A], second[A])
    again: Any = load_strategy("flora", {}, 2, seed=4)
    assert np.array_equal(again.combine(updates(2), 2).arrays[A], second[A])
    other: Any = load_strategy("flora", {}, 2, seed=5)
    assert not np.array_equal(other.combine(updates(2), 2).arrays[A], second[A])


@pytest.mark.parametrize(("name", "arguments"), [("flora", {}), ("flora", {"restart": "start"}), ("fedex-lora", {})])
def test_carrying_strategies_pass_the_suite(name: str, arguments: dict[str, Any]) -> None:
    check_strategy(name, arguments, method="lora")


DEFECTS = {
    "both_sides": "Product(left, right * np.repeat(shares(updates), RANK)[:, None])",  # FLoRA's weights twice
    "forgets_the_scale": "Product(left / 1.5, right)",  # FedLLM-Factory; fed-sb's merge
    "transposed": "Product(right.T, left.T) if len(left) == right.shape[1] else Product(left, right)",  # fedex-lora
    "first_client_alone": "Product(left[:, :RANK], right[:RANK])",  # weighted_sindgle_weights
    "truncated": "Product(*leading(left @ right))",
    "all_rounds_so_far": "self.hoard(layer, left, right)",  # client_model_dicts
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_suite_sees_the_defects_of_public_carriers(defect: str, tmp_path: Path) -> None:
    (tmp_path / "defects.py").write_text(
        "import numpy as np\n"
        "from fedlotr.flower import Product, WithCarry\n"
        "from fedlotr.strategies.flora import FLoRA\n"
        "RANK = 4\n"
        "def shares(updates):\n"
        "    total = sum(u.weight for u in updates)\n"
        "    return [u.weight / total for u in updates]\n"
        "def leading(matrix):\n"
        "    u, s, v = np.linalg.svd(matrix, full_matrices=False)\n"
        "    return u[:, :3] * s[:3], v[:3]\n"
        "class Broken(FLoRA):\n"
        "    def hoard(self, layer, left, right):\n"
        "        kept = vars(self).setdefault('kept', {}).setdefault(layer, [])\n"
        "        kept.append((left, right))\n"
        "        return Product(np.concatenate([k[0] for k in kept], 1), np.concatenate([k[1] for k in kept], 0))\n"
        "    def combine(self, updates, server_round):\n"
        "        new, carry = super().combine(updates, server_round)\n"
        f"        return WithCarry(new, {{layer: {DEFECTS[defect]} for layer, (left, right) in carry.items()}})\n",
        encoding="utf-8",
    )
    with pytest.raises(AssertionError, match="is not the mean of the updates"):
        check_strategy(f"{tmp_path / 'defects.py'}:Broken", method="lora")


@pytest.mark.parametrize(
    ("carried", "message"),
    [
        ("{'r': Product(np.ones((5, 1)), np.ones((1, 7)))}", "it carries r, expected an adapted layer such as"),
        ("{n: Product(np.ones((1, 1)), np.ones((1, 1))) for n in by_layer(mean)}", "expected .* in all"),
        ("{n: Product(x[n] + np.nan, y[n]) for n in x}", "not finite"),
    ],
)
def test_what_cannot_be_carried_is_blamed_on_the_strategy(
    carried: str, message: str, small: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "odd.py").write_text(
        "import numpy as np\n"
        "from fedlotr.flower import Product, Strategy, WithCarry, by_layer, weighted_mean\n"
        "class Odd(Strategy):\n"
        "    def combine(self, updates, server_round):\n"
        "        mean = weighted_mean(updates)\n"
        "        x = {n: mean[f['B']] for n, f in by_layer(mean).items()}\n"
        "        y = {n: mean[f['A']] for n, f in by_layer(mean).items()}\n"
        f"        return WithCarry(mean, {carried})\n",
        encoding="utf-8",
    )
    config = SimulationConfig(**small, strategy=f"{tmp_path / 'odd.py'}:Odd", out=tmp_path / "run")
    with pytest.raises(StrategyError, match=f"strategy Odd, aggregate_train, round 1.*{message}"):
        run_simulation(config)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """A run whose carried term becomes dense in its midst; α ≠ r."""
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 7,
        "sample": 3,
        "rounds": 7,
        "rank": 4,
        "alpha": 6.0,
        "lr": 0.003,
        "head_lr": 0.003,
        "partition": "iid",
        "lr_schedule": "constant",
        "public_examples": 16,
        "eval_every": 3,
        "method": "lora",
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
    }


@pytest.fixture(scope="module")
def runs(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run of each strategy, from the command line."""
    found = {name: tmp_path_factory.mktemp("carry") / name for name in STRATEGIES}
    for name, out in found.items():
        assert simulate.main([*flags({**small, "strategy": name, "out": out}), "--quiet"]) == 0
    return found


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_is_exact_and_every_part_is_priced(name: str, runs: dict[str, Path], small: dict[str, Any]) -> None:
    """The oracle reckons from the formulas alone: c·r or (c-1)·r a round, in a layer until min(d_in, d_out)."""
    summary, rows = read_run(runs[name])
    assert all(row["aggregation_error"] <= 1e-6 and row["transport_error"] <= 1e-5 for row in rows)
    assert summary["final"]["loss"] < summary["initial"]["loss"] and summary["failed_clients"] == 0
    config = SimulationConfig(**small)
    added = {"flora": 3 * 4, "fedex-lora": 2 * 4}[name]
    last_seen: dict[int, int] = {}
    ledger = read_ledger(runs[name] / "ledger")
    checked = prepare_again(check(resolve(config)), runs[name] / ".work" / "again")
    for number in range(1, 8):
        version = number - 1
        for client in sample_clients(federation(config, checked), number):
            missed = version - last_seen.get(client, 0)
            numbers = 0
            for d_in, d_out in WIDTHS:
                parts = missed * added * (d_in + d_out)
                dense = version * added > min(d_in, d_out)
                numbers += min(parts, d_in * d_out) if dense else parts
            paid = [row for row in ledger if (row.round, row.client, row.kind) == (number, client, "carry")]
            assert sum(row.payload_bytes for row in paid) == 4 * numbers, (number, client)
            assert all(row.direction == "down" and row.wire_bytes > row.payload_bytes for row in paid)
            last_seen[client] = version
    assert max(missed_by(ledger)) <= 4 * sum(d_in * d_out for d_in, d_out in WIDTHS) * 2, "and then it is flat"
    downloads = [row.payload_bytes for row in ledger if row.kind in ("broadcast", "carry")]
    spoken_to = len({(row.round, row.client) for row in ledger})
    mean = summary["communication"]["download_payload_bytes_per_client_round"]
    assert mean == pytest.approx(sum(downloads) / spoken_to)


def missed_by(ledger: list[Any]) -> list[int]:
    return [row.payload_bytes for row in ledger if row.kind == "carry"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_that_is_cut_off_and_resumed_ends_in_the_same_bytes(
    name: str, runs: dict[str, Path], small: dict[str, Any], tmp_path: Path
) -> None:
    """After rounds 2 and 5: with factors, and with matrices; a client is absent across both."""
    options = {**small, "strategy": name, "out": tmp_path / "run"}
    for rounds in (2, 5):
        run_simulation(SimulationConfig(**options | {"rounds": rounds, "resume": rounds > 2}))
    run_simulation(SimulationConfig(**options | {"resume": True}))
    assert read_ledger(tmp_path / "run" / "ledger") == read_ledger(runs[name] / "ledger")
    found, wanted = read_run(tmp_path / "run")[0], read_run(runs[name])[0]
    assert found["trained_sha256"] == wanted["trained_sha256"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "run/adapter" / file).read_bytes() == (runs[name] / "adapter" / file).read_bytes()


def test_trained_sha256_is_of_the_carried_term_too() -> None:
    arrays = to_record({"C": np.eye(2, dtype=np.float32)})
    hashes = [model_sha256(arrays, carry) for carry in grown(2, 2, 3)]
    assert len(set(hashes)) == 4
    for carry in grown(2, 2, 3)[1:]:
        link = CarriedTerm(Carry())
        link.load_state(CarriedTerm(carry).state())
        assert model_sha256(arrays, link.carry) == model_sha256(arrays, carry)


@pytest.mark.slow
def test_kill_9_in_the_midst_changes_nothing(
    runs: dict[str, Path], small: dict[str, Any], simulate: Simulate, tmp_path: Path
) -> None:
    """Killed in round 6, after clients have taken in what round 5 merged, and before anything of it is saved."""
    options = {
        **small,
        "strategy": deadly(tmp_path, "fedex_lora:FedExLoRA", in_round=6),
        "out": tmp_path / "run",
        "codec": "float32",
    }
    assert simulate(*flags(options)).returncode == -signal.SIGKILL
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    resumed = run_simulation(SimulationConfig(**options, resume=True))
    assert resumed.summary["trained_sha256"] == read_run(runs["fedex-lora"])[0]["trained_sha256"]
    assert read_ledger(tmp_path / "run" / "ledger") == read_ledger(runs["fedex-lora"] / "ledger")


@pytest.mark.slow
@pytest.mark.serial
def test_workers_of_ray_follow_to_the_same_bytes(
    runs: dict[str, Path], small: dict[str, Any], tmp_path: Path, ray_session: None
) -> None:
    """Two processes share seven clients: each brings its model to a message's version, whoever had the last one."""
    options = {**small, "rounds": 4, "engine": "ray", "workers": 2, "cohort": 1, "strategy": "fedex-lora"}
    result = run_simulation(SimulationConfig(**options, out=tmp_path / "ray"))
    alone = run_simulation(
        SimulationConfig(**{**small, "rounds": 4, "cohort": 1}, strategy="fedex-lora", out=tmp_path / "local")
    )
    assert result.summary["trained_sha256"] == alone.summary["trained_sha256"]
    assert result.summary["failed_clients"] == 0


def test_a_new_worker_follows_from_what_the_clients_were_sent_before(small: dict[str, Any], tmp_path: Path) -> None:
    prepared = prepare(check(resolve(SimulationConfig(**small))), tmp_path / "work")
    layer = next(iter(prepared.model.trained.values()))[0]
    versions = [Carry()]
    for version in (1, 2, 3):
        versions.append(versions[-1].grown({layer: pair(version, 2, 32, 32)}))

    def worker() -> CarriedTerm:
        return Worker(Workplace(tmp_path / "work")).chain.the(CarriedTerm)

    def follow(link: CarriedTerm, version: int, since: int) -> str:
        job = Job(client=0, records=carry_records(versions[version], since), memory={})
        link.receive(job)
        link.send(job)
        return str(job.identity["carry-sha256"])

    one = worker()
    follow(one, 1, 0)
    follow(one, 2, 1)
    another = worker()  # of a process that died, and came back
    assert follow(another, 3, 2) == versions[3].sha256
    assert follow(one, 3, 0) == versions[3].sha256
    assert sorted(path.stem for path in (tmp_path / "work" / "carry").iterdir()) == ["2", "3"]
    for path in (tmp_path / "work" / "carry").iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match="the carried term of version 2, which this message goes on from, is lost"):
        follow(worker(), 3, 2)


def test_the_adapters_lines_give_the_trained_models_logits(
    runs: dict[str, Path], small: dict[str, Any], tiny_gpt2: Path, tmp_path: Path
) -> None:
    """As factors (after two rounds) and as matrices (after seven), of Linear and Conv1D layers.

    And of a run that starts from a run that carries matrices, which are then factors of full rank, and merges more.
    """
    options = {**small, "rounds": 1, "init_adapter": str(runs["flora"])}
    second = run_simulation(SimulationConfig(**options, strategy="flora", out=tmp_path / "second"))
    first = read_run(runs["flora"])[0]
    assert second.summary["initial"]["loss"] == pytest.approx(first["final"]["loss"], rel=1e-5)
    found = [*runs.values(), tmp_path / "second"]
    for model in (small["model"], str(tiny_gpt2)):
        out = tmp_path / f"short-{len(found)}"
        run_simulation(SimulationConfig(**small | {"rounds": 2, "model": model}, strategy="fedex-lora", out=out))
        found.append(out)
        full = {
            **small,
            "rounds": 1,
            "model": model,
            "method": "full",
            "alpha": None,
            "out": tmp_path / f"full-{out.name}",
        }
        learnt = run_simulation(SimulationConfig(**full)).summary
        assert learnt["timing"]["cohort"] == 1 and learnt["aggregation_error_max"] <= 1e-12
        found.append(full["out"])
    run_simulation(
        SimulationConfig(**small | {"rounds": 5, "model": str(tiny_gpt2)}, strategy="flora", out=tmp_path / "long")
    )
    found.append(tmp_path / "long")
    for run, plain in zip(found, plain_logits(*(run / "adapter" for run in found)), strict=True):
        config = saved_configuration(run)
        assert config is not None
        ours = our_logits(config, run, TEXTS)
        assert_logits(plain, ours)


@pytest.mark.parametrize("base", [nn.Linear(5, 7), Conv1D(7, 5)], ids=str)  # type: ignore[no-untyped-call]
def test_full_is_a_peft_method_like_any_other(base: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 5)
    plain = base(x).detach()
    config = CoreConfig(method="full", target_modules=["0"])
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), config)  # type: ignore[arg-type]
    assert torch.equal(model(x), plain), "starts as the base model"
    (trained,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    trained.data = torch.randn(7, 5)
    w = base.weight.T if isinstance(base, Conv1D) else base.weight
    most = x.abs() @ (w.abs() + trained.abs()).T + base.bias.abs()
    wanted, bound = plain.double() + x.double() @ trained.double().T, float32_bound(5 + 3, most)
    assert_within(model(x), wanted, bound)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), str(tmp_path))  # type: ignore[arg-type]
    assert_within(again(x), wanted, bound)
    assert_within(again.merge_and_unload()(x), wanted, bound)


@pytest.mark.parametrize("method", ["lotr", "rolora", "ffa-lora", "head"])
def test_a_method_whose_clients_send_other_factors_is_refused(
    method: str, small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**small, "method": method, "strategy": "flora", "out": tmp_path / "run"}
    if method == "head":
        options.pop("alpha")
    assert simulate.main(flags(options)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--strategy flora with --method {method}: it combines A and B of every client" in said
    assert "choose --method lora" in said


def test_what_is_merged_has_no_core_between(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**small, "method": "personal-core", "strategy": "fedex-lora", "out": tmp_path / "run"}
    assert simulate.main(flags(options)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--strategy fedex-lora with --method personal-core: what it merges is B A, without the core" in said
