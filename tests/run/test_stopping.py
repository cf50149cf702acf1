"""`--stop-after` and `--keep best`: a run ends when its model gets no better, and its adapter is the best round's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlotr import SimulationConfig, cli, run_simulation
from fedlotr.simulate import main
from tests.run.test_samples import SPOILT, asked, write
from tests.run.test_simulation import flags
from tests.support import read_run


@pytest.fixture
def options(stories: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of seconds whose best round is the second: from the third on its mean is worthless."""
    (tmp_path / "spoilt.py").write_text(SPOILT, encoding="utf-8")
    return {
        **{
            "model": str(stories),
            "data": str(write(tmp_path / "data", asked)),
            "strategy": f"{tmp_path}/spoilt.py:Spoilt",
        },
        **{"clients": 2, "sample": 2, "rounds": 8, "max_examples": 16, "rank": 4, "method": "lora", "partition": "iid"},
        **{"engine": "local", "threads": 1, "public_examples": 2, "samples": 0, "max_length": "auto"},
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_ends_and_keeps_its_best_round(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert (
        main([*flags(options), "--out", str(out), "--stop-after", "2", "--keep", "best", "--adapter-every", "2"]) == 0
    )
    summary, rows = read_run(out)
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert (summary["best"]["round"], summary["adapter_round"], summary["rounds"]) == (2, 2, 4)
    told = " ".join("".join(capsys.readouterr()).split())
    assert "no better perplexity than round 2's for 2 rounds: the run ends after round 4 of 8 (--stop-after 2)" in told
    assert "the round is chosen by its score on test, which flatters that score" in told
    assert "is that of round 2, the best" in told
    every = sorted(path.parent for path in out.rglob("adapter_model.safetensors") if path.parent.name != "adapter")
    assert len(every) == 2
    assert same(out / "adapter", every[0])
    assert not same(out / "adapter", every[1])
    assert cli.main(["export", str(out), "--to", "peft", "--out", str(tmp_path / "handed")]) == 0
    assert same(out / "adapter", tmp_path / "handed"), "what is handed on is the round that was kept"
    # Whoever goes on with it asks for more patience, and gets more rounds.
    assert main([*flags(options), "--out", str(out), "--stop-after", "3", "--keep", "last", "--resume"]) == 0
    summary, rows = read_run(out)
    assert (len(rows), summary["adapter_round"]) == (5, 5)


def test_a_killed_run_keeps_the_best_round_that_it_had(options: dict[str, Any], tmp_path: Path) -> None:
    """What is kept from before the last two checkpoints is there after a resumption too."""
    rounds = {**options, "rounds": 5, "keep": "best", "lr_schedule": "constant"}
    run_simulation(SimulationConfig(**rounds, out=tmp_path / "whole"))
    run_simulation(SimulationConfig(**{**rounds, "rounds": 4}, out=tmp_path / "parts"))
    result = run_simulation(SimulationConfig(**rounds, out=tmp_path / "parts", resume=True))
    assert result.summary["adapter_round"] == 2
    assert same(tmp_path / "whole" / "adapter", tmp_path / "parts" / "adapter")


def test_rounds_between_two_evaluations_are_waited_for(options: dict[str, Any], tmp_path: Path) -> None:
    run = run_simulation(SimulationConfig(**options, eval_every=2, stop_after=1, out=tmp_path / "run"))
    assert [row["round"] for row in run.history] == [1, 2, 3, 4]
    assert run.history[-1]["evaluate_seconds"] is not None


def test_rows_held_out_of_train_choose_in_silence(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**options, "rounds": 1, "eval_split": "held-out", "keep": "best"}
    assert main([*flags(given), "--out", str(tmp_path / "run")]) == 0
    assert "flatters" not in "".join(capsys.readouterr())


def test_a_best_round_needs_a_common_model(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key: value for key, value in options.items() if key != "strategy"} | {"method": "fedsa-lora"}
    assert main([*flags(given), "--out", str(tmp_path / "run"), "--keep", "best"]) == 2
    assert "what stays with the clients is kept of the last round alone" in capsys.readouterr().err
