"""`fedlotr ls` lists every method and strategy, for the eye, for a pipe and as JSON."""

import json

import pytest

from fedlotr import cli
from fedlotr.adapters import METHODS
from fedlotr.fleet.devices import DEVICES
from fedlotr.fleet.presets import FLEETS


def test_ls_methods_lists_every_row_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "methods", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(METHODS)
    assert rows["lotr"]["upload a layer"] == "r²"
    assert rows["rolora"]["upload a layer"] == "r·d_out, then r·d_in"
    assert rows["lotr-sb"]["one-off"] == "r·(d_in + d_out) per type"


def test_ls_strategies_is_plain_where_it_is_piped(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "strategies"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split("\t") == ["strategy", "certified", "what", "from"]
    certified = {row.split("\t")[0]: row.split("\t")[1] for row in rows}
    assert certified["exact-average"] == "yes" and certified["krum"] == "no"


def test_ls_names_the_nearest_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "metods"]) == 2
    assert "did you mean 'methods'" in capsys.readouterr().err


def test_ls_fleets_and_devices_say_what_a_name_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "fleets", "--json"]) == 0
    rows = {row["fleet"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(FLEETS) and all("assumption" in row["source"] for row in rows.values())
    assert rows["edge"]["what"].endswith("links: broadband; availability: bernoulli:0.9")
    assert cli.main(["ls", "devices"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.split("\t") == ["device", "what", "source"]
    cells = {line.split("\t")[0]: line.split("\t") for line in lines}
    assert set(cells) == set(DEVICES) and cells["t4"][1:] == [
        "1.95e+13 operations a second at training",
        DEVICES["t4"].source,
    ]
