"""`fedlotr ls` lists every method and strategy, for the eye, for a pipe and as JSON."""

import json

import pytest

from fedlotr import cli
from fedlotr.adapters import METHODS


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
