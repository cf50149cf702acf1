"""Runs whose messages are coded: the bill is what crosses, a client keeps what it lost, damage is a failed client."""

import json
import signal
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MessageType, RecordDict
from safetensors.numpy import load_file

from fedlotr import SimulationConfig, run_simulation, simulate
from fedlotr.adapters import METHODS, CoreConfig
from fedlotr.commands import doctor
from fedlotr.communication.codecs import CodecError, encode
from fedlotr.communication.ledger import read_ledger
from fedlotr.communication.wire_form import Coding
from fedlotr.cost.architectures import read_architecture
from fedlotr.cost.formulas import bill
from fedlotr.errors import InputError
from fedlotr.flower import certificate
from fedlotr.flower import round as loop
from fedlotr.flower.link import Draft, Job, Turn
from fedlotr.flower.links import codec as coding_of_clients
from fedlotr.flower.links.codec import HELD, LOST, Codec, received
from fedlotr.flower.plugins import GROUP
from fedlotr.flower.private import identify_process
from fedlotr.flower.records import ARRAYS, arrays_sha256, to_arrays, to_record
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.run import unmet
from fedlotr.run.simulation import check_all, resolve
from fedlotr.training.model import TrainableModel
from tests import faulty_app
from tests.flower.test_client_state import RETURNS, ROUNDS, SEED, asked, options, states
from tests.run.test_simulation import MORTAL, assert_same_results, flags
from tests.support import Simulate, read_run
from tests.test_conformance import OF_THREE, check_the_bill

FLOWERS = "flwr.serverapp.strategy:FedAvg"


def words(model: Path, data: Path, **fields: Any) -> dict[str, Any]:
    """Three clients, all of them in every round."""
    return {
        **options(model, data),
        "clients": 3,
        "sample": 3,
        "rounds": 3,
        "max_examples": 6,
        "eval_every": 3,
        **fields,
    }


CODED = (
    ("fed-sb", "exact-average", "int8", "delta+int8", True),
    ("lotr", "fedavgm", "int4", "delta+int4", True),
    ("lora-xs", "exact-average", "sign", "delta+sign", True),
    ("ravan", "fedadam", "bfloat16", "bfloat16", True),
    ("lora", "fedit", "top-k:0.1", "delta+top-k:0.2", True),
    ("ffa-lora", "ffa-lora", "int4", "int4", True),
    ("fedsvd", "ffa-lora", "int8", "float32", False),
    ("frlora", "fedit", "int8", "int8", False),
    ("head", "exact-average", "sign", "float32", True),
    ("rolora", "rolora", "float32", "delta+bfloat16", False),
    ("lotr", FLOWERS, "int8", "int8", True),
    ("lora", "flora", "int8", "int8", False),
    ("lora", "fedex-lora", "int4", "delta+int8", True),
    ("lotr", "scaffold", "top-k:0.5", "bfloat16", True),
    ("fedsa-lora", "fedsa", "int8", "delta+int8", True),
    ("lora", "fedit", "int8+zstd", "delta+int4+zstd", True),
    ("lotr-tucker", "fedyogi", "int8", "delta+int4", True),
    ("lotr-sb", "fedadagrad", "int4", "int8", True),
    ("loldu", "fedprox", "sign", "delta+int8", True),
    ("int-tune", "median", "int8", "delta+bfloat16", True),
    ("tiny-lora", "trimmed-mean", "int4", "delta+int8", True),
    ("lora-xs", "krum", "int8", "delta+int8", True),
    ("lora", "multi-krum", "int8", "delta+int8", True),
    ("ffa-lora", "geometric-median", "int4", "delta+int8", True),
    ("loldu", "norm-clip", "int8", "bfloat16", True),
    ("lora", "fltrust", "int8", "delta+int8", True),
    ("lora", "q-fedavg", "int4", "delta+int8", True),
    ("full", "exact-average", "top-k:0.1", "delta+int8", True),
    ("lora", "flexlora", "int8", "delta+int8", False),
    ("lora", "hetlora", "int4", "float32", False),
    ("personal-core", "fedsa", "int4", "delta+int8", True),
    ("lotr-trained", "fedit", "int8", "delta+int4", True),
)
"""Every method, every strategy, each codec and each broadcast; whether clients make up for what was lost."""


@pytest.mark.parametrize(("method", "strategy", "codec", "broadcast", "feedback"), CODED)
def test_the_bill_of_every_codec_is_what_crosses(
    method: str,
    strategy: str,
    codec: str,
    broadcast: str,
    feedback: bool,
    tiny_bert: Path,
    animals: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = words(tiny_bert, animals, method=method, strategy=strategy, codec=codec, broadcast_codec=broadcast)
    given = [*flags(fields), "--out", str(tmp_path / "run")]
    given += [f"--strategy-arg={name}={value}" for name, value in OF_THREE.get(strategy, {}).items()]
    assert doctor.main([*given, "--json"]) == 0
    foretold = json.loads(capsys.readouterr().out)["needs"]
    assert simulate.main([*given, "--quiet"]) == 0
    summary, rows = read_run(tmp_path / "run")
    coding = Coding(codec, broadcast)
    if strategy != FLOWERS:
        check_the_bill(tmp_path / "run", tiny_bert, method, strategy, [4, 4, 4], rounds=3, coding=coding)
    traffic = summary["communication"]
    for direction, form in (("upload", coding.update), ("download", coding.broadcast)):
        found, most = traffic[f"{direction}_payload_bytes_per_client_round"], foretold[f"{direction}_bytes"]
        assert found < most if form.zstd else found == pytest.approx(most, rel=1e-12), "doctor knows it too"
    if strategy == "scaffold":
        crossed = sum(traffic[f"{way}_payload_bytes_per_client_round"] for way in ("upload", "download")) * 9
        told = foretold["total_bytes"] - crossed - 3 * traffic["one_off_bytes_per_client"]
        variates = 2 * 9 * 4 * summary["trained_numbers"]
        assert told == pytest.approx(variates) and traffic["total_payload_bytes"] >= foretold["total_bytes"]
    assert summary["codec"]["error_feedback"] == feedback
    assert summary["failed_clients"] == 0
    errors = [row["transport_error"] for row in rows]
    assert all(error > 1e-4 if coding.update.lossy else error < 1e-4 for error in errors)
    if coding.broadcast.lossy:
        assert all(row["broadcast_error"] > 0 for row in rows)
    if method in ("fed-sb", "lotr", "lora-xs") and strategy not in (FLOWERS, "krum"):
        assert summary["aggregation_error_max"] <= 1e-6, "the mean of what was decoded is still exact"


def test_every_method_and_every_strategy_has_been_run_with_a_codec() -> None:
    assert {row[0] for row in CODED} == set(METHODS)
    assert {row[1] for row in CODED} == {*entry_points(group=GROUP).names, FLOWERS}


BOTH = ("int8", "delta+int8", True)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, BOTH),
        ({"method": "lora"}, BOTH),
        ({"method": "lotr", "strategy": "scaffold"}, BOTH),
        ({"rebase": "2"}, BOTH),
        ({"client_rank": "4,2,1"}, ("int8", "float32", True)),
        ({"codec": "int4"}, ("int4", "delta+int8", True)),
        ({"broadcast_codec": "float32"}, ("int8", "float32", True)),
        ({"codec": "float32"}, ("float32", "float32", None)),
        ({"error_feedback": False}, ("float32", "float32", False)),
        ({"method": "lora", "strategy": "flora"}, ("float32", "float32", None)),
        ({"method": "fedsvd"}, ("float32", "float32", None)),
        ({"engine": "flower"}, ("float32", "float32", None)),
        ({"baseline": "central"}, ("float32", "float32", None)),
        ({"privacy": "example", "epsilon": 8.0}, ("float32", "float32", None)),
        ({"privacy": "example", "epsilon": 8.0, "error_feedback": True}, BOTH),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) if isinstance(fields, dict) else "",
)
def test_what_is_left_open_travels_in_a_byte_a_number_where_nothing_is_lost_by_it(
    fields: dict[str, Any], found: tuple[Any, ...], tiny_bert: Path, animals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, usual in zip(unmet.USUAL, BOTH, strict=False):
        monkeypatch.setitem(unmet.USUAL, name, usual)
    config = check_all(resolve(SimulationConfig(**words(tiny_bert, animals, **fields))))[0].config
    assert (config.codec, config.broadcast_codec, config.error_feedback) == found


def test_the_command_line_codes_and_an_older_run_goes_on_as_it_was(
    tiny_bert: Path, animals: Path, tmp_path: Path, simulate: Simulate
) -> None:
    """In processes of their own, which have the default; and a configuration from before there were codecs."""
    given = {name: value for name, value in words(tiny_bert, animals, rounds=2).items() if name != "quiet"}
    assert simulate(*flags({**given, "out": tmp_path / "run"})).returncode == 0
    assert read_run(tmp_path / "run")[0]["codec"]["update"] == "int8"
    old = tmp_path / "old"
    assert simulate(*flags({**given, "codec": "float32", "out": old})).returncode == 0
    lines = (old / "config.yaml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("codec:", "broadcast_codec:"))]
    (old / "config.yaml").write_text("\n".join(kept) + "\n", encoding="utf-8")
    done = simulate(*flags({**given, "out": old, "rounds": 3}), "--resume")
    assert done.returncode == 0, done.stderr
    assert read_run(old)[0]["codec"] is None


@pytest.mark.parametrize("method", METHODS)
def test_the_tensors_of_every_method_make_messages_of_the_bills_size(method: str, tiny_bert: Path) -> None:
    """With every codec; what a strategy does with decoded tensors has no part in it."""
    row, spec = METHODS[method], ModelSpec(str(tiny_bert), "classification", 2, False, 0)
    base, config = load_base(spec), None
    if row.adapts:
        config = CoreConfig(method=method, r=4, basis="svd" if row.basis == "update" else None)
        config.target_modules = adaptable_layers(base, "all-linear")
    model = TrainableModel(base, spec, config)
    values = {name: tensor.numpy() for name, tensor in model.values().items()}
    architecture = read_architecture(str(tiny_bert), "classification", 2, "all-linear")
    for codec in ("bfloat16", "int8", "int4", "sign", "top-k:0.03"):
        coding, stream = Coding(codec, f"delta+{codec}"), np.random.default_rng(0)
        owed = bill(row, architecture.layers, architecture.heads, [4], 2, coding)
        for number in (1, 2):
            sent = {name: value for name, value in values.items() if name in model.moving(number)}
            assert len(encode(coding.update, sent, stream)) == owed.ups[number - 1]
        assert len(encode(coding.broadcast, values, stream)) == owed.downs[1] == owed.round_down
        assert len(encode(coding.whole, values, stream)) == owed.downs[0], "who holds nothing is sent the whole"


@pytest.fixture(scope="module")
def long_run(
    tiny_bert: Path, animals: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SimulationConfig, Path, list[dict[int, Any]]]]:
    """Two of six clients a round, with feedback and deltas; of each round what the server knows that clients hold."""
    out = tmp_path_factory.mktemp("coded") / "run"
    fields = {**options(tiny_bert, animals), "seed": SEED, "rounds": ROUNDS, "method": "lora", "max_examples": 6}
    config = SimulationConfig(**fields, codec="int4", broadcast_codec="delta+int8", out=out)
    held: list[dict[int, Any]] = []

    def spied(grid: Any, strategy: Any, federation: Any, state: Any) -> Any:
        done = loop.run_round(grid, strategy, federation, state)
        held.append(dict(state.chain.the(Codec).held))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlotr.run.directory.KEPT_CHECKPOINTS", ROUNDS)
        patch.setattr("fedlotr.run.rounds.run_round", spied)
        run_simulation(config)
    yield config, out, held


def test_a_client_that_returns_finds_what_it_lost_and_what_it_holds(
    long_run: tuple[SimulationConfig, Path, list[dict[int, Any]]],
) -> None:
    _, run, _ = long_run
    first, before, after = (states(run, number)[RETURNS] for number in (1, ROUNDS - 1, ROUNDS))
    assert set(first) == {LOST, HELD}
    assert first == before and arrays_sha256(before[LOST]) != arrays_sha256(after[LOST])
    assert set(states(run, 1)) == set(asked(SEED)[0]), "who was not asked keeps nothing"
    sizes = [e.payload_bytes for e in read_ledger(run / "ledger") if e.client == RETURNS and e.kind == "broadcast"]
    assert len(sizes) == 2 and sizes[0] == sizes[1], "the whole and what it changed by, both in a byte a number"


def test_the_server_knows_to_the_bit_what_every_client_holds(
    long_run: tuple[SimulationConfig, Path, list[dict[int, Any]]],
) -> None:
    _, run, held = long_run
    for number, known in enumerate(held, start=1):
        again = Codec(Coding(broadcast_codec="delta+int8"), SEED)
        again.recall(states(run, number))
        kept = again.held
        assert set(kept) == set(known) == set().union(*asked(SEED)[:number])
        for client, tensors in known.items():
            assert all(tensors[name].tobytes() == kept[client][name].tobytes() for name in tensors)


def test_a_client_that_the_server_takes_for_a_newcomer_takes_the_whole_for_what_it_holds() -> None:
    """As on an engine whose clients keep what they were sent in a round in which they failed."""
    identify_process()
    rng, coding = np.random.default_rng(0), Coding(broadcast_codec="delta+sign")
    values, other = ({"C": rng.normal(size=(8, 8)).astype(np.float32)} for _ in range(2))
    server = Codec(coding, SEED)
    server.begin(Turn(number=3, moved=to_record(values)))
    draft = Draft(client=0, message=Message(RecordDict(), 1, MessageType.TRAIN), records={ARRAYS: to_record(values)})
    server.outgoing(draft)
    state = RecordDict({HELD: to_record(other)})
    got = to_arrays(received(draft.records, state, coding, {"C": (8, 8)}))
    assert np.array_equal(got["C"], server.sent[0]["C"])
    assert arrays_sha256(state[HELD]) != arrays_sha256(to_record(other))
    assert 0 < np.abs(got["C"] - values["C"]).max() < np.abs(values["C"]).max() / 6, "in int4, not by its signs"


@pytest.mark.slow
def test_a_killed_run_with_feedback_and_deltas_goes_on_to_the_same_bytes(
    tiny_bert: Path, animals: Path, simulate: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed in the middle of a round, after clients have trained and kept what they lost."""
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    monkeypatch.setenv("MORTAL_ROUND", "3")
    monkeypatch.setenv("MORTAL_FLAG", str(tmp_path / "flag"))
    fields = {**options(tiny_bert, animals), "sample": 3, "rounds": 4, "method": "lora", "max_examples": 6}
    fields |= {"codec": "int4", "broadcast_codec": "delta+int8", "strategy": f"{tmp_path}/mortal.py:Momentum"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    died = simulate(*flags(fields), "--out", killed)
    assert died.returncode == -signal.SIGKILL, died.stderr
    config = SimulationConfig(**fields, out=killed, resume=True)
    run_simulation(config)
    run_simulation(config.model_copy(update={"out": whole, "resume": False}))  # the flag is there: nobody dies
    assert_same_results(killed, whole)
    assert states(killed, 4) == states(whole, 4)


def test_a_damaged_message_is_a_failed_client_that_is_named(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlotr.run.simulation.CLIENT_APP", "tests.faulty_app:app")
    monkeypatch.setenv("FAULTS", "1:truncated:2 4:flipped:2")
    faulty_app.SENT.clear()  # of other tests in this process
    fields = {**options(tiny_bert, animals), "sample": 6, "rounds": 3, "method": "lotr", "max_examples": 6}
    config = SimulationConfig(**fields, codec="int8", broadcast_codec="delta+int8", out=tmp_path / "run")
    run_simulation(config)
    summary, rows = read_run(tmp_path / "run")
    bad = {"1": "damaged message", "4": "damaged message"}
    assert [row["failures"] for row in rows] == [{}, bad, bad], "and the server still knows what they hold in round 3"
    assert summary["failures"] == {"damaged message": {"1": 2, "4": 2}}
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert (
        "round 2: client 1 failed and is left out: its update cannot be decoded: it has 307 bytes, expected 308" in log
    )
    assert "round 2: client 4 failed and is left out: its update cannot be decoded: its checksum is wrong" in log
    before, after = states(tmp_path / "run", 2), states(tmp_path / "run", 3)
    assert all((before[client] == after[client]) == (client in (1, 4)) for client in range(6)), (
        "they kept nothing of it"
    )
    assert not faulty_app.SENT or all(number < 1 for number, *_ in faulty_app.SENT)


def test_a_client_that_diverges_is_left_out_alone(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlotr.flower.client_app import Worker

    def diverging(self: Worker, job: Job) -> None:
        if job.client == 1:
            next(iter(job.trained.tensors.values()))[0] = np.nan
        finish(self, job)

    finish = Worker.finish
    monkeypatch.setattr(Worker, "finish", diverging)
    fields = words(tiny_bert, animals, rounds=1, eval_every=1, method="lotr", codec="sign", out=tmp_path / "run")
    run_simulation(SimulationConfig(**fields))
    assert read_run(tmp_path / "run")[1][0]["failures"] == {"1": "CodecError"}
    assert "has values that are not finite" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


def test_what_is_told_as_lost_is_what_was_lost(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against the tensors that clients really had, in a round without and one with something to make up for."""
    own: list[dict[str, Any]] = []
    streams: list[Any] = []
    told: list[Any] = []
    really = coding_of_clients.coded_update

    def coded_update(tensors: Any, sent: Any, state: Any, coding: Coding, stream: Any) -> Any:
        own.append({name: tensor.double().numpy() for name, tensor in tensors.items()})
        streams.append(stream.bit_generator.state["state"]["state"])
        return really(tensors, sent, state, coding, stream)

    def codec_error(layers: Any, start: Any, replies: Any, lost: Any) -> Any:
        told.extend(zip(replies, lost, strict=True))
        return certificate.codec_error(layers, start, replies, lost)

    monkeypatch.setattr("fedlotr.flower.links.codec.coded_update", coded_update)
    monkeypatch.setattr("fedlotr.flower.round.codec_error", codec_error)
    fields = words(tiny_bert, animals, rounds=2, eval_every=2, method="lora", codec="int4", out=tmp_path / "run")
    run_simulation(SimulationConfig(**fields))
    assert len(own) == len(told) == 6
    for true, (reply, lost) in zip(own, told, strict=True):
        for name, tensor in true.items():
            np.testing.assert_allclose(reply.arrays[name] + lost[name], tensor, rtol=0, atol=1e-7)
    assert max(float(np.abs(gone).max()) for _, lost in told for gone in lost.values()) > 1e-4
    assert len(set(streams)) == 6, "every client and round rounds by a stream of its own"


def test_the_codecs_error_is_that_of_the_mean_multiplied_out() -> None:
    stream, s = np.random.default_rng(0), 0.5
    a, b = stream.standard_normal((2, 5)), stream.standard_normal((4, 2))
    layers = [
        certificate.Layer({"C": "c"}, a, b, s),
        certificate.Layer({"A": "a", "B": "b"}, None, None, s),
    ]

    def tensors(size: float) -> dict[str, Any]:
        shapes = {"c": (2, 2), "a": (2, 5), "b": (4, 2), "head": (3,)}
        return {name: size * stream.standard_normal(shape) for name, shape in shapes.items()}

    def dense(x: dict[str, Any]) -> Any:
        return np.concatenate([(s * b @ x["c"] @ a).ravel(), (s * x["b"] @ x["a"]).ravel()])

    start, replies = tensors(1), [certificate.Weighted(tensors(1), share) for share in (0.25, 0.75)]
    lost = [tensors(0.1), tensors(0.1)]
    true = [{name: reply.arrays[name] + gone[name] for name in gone} for reply, gone in zip(replies, lost, strict=True)]
    mean = sum(r.share * dense(x) for r, x in zip(replies, true, strict=True)) - dense(start)
    gone = sum(r.share * (dense(r.arrays) - dense(x)) for r, x in zip(replies, true, strict=True))
    found = certificate.codec_error(layers, start, replies, lost)
    assert found == pytest.approx(np.linalg.norm(gone) / np.linalg.norm(mean), rel=1e-10)


def test_what_a_broadcast_loses_never_enters_the_model(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    """Clients that learn nothing leave the model as it is, though all of them start from a rounded one."""
    fields = words(tiny_bert, animals, method="lora", lr=1e-30, head_lr=1e-30, broadcast_codec="int4")
    run_simulation(SimulationConfig(**fields, out=tmp_path / "run"))
    first, last = (load_file(tmp_path / "run" / "checkpoints" / f"round-0000{n}.safetensors") for n in (2, 3))
    assert all(row["broadcast_error"] > 0.01 for row in read_run(tmp_path / "run")[1])
    assert all(np.abs(first[name] - last[name]).max() < 1e-20 for name in first)


def test_a_change_of_what_a_client_does_not_hold_is_refused() -> None:
    coding, stream = Coding(broadcast_codec="delta+int8"), np.random.default_rng(0)
    held, now = ({"x": stream.standard_normal(50).astype(np.float32)} for _ in range(2))
    identify_process()  # Flower makes no message without
    message = Message(RecordDict({"arrays": to_record(now)}), 100, MessageType.TRAIN)
    coder = Codec(coding, 0)
    coder.held = {0: held}
    coder.begin(Turn(number=2, moved=to_record(now)))
    draft = Draft(client=0, message=message, records=dict(message.content.items()))
    coder.outgoing(draft)
    state: Any = RecordDict({HELD: to_record(held)})
    found = coding_of_clients.received(draft.records, state, coding, {})
    assert found["x"].numpy().tobytes() == coder.sent[0]["x"].tobytes() == state[HELD]["x"].numpy().tobytes()
    other = held["x"].copy()
    other[7] = np.nextafter(other[7], np.float32(1))
    with pytest.raises(CodecError, match="about another state than there is here"):
        coding_of_clients.received(draft.records, RecordDict({HELD: to_record({"x": other})}), coding, {})
    with pytest.raises(CodecError, match="and holds nothing"):
        coding_of_clients.received(draft.records, RecordDict(), coding, {})


@pytest.mark.parametrize(
    "fields",
    [
        {"privacy": "example", "noise_multiplier": 1.0, "reproducible_noise": True, "method": "lotr", "codec": "int8"},
        {
            "privacy": "client",
            "noise_multiplier": 1.0,
            "reproducible_noise": True,
            "clip_norm": 1.0,
            "method": "lotr",
            "codec": "int8",
        },
        {"client_rank": "4,2,1", "method": "lora", "codec": "int8"},
    ],
)
def test_codecs_go_with_privacy_and_with_ranks(
    fields: dict[str, Any], tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    run_simulation(SimulationConfig(**words(tiny_bert, animals, **fields), out=tmp_path / "run"))
    summary, rows = read_run(tmp_path / "run")
    told = fields.get("privacy") != "client"  # of hidden clients nothing is told that no noise covers
    assert summary["failed_clients"] == (0 if told else None) and summary["codec"]["error_feedback"]
    assert all((row["transport_error"] is not None) == told for row in rows)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"error_feedback": True, "codec": "float32"}, "this codec loses nothing"),
        ({"error_feedback": True, "baseline": "central"}, "which loses nothing"),
        ({"codec": "int8", "baseline": "central"}, "a baseline sends nothing"),
        ({"client_rank": "4,2", "broadcast_codec": "int8"}, "not those of its blocks"),
        ({"engine": "flower", "broadcast_codec": "delta+int8"}, "Flower does not show what its clients keep"),
        ({"engine": "flower", "codec": "int8", "error_feedback": True}, "Flower does not show what its clients keep"),
        ({"method": "lora", "strategy": "flora", "codec": "int8", "error_feedback": True}, "cannot be made up for"),
        ({"method": "lora", "strategy": "hetlora", "broadcast_codec": "int8"}, "it changes clients' ranks"),
        ({"codec": "int8+zstd", "privacy": "client", "epsilon": 8, "clip_norm": 1}, "size of a squeezed update tells"),
        ({"codec": "int5"}, "did you mean 'int4'|did you mean 'int8'"),
        ({"broadcast_codec": "top-k:0.1"}, "delta\\+top-k:0.1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    fields: dict[str, Any], said: str, tiny_bert: Path, animals: Path
) -> None:
    with pytest.raises(InputError, match=said):
        check_all(resolve(SimulationConfig(**words(tiny_bert, animals, **fields))))
