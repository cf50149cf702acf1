"""Bases that move: the function stays, the mean stays exact, whoever was away has the same bits; all is priced."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from safetensors.numpy import load_file

from fedlotr import SimulationConfig, cli, run_simulation, simulate
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.moves import MOVES, read_rebase
from fedlotr.adapters.tuner import bases_of, factored_layers
from fedlotr.communication.ledger import read_ledger
from fedlotr.cost.architectures import read_architecture
from fedlotr.cost.formulas import folded
from fedlotr.flower.client_app import Worker
from fedlotr.flower.link import Job
from fedlotr.flower.links.codec import LOST
from fedlotr.flower.links.moving import Moving
from fedlotr.flower.records import ARRAYS, to_record, to_tensors
from fedlotr.flower.serialize import unpack
from fedlotr.flower.workplace import Workplace
from fedlotr.models.loading import load_base
from fedlotr.reporting import report, run_record
from fedlotr.run.checking import check
from fedlotr.run.federation import federation
from fedlotr.run.preparation import Prepared, prepare
from fedlotr.run.resumption import saved_configuration
from fedlotr.run.simulation import resolve
from fedlotr.training import moving
from fedlotr.training.model import TrainableModel
from tests.run.test_simulation import flags
from tests.support import (
    TEXTS,
    Simulate,
    assert_logits,
    assert_within,
    deadly,
    network_bound,
    our_logits,
    plain_logits,
    read_run,
)

WAYS = {
    "fed-sb": "2:gradient",
    "lotr-sb": "2",
    "lora-xs": "3:svd",
    "ravan": "2:random",
    "tiny-lora": "1:residual",
    "loldu": "2:svd",
    "ffa-lora": "2:gradient",
    "fedsvd": "1:product",
    "lora": "2:gradient",
    "frlora": "1:start",
}
"""Methods of every kind of core, tied and not, one-sided, each with a way for its bases to move."""


@pytest.fixture(scope="session")
def small(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """Clients are away for several moves; α ≠ r."""
    return {
        **{"model": str(tiny_bert), "data": str(animals), "clients": 7, "sample": 3, "rounds": 7, "rank": 4},
        **{"alpha": 6.0, "partition": "iid", "lr_schedule": "constant", "public_examples": 16, "eval_every": 7},
        **{"engine": "local", "threads": 1, "dtype": "float32", "max_examples": 16, "local_epochs": 1},
        **{"lr": 0.003, "head_lr": 0.003},
    }


@pytest.fixture(scope="module")
def runs(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run of each, from the command line; one of them with codecs both ways."""
    found = {method: tmp_path_factory.mktemp("moving") / method for method in WAYS}
    for method, out in found.items():
        coded = {"codec": "int8", "broadcast_codec": "delta+int8"} if method == "fed-sb" else {}
        words = flags({**small, **coded, "method": method, "rebase": WAYS[method], "out": out})
        if METHODS[method].rebase is not None:
            words = [word for word in words if word not in ("--rebase", WAYS[method])]
        assert simulate.main([*words, "--quiet"]) == 0
    return found


def link_of(run: Path, place: Path) -> tuple[Moving, Prepared]:
    """The server's link as the last checkpoint of a run has it."""
    ran = saved_configuration(run)
    assert ran is not None
    prepared = prepare(check(resolve(ran.model_copy(update={"out": None}))), place)
    link = Moving.at_server(federation(prepared.checked.config, prepared))
    assert isinstance(link, Moving)
    last = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    saved = json.loads(last.with_suffix(".json").read_text(encoding="utf-8"))["links"]["carry"]
    link.load_state(unpack(saved, load_file(last)))
    return link, prepared


@pytest.mark.parametrize("method", WAYS)
def test_the_mean_stays_exact_and_every_move_is_priced(
    method: str, runs: dict[str, Path], small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Reckoned anew: who missed so many moves is sent so many cores, and bases where these cannot be derived."""
    summary, rows = read_run(runs[method])
    lossy, apart = method == "fed-sb", METHODS[method].both  # A and B averaged apart is FedIT's error, moving or not
    assert all(row["aggregation_error"] <= (1 if apart else 1e-6) for row in rows)
    assert lossy or all(row["transport_error"] <= 1e-5 for row in rows)
    assert summary["final"]["loss"] < summary["initial"]["loss"] and summary["failed_clients"] == 0
    config = saved_configuration(runs[method])
    assert config is not None and config.moves is not None
    layers = read_architecture(str(small["model"]), "classification", 2, "all-linear").layers
    each = folded(METHODS[method], layers, 4, config.moves, config.coding)
    ledger, last_seen, came = read_ledger(runs[method] / "ledger"), dict[int, int](), 0
    for number in range(1, 8):
        version = config.moves.versions(number - 1)
        for client in sorted({row.client for row in ledger if row.round == number}):
            paid = [row for row in ledger if (row.round, row.client, row.kind) == (number, client, "carry")]
            assert sum(row.payload_bytes for row in paid) == (version - last_seen.get(client, 0)) * each
            came += len(paid)
            last_seen[client] = version
    assert came > 7
    words = flags({name: value for name, value in config.model_dump(mode="json").items() if name in small})
    words += ["--method", method, "--rebase", WAYS[method], "--codec", config.codec]
    assert cli.main(["doctor", *words, "--broadcast-codec", config.broadcast_codec, "--json"]) == 0
    needs = json.loads(capsys.readouterr().out)["needs"]
    controls = [row.payload_bytes for row in ledger if row.kind == "control"]
    assert summary["communication"]["total_payload_bytes"] == needs["total_bytes"] + sum(controls)


def test_the_adapters_lines_give_the_trained_models_logits(runs: dict[str, Path]) -> None:
    for run, plain in zip(runs.values(), plain_logits(*(run / "adapter" for run in runs.values())), strict=True):
        config = saved_configuration(run)
        assert config is not None
        assert_logits(plain, our_logits(config, run, TEXTS))


@pytest.mark.parametrize("method", ["fed-sb", "lora-xs", "ffa-lora", "lora", "frlora"])
def test_who_was_away_has_the_bits_of_who_was_not_from_its_messages_alone(
    method: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Workers with an empty folder each: one that is told every move as it comes, one all of them at once."""
    link, prepared = link_of(runs[method], tmp_path / "work")
    first = bases_of(prepare(prepared.checked, tmp_path / "first").model.module)
    wanted = link.carry.sha256

    def worker(name: str) -> Moving:
        recipe, train, test = prepared.workplace.recipe, prepared.workplace.train, prepared.workplace.test
        core = prepared.checked.core
        kept = {} if core is None or core.basis_kind.derivable else first
        place = Workplace.write(tmp_path / name, recipe, train, test, prepared.checked.parts, kept, {})
        return Worker(Workplace(place.folder)).chain.the(Moving)

    def follow(one: Moving, version: int, since: int) -> str:
        told = link.records(since)
        state = dict(told["carry-state"]) | {"version": version}
        parts = {name: a for name, a in told["carry"].items() if int(name.partition(".")[0]) <= version}
        job = Job(client=0, records={"carry-state": ConfigRecord(state), "carry": ArrayRecord(parts)}, memory={})
        one.receive(job)
        one.send(job)
        return str(job.identity["carry-sha256"])

    awake = worker("awake")
    for version in range(1, link.carry.version + 1):
        found = follow(awake, version, version - 1)
    assert found == wanted
    assert follow(worker("slept"), link.carry.version, 0) == wanted
    with pytest.raises(RuntimeError, match="the bases of version 1, which this message goes on from, are lost"):
        follow(worker("lost"), link.carry.version, 1)


@pytest.mark.parametrize("method", ["fed-sb", "loldu", "lora", "frlora"])
def test_a_run_that_is_cut_off_and_resumed_ends_in_the_same_bytes(
    method: str, runs: dict[str, Path], small: dict[str, Any], tmp_path: Path
) -> None:
    coded = {"codec": "int8", "broadcast_codec": "delta+int8"} if method == "fed-sb" else {}
    options = {**small, **coded, "method": method, "rebase": WAYS[method], "out": tmp_path / "run"}
    for rounds in (2, 5, 7):
        run_simulation(SimulationConfig(**options | {"rounds": rounds, "resume": rounds > 2}))
    assert read_ledger(tmp_path / "run" / "ledger") == read_ledger(runs[method] / "ledger")
    assert read_run(tmp_path / "run")[0]["trained_sha256"] == read_run(runs[method])[0]["trained_sha256"]
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (runs[method] / file).read_bytes()


@pytest.mark.slow
@pytest.mark.serial
def test_workers_of_ray_move_to_the_same_bytes(
    runs: dict[str, Path], small: dict[str, Any], tmp_path: Path, ray_session: None
) -> None:
    options = {**small, "rounds": 5, "cohort": 1, "method": "fed-sb", "rebase": "1:gradient"}
    ray = run_simulation(SimulationConfig(**options | {"engine": "ray", "workers": 2}, out=tmp_path / "ray"))
    alone = run_simulation(SimulationConfig(**options, out=tmp_path / "local"))
    assert ray.summary["trained_sha256"] == alone.summary["trained_sha256"] and not ray.summary["failed_clients"]


@pytest.fixture
def prepared(small: dict[str, Any], tmp_path: Path) -> Prepared:
    config = SimulationConfig(**small, method="fed-sb", rebase="2:gradient")
    return prepare(check(resolve(config)), tmp_path / "work")


def test_a_move_leaves_the_function_as_it_was(prepared: Prepared) -> None:
    mover = federation(prepared.checked.config, prepared).mover
    model, rows = prepared.model, np.arange(8)
    batch = prepared.checked.examples.test.examples.batch(rows)
    tensors = {name: torch.randn_like(value) * 0.3 for name, value in model.values().items()}
    model.assign(tensors)
    before = model.logits(batch)
    bases = dict(model.carried.bases)
    mover.fold(tensors)
    bound = network_bound(36, 48) * max(1.0, float(before.abs().max()))
    assert float((model.logits(batch) - before).abs().max()) <= bound
    assert all(not model.values()[name].any() for name in moving.folded_names(model))
    assert all(not torch.equal(pair.A, bases[name].A) for name, pair in model.carried.bases.items())


def test_the_gradient_is_that_of_the_whole_matrices(prepared: Prepared) -> None:
    """Against torch's own, by the weights, with a term that is carried."""
    model, public = prepared.model, prepared.checked.public
    federation(prepared.checked.config, prepared).mover.fold(
        {name: torch.randn_like(value) * 0.3 for name, value in model.values().items()}
    )
    examples = prepared.checked.examples.train.examples
    members = moving._members(model)
    found = list(moving._gradients(model, members, examples, public))
    layers = [layer for of in members.values() for _, layer in of]
    weights = [layer.get_base_layer().weight.requires_grad_(True) for layer in layers]
    loss = torch.stack([model.losses(examples.batch(public[at : at + 1])).sum() for at in range(len(public))]).sum()
    for gradient, wanted in zip(found, torch.autograd.grad(loss, weights), strict=True):
        bound = torch.full_like(wanted, 4 * network_bound(72, 64) * float(wanted.norm()))
        assert_within(gradient, wanted, bound)
    assert len(found) == len(factored_layers(model.module))


def test_a_layer_whose_gradient_has_no_directions_moves_to_the_weights_own(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums, said = moving._summed, list[str]()

    def some_flat(*given: Any) -> list[torch.Tensor]:
        found = sums(*given)
        return [found[0] * 0, found[1] * torch.nan, *found[2:]]

    monkeypatch.setattr(moving, "_summed", some_flat)
    monkeypatch.setattr(moving, "say", said.append)
    mover = federation(prepared.checked.config, prepared).mover
    mover.fold(prepared.model.values())
    assert all(torch.isfinite(factor).all() for pair in prepared.model.carried.bases.values() for factor in pair)
    (line,) = said
    assert "and of 1 more on the public rows has no directions" in line


def test_fedsvd_is_its_papers_formula(runs: dict[str, Path], small: dict[str, Any], tmp_path: Path) -> None:
    """A ← Vᵀ, B ← U Σ of SVD(B A), which leaves the model as it was; A and B as the next round begins with them."""
    link, _ = link_of(runs["fedsvd"], tmp_path / "work")
    model, stream = link.mover.model, torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(value.shape, generator=stream) for name, value in model.values().items()}
    before = {name: pair.A.clone() for name, pair in link.carry.bases.items()}
    begun = link.before(link.carry.version + 2, to_record(tensors))
    for name in moving.folded_names(model):
        (layer,) = model.shared[name]
        product = tensors[name].double() @ before[layer].double()
        u, sigma, vh = torch.linalg.svd(product, full_matrices=False)
        a, b = link.carry.bases[layer].A.double(), torch.from_numpy(begun[name].numpy()).double()
        signs = torch.sign((a * vh[:4]).sum(dim=1))
        torch.testing.assert_close(a, vh[:4] * signs[:, None], atol=1e-5, rtol=0)
        torch.testing.assert_close(b, u[:, :4] * sigma[:4] * signs, atol=1e-5 * float(sigma[0]), rtol=0)
        torch.testing.assert_close(b @ a, product, atol=1e-5 * float(sigma[0]), rtol=0)


def test_frlora_is_its_papers_formula(runs: dict[str, Path], small: dict[str, Any], tmp_path: Path) -> None:
    """W ← W + s (B̄ Ā - B₀ A₀), and A₀, B₀ again, which are W's leading singular vectors, each with the root of Σ."""
    link, prepared = link_of(runs["frlora"], tmp_path / "work")
    model, stream, s = link.mover.model, torch.Generator().manual_seed(0), 6.0 / 4
    tensors = {name: torch.randn(value.shape, generator=stream) for name, value in model.values().items()}
    before = {name: term.matrix() for name, term in link.carry.terms.items()}
    begun = link.before(link.carry.version + 2, to_record(tensors))
    for name, layer in factored_layers(model.module).items():
        own = {side: f"base_model.model.{name}.core_{side}" for side in "AB"}
        u, sigma, vh = torch.linalg.svd(layer.base_layer.weight.double(), full_matrices=False)
        first = {side: torch.from_numpy(begun[tensor].numpy()).double() for side, tensor in own.items()}
        principal = u[:, :4] * sigma[:4] @ vh[:4]
        assert_within(first["B"] @ first["A"], principal, 1e-5)
        torch.testing.assert_close(first["A"].norm(dim=1), sigma[:4].sqrt(), rtol=1e-4, atol=0)
        learnt = tensors[own["B"]].double() @ tensors[own["A"]].double() - principal
        assert_within(link.carry.terms[name].matrix() - before[name], s * learnt, 1e-4)
    start = prepare(prepared.checked, tmp_path / "start").model
    batch = prepared.checked.examples.test.examples.batch(np.arange(6))
    plain = TrainableModel(load_base(start.spec), start.spec, None)
    plain.assign({name: value for name, value in start.values().items() if name in start.head_names})
    assert_within(start.logits(batch), plain.logits(batch), 1e-4)


def test_between_new_bases_clients_start_at_zero_whatever_the_codec(small: dict[str, Any], tmp_path: Path) -> None:
    """Of a change of four levels the old core would not be undone; and the server knows what they hold."""
    begun: dict[int, list[float]] = {}

    class Spied(Worker):
        def finish(self, job: Job) -> None:
            sent = to_tensors(job.records[ARRAYS])
            cores = [float(tensor.norm()) for name, tensor in sent.items() if "core" in name]
            begun.setdefault(job.round, []).append(sum(cores))
            super().finish(job)

    given = {**small, "clients": 3, "rounds": 5, "eval_every": 5, "lr": 0.03, "method": "lora-xs", "rebase": "2:svd"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlotr.flower.client_app.Worker", Spied)
        config = SimulationConfig(**given, codec="float32", broadcast_codec="delta+int2", out=tmp_path / "run")
        run_simulation(config)
    assert [number for number, norms in sorted(begun.items()) if not any(norms)] == [1, 3, 5]
    assert read_run(tmp_path / "run")[0]["failed_clients"] == 0


def test_what_updates_lost_between_other_bases_is_forgotten(prepared: Prepared, tmp_path: Path) -> None:
    link = Moving.at_server(federation(prepared.checked.config, prepared))
    assert isinstance(link, Moving)
    values = {name: torch.randn_like(value) for name, value in prepared.model.values().items()}
    link.before(3, to_record(values))
    memory: dict[str, Any] = {LOST: to_record(values)}
    worker = Worker(Workplace(tmp_path / "work")).chain.the(Moving)
    job = Job(client=0, records=link.records(0), memory=memory)
    worker.receive(job)
    assert set(memory[LOST]) == set(values), "who only scores the model forgets nothing"
    worker.start(job, {})
    assert set(memory[LOST]) == prepared.model.head_names
    memory[LOST] = to_record(values)
    worker.receive(job)
    worker.start(job, {})
    assert set(memory[LOST]) == set(values), "as long as bases stay"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rebase 0", "expected T or T:HOW"),
        ("--rebase 2:gradeint", "did you mean 'gradient'"),
        ("--rebase 2:", "expected T or T:HOW"),
        ("--method fedsvd --rebase 3", "that is 3:gradient, and this method moves otherwise, 1:product"),
        ("--rebase 2 --method rolora", "trains its factors in turn"),
        ("--rebase 2 --method lotr-trained", "trains its factors in turn, with a core"),
        ("--rebase 2 --method fedsa-lora", "or apart"),
        ("--rebase 2:start", "choose 2:gradient, or lora"),
        ("--rebase 2:product --method lora", "choose a method that trains B alone"),
        ("--rebase 2 --method lora --strategy flora", "these are of other bases once they have moved"),
        ("--method frlora --client-rank 4,2", "choose lora"),
        ("--method frlora --basis update", "leave --basis out"),
        ("--method frlora --strategy hetlora", "it changes clients' ranks"),
        ("--rebase 2 --method head", "this method adapts no layer"),
        ("--rebase 2 --strategy fedadam", "these are of other bases once they have moved"),
        ("--rebase 2 --strategy flwr.serverapp.strategy:FedAvgM", "these are of other bases once they have moved"),
        ("--rebase 2 --strategy scaffold", "these are of other bases once they have moved"),
        ("--rebase 2 --optimizer-state keep", "about the bases that it was computed between"),
        ("--rebase 2:product", "choose a method that trains B alone"),
        ("--method fedsvd --optimizer-state keep", "about the bases that it was computed between"),
        ("--method fedsvd --baseline central", "choose ffa-lora or lora"),
        ("--method fedsvd --strategy fedadam", "these are of other bases once they have moved"),
        ("--rebase 2 --baseline central", "a baseline sends nothing"),
        ("--rebase 2 --method lora-xs --public-examples 0", "or choose 2:svd"),
        ("--rebase 2 --method lora-xs --privacy example --epsilon 8", "give --public-data, or choose 2:svd"),
    ],
)
def test_what_does_not_go_with_moving_bases_is_refused(
    options: str, message: str, small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {word for word in options.replace("-", "_").split() if word.startswith("__")}
    rest = {name: value for name, value in small.items() if f"__{name}" not in named and name != "alpha"}
    assert simulate.main([*flags({**rest, "out": tmp_path / "run"}), *options.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_method_that_moves_by_itself_is_named_in_a_refusal_and_no_option_that_was_not_given(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, named in (("", "--method fedsvd"), ("--rebase 2:product", "--rebase 2:product")):
        given = [*flags({**small, "out": tmp_path / "run", "method": "fedsvd", "strategy": "fedavgm"}), *more.split()]
        assert simulate.main(given) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("of other bases once they have moved") == 1 and f"{named}: " in said


def test_bases_that_the_run_ends_before_they_move_are_said(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**small, "out": tmp_path / "run", "rounds": 2, "eval_every": 2, "rebase": "2:svd", "method": "lora-xs"}
    assert simulate.main([*flags(given), "--quiet"]) == 0
    assert (
        "--rebase 2:svd with --rounds 2: the run ends before the bases move"
        in read_run(tmp_path / "run")[0]["warnings"]
    )


@pytest.mark.parametrize(
    ("method", "rebase", "derived"),
    [("fed-sb", "1", False), ("fed-sb", "1", True), ("lora", "2:random", False), ("fedsvd", None, False)],
)
def test_the_bill_on_a_page_is_of_the_bases_that_moved(
    method: str, rebase: str | None, derived: bool, small: dict[str, Any], tmp_path: Path
) -> None:
    """All clients in every round, as the page reckons: then it is the ledger's."""
    given = {**small, "method": method, "clients": 2, "sample": 2, "rounds": 4, "eval_every": 4, "codec": "float32"}
    config = SimulationConfig(**given, rebase=rebase, derive_bases=derived, out=tmp_path / "run")
    run_simulation(config)
    owed, _ = report._bills(run_record.read_run(tmp_path / "run"))
    (own,) = (row for row in owed if row.method == method and METHODS[method].strategy in row.strategies)
    paid = [row.payload_bytes for row in read_ledger(tmp_path / "run" / "ledger") if row.kind != "control"]
    assert own.bill.total == sum(paid)


@pytest.mark.parametrize(
    "fields",
    [
        {"client_rank": "4,2,1", "method": "fed-sb", "codec": "int4"},
        {"privacy": "example", "noise_multiplier": 1, "reproducible_noise": True, "method": "lotr", "rebase": "2:svd"},
        {"privacy": "client", "noise_multiplier": 1, "reproducible_noise": True, "clip_norm": 1, "method": "fedsvd"},
        {"method": "lora-xs", "strategy": "median", "rebase": "1:gradient"},
        {"method": "lora", "rebase": "2:start", "client_rank": "4,2,1", "codec": "int8", "broadcast_codec": "float32"},
        {"method": "frlora", "init_adapter": True},
        {"method": "lora-xs", "strategy": "flwr.serverapp.strategy:FedAvg", "broadcast_codec": "delta+sign"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_moving_goes_with_ranks_privacy_and_other_strategies(
    fields: dict[str, Any], runs: dict[str, Path], small: dict[str, Any], tmp_path: Path
) -> None:
    fields = dict(fields)
    rest = {name: value for name, value in small.items() if name != "alpha"} | {"rounds": 4, "eval_every": 4}
    if METHODS[fields["method"]].rebase is None:
        fields = {"rebase": "2", **fields}
    if fields.pop("init_adapter", False):
        fields["init_adapter"] = str(runs["fed-sb"] / "adapter")
    result = run_simulation(SimulationConfig(**{**rest, **fields}, out=tmp_path / "run"))
    assert not result.summary["failed_clients"] and np.isfinite(result.loss)
    config = saved_configuration(tmp_path / "run")
    assert config is not None
    (plain,) = plain_logits(tmp_path / "run" / "adapter")
    assert_logits(plain, our_logits(config, tmp_path / "run", TEXTS))


@pytest.mark.slow
def test_kill_9_between_two_moves_changes_nothing(
    runs: dict[str, Path], small: dict[str, Any], simulate: Simulate, tmp_path: Path
) -> None:
    """In round 5, after clients have moved, and before anything of it is saved."""
    options = {**small, "method": "lotr-sb", "rebase": WAYS["lotr-sb"], "out": tmp_path / "run", "codec": "float32"}
    options["strategy"] = deadly(tmp_path, "exact_average:ExactAverage", in_round=5)
    assert simulate(*flags(options)).returncode == -signal.SIGKILL
    resumed = run_simulation(SimulationConfig(**options, resume=True))
    assert resumed.summary["trained_sha256"] == read_run(runs["lotr-sb"])[0]["trained_sha256"]
    assert read_ledger(tmp_path / "run" / "ledger") == read_ledger(runs["lotr-sb"] / "ledger")


def test_moves_without_a_gradient_cost_no_byte_but_the_cores() -> None:
    for name, move in MOVES.items():
        assert read_rebase(f"3:{name}").move is move
        assert move.derivable == (name != "gradient")
    assert read_rebase("3").how == "gradient"
