"""What a federation is held against: the pooled data, and each client alone, on the federation's own path."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedlotr import SimulationConfig, cli, run_simulation, simulate
from fedlotr.evaluation.scores import evaluate
from fedlotr.evaluation.spreads import spread_of
from fedlotr.run.baselines import over_clients, pooled
from fedlotr.run.checking import check
from fedlotr.run.directory import RunDirectory
from fedlotr.run.federation import LR_FACTORS
from fedlotr.run.simulation import resolve
from fedlotr.streams import generator
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from tests.support import prepare_again, read_run


@pytest.fixture(scope="module")
def base(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 3,
        "sample": 2,
        "rounds": 2,
        "rank": 4,
        "method": "lotr",
        "public_examples": 16,
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
    }


def words(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def test_the_pooled_data_are_worked_through_in_as_many_steps_and_examples_as_a_round_has() -> None:
    parts = [np.arange(0, 16), np.arange(16, 20), np.arange(20, 40)]
    training = LocalTraining(epochs=2, batch_size=8)  # 4, 2 and 6 steps; 32, 8 and 40 examples
    (everything,), central = pooled(parts, training, sampled=3)
    assert everything.tolist() == list(range(40))
    assert (central.steps, central.batch_size) == (4, 20), "80 examples in four steps"
    (_,), central = pooled(parts, replace(training, steps=3), sampled=2)
    # in three steps 16 + 8, 3 · 4 and 8 + 8 + 4 examples, 56 in all; of two clients of three 37, in three steps
    assert (central.steps, central.batch_size) == (3, 12)
    (_,), central = pooled(parts, replace(training, steps=1), sampled=50)
    assert central.batch_size == 40, "not more than there are"


@pytest.mark.parametrize("method", ["lotr", "rolora", "ravan"])
def test_central_is_the_federation_of_one_client_that_holds_everything(
    method: str, base: dict[str, Any], tmp_path: Path
) -> None:
    options = {**base, "method": method, "partition": "iid", "max_examples": None}
    config = SimulationConfig(**options, baseline="central", out=tmp_path / "central")
    training = check(resolve(config)).training
    central = run_simulation(config)
    one = run_simulation(
        SimulationConfig(
            **{**options, "clients": 1, "sample": 1, "local_steps": training.steps, "batch_size": training.batch_size},
            out=tmp_path / "one",
        )
    )
    assert central.summary["trained_sha256"] == one.summary["trained_sha256"]
    assert central.summary["final"] == one.summary["final"]
    assert one.summary["communication"]["total_wire_bytes"] > 0
    assert set(central.summary["communication"].values()) == {0}
    assert [row["bytes_up"] + row["bytes_down"] for row in central.history] == [0, 0]
    assert central.summary["aggregation_error_max"] is None
    assert central.summary["aggregation_error_reason"] == "baseline central: no updates are averaged"
    assert (central.run_dir / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["lotr", "rolora"])
def test_local_is_each_client_trained_alone_from_the_common_start(
    method: str, base: dict[str, Any], tmp_path: Path
) -> None:
    config = SimulationConfig(**{**base, "method": method}, baseline="local", out=tmp_path / "run")
    summary = run_simulation(config).summary
    checked = check(resolve(config))
    prepared = prepare_again(checked, tmp_path / "again")
    model, workplace = prepared.model, prepared.workplace
    start, scores = model.values(), []
    checkpoint = RunDirectory(tmp_path / "run").last_checkpoint()
    assert checkpoint is not None
    for client in range(3):
        own = dict(start)
        for number in (1, 2):
            factor = LR_FACTORS["cosine"]((number - 1) / 2)
            rates = replace(
                checked.training, lr=checked.training.lr * factor, head_lr=checked.training.head_lr * factor
            )
            work = ClientWork(workplace.rows(client), generator(0, "shuffle", number, client))
            own |= train_cohort(model, own, workplace.train, [work], rates, None, number)[0].tensors
        model.assign(own)
        found = evaluate(model, workplace.test, np.arange(len(workplace.test)))
        scores.append({"loss": found.mean_loss, "accuracy": found.accuracy})
    losses = [score["loss"] for score in scores]
    assert np.ptp(losses) > 1e-3, "the clients are not alike"
    assert summary["final"]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert summary["final"]["accuracy"] == pytest.approx(np.mean([score["accuracy"] for score in scores]))
    assert summary["over_clients"]["loss_std"] == pytest.approx(np.std(losses), rel=1e-3)
    assert summary["over_clients"]["loss_worst_tenth"] == pytest.approx(max(losses), rel=1e-4)
    assert set(summary["communication"].values()) == {0} and summary["aggregation_error_max"] is None
    assert not (tmp_path / "run" / "adapter").exists(), "there is no common model"


def test_the_worst_tenth_is_the_lowest_accuracy_and_the_highest_loss() -> None:
    scores = [{"accuracy": k / 20, "loss": float(k)} for k in range(20)]
    means, spread = over_clients(scores)
    assert means == {"accuracy": pytest.approx(0.475), "loss": 9.5}
    assert spread["accuracy_worst_tenth"] == pytest.approx(0.025) and spread["loss_worst_tenth"] == 18.5
    assert spread["loss_std"] == pytest.approx(np.std(np.arange(20)))


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (9, 1), (10, 1), (14, 2), (15, 2), (25, 3), (70, 7)])
def test_the_worst_tenth_is_the_same_clients_wherever_it_is_told(clients: int, worst: int) -> None:
    scores = [float(k * 7919 % clients) for k in range(clients)]  # 0 to clients - 1, in no order
    _, spread = over_clients([{"accuracy": score, "loss": score} for score in scores])
    lowest, largest = (worst - 1) / 2, clients - 1 - (worst - 1) / 2
    assert (spread["accuracy_worst_tenth"], spread["loss_worst_tenth"]) == (lowest, largest)
    assert spread_of("accuracy", scores)["worst_tenth"] == lowest
    assert spread_of("perplexity", scores)["worst_tenth"] == largest


@pytest.mark.parametrize("baseline", ["central", "local"])
def test_a_baseline_goes_on_to_the_same_bytes(baseline: str, base: dict[str, Any], tmp_path: Path) -> None:
    given = words({**base, "lr_schedule": "constant", "baseline": baseline})
    assert simulate.main([*given, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    assert simulate.main([*given, "--rounds", "1", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert simulate.main([*given, "--out", str(tmp_path / "run"), "--resume", "--quiet"]) == 0
    whole, again = (read_run(tmp_path / name) for name in ("whole", "run"))
    assert whole[0]["trained_sha256"] == again[0]["trained_sha256"]
    assert whole[1][1]["loss"] == again[1][1]["loss"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"{baseline} baseline" in page and "a baseline sends nothing" in page and "over bytes" not in page


def test_a_baseline_has_no_strategy_and_a_runs_own_configuration_gives_it_none(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words({**base, "rounds": 1})
    assert simulate.main([*given, "--baseline", "central", "--strategy", "fedadam"]) == 2
    assert "a baseline averages nothing" in capsys.readouterr().err
    assert simulate.main([*given, "--baseline", "centre"]) == 2
    assert "--baseline centre: not a choice, did you mean 'central'?" in capsys.readouterr().err
    assert simulate.main([*given, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    again = [str(tmp_path / "run" / "config.yaml"), "--baseline", "local", "--out", str(tmp_path / "local"), "--quiet"]
    assert simulate.main(again) == 0


@pytest.mark.parametrize("baseline", ["central", "local"])
def test_doctor_foretells_that_a_baseline_sends_nothing(
    baseline: str, base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words(base), "--baseline", baseline, "--json"]
    assert cli.main(["doctor", *given, "--out", str(tmp_path / "run")]) == 0
    assert '"total_bytes": 0' in capsys.readouterr().out


def test_baselines_stand_in_a_grid_beside_the_federation(base: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"method": "lotr"}, {"method": "lotr", "baseline": "central"}, {"method": "lotr", "baseline": "local"}]
    file = tmp_path / "grid.yaml"
    file.write_text(
        yaml.safe_dump({"base": {**base, "strategy": "fedadam"}, "rows": rows}, sort_keys=False), encoding="utf-8"
    )
    assert cli.main(["grid", str(file), "--out", str(tmp_path / "out"), "--in-process", "--quiet"]) == 0
    with open(tmp_path / "out" / "table.csv", newline="", encoding="utf-8") as lines:
        found = {row["row"]: row for row in csv.DictReader(lines)}
    assert [found[name]["upload_bytes"] for name in found] == ["1096", "0", "0"]
    assert [found[name]["certificate"] == "" for name in found] == [False, True, True]
    local = read_run(tmp_path / "out" / "lotr_local" / "seed-0")[0]
    assert float(found["lotr_local"]["accuracy_clients_std"]) == local["over_clients"]["accuracy_std"]
    assert "worst tenth" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
