"""Fairness: whom a round asks, in runs; q-FedAvg; and what each client gains."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord

from fedlotr import SimulationConfig, run_simulation
from fedlotr.communication.ledger import read_ledger
from fedlotr.errors import InputError
from fedlotr.fleet.draws import inclusion
from fedlotr.flower import Update
from fedlotr.flower.link import Refused, Reply, Turn
from fedlotr.flower.links.first_loss import FIRST_LOSS, FirstLoss, recorded
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import to_record
from fedlotr.reporting.comparison import compare, tables
from fedlotr.run.simulation import check_all, resolve
from tests.flower.test_client_state import options
from tests.support import read_run


class _NoNodes:
    @staticmethod
    def get_node_ids() -> list[int]:
        return []


def small(tiny_bert: Path, animals: Path, **fields: Any) -> dict[str, Any]:
    given = {"rounds": 3, "rank": 2, "max_examples": 8, "local_epochs": 1, "partition": "dirichlet:0.3", "threads": 1}
    return {**options(tiny_bert, animals), **given, "clients": 8, "sample": 3, **fields}


def step(q: float, *of: tuple[float, float, float], **arguments: Any) -> Any:
    """Where q-FedAvg goes from (1, 1). of: clients as (first loss, change of the one number, weight)."""
    strategy: Any = load_strategy("q-fedavg", {"q": q, **arguments}, len(of))
    ones = {"a": np.ones((1, 1), np.float32), "b": np.ones(1, np.float32)}
    strategy.configure_train(1, to_record(ones), ConfigRecord(), _NoNodes())
    updates = [
        Update(k, {"a": np.array([[1 + d]]), "b": np.ones(1)}, weight, first_loss=loss)
        for k, (loss, d, weight) in enumerate(of)
    ]
    found = strategy.combine(updates, 1)
    assert found["b"] == [1.0]
    return float(found["a"][0, 0]) - 1


def test_q_fedavg_is_the_papers_step() -> None:
    """Two clients, F = 2 and 4, changes 1 and -3, weights 1 and 3, worked out by hand."""
    two = ((2.0, 1.0, 1.0), (4.0, -3.0, 3.0))
    assert step(0.0, *two) == pytest.approx((1 - 9) / 4), "the weighted mean"
    assert step(0.0, *two, lr=0.1) == pytest.approx(-2.0)
    assert step(1.0, *two) == pytest.approx((2 * 1 - 3 * 4 * 3) / (2 + 3 * 4))
    # Algorithm 2 with L = 1 / 0.5: Δ = F L (x - x_k), h = ||L (x - x_k)||² + L F.
    deltas = 0.25 * 2 * 2 * -1 + 0.75 * 4 * 2 * 3
    bounds = 0.25 * (4 * 1 + 2 * 2) + 0.75 * (4 * 9 + 2 * 4)
    assert step(1.0, *two, lr=0.5) == pytest.approx(-deltas / bounds)
    cubes = 0.25 * 2**3 * 2 * -1 + 0.75 * 4**3 * 2 * 3
    below = 0.25 * (3 * 2**2 * 4 * 1 + 2 * 2**3) + 0.75 * (3 * 4**2 * 4 * 9 + 2 * 4**3)
    assert step(3.0, *two, lr=0.5) == pytest.approx(-cubes / below)


def test_q_fedavg_stands_losses_of_any_size() -> None:
    assert step(50.0, (1e30, 1.0, 1.0), (1.0, -1.0, 1.0)) == pytest.approx(1.0)
    assert step(2.0, (0.0, 1.0, 1.0), (0.0, 5.0, 1.0)) == 0.0, "nobody has a loss: nobody needs a step"
    assert step(1.0, (0.0, 7.0, 1.0), (3.0, 1.0, 1.0), lr=1e9) == pytest.approx(1.0)


@pytest.mark.parametrize("arguments", [{"q": -1.0}, {"q": float("nan")}, {"lr": 0.0}, {"lr": float("inf")}])
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        load_strategy("q-fedavg", arguments, 5)


def test_a_negative_loss_is_refused_and_only_one_that_was_asked_for_is_expected() -> None:
    link = FirstLoss()
    link.begin(Turn(number=1, moved=ArrayRecord()))
    assert not link.expects(0)
    link.begin(Turn(number=1, moved=ArrayRecord(), asks={FIRST_LOSS: True}))
    assert set(link.expects(0)) == {FIRST_LOSS}
    reply = Reply(client=0, arrays=ArrayRecord(), weight=1.0, examples=1, records={FIRST_LOSS: recorded(-0.1)})
    with pytest.raises(Refused, match=r"-0\.1"):
        link.verify(reply)


OWN = """
import json
from fedlotr.strategies.q_fedavg import QFedAvg


class Noting(QFedAvg):
    def combine(self, updates, server_round):
        with open("noted.jsonl", "a") as file:
            for one in updates:
                print(json.dumps([server_round, one.client, one.first_loss, one.weight]), file=file)
        return super().combine(updates, server_round)
"""


def test_the_first_loss_is_the_common_models_on_a_clients_examples(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a client's only step over all it has is of the model that it was sent, whatever packs its rows."""
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    given = small(tiny_bert, animals, batch_size=64, strategy="own.py:Noting")
    run_simulation(SimulationConfig(**given, out=tmp_path / "run"))
    noted = [json.loads(line) for line in (tmp_path / "noted.jsonl").read_text(encoding="utf-8").splitlines()]
    _, rows = read_run(tmp_path / "run")
    assert len(noted) == 9
    for row in rows:
        mine = [(loss, weight) for number, _, loss, weight in noted if number == row["round"]]
        mean = np.average([loss for loss, _ in mine], weights=[weight for _, weight in mine])
        assert row["train_loss"] == pytest.approx(mean, rel=1e-5)
    # and it is counted: beside the update and what a client says, a record of eight bytes
    up = [entry for entry in read_ledger(tmp_path / "run" / "ledger") if entry.direction == "up"]
    assert sum(entry.payload_bytes == 8 for entry in up) == 9


def test_a_run_by_size_weighs_all_alike(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    given = small(tiny_bert, animals, rounds=4, sampling="size", strategy="own.py:Noting", max_examples=None)
    config = SimulationConfig(**given, out=tmp_path / "run")
    sizes = np.array([len(part) for part in check_all(resolve(config))[0].parts], float)
    assert len(set(sizes)) > 2, "or this shows nothing"
    run_simulation(config)
    chances = inclusion(sizes, 3)
    noted = [json.loads(line) for line in (tmp_path / "noted.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(noted) == 12
    for _, client, _, weight in noted:
        assert weight == pytest.approx(sizes[client] / (chances[client] * 8 / 3))
    whole, rows = read_run(tmp_path / "run")
    assert all(row["aggregation_error"] is None or row["aggregation_error"] < 1e-6 for row in rows) and whole


def test_a_first_loss_that_is_under_way_survives_a_kill(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits in a checkpoint has all that came with it: updates of round 2 are combined in round 3."""
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    given = small(tiny_bert, animals, sample=6, mode="async", buffer=2, strategy="own.py:Noting")
    run_simulation(SimulationConfig(**given, out=tmp_path / "run"))
    noted = (tmp_path / "noted.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(noted) == 6 and read_run(tmp_path / "run")[1][-1]["staleness_mean"] > 0, "or this shows nothing"
    kept = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    for path in (tmp_path / "run" / "checkpoints").glob("round-00003*"):
        path.unlink()
    run_simulation(SimulationConfig(**given, out=tmp_path / "run", resume=True))
    again = (tmp_path / "noted.jsonl").read_text(encoding="utf-8").splitlines()
    assert again[6:] == noted[4:] and "null" not in "".join(again)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == kept


@pytest.mark.parametrize("sampling", ["loss", "availability"])
def test_who_was_asked_before_decides_who_is_next(
    tiny_bert: Path, animals: Path, tmp_path: Path, sampling: str
) -> None:
    given = small(tiny_bert, animals, sampling=sampling, clients=6)
    run_simulation(SimulationConfig(**given, out=tmp_path / "run"))
    ledger = read_ledger(tmp_path / "run" / "ledger")
    first, second, third = ({entry.client for entry in ledger if entry.round == number} for number in (1, 2, 3))
    assert not first & second and first | second == set(range(6)), "all six had their turn in two rounds of three"
    assert len(third) == 3


def scores_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "client_scores.jsonl").read_text(encoding="utf-8").splitlines()]


def test_what_clients_gain_is_told_client_by_client(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    """Beside no training in one run, beside a model of its own in two; and so where a run was cut off."""
    given = small(tiny_bert, animals, client_eval=0.4, max_examples=16, lr=0.05)
    run_simulation(SimulationConfig(**given, out=tmp_path / "together"))
    summary, rows = read_run(tmp_path / "together")
    scores = scores_of(tmp_path / "together")
    clients = summary["client_evaluation"]["clients"]
    assert len(scores) == 4 * clients and [one["round"] for one in scores[::clients]] == [0, 1, 2, 3]
    first, last = scores[:clients], scores[-clients:]
    gained = [one["score"] - before["score"] for one, before in zip(last, first, strict=True)]
    gain = rows[-1]["client_evaluation"]["gain"]
    assert gain["mean"] == pytest.approx(np.mean(gained)) and gain["spread"] == pytest.approx(np.std(gained))
    assert gain["worst_tenth"] == min(gained) and gain["worse"] == sum(one < 0 for one in gained)
    assert (
        "gain" not in summary["initial"]["client_evaluation"]
        and summary["client_evaluation"] == (rows[-1]["client_evaluation"])
    )
    page = (tmp_path / "together" / "report.html").read_text(encoding="utf-8")
    assert "Each client by itself" in page and f"{gain['worse']:,} lose." in page

    shutil.copytree(tmp_path / "together", tmp_path / "again")
    for path in [*(tmp_path / "again" / "checkpoints").glob("round-00003*"), tmp_path / "again" / "summary.json"]:
        path.unlink()
    run_simulation(SimulationConfig(**given, out=tmp_path / "again", resume=True))
    whole, again = tmp_path / "together" / "client_scores.jsonl", tmp_path / "again" / "client_scores.jsonl"
    assert again.read_bytes() == whole.read_bytes()
    assert read_run(tmp_path / "again")[1][-1]["client_evaluation"] == rows[-1]["client_evaluation"]

    alone = {**given, "baseline": "local", "sampling": "uniform"}
    run_simulation(SimulationConfig(**alone, out=tmp_path / "alone"))
    own = scores_of(tmp_path / "alone")
    assert own[:clients] == first, "before the first round it is the same model"
    assert {(one["client"], one["rows"]) for one in own} == {(one["client"], one["rows"]) for one in scores}
    found = {row["over"]: row for row in gains_of(tmp_path / "together", tmp_path / "alone")}
    over_own = [one["score"] - theirs["score"] for one, theirs in zip(last, own[-clients:], strict=True)]
    assert found["one's own (alone)"]["mean gain"] == pytest.approx(np.mean(over_own))
    assert found["one's own (alone)"]["clients that lose"] == sum(one < 0 for one in over_own)
    assert found["no training"]["worst tenth"] == pytest.approx(gain["worst_tenth"])


def gains_of(*folders: Path) -> list[dict[str, Any]]:
    """As `fedlotr compare` has them, of the first of these runs."""
    table = tables(compare(folders))["What each client gains"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    return [row for row in rows if row["run"] == folders[0].name]


def test_gains_are_of_the_same_clients_and_rows_alone(tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    given = small(tiny_bert, animals, client_eval=0.4, rounds=1)
    run_simulation(SimulationConfig(**given, out=tmp_path / "one"))
    run_simulation(SimulationConfig(**{**given, "seed": 5}, baseline="local", out=tmp_path / "other"))
    assert [row["over"] for row in gains_of(tmp_path / "one", tmp_path / "other")] == ["no training"]
    (tmp_path / "one" / "client_scores.jsonl").write_text('{"round": 1}\n[]\nnothing', encoding="utf-8")
    (tmp_path / "other" / "client_scores.jsonl").write_bytes(b"\xff" * 10)
    assert "What each client gains" not in tables(compare([tmp_path / "one", tmp_path / "other"]))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"baseline": "central", "client_eval": 0.2}, "nobody has rows of its own"),
        ({"sampling": "size", "privacy": "example", "epsilon": 8.0}, "even draws"),
        ({"sampling": "loss", "sample": 8}, "none to choose from"),
        ({"sampling": "availability", "baseline": "local"}, "nobody to choose from"),
        ({"strategy": "q-fedavg", "privacy": "example", "epsilon": 8.0}, "training losses"),
    ],
)
def test_what_does_not_go_with_fairness_is_refused(
    tiny_bert: Path, animals: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_all(resolve(SimulationConfig(**small(tiny_bert, animals, **fields))))
