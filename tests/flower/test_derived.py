"""Bases that clients make of public rows: the same run for fewer bytes, and whoever makes others is told."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from fedlotr import SimulationConfig, cli, run_simulation, simulate
from fedlotr.adapters.bases import Factors
from fedlotr.adapters.tuner import bases_of
from fedlotr.communication.basis_coding import coded, decoded, fingerprints, part, shapes_of
from fedlotr.communication.ledger import read_ledger
from fedlotr.communication.wire_form import read_form
from fedlotr.flower.client_app import Worker
from fedlotr.flower.link import Asks, Job, Refused
from fedlotr.flower.links.bases import Bases
from fedlotr.flower.links.derived import Offered, asked_for, public_record, public_rows
from fedlotr.flower.links.moving import Moving
from fedlotr.flower.records import CONFIG, to_record
from fedlotr.flower.trouble import TooManyFailuresError
from fedlotr.flower.workplace import Workplace
from fedlotr.run.checking import check
from fedlotr.run.federation import federation
from fedlotr.run.preparation import prepare
from fedlotr.run.simulation import resolve
from fedlotr.training.examples import Examples
from tests.conftest import SEED
from tests.run.test_simulation import flags
from tests.support import read_run

WAYS: dict[str, dict[str, Any]] = {
    "fed-sb": {"rebase": "1:gradient"},
    "fixed": {"method": "fed-sb"},
    "lora-xs": {"rebase": "2:gradient", "basis_codec": "float32"},
    "lotr-sb": {"rebase": "2", "basis_codec": "int4+zstd", "codec": "int8", "broadcast_codec": "delta+int8"},
    "ffa-lora": {"rebase": "2:gradient"},
}
"""First bases of a gradient, later ones, or both; tied; one-sided."""


@pytest.fixture(scope="session")
def small(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """Clients are away for several moves; the head moves too."""
    return {
        **{"model": str(tiny_bert), "data": str(animals), "clients": 5, "sample": 2, "rounds": 4, "rank": 4},
        **{"partition": "iid", "lr_schedule": "constant", "public_examples": 16, "eval_every": 4},
        **{"engine": "local", "threads": 1, "dtype": "float32", "max_examples": 16, "local_epochs": 1},
        **{"lr": 0.003, "head_lr": 0.003},
    }


@pytest.fixture(scope="module")
def made(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of a way, once; derive: whether clients make its bases."""
    found: dict[tuple[str, bool], Path] = {}

    def run(way: str, *, derive: bool) -> Path:
        if (way, derive) not in found:
            out = found[way, derive] = tmp_path_factory.mktemp("derived") / "run"
            words = flags({**small, "method": way, **WAYS[way], "out": out}) + ["--derive-bases"] * derive
            assert simulate.main([*words, "--quiet"]) == 0
        return found[way, derive]

    return run


@pytest.mark.parametrize("way", WAYS)
def test_derived_bases_are_the_sent_ones_and_cost_what_doctor_says(
    way: str, made: Callable[..., Path], small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    derived, sent = (made(way, derive=derive) for derive in (True, False))
    (here, _), (there, _) = read_run(derived), read_run(sent)
    assert here["trained_sha256"] == there["trained_sha256"] and not here["failed_clients"]
    file = "adapter/adapter_model.safetensors"
    assert (derived / file).read_bytes() == (sent / file).read_bytes()
    words = flags({**small, "method": way, **WAYS[way]})
    assert cli.main(["doctor", *words, "--derive-bases", "--json"]) == 0
    needs = json.loads(capsys.readouterr().out)["needs"]
    entries = read_ledger(derived / "ledger")
    controls = sum(row.payload_bytes for row in entries if row.kind == "control")
    assert here["communication"]["total_payload_bytes"] == needs["total_bytes"] + controls
    assert here["communication"]["one_off_bytes_per_client"] == needs["one_off_bytes"]
    bases = [sum(row.payload_bytes for row in read_ledger(run / "ledger") if row.kind in ("basis", "carry"))
             for run in (derived, sent)]  # fmt: skip
    assert bases[0] < bases[1] or way == "ffa-lora", "one-sided and in two bits they are less than the rows, here"


def test_a_client_with_an_empty_folder_makes_the_bases_of_all_versions_from_its_messages(
    small: dict[str, Any], tmp_path: Path
) -> None:
    """Its own first bases are zeros until then, and it holds no public rows."""
    options = {**small, "method": "fed-sb", "rebase": "1", "derive_bases": True}
    prepared = prepare(check(resolve(SimulationConfig(**options))), tmp_path / "work")
    run = federation(prepared.checked.config, prepared)
    bases, moving = Bases.at_server(run), Moving.at_server(run)
    assert isinstance(moving, Moving)
    first = {name: Factors(*pair) for name, pair in bases_of(prepared.model.module).items()}
    for number in (2, 3):
        moving.before(number, to_record({n: torch.randn_like(v) for n, v in prepared.model.values().items()}))
    nothing = {name: Factors(*map(torch.zeros_like, pair)) for name, pair in first.items()}
    place, held = prepared.workplace, prepared.checked.parts
    empty = Workplace.write(tmp_path / "own", place.recipe, place.train, place.test, held, nothing, {})
    worker = Worker(Workplace(empty.folder))
    records = {CONFIG: ConfigRecord({}), "basis": run.basis, "public": run.derived.rows, **moving.records(0)}
    assert not any(name.endswith((".basis", ".codes")) for name in records["carry"])
    job = Job(client=0, records=records, memory={})
    worker.chain.receive(job)
    worker.chain.the(Moving).send(job)
    worker.chain.the(Bases).send(job)
    assert job.identity["bases-sha256"] == bases.sha256
    assert job.identity["carry-sha256"] == moving.carry.sha256 and moving.carry.version == 2


@pytest.mark.parametrize(
    ("way", "wrong"),
    [*product(["fed-sb", "lora-xs", "lotr-sb"], [(0,), (0, 1), (1, 2, 3)]), ("fixed", (0,))],
)
def test_a_client_whose_layers_differ_is_noticed_and_sent_those_alone(
    way: str,
    wrong: tuple[int, ...],
    made: Callable[..., Path],
    small: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a processor that rounds otherwise: of some versions the first pair made here is another."""
    whole, all_sent = (made(way, derive=derive) for derive in (True, False))
    was, spoilt = Offered.settled, set[int]()

    def otherwise(self: Offered, form: Any, made: Any, *, version: int, **others: Any) -> Any:
        if version in wrong:
            spoilt.add(version)
            first, pair = next(iter(made.items()))
            made = {**made, first: Factors(pair.A.flip(0), pair.B)}
        return was(self, form, made, version=version, **others)

    monkeypatch.setattr(Offered, "settled", otherwise)
    out = tmp_path / "run"
    options = {**small, "method": way, **WAYS[way], "derive_bases": True, "out": out}
    result = run_simulation(SimulationConfig(**options))
    assert result.summary["trained_sha256"] == read_run(whole)[0]["trained_sha256"]
    assert not result.summary["failed_clients"]
    asked = [row for row in read_ledger(out / "ledger") if (row.direction, row.kind) == ("up", "control")]
    usual = [row for row in read_ledger(whole / "ledger") if row.direction == "up"]
    asked = [row for row in asked if row.payload_bytes not in {one.payload_bytes for one in usual}]
    assert bool(asked) == bool(spoilt)
    sent = sum(row.payload_bytes for row in read_ledger(all_sent / "ledger") if row.direction == "down")
    here = sum(row.payload_bytes for row in read_ledger(out / "ledger") if row.direction == "down")
    assert not spoilt or here < 2 * sent


def test_a_client_that_never_makes_the_same_bases_fails(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = np.random.default_rng(0)

    def fresh(self: Offered, *arguments: Any, version: int, link: str, **others: Any) -> Any:
        raise Asks(link, version, [int(stream.integers(3))])

    monkeypatch.setattr(Offered, "settled", fresh)
    with pytest.raises(TooManyFailuresError, match="it asks for bases again"):
        run_simulation(SimulationConfig(**small, method="fed-sb", derive_bases=True, out=tmp_path / "run"))


@pytest.mark.parametrize("way", ["fed-sb", "lotr-sb"])
def test_a_run_that_is_cut_off_and_resumed_ends_in_the_same_bytes(
    way: str, made: Callable[..., Path], small: dict[str, Any], tmp_path: Path
) -> None:
    whole, out = made(way, derive=True), tmp_path / "run"
    for rounds in (1, 3, 4):
        options = {**small, "method": way, **WAYS[way], "derive_bases": True, "rounds": rounds, "out": out}
        run_simulation(SimulationConfig(**options, resume=rounds > 1))
    assert read_ledger(out / "ledger") == read_ledger(whole / "ledger")
    assert read_run(out)[0]["trained_sha256"] == read_run(whole)[0]["trained_sha256"]


@pytest.mark.slow
@pytest.mark.serial
def test_workers_of_ray_make_the_bases_of_the_server(
    made: Callable[..., Path], small: dict[str, Any], tmp_path: Path, ray_session: None
) -> None:
    options = {**small, "method": "fed-sb", **WAYS["fed-sb"], "derive_bases": True, "engine": "ray", "workers": 2}
    ray = run_simulation(SimulationConfig(**options, out=tmp_path / "run"))
    assert ray.summary["trained_sha256"] == read_run(made("fed-sb", derive=True))[0]["trained_sha256"]
    assert read_ledger(tmp_path / "run" / "ledger") == read_ledger(made("fed-sb", derive=True) / "ledger")


def test_a_language_models_public_rows_cost_what_their_tokens_do(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Two bytes a token and no head: derived, all of its bases are fewer bytes than one of them sent."""
    options: dict[str, Any] = {"model": str(tiny_gpt2), "data": "pydoc-chat", "clients": 3, "sample": 2, "rank": 4}
    options |= {"rounds": 3, "rebase": "1", "method": "fed-sb", "engine": "local", "threads": 1, "eval_every": 3}
    options |= {"max_examples": 4, "public_examples": 8, "max_length": 32, "dtype": "float32"}
    sent = run_simulation(SimulationConfig(**options, out=tmp_path / "sent")).summary
    derived = run_simulation(SimulationConfig(**options, derive_bases=True, out=tmp_path / "derived")).summary
    assert derived["trained_sha256"] == sent["trained_sha256"]
    assert derived["communication"]["total_payload_bytes"] < sent["communication"]["total_payload_bytes"]


@pytest.mark.parametrize("words", ["float32", "bfloat16", "int8", "int4+zstd", "int2", "sign"])
def test_a_part_of_a_message_says_what_the_whole_one_does(words: str) -> None:
    form, stream = read_form(words), torch.Generator().manual_seed(SEED)
    drawn = {
        f"l{at}": (torch.randn(3, 5 + at, generator=stream), torch.randn(7, 3, generator=stream)) for at in (2, 0, 1)
    }
    pairs = {n: (a / a.norm(dim=1, keepdim=True), b / b.norm(dim=0, keepdim=True)) for n, (a, b) in drawn.items()}
    shapes, whole = shapes_of(pairs), coded(form, pairs, 5, 2)
    all_of_them = decoded(form, whole, shapes)
    for chosen in (["l1"], ["l0", "l2"]):
        some = decoded(form, part(form, whole, shapes, chosen), {name: shapes[name] for name in chosen})
        assert set(some) == set(chosen)
        for name, pair in some.items():
            assert all(map(torch.equal, pair, all_of_them[name]))
    hashes = fingerprints(all_of_them)
    assert hashes.shape == (3, 8) and len({row.tobytes() for row in hashes}) == 3


@pytest.mark.parametrize("kind", ["classes", "scale", "pairs", "targets"])
def test_public_rows_come_back_as_they_were(kind: str) -> None:
    tokens, offsets = np.array([70000, 3, 4, 5, 6, 7], np.int32), np.array([0, 2, 3, 6])
    beside: dict[str, Any] = {"pairs": {"segments": np.array([0, 1, 0, 0, 1, 2], np.int8)}}.get(kind, {})
    labels: Any = np.array([0.5, -2, 1e-7], np.float32) if kind == "scale" else np.array([1, 0, 2])
    if kind == "targets":
        beside = {"targets": np.array([0, 1, 0, 1, 0, 1], bool), "causal": True}
    examples, rows = Examples(tokens, offsets, labels, **beside), np.array([2, 0])
    found = public_rows(public_record(examples, rows), causal=kind == "targets")
    for one, batch in ((row, found.batch([at])) for at, row in enumerate(rows)):
        want = examples.batch([one])
        assert torch.equal(batch.input_ids, want.input_ids) and torch.equal(batch.labels, want.labels)
        assert (batch.token_type_ids is None) == (want.token_type_ids is None)
        if want.token_type_ids is not None:
            assert torch.equal(batch.token_type_ids, want.token_type_ids)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [{}, {"version": 3, "ties": [0]}, {"version": True, "ties": [0]}, {"version": 1, "ties": [4]},
     {"version": 1, "ties": [-1]}, {"version": 1, "ties": []}, {"version": 1, "ties": "0"}],
)  # fmt: skip
def test_what_was_not_offered_is_not_sent(asked: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="it asks for"):
        asked_for(ConfigRecord(asked), 1, 2, 4)
    assert asked_for(ConfigRecord({"version": 2, "ties": [3, 1, 3]}), 1, 2, 4) == (2, [1, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method lora-xs", "no basis here is made of a gradient"),
        ("--method lora-xs --rebase 2:svd", "no basis here is made of a gradient"),
        ("--method lora", "no basis here is made of a gradient"),
        ("--baseline central", "a baseline sends nothing"),
        ("--method fed-sb --privacy example --epsilon 8", "give --public-data"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    options: str, message: str, small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*flags({**small, "out": tmp_path / "run"}), "--derive-bases", *options.split()]
    assert simulate.main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "of-gradient" not in said


def test_record_of_arrays_is_all_that_an_offer_is() -> None:
    """A message of bases as they are, or of a seed, offers nothing."""
    assert not Offered(ArrayRecord({}))
