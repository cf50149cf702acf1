"""Who is there: at seconds that can be checked by hand, and what is said of coming and going by brute force."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlotr.errors import InputError
from fedlotr.fleet.availability import Availability, Bernoulli
from fedlotr.fleet.kinds import AVAILABILITY, Asked, read_availability

HOUR = 3600


def read(
    words: str,
    clients: int = 4,
    seed: int = 0,
    zones: str | None = None,
    repeat: int | None = None,
    folder: Path = Path(),
) -> Availability:
    asked = Asked(clients=clients, seed=seed, zones=zones, repeat=repeat, folder=folder, where="fleet.yaml")
    return read_availability(words, asked)


def who(found: Availability, at: float) -> list[int]:
    return np.flatnonzero(found.available(at)).tolist()


def trace(folder: Path, *rows: tuple[int, float, float]) -> Path:
    lines = [json.dumps({"client": client, "from": begin, "until": until}) for client, begin, until in rows]
    (folder / "trace.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_nobody_is_ever_away() -> None:
    found = read("always")
    assert who(found, 1e9) == [0, 1, 2, 3]
    assert found.until(3, 5.0) == math.inf and found.next_arrival(5.0) == math.inf


def test_nights_go_over_midnight() -> None:
    found = read("day-night", clients=1, zones="0")
    there = {hour for hour in range(24) if who(found, hour * HOUR)}
    assert there == {22, 23, 0, 1, 2, 3, 4, 5}
    assert found.until(0, 23 * HOUR) == 30 * HOUR and found.until(0, 5 * HOUR) == 6 * HOUR
    assert found.until(0, 6 * HOUR) == 6 * HOUR, "whoever leaves is away at that very second"
    assert found.next_arrival(6 * HOUR) == 22 * HOUR and found.next_arrival(23 * HOUR) == math.inf
    assert found.next_arrival(30 * HOUR) == 46 * HOUR


def test_a_day_is_that_of_the_clients_zone() -> None:
    found = read("day-night:8-17.5", zones="0,2,-5.5")
    assert who(found, 6 * HOUR) == [1] and who(found, 8 * HOUR) == [0, 1, 3]
    assert who(found, 13.5 * HOUR) == [0, 1, 2, 3] and who(found, 15.5 * HOUR) == [0, 2, 3]
    assert who(found, 22.99 * HOUR) == [2] and who(found, 23 * HOUR) == []
    assert found.until(2, 14 * HOUR) == 23 * HOUR and found.next_arrival(23 * HOUR) == 30 * HOUR


def test_zones_are_drawn_from_the_seed_or_by_shares() -> None:
    drawn = read("day-night", clients=2000)
    assert 500 < drawn.available(0).sum() < 850, "8 of 24 hours"
    assert who(drawn, 0) == who(read("day-night", clients=2000), 0) != who(read("day-night", clients=2000, seed=1), 0)
    shares = read("day-night:0-12", clients=1000, zones="0:0.75,12:0.25")
    assert 700 < shares.available(0).sum() < 800
    assert shares.available(0).sum() + shares.available(12 * HOUR).sum() == 1000


def test_a_slots_draws_are_the_streams_and_one_clients_are_found_without_the_others() -> None:
    found = read("bernoulli:0.3:100", clients=500, seed=7)
    assert isinstance(found, Bernoulli)
    rows = np.array([found.available(100 * slot) for slot in range(40)])
    assert all((found.available(100 * slot + 99.9) == row).all() for slot, row in enumerate(rows))
    assert abs(rows.mean() - 0.3) < 0.01 and abs((rows[1:] & rows[:-1]).mean() - 0.09) < 0.01
    for client in (0, 3, 499):
        for slot in range(20):
            stays = rows[slot:, client].argmin() if rows[slot, client] else 0
            assert found.until(client, 100 * slot + 5) == (100 * (slot + stays) if stays else 100 * slot + 5)


def test_a_trace_is_there_in_its_intervals_of_which_those_that_overlap_are_one(tmp_path: Path) -> None:
    rows = (0, 10, 20), (2, 0, 5), (0, 15, 30), (0, 16, 17), (0, 30, 31), (2, 40, 50)
    found = read("trace:trace.jsonl", clients=3, folder=trace(tmp_path, *rows))
    assert [who(found, at) for at in (0, 5, 10, 30.5, 31, 40, 50)] == [[2], [], [0], [0], [], [2], []]
    assert found.until(0, 12) == 31 and found.until(2, 0) == 5 and found.until(1, 3) == 3
    assert [found.next_arrival(at) for at in (0, 10, 31, 45, 50)] == [10, 40, 40, math.inf, math.inf]
    assert found.in_words() == "there as trace.jsonl says, 1 without a line never"


def test_a_trace_repeats_and_stays_go_on_over_its_end(tmp_path: Path) -> None:
    rows = (0, 0, 10), (0, 90, 100), (1, 0, 60), (1, 60, 100), (2, 20, 30.1)
    found = read("trace:trace.jsonl", clients=3, repeat=100, folder=trace(tmp_path, *rows))
    assert who(found, 1000 + 25) == [1, 2] and who(found, 295) == [0, 1]
    assert found.until(0, 295) == 310 and found.until(1, 5) == math.inf and found.until(2, 325) == 300 + 30.1
    assert found.next_arrival(325) == 390 and found.next_arrival(330.1) == 390 and found.next_arrival(395) == 420
    assert read("trace:trace.jsonl", clients=3, folder=tmp_path).next_arrival(95) == math.inf


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    trace(tmp_path, (1, 0, 7.5), (0, 3, 4))
    (tmp_path / "trace.csv").write_text("\ufefffrom, until,client\n0,7.5,1\n\n3,4,0\n", encoding="utf-8")
    one, other = read("trace:trace.jsonl", folder=tmp_path), read("trace:trace.csv", folder=tmp_path)
    assert all(who(one, at) == who(other, at) for at in np.arange(0, 10, 0.5))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_coming_and_going_are_what_a_look_at_every_second_finds(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = data.draw(st.sampled_from(["bernoulli:0.4:7", "bernoulli:0.9:3", "trace", "again", "day-night"]))
    step = 1
    if kind in ("trace", "again"):
        spans = st.tuples(st.integers(0, 2), st.integers(0, 29), st.integers(1, 15))
        rows = [
            (client, begin, min(30, begin + long)) for client, begin, long in data.draw(st.lists(spans, max_size=8))
        ]
        folder = trace(tmp_path_factory.mktemp("trace"), *rows)
        found = read("trace:trace.jsonl", 3, repeat=30 if kind == "again" else None, folder=folder)
    elif kind == "day-night":
        begin, end = data.draw(st.lists(st.integers(0, 23), min_size=2, max_size=2, unique=True))
        found, step = read(f"day-night:{begin}-{end}", 3, seed=data.draw(st.integers(0, 9))), HOUR
    else:
        found = read(kind, 3, seed=data.draw(st.integers(0, 99)))
    seconds = np.arange(0, 200) * step
    there = np.array([found.available(at) for at in seconds])
    for now in data.draw(st.lists(st.integers(0, 60), min_size=5, max_size=5)):
        at = float(seconds[now])
        for client in range(3):
            gone = np.flatnonzero(~there[now:, client])
            until = found.until(client, at)
            assert until == (at + gone[0] * step if gone.size else until) and until >= at
            if not gone.size:
                assert until > seconds[-1]
        comes = np.flatnonzero((there[now + 1 :] & ~there[now]).any(axis=1))
        arrival = found.next_arrival(at)
        assert arrival == at + (comes[0] + 1) * step if comes.size else arrival > seconds[-1]


def test_a_kinds_example_is_one(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("client,from,until\n0,0,1\n")
    for name, kind in AVAILABILITY.items():
        assert read(kind.example, folder=tmp_path).available(0).shape == (4,)
        assert kind.example.partition(":")[0] == name == kind.form.partition(":")[0].partition("[")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bernouli:0.5", "no such kind, did you mean 'bernoulli'"),
        ("always:1", "always takes no value"),
        ("bernoulli", "a chance from 0.001 to 0.999"),
        ("bernoulli:1", "'always' where all are there"),
        ("bernoulli:nan", "a chance from"),
        ("bernoulli:0.5:", "whole seconds"),
        ("bernoulli:0.5:0", "whole seconds"),
        ("bernoulli:0.5:1.5", "whole seconds"),
        ("day-night:6", "two different hours"),
        ("day-night:6-6", "two different hours"),
        ("day-night:0-24", "two different hours"),
        ("day-night:0-25", "two different hours"),
        ("trace", "a file of intervals"),
        ("trace:none.csv", "none.csv: cannot be read (No such file"),
        ("trace:trace.parquet", "expected JSON lines (.jsonl) or CSV"),
    ],
)
def test_words_that_name_no_availability(words: str, said: str) -> None:
    with pytest.raises(InputError, match=".") as caught:
        read(words)
    assert said in str(caught.value) and len(caught.value.problems) == 1


def test_keys_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        read("bernoulli:2", zones="1", repeat=5)
    assert caught.value.problems[:2] == [
        "fleet.yaml: zones: bernoulli has none; remove it, or give availability: day-night[:FROM-UNTIL]",
        "fleet.yaml: repeat: bernoulli has none; remove it, or give availability: trace:FILE",
    ]
    assert "a chance from" in caught.value.problems[2]


@pytest.mark.parametrize("zones", ["x", "24", "1,", "1:0.5,2", "1e1", "nan"])
def test_zones_that_there_are_not(zones: str) -> None:
    with pytest.raises(InputError, match="fleet.yaml: zones"):
        read("day-night", zones=zones)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[]", "expected keys with their values"),
        ('{"client": 0, "from": 0}', "until is missing"),
        ('{"client": 0, "from": 0, "until": 1, "untill": 2}', "untill: no such key, did you mean 'until'"),
        ('{"client": 4, "from": 0, "until": 1}', "client 4, but the run has 4, numbered from 0"),
        ('{"client": -1, "from": 0, "until": 1}', "client -1: expected at least 0"),
        ('{"client": true, "from": 0, "until": 1}', "client true: expected a number"),
        ('{"client": 0.5, "from": 0, "until": 1}', "client 0.5: expected a whole number"),
        ('{"client": 0, "from": 1, "until": 1}', "expected an end after the beginning"),
        ('{"client": 0, "from": "x", "until": NaN}', "from x: expected a number; until nan: expected a number"),
        ('{"client": 0, "from": 0, "until": 11}', "until 11, but all begins again after repeat: 10"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"client": 0, "from": 0, "until": 1}\n\n' + line + "\n")
    with pytest.raises(InputError) as caught:
        read("trace:t.jsonl", repeat=10, folder=tmp_path)
    [problem] = caught.value.problems
    assert "t.jsonl, line 3: " in problem and said in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("client,begin,until\n0,0,1\n", "line 1: begin: no such column"),
        ("client,from,from,until\n", "line 1: from is there twice"),
        ("client,from,until\n0,0,1\n0,5\n", "line 3: 2 cells; the header has 3"),
        ("client,from,until\n0,,1\n", "line 2: from is missing"),
        ('client,from,until\n0,"5"x,1\n', "line 2: not CSV"),
        ("client,from,until\n0,0," + "1" * 70_000, "line 2 has more than 65,536 characters"),
        ("client,from,until\n" + "x,0,1\n" * 99, "further lines were not looked at"),
    ],
)
def test_csv_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        read("trace:t.csv", folder=tmp_path)
    assert said in caught.value.problems[-1] and len(caught.value.problems) <= 11
    (tmp_path / "t.csv").write_bytes(b"client,from,until\n\xff")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read("trace:t.csv", folder=tmp_path)


def test_a_hundred_thousand_clients_take_one_stream_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlotr.fleet import availability

    made: list[tuple[object, ...]] = []
    stream = availability.generator
    monkeypatch.setattr(availability, "generator", lambda *keys: made.append(keys) or stream(*keys))
    assert read("bernoulli:0.5", clients=100_000).available(0).sum() > 49_000
    assert made == [(0, "available", 0)]
