"""With `--adapter-every` a run writes its adapter as it goes, and what is there is of rounds that count."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlotr import Callbacks, RoundEvent, SimulationConfig, run_simulation
from fedlotr.simulate import main
from tests.run.test_simulation import flags

NAMES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@pytest.fixture
def options(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    return {
        **{"model": str(tiny_bert), "data": str(animals), "clients": 4, "sample": 2, "rounds": 3, "rank": 4},
        **{"public_examples": 16, "engine": "local", "threads": 1, "dtype": "float32", "method": "fed-sb"},
        "lr_schedule": "constant",  # whatever the number of rounds
    }


def written(run: Path) -> dict[str, list[bytes]]:
    return {path.name: [(path / name).read_bytes() for name in NAMES] for path in sorted((run / "adapters").iterdir())}


def test_the_adapter_of_a_round_is_there_when_the_round_is_told(options: dict[str, Any], tmp_path: Path) -> None:
    seen = {}

    class Watching(Callbacks):
        def on_round(self, event: RoundEvent) -> None:
            seen[event.round] = sorted(written(event.run_dir)) if event.round > 1 else []

    out = tmp_path / "run"
    run_simulation(SimulationConfig(**options, adapter_every=2, quiet=True, out=out), callbacks=Watching())
    assert seen == {1: [], 2: ["round-00002"], 3: ["round-00002"]}
    # It is what a run leaves that ends there, and writing it changes nothing.
    short = {**options, "rounds": 2}
    run_simulation(SimulationConfig(**short, quiet=True, out=tmp_path / "short"))
    assert written(out)["round-00002"] == [(tmp_path / "short" / "adapter" / name).read_bytes() for name in NAMES]
    run_simulation(SimulationConfig(**options, quiet=True, out=tmp_path / "plain"))
    assert [(out / "adapter" / name).read_bytes() for name in NAMES] == [
        (tmp_path / "plain" / "adapter" / name).read_bytes() for name in NAMES
    ]


def test_a_run_that_goes_on_drops_the_adapters_of_rounds_that_do_not_count(
    options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_simulation(SimulationConfig(**options, adapter_every=1, quiet=True, out=out))
    before = written(out)
    assert list(before) == [f"round-{number:05d}" for number in (1, 2, 3)]
    (out / "eval").mkdir()
    for number in (0, 2, 3):  # as `fedlotr eval` calls what it finds
        (out / "eval" / f"mine-round-{number}.json").write_text("{}", encoding="utf-8")
    words = [*flags(options), "--out", str(out), "--resume", "--resume-round", "2", "--quiet"]
    assert main(words) == 0  # without --adapter-every
    assert list(written(out)) == ["round-00001", "round-00002"]
    assert sorted(path.name for path in (out / "eval").iterdir()) == ["mine-round-0.json", "mine-round-2.json"]
    assert main([*words, "--adapter-every", "1"]) == 0
    assert written(out) == before
    shutil.rmtree(out / "adapters")
    assert main([*flags(options), "--out", str(out), "--resume", "--quiet"]) == 0  # nothing to drop


def test_there_is_none_where_each_client_is_alone(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*flags(options), "--baseline", "local", "--adapter-every", "1", "--out", str(tmp_path / "run")]
    assert main(words) == 2 and "no common adapter" in capsys.readouterr().err
