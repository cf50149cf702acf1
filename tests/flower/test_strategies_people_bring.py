"""A strategy from the template runs; one that raises is named with its method and round, and no round is lost."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from fedlotr import cli, run_simulation
from fedlotr.commands import simulate
from fedlotr.flower import Product, Reply, Strategy, Update, WithCarry, traits, weighted_mean
from fedlotr.flower.plugins import GROUP, installed, load_strategy
from fedlotr.flower.records import to_record
from fedlotr.flower.strategy import ask
from fedlotr.testing import check_strategy
from tests.conftest import ROOT
from tests.data.test_own_data import ROWS, small
from tests.support import read_run

BROKEN = """
from fedlotr.flower import Strategy, weighted_mean

class Broken(Strategy):
    def __init__(self, where="nowhere"):
        self.where, self.past, self.round = where, 0, 0
        self.fail("__init__")

    def fail(self, here):
        if here == self.where and (self.past or here in ("__init__", "load_state")):
            raise KeyError("alhpa")

    def configure_train(self, server_round, arrays, config, grid):
        self.past = server_round - 1
        self.fail("configure_train")
        return super().configure_train(server_round, arrays, config, grid)

    def combine(self, updates, server_round):
        self.fail("combine")
        return weighted_mean(updates)

    def state(self):
        self.fail("state")
        return {}

    def load_state(self, state):
        self.fail("load_state")
"""


@pytest.fixture
def words(tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    given: dict[str, Any] = {
        "model": tiny_bert,
        "data": animals,
        "clients": 3,
        "rounds": 2,
        "rank": 4,
        "method": "lotr",
    }
    given |= {"public-examples": 8, "engine": "local", "threads": 1, "dtype": "float32", "out": tmp_path / "run"}
    return [f"--{name}={value}" for name, value in given.items()] + ["--quiet", "--sample=3"]


@pytest.mark.parametrize("method", ["configure_train", "combine", "state", "load_state"])
def test_what_a_strategy_raises_names_it_its_method_and_the_round_and_loses_nothing(
    method: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Mended in its file: the arguments are part of the configuration, which a resumed run may not change.
    sound, broken = BROKEN, BROKEN.replace('where="nowhere"', f'where="{method}"')
    strategy = "--strategy=broken.py:Broken"
    (tmp_path / "broken.py").write_text(sound if method == "load_state" else broken, encoding="utf-8")
    number = 2
    if method == "load_state":
        number = 1
        assert simulate.main([*words, strategy, "--rounds=1"]) == simulate.DONE
        (tmp_path / "broken.py").write_text(broken, encoding="utf-8")
    resume = ["--resume"] if method == "load_state" else []
    assert simulate.main([*words, strategy, *resume]) == simulate.FAILED
    expected = f"error: strategy Broken, {method}, round {number}, method lotr: KeyError: 'alhpa'"
    assert expected in capsys.readouterr().err
    assert any((tmp_path / "run" / "checkpoints").glob("*00001.json")), "round 1 is safe"

    (tmp_path / "broken.py").write_text(sound, encoding="utf-8")
    assert simulate.main([*words, strategy, "--resume"]) == simulate.DONE
    summary, rows = read_run(tmp_path / "run")
    assert summary["rounds"] == 2 and [row["round"] for row in rows] == [1, 2]


def test_a_strategy_that_cannot_be_made_is_a_mistake_in_the_words(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, "--strategy=broken.py:Broken", "--strategy-arg=where=__init__"]
    assert simulate.main(given) == simulate.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --strategy broken.py:Broken: Broken cannot be made: KeyError: 'alhpa'")
    assert not (tmp_path / "run").exists()


def test_the_template_runs_as_it_is_and_passes_the_suite(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ls", "strategies", "--template"]) == 0
    (tmp_path / "mine.py").write_text(capsys.readouterr().out, encoding="utf-8")
    given = [*words, "--strategy=mine.py:Mine", "--strategy-arg=trust=0.5"]
    assert simulate.main([*given, "--rounds=1"]) == simulate.DONE
    assert simulate.main([*given, "--resume"]) == simulate.DONE
    summary, _ = read_run(tmp_path / "run")
    assert summary["rounds"] == 2 and summary["aggregation_error_max"] <= 1e-6
    check_strategy("mine.py:Mine", {"trust": 0.9})
    assert simulate.main([*words, "--strategy=mine.py:Mine", "--strategy-arg=trust=3", "--out=other"]) == 2
    assert "trust is 3; expected more than 0 and at most 1" in capsys.readouterr().err


THEIRS = """
from pathlib import Path

from fedlotr.flower import Strategy, weighted_mean

(Path(__file__).parent / "imported").write_text("")
print("hello from a package of someone else's")


class Good(Strategy):
    def combine(self, updates, server_round):
        return weighted_mean(updates)

class Raises(Good):
    def __init__(self):
        raise RuntimeError("no licence\\nfound")

class Ends(Good):
    def __init__(self):
        raise SystemExit("goodbye")

class Wants(Good):
    def __init__(self, key):
        pass

class Merges(Good):
    def merges(self, ranks):
        raise ZeroDivisionError("no ranks")

class Counts(Good):
    def merges(self, ranks):
        return "many"

class Needs(Good):
    needs = None
"""
BAD = {
    "raises": "RuntimeError: no licence found",
    "ends": "SystemExit: goodbye",
    "wants": "key",
    "merges": "ZeroDivisionError: no ranks",
    "counts": "TypeError",
    "needs": "TypeError",
    "gone": "No module named 'no_such_module'",
    "exits": "SystemExit: 3",
}


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an installed package lies whose strategies are good, bad, and called like one of ours."""
    folder = tmp_path / "site"
    about = folder / "theirs-1.dist-info"
    about.mkdir(parents=True)
    (folder / "theirs.py").write_text(THEIRS, encoding="utf-8")
    (folder / "theirs_exits.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n", encoding="utf-8")
    points = {name: f"theirs:{name.title()}" for name in ("good", *BAD)}
    points |= {"gone": "no_such_module:X", "exits": "theirs_exits:X", "fedit": "theirs:Raises"}
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join(["[fedlotr.strategies]", *lines, ""]), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    return folder


def test_a_run_loads_no_strategy_but_its_own(theirs: Path, words: list[str], tmp_path: Path) -> None:
    assert simulate.main(words) == 0 and (tmp_path / "run" / "report.html").exists()
    assert not (theirs / "imported").exists()
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert not (theirs / "imported").exists()
    assert read_run(tmp_path / "run")[0]["strategy"] == "exact-average"


def test_a_run_by_an_installed_strategy_is_billed_with_it(theirs: Path, words: list[str], tmp_path: Path) -> None:
    assert simulate.main([*words, "--strategy=good"]) == 0
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "lotr, this run: " in html and ", good, " in html and "raises" not in html


def test_the_bill_and_the_list_name_a_broken_strategy_and_go_on(
    theirs: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cost", "--model", str(tiny_bert), "--rank", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, reason in BAD.items():
        assert reason in found["left_out"][name] and "\n" not in found["left_out"][name]
    named = {name for row in found["rows"] for name in row["strategies"]}
    assert {"good", "exact-average", "fedit"} <= named and not named & set(BAD)
    assert cli.main(["ls", "strategies", "--json"]) == 0
    listed = {(row["strategy"], row["from"]): row["what"] for row in json.loads(capsys.readouterr().out)}
    assert "No module named" in listed["gone", "no_such_module:X"] and ("good", "theirs:Good") in listed
    assert "SystemExit: 3" in listed["exits", "theirs_exits:X"]


def test_a_name_of_ours_stays_ours_and_a_broken_strategy_that_is_asked_for_is_one_line(
    theirs: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert type(load_strategy("fedit", {}, 3)).__module__ == "fedlotr.strategies.fedit"
    assert simulate.main([*words, "--strategy=raises"]) == 2
    said = capsys.readouterr().err.strip()
    assert "--strategy raises: Raises cannot be made: RuntimeError: no licence found" in said and "\n" not in said


def test_nothing_but_its_traits_is_asked_of_a_strategy() -> None:
    probed = re.compile(r"(getattr|hasattr|vars)\((self\._?)?strategy\b|isinstance\((self\._?)?strategy, Strategy\b")
    found = {
        str(path.relative_to(ROOT))
        for folder in ("fedlotr", "strategies")
        for path in (ROOT / folder).rglob("*.py")
        if probed.search(path.read_text(encoding="utf-8"))
    }
    # The checkpoint keeps the attributes of those that have no `state`.
    assert found == {"fedlotr/flower/traits.py", "fedlotr/flower/state.py"}


def test_a_trait_is_added_by_a_line_in_the_table_and_is_its_default_of_other_authors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(traits.StrategyTraits):
        sleeps: bool = False

    class Tired(FedAvg):
        sleeps = True
        averages = True

    monkeypatch.setattr(traits, "StrategyTraits", More)
    for strategy, expected in ((Tired(), More(sleeps=True, averages=True)), (FedAvg(), More())):
        assert traits.traits_of(strategy) == expected
    assert traits.traits_of(load_strategy("fedex-lora", {}, 3)).merges([4, 4, 4]) == 8


def test_what_earlier_strategies_answer_is_understood() -> None:
    class Old(Strategy):
        def combine(self, updates: Sequence[Update], server_round: int) -> WithCarry:
            self.mean_before_step = weighted_mean(updates)
            return WithCarry({"x": np.zeros(2)}, {"layer": Product(np.ones((2, 1)), np.ones((1, 2)))})

    reply = Reply(client=0, arrays=to_record({"x": np.ones(2)}), weight=1.0, examples=1, loss=0.5)
    arrays, metrics, beside = ask(Old(), 1, [reply])
    assert arrays is not None and arrays["x"].numpy().tolist() == [0, 0] and metrics == {"loss": 0.5}
    assert list(beside.carry) == ["layer"] and beside.mean is not None and beside.mean["x"].tolist() == [1, 1]
    tensors, carry = WithCarry({"x": np.zeros(2)}, {})
    assert list(tensors) == ["x"] and carry == {}


def test_a_broken_strategy_that_another_package_announces_breaks_no_run_and_no_report(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "site" / "others-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\nothers = others_strategy:Mine\n", encoding="utf-8")
    (about.parent / "others_strategy.py").write_text("raise SystemExit('no licence')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(about.parent)
    assert "others" in installed()
    out = tmp_path / "run"
    result = run_simulation(small(tiny_bert, out), data={"train": ROWS})
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The bill under other methods" in page and "licence" not in page
    assert "licence" not in " ".join(result.summary["warnings"])
