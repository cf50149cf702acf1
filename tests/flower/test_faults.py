"""Faults on purpose: the checks of replies meet them, the run goes on, and what is told of them agrees everywhere."""

import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedlotr import SimulationConfig, run_simulation
from fedlotr.communication.ledger import read_ledger
from fedlotr.errors import FedlotrError, InputError
from fedlotr.fleet.faults import FAULTS, read_faults
from fedlotr.flower.chain import Chain
from fedlotr.flower.faults import Faults, Past, _packed, _unpacked
from fedlotr.flower.federation import Weights
from fedlotr.flower.link import Draft
from fedlotr.flower.links.codec import coded_record
from fedlotr.flower.private import identify_process, set_message_id
from fedlotr.flower.replies import METRICS_OF_A_REPLY, Rules, check_replies
from fedlotr.flower.round import draw_clients
from fedlotr.flower.serialize import pack, unpack
from tests.flower.test_client_state import options, states
from tests.flower.test_virtual_time import arrivals
from tests.run.test_simulation import assert_same_results, flags, timeless
from tests.support import Simulate, read_run

UNCODED = {"codec": "float32", "broadcast_codec": "float32"}
CODED = {"codec": "int8", "broadcast_codec": "delta+int8"}
"""As it is by default, where tests do not say otherwise."""
TIMED: dict[str, Any] = {"mode": "async", "buffer": 6}
ROUNDS = 10
REFUSED_AS = {
    "dropout": ("no reply", "no reply"),
    "crash": ("CrashOnPurpose", "CrashOnPurpose"),
    "nan": ("damaged message", "not finite"),
    "shape": ("damaged message", "wrong shape"),
    "replayed": ("another message", "another message"),
    "stale": ("damaged message", None),
}
"""Kind -> what its clients' failures are called, where updates are coded, and where they are not; None: it is used."""
ALL = "dropout:0.08,crash:0.08,nan:0.08,shape:0.08,duplicate:0.1,reordered:0.1,replayed:0.1,stale:0.1"


def small(tiny_bert: Path, animals: Path, **fields: Any) -> dict[str, Any]:
    return {
        **options(tiny_bert, animals),
        **{"clients": 50, "sample": 20, "rounds": ROUNDS, "rank": 2, "max_examples": 2, "local_epochs": 1},
        **{"partition": "iid", "eval_every": ROUNDS, "method": "lora-xs", **fields},
    }


def run(folder: Path, given: dict[str, Any], **more: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run_simulation(SimulationConfig(**{**given, **more}, out=folder), quiet=True)
    return read_run(folder)


def wanted(seed: int, words: str) -> list[tuple[int, int, str]]:
    """(round, client, kind) of what is put in: who has answered nothing yet has nothing to bring again."""
    faults, found, answered = Faults.of(read_faults(words), seed, {}), [], set()
    for number in range(1, ROUNDS + 1):
        for client in draw_clients(50, 20, seed, number):
            kind = faults.kind(number, client)
            if kind is not None and not (FAULTS[kind].recalls and client not in answered):
                found.append((number, client, kind))
            if kind is None or not FAULTS[kind].spoils or (FAULTS[kind].recalls and client not in answered):
                answered.add(client)
    return found


def told(folder: Path) -> list[tuple[int, int, str]]:
    """What log.txt says was put in."""
    lines = re.findall(r"round (\d+): client (\d+): fault ([\w]+) on purpose", (folder / "log.txt").read_text())
    return [(int(number), int(client), kind) for number, client, kind in lines]


def check_counts(folder: Path, words: str, *, coded: bool) -> None:
    """That log, rows, summary, failures and report say the same of the same faults."""
    summary, rows = read_run(folder)
    put_in = wanted(0, words)
    assert sorted(told(folder)) == sorted(put_in)
    kinds = read_faults(words).shares
    for row in rows:
        counts = Counter(kind for number, _, kind in put_in if number == row["round"])
        assert row["faults"] == {kind: counts[kind] for kind in kinds}
        failures = {}
        for number, client, kind in put_in:
            said = REFUSED_AS.get(kind, (None, None))[0 if coded else 1]
            if number == row["round"] and said is not None:
                failures[str(client)] = said
        assert row["failures"] == failures and row["failed"] == len(failures)
    for kind in kinds:
        count = sum(one == kind for _, _, one in put_in)
        refused = count if REFUSED_AS.get(kind, (None, None))[0 if coded else 1] else 0
        assert count and summary["faults"][kind] == {"put_in": count, "refused": refused, "used": count - refused}
    page = (folder / "report.html").read_text(encoding="utf-8")
    table = page[page.index("Faults on purpose") :]
    for kind, counts in summary["faults"].items():
        cells = r"\s*".join(rf"<td[^>]*>{value}</td>" for value in counts.values())
        assert re.search(rf">{kind}</t[dh]>\s*{cells}", table), kind


@pytest.fixture(scope="module")
def honest(tiny_bert: Path, animals: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Runs without faults, coded or not."""
    folder = tmp_path_factory.mktemp("honest")
    for coded, codecs in ((True, CODED), (False, UNCODED)):
        run(folder / str(coded), small(tiny_bert, animals, **codecs))
    return {coded: folder / str(coded) for coded in (True, False)}


@pytest.mark.parametrize("coded", [True, False], ids=["coded", "float32"])
@pytest.mark.parametrize("kind", [kind for kind, fault in FAULTS.items() if not fault.takes_time])
def test_every_kind_alone(
    kind: str, coded: bool, honest: dict[bool, Path], tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    words = f"{kind}:0.2"
    summary, rows = run(tmp_path / "run", small(tiny_bert, animals, **(CODED if coded else UNCODED)), fault=words)
    check_counts(tmp_path / "run", words, coded=coded)
    found, plain = (read_ledger(folder / "ledger") for folder in (tmp_path / "run", honest[coded]))
    up = Counter((entry.round, entry.client) for entry in found if entry.direction == "up")
    usual = Counter((entry.round, entry.client) for entry in plain if entry.direction == "up")
    crossed = {"dropout": 0, "crash": 0, "duplicate": 2}.get(kind, 1)
    put_in = {(number, client) for number, client, _ in wanted(0, words)}
    assert up == Counter({at: n * crossed if at in put_in else n for at, n in usual.items()}) + Counter()
    assert [row["bytes_up"] for row in rows] == [
        sum(entry.wire_bytes for entry in found if (entry.round, entry.direction) == (row["round"], "up"))
        for row in rows
    ]
    honest_summary, honest_rows = read_run(honest[coded])
    if not FAULTS[kind].spoils:
        assert summary["trained_sha256"] == honest_summary["trained_sha256"], "what comes twice or late is used once"
        beside = ("faults", "bytes_up")
        rows, honest_rows = (
            [{k: v for k, v in row.items() if k not in beside} for row in r] for r in (rows, honest_rows)
        )
        assert timeless(rows) == timeless(honest_rows)
        notes = re.findall(r"client \d+ sent 2 replies", (tmp_path / "run" / "log.txt").read_text())
        assert len(notes) == (len(put_in) if kind == "duplicate" else 0)
    else:
        assert summary["trained_sha256"] != honest_summary["trained_sha256"]


MORTAL = """
import os, signal
from pathlib import Path
from fedlotr.strategies.exact_average import ExactAverage


class Mortal(ExactAverage):
    def combine(self, updates, server_round):
        flag = Path(os.environ["MORTAL_FLAG"])
        if server_round == 7 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().combine(updates, server_round)
"""


@pytest.mark.parametrize("fields", [CODED, UNCODED, {**UNCODED, **TIMED}], ids=["coded", "float32", "async"])
def test_all_together_go_on_to_the_same_bytes_after_kill(
    fields: dict[str, Any],
    tiny_bert: Path,
    animals: Path,
    simulate: Simulate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    monkeypatch.setenv("MORTAL_FLAG", str(tmp_path / "flag"))
    given = small(tiny_bert, animals, fault=ALL, **fields, strategy=f"{tmp_path}/mortal.py:Mortal")
    died = simulate(*flags(given), "--out", tmp_path / "run")
    assert died.returncode == -signal.SIGKILL, died.stderr
    run(tmp_path / "run", given, resume=True)
    run(tmp_path / "whole", given)
    if "mode" not in fields:
        check_counts(tmp_path / "whole", ALL, coded=fields is CODED)
    assert read_run(tmp_path / "run")[0]["faults"] == read_run(tmp_path / "whole")[0]["faults"]
    assert_same_results(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("fields", [CODED, UNCODED], ids=["coded", "float32"])
def test_any_engine_has_the_same_faults(
    fields: dict[str, str], tiny_bert: Path, animals: Path, tmp_path: Path, ray_session: None
) -> None:
    given = small(tiny_bert, animals, fault=ALL, **fields)
    run(tmp_path / "local", given)
    run(tmp_path / "ray", {**given, "engine": "ray", "workers": 2})
    assert read_run(tmp_path / "ray")[0]["faults"] == read_run(tmp_path / "local")[0]["faults"]
    assert told(tmp_path / "ray") == told(tmp_path / "local")
    assert_same_results(tmp_path / "ray", tmp_path / "local")


@pytest.mark.parametrize(
    "mode",
    [{"fleet": "even"}, {"mode": "deadline", "deadline": 5.0}, {"mode": "over-select"}, TIMED],
    ids=["sync", "deadline", "over-select", "async"],
)
def test_faults_in_virtual_time(mode: dict[str, Any], tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    words = f"{ALL},slow=100:0.2"
    summary, rows = run(
        tmp_path / "run", small(tiny_bert, animals, **UNCODED, **mode, link="up=100k,down=10M"), fault=words
    )
    put_in = told(tmp_path / "run")
    assert {kind for _, _, kind in put_in} == set(FAULTS)
    faults = Faults.of(read_faults(words), 0, {})
    assert all(faults.kind(number, client) == kind for number, client, kind in put_in)
    log = arrivals(tmp_path / "run")
    usual = min(line["computing"] for line in log)
    for line in log:
        slow = (line["trained_on"] + 1, line["client"], "slow") in put_in
        assert slow == (line["computing"] > 50 * usual)
    for kind, counts in summary["faults"].items():
        assert counts["put_in"] == sum(row["faults"][kind] for row in rows) == sum(k == kind for *_, k in put_in)
        said = REFUSED_AS.get(kind, (None, None))[1]
        if said is not None:
            refused = [line for line in log if line["outcome"] == said]
            assert counts["used"] == 0 and counts["refused"] == len(refused) <= counts["put_in"]
    twice = [line["bytes_up"] for line in log if (line["trained_on"] + 1, line["client"], "duplicate") in put_in]
    once = {line["bytes_up"] for line in log if line["outcome"] == "used"}
    assert twice and all(size / 2 in once for size in twice)
    # The first of two is there as soon as one alone would be.
    used = [line for line in log if line["outcome"] == "used"]
    ways = [line["ended"] - line["asked"] - line["computing"] for line in used]
    assert max(ways) < 1.2 * min(ways)


@pytest.mark.parametrize(
    "fields",
    [{}, {"strategy": "flwr.serverapp.strategy:FedAvg"}, {"fleet": "even"}, {**TIMED, "buffer": 2}],
    ids=["ours", "flower's", "sync", "async"],
)
def test_of_a_round_in_which_nothing_arrives_nothing_comes(
    fields: dict[str, Any], tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    given = small(tiny_bert, animals, rounds=3, sample=4, eval_every=1, max_failed=0, **fields)
    summary, rows = run(tmp_path / "run", given, fault="dropout:0.5,nan:0.5")
    assert summary["rounds"] == 3 and [row["loss"] for row in rows] == [summary["initial"]["loss"]] * 3
    assert sum(counts["put_in"] for counts in summary["faults"].values()) == sum(row["clients"] for row in rows)


def test_a_client_that_really_fails_ends_the_run(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlotr.run.simulation.CLIENT_APP", "tests.faulty_app:app")
    given = small(tiny_bert, animals, clients=6, sample=6, max_examples=4, rounds=2, max_failed=0, **UNCODED)
    summary, _ = run(tmp_path / "purpose", given, fault="nan:0.7")
    assert summary["faults"]["nan"]["refused"] > 6
    monkeypatch.setenv("FAULTS", "3:nan")
    with pytest.raises(FedlotrError, match="1 of 6 clients failed"):
        run(tmp_path / "real", given, fault="duplicate:1")
    monkeypatch.setenv("FAULTS", "3:raises")
    with pytest.raises(FedlotrError, match="1 of 6 clients failed.*out of cheese"):
        run(tmp_path / "raises", given, fault="dropout:1")


def test_a_client_whose_reply_is_refused_has_what_it_had(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    given = small(tiny_bert, animals, clients=6, sample=6, max_examples=8, rounds=2, method="fedsa-lora", **UNCODED)
    run(tmp_path / "run", given, fault="dropout:0.1,crash:0.1,nan:0.1,shape:0.1,replayed:0.2")
    first, second = (states(tmp_path / "run", number) for number in (1, 2))
    refused = {client for number, client, _ in told(tmp_path / "run") if number == 2}
    assert refused & set(first) and refused - set(first), "of those who had something, and of those who had nothing"
    for client in range(6):
        before, after = first.get(client), second.get(client)
        assert (before == after) == (client in refused), client


def test_the_first_answer_counts_and_no_answer_to_another_message() -> None:
    identify_process()
    asked = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in (1, 2, 3)]
    for number, message in enumerate(asked):
        set_message_id(message, f"new-{number}")
    old = Message(RecordDict(), dst_node_id=2, message_type="train")
    set_message_id(old, "old")

    def reply(weight: float, to: Message) -> Message:
        client = to.metadata.dst_node_id - 1
        metrics = MetricRecord({"num-examples": 1, "weight": weight, "loss": 0.0})
        records = {"arrays": ArrayRecord(), "metrics": metrics, "client": ConfigRecord({"client": client})}
        return Message(RecordDict(records), reply_to=to)

    drafts = [Draft(client=client, message=message, records={}) for client, message in enumerate(asked)]
    rules = Rules(
        expected=lambda client: ArrayRecord(),
        chain=Chain([]),
        metrics=METRICS_OF_A_REPLY,
        weights=Weights(),
        number=1,
    )
    came = [reply(1.0, asked[0]), reply(2.0, old), reply(3.0, old), reply(4.0, asked[0])]
    good, failures = check_replies(came, drafts, {1: 0, 2: 1, 3: 2}, rules)
    assert [(one.client, one.weight) for one in good] == [(0, 1.0)]
    assert {client: failure.kind for client, failure in failures.items()} == {1: "another message", 2: "no reply"}
    good, _ = check_replies([*came, reply(6.0, asked[1])], drafts, {1: 0, 2: 1, 3: 2}, rules)
    assert [(one.client, one.weight) for one in good] == [(0, 1.0), (1, 6.0)], "the others are no answers to it"


def test_a_reply_of_before_is_kept_bit_for_bit() -> None:
    records = RecordDict(
        {
            "arrays": coded_record(b"\x00\xff\x01"),
            "moments": ArrayRecord({"a": Array(np.float32([[1, np.nan]]))}),
            "metrics": MetricRecord({"weight": 2.0}),
            "client": ConfigRecord({"client": 3}),
        }
    )
    arrays: Any = {}
    kept = unpack(pack(_packed(Past(answered="17", records=records)), arrays, "faults"), arrays)
    found = _unpacked(kept)
    assert (found.answered, dict(found.records)) == ("17", dict(records))


def test_faults_are_as_frequent_as_they_are_said_to_be() -> None:
    plan = read_faults("dropout:0.3,slow=2.5:0.2")
    faults = Faults.of(plan, 1, {})
    found = Counter(faults.kind(number, client) for number in range(1, 41) for client in range(100))
    assert plan.times == 2.5 and found.keys() == {"dropout", "slow", None}
    for kind, share in (("dropout", 0.3), ("slow", 0.2)):
        assert abs(found[kind] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fault": "dropuot:0.1"}, "'dropuot' is no fault, did you mean 'dropout'"),
        ({"fault": "meteor:0.1"}, "'meteor' is no fault; choose one of: crash, dropout"),
        ({"fault": "nan"}, "nan has the share '', expected one from 0 to 1"),
        ({"fault": "nan:1.5"}, "nan has the share '1.5', expected one from 0 to 1"),
        ({"fault": "nan:-0.1"}, "nan has the share '-0.1', expected one from 0 to 1"),
        ({"fault": "nan:nan"}, "nan has the share 'nan', expected one from 0 to 1"),
        ({"fault": "nan:0.6,crash:0.6"}, "its shares come to 1.2 together"),
        ({"fault": "nan:0.1,nan:0.1"}, "nan is named twice"),
        ({"fault": "nan=3:0.1"}, "nan takes no number"),
        ({"fault": "slow=0.5:0.1", "fleet": "even"}, "slow=0.5: expected how many times as long"),
        ({"fault": "slow=inf:0.1", "fleet": "even"}, "slow=inf: expected how many times as long"),
        ({"fault": "nan:0.1,slow=3:0.1"}, "how long a client takes is virtual time"),
        ({"fault": "nan:0.1", "baseline": "local"}, "a baseline sends nothing, and nothing of it can go wrong"),
        (
            {"fault": "nan:0.1", "privacy": "client", "noise_multiplier": 1.0, "clip_norm": 1.0},
            "what is missing of a round would show who was in it",
        ),
    ],
)
def test_what_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        SimulationConfig(**fields)
    (problem,) = refused.value.problems
    assert "--fault" in problem or "fault" in problem
    assert said in problem
