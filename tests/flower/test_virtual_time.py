"""Virtual time: the same bytes for any workers and after any kill, and a log that says who trained on what, when."""

import json
import math
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from fedlotr import SimulationConfig, run_simulation
from fedlotr.communication.ledger import read_ledger
from fedlotr.errors import FedlotrError, InputError
from fedlotr.fleet.modes import STALENESS, read_staleness
from fedlotr.flower.records import to_arrays, to_record
from fedlotr.flower.timed import OF_THE_FLEET, USED, _moved
from fedlotr.run.federation import virtual_time
from fedlotr.run.simulation import check_all, resolve
from tests.flower.test_client_state import options
from tests.run.test_simulation import flags, timeless
from tests.support import Simulate, prepare_again, read_run

TIMES = ("virtual_seconds", "used", "staleness_mean", "bytes_in_vain", "under_way")
"""What virtual time adds to a row."""


def small(tiny_bert: Path, animals: Path, **fields: Any) -> dict[str, Any]:
    return {
        **options(tiny_bert, animals),
        "rounds": 3,
        "rank": 2,
        "max_examples": 4,
        "local_epochs": 1,
        "partition": "iid",
        **fields,
    }


def arrivals(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "arrivals.jsonl").read_text(encoding="utf-8").splitlines()]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in timeless(rows)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All that must be the same whoever did the work."""
    files = [folder / "arrivals.jsonl", *folder.glob("ledger/*"), *folder.glob("adapter/*.safetensors")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "fed-sb"},
        {"method": "fed-sb", "codec": "int8", "broadcast_codec": "delta+int8"},
        {"method": "lora", "strategy": "fedit"},
        {"method": "lora", "strategy": "median"},
        {"method": "ffa-lora"},
        {"method": "lora-xs", "strategy": "fedavgm"},
        {"method": "lora-xs", "strategy": "flwr.serverapp.strategy:FedAvg"},
        {"method": "fed-sb", "rebase": "2:svd"},
        {"method": "lora", "strategy": "flora"},
        {"method": "lotr", "strategy": "scaffold"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_a_round_of_all_without_staleness_is_a_whole_round(
    tiny_bert: Path, animals: Path, tmp_path: Path, fields: Mapping[str, Any]
) -> None:
    given = small(tiny_bert, animals, sample=6, **fields)
    modes: dict[str, dict[str, Any]] = {"plain": {}, "sync": {"fleet": "even"}, "over-select": {"mode": "over-select"}}
    modes["deadline"] = {"mode": "deadline", "deadline": 1e6}
    if fields.get("strategy") not in ("flora", "scaffold"):
        modes["async"] = {"mode": "async", "buffer": 6}
    found = {}
    for name, mode in modes.items():
        run_simulation(SimulationConfig(**given, **mode, out=tmp_path / name))
        summary, rows = read_run(tmp_path / name)
        found[name] = summary["trained_sha256"], without_time(rows), read_ledger(tmp_path / name / "ledger")
    assert all(one == found["plain"] for one in found.values()), [
        name for name in found if found[name] != found["plain"]
    ]


SECONDS = (1, 2, 3.5, 4, 5.25, 6, 7.5, 8, 9.75, 30)
"""That each of ten clients trains."""
AWAY = 9
"""Who is there for the first twelve seconds, and again from second twenty on."""
BY_HAND: tuple[tuple[float, str], ...] = (
    # End of the round; its arrivals: client @ second, the model trained on.
    (4, "0@1:0 1@2:0 2@3.5:0 3@4:0"),
    (6, "0@5:1 4@5.25:0 1@6:1 5@6:0"),
    (8, "0@7:2 2@7.5:1 6@7.5:0 1@8:2"),
    (9.75, "3@8:1 7@8:0 0@9:3 8@9.75:0"),
    (11.5, "1@10:3 0@10.75:4 4@11.25:2 2@11.5:3"),
    (13.75, "5@12:2 9@12:0! 0@12.5:5 1@13.5:5 3@13.75:4"),
)
"""Ten clients at a time, a buffer of four: whoever has arrived is asked again for the next model. `!`: lost."""


def of_these_speeds(config: SimulationConfig, tmp_path: Path, each: Sequence[float] = SECONDS) -> Path:
    """A fleet in which the clients' training takes so many seconds."""
    checked, _ = check_all(resolve(config.model_copy(update={"fleet": "even"})))
    plan = virtual_time(checked.config, prepare_again(checked, tmp_path / "place"))
    assert plan is not None
    rows = [f"{client},{plan.operations[client] / seconds!r}" for client, seconds in enumerate(each)]
    (tmp_path / "clients.csv").write_text("client,flops\n" + "\n".join(rows), encoding="utf-8")
    there = [(client, 0, 12 if client == AWAY else 1000) for client in range(10)] + [(AWAY, 20, 1000)]
    lines = "\n".join(f"{client},{start},{end}" for client, start, end in there)
    (tmp_path / "trace.csv").write_text(f"client,from,until\n{lines}", encoding="utf-8")
    path = tmp_path / "fleet.yaml"
    path.write_text("devices: laptop\nclients: clients.csv\ntrace: trace.csv\n", encoding="utf-8")
    return path


def test_a_trace_of_ten_clients_is_what_was_reckoned_by_hand(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    given = small(tiny_bert, animals, clients=10, sample=10, rounds=6, mode="async", buffer=4)
    fleet = of_these_speeds(SimulationConfig(**given), tmp_path)
    run_simulation(SimulationConfig(**given, fleet=str(fleet), out=tmp_path / "run"))
    _, rows = read_run(tmp_path / "run")
    log = arrivals(tmp_path / "run")
    for number, (end, words) in enumerate(BY_HAND, start=1):
        mine = [line for line in log if line["round"] == number]
        assert rows[number - 1]["virtual_seconds"] == pytest.approx(end)
        assert len(mine) == len(words.split())
        for line, word in zip(mine, words.split(), strict=True):
            client, _, rest = word.rstrip("!").partition("@")
            second, _, version = rest.partition(":")
            lost = word.endswith("!")
            age = number - 1 - int(version)
            wanted = [int(client), float(second), int(version), age, "went offline" if lost else USED]
            keys = ("client", "ended", "trained_on", "staleness", "outcome")
            assert [round(line[key], 9) if key == "ended" else line[key] for key in keys] == wanted
            weight = None if lost else 4 / math.sqrt(1 + age)
            assert line["weight"] == (weight if weight is None else pytest.approx(weight)), (
                "FedBuff's, of four examples"
            )
    lost = [line for line in log if line["outcome"] != USED]
    assert [row["bytes_in_vain"] for row in rows] == [0] * 5 + [lost[0]["bytes_down"]] and not lost[0]["bytes_up"]
    assert rows[-1]["failures"] == {"9": "went offline"}


def test_every_byte_is_some_messages(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    given = small(tiny_bert, animals, clients=10, sample=10, rounds=5, mode="async", buffer=4, link="4g")
    fleet = of_these_speeds(SimulationConfig(**given), tmp_path)
    run_simulation(SimulationConfig(**given, fleet=str(fleet), out=tmp_path / "run"))
    summary, rows = read_run(tmp_path / "run")
    ledger, log = read_ledger(tmp_path / "run" / "ledger"), arrivals(tmp_path / "run")
    for client in range(10):
        up = sum(entry.wire_bytes for entry in ledger if (entry.client, entry.direction) == (client, "up"))
        assert up == sum(line["bytes_up"] for line in log if line["client"] == client), "as much as has arrived"
    down = {line["job"]: line["bytes_down"] for line in log}
    sent = sum(entry.wire_bytes for entry in ledger if entry.direction == "down")
    assert sum(down.values()) < sent and summary["virtual"]["under_way"] == rows[-1]["under_way"] == 10 - 4 + 0
    used = [line for line in log if line["outcome"] == USED]
    assert summary["virtual"]["used"] == len(used) == sum(row["used"] for row in rows) == 20
    assert summary["virtual"]["seconds_total"] == rows[-1]["virtual_seconds"] == max(line["ended"] for line in log)


CODED = {"codec": "int8", "broadcast_codec": "delta+int8"}
PHONES = {"clients": 30, "sample": 6, "rounds": 5, "fleet": "phones", "mode": "async", "buffer": 3}


@pytest.mark.slow
def test_any_number_of_workers_and_either_engine_give_the_same_bytes(
    tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    given = {**small(tiny_bert, animals, **PHONES), "engine": "ray"}
    found = []
    for workers in (1, 2, 4):
        out = tmp_path / f"ray-{workers}"
        run_simulation(SimulationConfig(**given, workers=workers, out=out))
        found.append(bytes_of(out))
    run_simulation(SimulationConfig(**{**given, "engine": "local"}, out=tmp_path / "local"))
    assert all(one == bytes_of(tmp_path / "local") for one in found)


MORTAL = """
import os, signal
from pathlib import Path
from fedlotr.strategies.exact_average import ExactAverage


class Mortal(ExactAverage):
    def combine(self, updates, server_round):
        flag = Path(os.environ["MORTAL_FLAG"])
        if server_round == 4 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().combine(updates, server_round)
"""


@pytest.mark.parametrize(
    "fields",
    [
        {"codec": "float32", "broadcast_codec": "float32"},
        CODED,
        {**CODED, "mode": "deadline", "buffer": None, "deadline": 0.1005, "late": "use"},
        {**CODED, "rebase": "2:svd", "method": "lora-xs"},
        {**CODED, "sampling": "loss"},
        {**CODED, "sampling": "availability"},
    ],
    ids=["plain numbers", "coded", "late", "moving bases", "by loss", "by availability"],
)
def test_a_run_that_was_killed_goes_on_with_what_was_under_way(
    tiny_bert: Path,
    animals: Path,
    simulate: Simulate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    monkeypatch.setenv("MORTAL_FLAG", str(tmp_path / "flag"))
    given = {**small(tiny_bert, animals, **PHONES), "strategy": f"{tmp_path}/mortal.py:Mortal", **fields}
    given = {name: value for name, value in given.items() if value is not None}
    died = simulate(*flags(given), "--out", tmp_path / "run")
    assert died.returncode == -signal.SIGKILL, died.stderr
    with open(tmp_path / "run" / "arrivals.jsonl", "a", encoding="utf-8") as file:  # of a round that does not count
        file.write('{"round": 4, "client": 0}\n{"round": 4, "cl')
    run_simulation(SimulationConfig(**given, out=tmp_path / "run", resume=True))
    run_simulation(SimulationConfig(**given, out=tmp_path / "whole"))
    (found, rows), (wanted, expected) = read_run(tmp_path / "run"), read_run(tmp_path / "whole")
    assert any(row["under_way"] for row in expected[:3]), "something was"
    assert found["trained_sha256"] == wanted["trained_sha256"] and timeless(rows) == timeless(expected)
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "whole")


def test_what_comes_after_the_deadline_is_dropped_or_used_later(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    given = small(tiny_bert, animals, clients=10, sample=10, mode="deadline", deadline=5)
    fleet = of_these_speeds(SimulationConfig(**given), tmp_path)
    for late in ("drop", "use"):
        run_simulation(SimulationConfig(**given, fleet=str(fleet), late=late, out=tmp_path / late))
    _, dropped = read_run(tmp_path / "drop")
    assert [row["virtual_seconds"] for row in dropped] == [5, 10, 15] and [row["used"] for row in dropped] == [4, 4, 4]
    assert dropped[0]["failures"] == dict.fromkeys("456789", "late")
    log = arrivals(tmp_path / "drop")
    late = [line for line in log if line["outcome"] == "late"]
    assert all(line["bytes_up"] for line in late if line["client"] != AWAY), "they were sent, in vain"
    _, used = read_run(tmp_path / "use")
    came = [
        [(line["client"], line["staleness"]) for line in arrivals(tmp_path / "use") if line["round"] == number]
        for number in (1, 2)
    ]
    assert came[0] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    # Asked at 0: 4 comes at 5.25, 5 at 6, 6 at 7.5, 7 at 8, 8 at 9.75; at 5 the four are asked again, the last of whom
    # has answered at 9.
    assert came[1] == [(4, 1), (0, 0), (5, 1), (1, 0), (6, 1), (7, 1), (2, 0), (3, 0)]
    assert used[1]["virtual_seconds"] == 9 and used[1]["under_way"] == 2 and used[1]["staleness_mean"] == 0.5
    assert used[1]["aggregation_error"] < 1e-7


def test_of_more_that_are_asked_the_first_are_taken(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    given = small(tiny_bert, animals, clients=10, sample=5, mode="over-select", over_select=2)
    fleet = of_these_speeds(SimulationConfig(**given), tmp_path)
    run_simulation(SimulationConfig(**given, fleet=str(fleet), out=tmp_path / "run"))
    _, rows = read_run(tmp_path / "run")
    assert [row["clients"] for row in rows] == [10, 10, 10]
    assert [row["used"] for row in rows] == [5] * 3 and rows[0]["virtual_seconds"] == pytest.approx(SECONDS[4])
    assert set(rows[0]["failures"].values()) == {"late"}
    clients = [line["client"] for line in arrivals(tmp_path / "run") if line["outcome"] == USED]
    assert clients == [0, 1, 2, 3, 4] * 3


def test_of_those_that_answer_at_the_same_moment_no_more_are_taken(
    tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    given = small(tiny_bert, animals, clients=10, sample=4, mode="over-select", over_select=1.5, late="use", rounds=2)
    fleet = of_these_speeds(SimulationConfig(**given), tmp_path, [2.0] * 10)
    run_simulation(SimulationConfig(**given, fleet=str(fleet), out=tmp_path / "run"))
    first = [line for line in arrivals(tmp_path / "run") if line["round"] == 1]
    assert {line["ended"] for line in first} == {2.0}, "all alike, so that all answer at once"
    assert [line["outcome"] for line in first] == [USED] * 4
    late = [line for line in arrivals(tmp_path / "run") if line["trained_on"] == 0 and line["round"] == 2]
    assert [line["staleness"] for line in late if line["outcome"] == USED] == [1, 1]


def test_updates_between_bases_that_have_moved_are_dropped_and_counted(
    tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    given = small(tiny_bert, animals, clients=10, sample=10, rounds=4, mode="async", buffer=4, rebase="2:svd")
    fleet = of_these_speeds(SimulationConfig(**given), tmp_path)
    run_simulation(SimulationConfig(**given, fleet=str(fleet), out=tmp_path / "run"))
    _, rows = read_run(tmp_path / "run")
    moved = [line for line in arrivals(tmp_path / "run") if line["outcome"] == "bases moved"]
    assert moved and all(line["trained_on"] < 2 < line["round"] for line in moved)
    assert all(line["bytes_up"] and line["weight"] is None for line in moved)
    told = [client for row in rows for client, kind in row["failures"].items() if kind == "bases moved"]
    assert sorted(told) == sorted(str(line["client"]) for line in moved)
    assert all(row["aggregation_error"] < 1e-7 for row in rows)


def test_a_late_update_is_moved_to_the_present_model() -> None:
    rng = np.random.default_rng(seed := 5)
    print("seed", seed)
    trained, here, start = ({"C": rng.normal(size=(3, 3)).astype(np.float32)} for _ in range(3))
    for factor in (1.0, 0.5):
        found = to_arrays(_moved(to_record(trained), to_record(here), start, factor))["C"]
        wanted = here["C"].astype(float) + factor * (trained["C"].astype(float) - start["C"])
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
    assert isinstance(_moved(to_record(trained), to_record(here), start, 1.0), ArrayRecord)


def test_what_an_old_update_counts() -> None:
    def none(words: str) -> Any:
        raise AssertionError(words)

    constant, polynomial, steep = (read_staleness(words, none) for words in ("constant", "polynomial", "polynomial:1"))
    hinge = read_staleness("hinge:2:3", none)
    assert [constant(9), polynomial(0), polynomial(3), steep(3)] == [1, 1, 0.5, 0.25]
    assert [hinge(steps) for steps in (0, 3, 4, 5)] == [1, 1, 1 / 3, 1 / 5]
    own = read_staleness("mine.py:f", lambda words: lambda steps: 2.0 if steps > 1 else 0.5)
    assert own(1) == 0.5
    with pytest.raises(InputError, match=r"2 steps old it says 2.0; expected a number from 0 to 1"):
        own(2)
    assert all(0 <= discount.make()(steps) <= 1 for discount in STALENESS.values() for steps in range(50))


def test_a_function_of_ones_own_and_fedasyncs_mixing(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def half(steps):\n    return 0.5 ** steps\n", encoding="utf-8")
    given = small(tiny_bert, animals, clients=10, sample=10, mode="async")
    fleet = of_these_speeds(SimulationConfig(**given), tmp_path)
    given |= {"fleet": str(fleet), "staleness": f"{tmp_path}/mine.py:half"}
    run_simulation(SimulationConfig(**given, buffer=4, out=tmp_path / "own"))
    assert all(line["weight"] == 4 * 0.5 ** line["staleness"] for line in arrivals(tmp_path / "own"))
    run_simulation(SimulationConfig(**given, buffer=1, mixing=0.6, out=tmp_path / "mixed"))
    for line in arrivals(tmp_path / "mixed"):
        assert line["weight"] == pytest.approx(4 * 0.6 * 0.5 ** line["staleness"])
    last = tmp_path / "own" / "checkpoints" / "round-00003.json"
    last.unlink()
    last.with_suffix(".safetensors").unlink()
    moved = given | {"buffer": 4, "out": tmp_path / "own", "resume": True, "staleness": f"{tmp_path}/yours.py:half"}
    (tmp_path / "yours.py").write_text("def half(steps):\n    return 0.4 ** steps\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"--staleness .*yours.py:half: .* its code differs"):
        run_simulation(SimulationConfig(**moved))
    (tmp_path / "yours.py").write_bytes((tmp_path / "mine.py").read_bytes())
    run_simulation(SimulationConfig(**moved))
    with pytest.raises(InputError, match=r"--staleness hinge:10: the run .* was begun with"):
        run_simulation(SimulationConfig(**moved | {"staleness": "hinge:10"}))
    with pytest.raises(InputError, match=r"--staleness .*mine.py:third: .* has no third"):
        run_simulation(SimulationConfig(**given | {"staleness": f"{tmp_path}/mine.py:third"}, out=tmp_path / "x"))


def test_a_run_ends_where_nobody_comes_any_more(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    given = small(tiny_bert, animals, sample=6, rounds=9, eval_every=4)
    (tmp_path / "trace.jsonl").write_text('{"client": 0, "from": 5, "until": 6}\n', encoding="utf-8")
    (tmp_path / "fleet.yaml").write_text(
        "devices: laptop\nlinks: up=1M,down=1M,latency=100ms\ntrace: trace.jsonl\n", encoding="utf-8"
    )
    done = run_simulation(SimulationConfig(**given, fleet=str(tmp_path / "fleet.yaml"), out=tmp_path / "run"))
    _, rows = read_run(tmp_path / "run")
    assert 1 <= len(rows) < 9 and rows[-1]["loss"] is not None, "the last round is scored"
    assert rows[0]["virtual_seconds"] > 5 and any(
        "no client is there any more" in said for said in done.summary["warnings"]
    )
    (tmp_path / "trace.jsonl").write_text('{"client": 0, "from": 0, "until": 0.000001}\n', encoding="utf-8")
    run_simulation(SimulationConfig(**given, fleet=str(tmp_path / "fleet.yaml"), out=tmp_path / "lost"))
    _, lost = read_run(tmp_path / "lost")
    assert lost[0]["used"] == 0 and lost[0]["train_loss"] is None and lost[0]["failures"] == {"0": "went offline"}
    (tmp_path / "trace.jsonl").write_text('{"client": 0, "from": 0, "until": 0}\n', encoding="utf-8")
    with pytest.raises(FedlotrError, match=r"no client is there any more|until"):
        run_simulation(SimulationConfig(**given, fleet=str(tmp_path / "fleet.yaml"), out=tmp_path / "none"))


def test_who_drops_out_is_not_held_against_the_run(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    given = small(tiny_bert, animals, sample=6, rounds=4, max_failed=0)
    (tmp_path / "fleet.yaml").write_text("devices: phone\ndropout: 0.6\n", encoding="utf-8")
    run_simulation(SimulationConfig(**given, fleet=str(tmp_path / "fleet.yaml"), out=tmp_path / "run"))
    summary, rows = read_run(tmp_path / "run")
    assert set(summary["failures"]) == {"dropped out"} <= OF_THE_FLEET
    log = arrivals(tmp_path / "run")
    lost = [line for line in log if line["outcome"] != USED]
    assert sum(row["bytes_in_vain"] for row in rows) == sum(line["bytes_down"] for line in lost) > 0
    assert all(line["bytes_up"] == 0 and line["ended"] > line["asked"] for line in lost)


def test_a_buffer_that_cannot_be_filled_is_a_round_of_fewer(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    """All are asked, some drop out, and clients come and go for ever: nobody is left who could fill it."""
    given = small(tiny_bert, animals, sample=6, mode="async", buffer=6)
    words = "devices: phone\navailability: day-night:22-6\ndropout: 0.5\n"
    (tmp_path / "fleet.yaml").write_text(words, encoding="utf-8")
    run_simulation(SimulationConfig(**given, fleet=str(tmp_path / "fleet.yaml"), out=tmp_path / "run"))
    _, rows = read_run(tmp_path / "run")
    assert len(rows) == 3 and all(row["used"] + row["failed"] <= 6 and row["under_way"] == 0 for row in rows)
    assert any(row["used"] < 6 for row in rows)


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"mode": "asinc"}, "not a mode, did you mean 'async'"),
        ({"mode": "deadline"}, "give --deadline"),
        ({"deadline": 3}, "it belongs to --mode deadline"),
        ({"mode": "async", "sample": 3, "buffer": 4}, "no more updates can come"),
        ({"mode": "async", "buffer": 2, "mixing": 0.5}, "give --buffer 1"),
        ({"buffer": 2}, "it belongs to --mode async"),
        ({"over_select": 2}, "it belongs to --mode over-select"),
        ({"mode": "async", "late": "use"}, "no update is late there"),
        ({"staleness": "constant"}, "no update is older than its round"),
        ({"mode": "async", "staleness": "polynom"}, "did you mean 'polynomial'"),
        ({"mode": "async", "staleness": "hinge:1:2:3"}, "expected hinge:A:B"),
        ({"mode": "async", "staleness": "polynomial:x"}, "expected polynomial:A"),
        ({"mode": "async", "privacy": "example", "epsilon": 8}, "reckoned for whole rounds"),
        ({"fleet": "phones", "privacy": "client", "epsilon": 8, "clip_norm": 1}, "who is there would decide"),
        ({"mode": "async", "baseline": "central"}, "a baseline sends nothing"),
        ({"mode": "async", "client_rank": "1,2", "rank": 2}, "cannot be told apart"),
        ({"mode": "deadline", "deadline": 3, "late": "use", "optimizer_state": "mean-v"}, "choose reset or keep"),
        ({"mode": "async", "method": "rolora"}, "trains other factors|train other factors"),
        ({"mode": "async", "method": "lora", "strategy": "flora"}, "late updates are of older ones"),
        ({"mode": "async", "method": "lotr", "strategy": "scaffold"}, "late updates are of older ones"),
        ({"mode": "async", "link": "up=1M,down=1M,server=3M"}, "leave server= out"),
        ({"fleet": "fones"}, "did you mean 'phones'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_what_does_not_go_with_virtual_time_is_refused(
    tiny_bert: Path, animals: Path, tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    given = small(tiny_bert, animals) | fields
    with pytest.raises(InputError, match=why):
        run_simulation(SimulationConfig(**given, out=tmp_path / "run"))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
