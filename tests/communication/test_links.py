"""Links are reckoned, beside what is measured: each client on its own line, the server on one for all."""

from pathlib import Path

import pytest

from fedlotr import SimulationConfig, run_simulation
from fedlotr.communication.ledger import read_ledger
from fedlotr.communication.links import PROFILES, Link, read_link, read_links, round_time
from fedlotr.errors import InputError
from tests.flower.test_client_state import options
from tests.support import read_run

FAST, SLOW = Link("fast", 80e3, 80e3, 0.01), Link("slow", 8e3, 80e3, 0.5)


def test_a_round_waits_for_its_slowest_client() -> None:
    found = round_time([FAST, SLOW, FAST], {0: 1000, 1: 1000, 2: 1000}, {0: 2000, 1: 2000, 2: 2000})
    assert found.slowest == 1 and found.seconds == pytest.approx(2 * 0.5 + 0.2 + 1.0)
    assert found.median == pytest.approx(2 * 0.01 + 0.2 + 0.1)


def test_who_sends_more_takes_longer_and_who_failed_sends_nothing() -> None:
    found = round_time([FAST, FAST], {0: 8000}, {0: 1000, 1: 1000})
    assert found.slowest == 0 and found.seconds == pytest.approx(0.02 + 0.1 + 0.8)
    assert found.median == pytest.approx(0.02 + 0.1 + 0.4)


def test_the_servers_line_is_shared_by_all_clients_of_a_round() -> None:
    narrow = Link("narrow", 80e3, 80e3, 0.0, server=8e3)
    found = round_time([narrow, FAST], {0: 500, 1: 500}, {0: 100, 1: 100})
    assert found.seconds == pytest.approx(0.02 + 0.2 + 1.0), "also of the client whose link says nothing of it"
    many = round_time([narrow] * 50, dict.fromkeys(range(50), 1000.0), dict.fromkeys(range(50), 300.0))
    assert many.seconds == pytest.approx(narrow.seconds(1000, 300, 50)), "as fedlotr cost reckons it"


def test_clients_have_links_in_turn_or_drawn_by_shares() -> None:
    assert read_links("4g", 3, 0) == [PROFILES["4g"]] * 3
    assert [link.name for link in read_links("4g,3g", 3, 0)] == ["4g", "3g", "4g"]
    written = read_links("up=1M,down=2M;3g", 2, 0)
    assert written == [read_link("up=1M,down=2M"), PROFILES["3g"]]
    drawn = [link.name for link in read_links("4g:0.75, 3g:0.25", 400, 7)]
    assert drawn == [link.name for link in read_links("4g:3,3g:1", 400, 7)], "of the seed, and of the shares alone"
    assert drawn != [link.name for link in read_links("4g:0.75,3g:0.25", 400, 8)]
    assert 250 < drawn.count("4g") < 350


@pytest.mark.parametrize("given", ["5g", "4g,", "4g:0.5,3g", "4g:0,3g:1", "4g:x", "up=1M", ""])
def test_links_that_there_are_not(given: str) -> None:
    with pytest.raises(InputError, match="--link"):
        read_links(given, 3, 0)


def test_simulated_seconds_stand_beside_the_measured_ones(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    fields = {**options(tiny_bert, animals), "rounds": 2, "method": "lotr", "max_examples": 6}
    for name, link in (("plain", None), ("linked", "4g,satellite")):
        run_simulation(SimulationConfig(**fields, link=link, out=tmp_path / name))
    (plain, plain_rows), (summary, rows) = read_run(tmp_path / "plain"), read_run(tmp_path / "linked")
    assert plain["trained_sha256"] == summary["trained_sha256"], "it changes nothing"
    assert plain["simulated"] is None and not any(key.startswith("simulated") for row in plain_rows for key in row)
    links = read_links("4g,satellite", 6, 0)
    ledger = read_ledger(tmp_path / "linked" / "ledger")
    for number, row in enumerate(rows, start=1):
        down, up = (
            {
                k: sum(e.wire_bytes for e in ledger if (e.round, e.direction, e.client) == (number, way, k))
                for k in {e.client for e in ledger if e.round == number}
            }
            for way in ("down", "up")
        )
        times = {k: links[k].seconds(up[k], down[k], 1) for k in down}
        assert row["simulated_seconds"] == pytest.approx(max(times.values()))
        assert times[row["simulated_slowest_client"]] == max(times.values())
        assert set(row) - set(plain_rows[0]) == {key for key in row if key.startswith("simulated_")}
    assert summary["simulated"]["seconds_total"] == pytest.approx(sum(row["simulated_seconds"] for row in rows))
    assert set(summary["timing"]) == set(plain["timing"]), "what was measured is told as ever"
