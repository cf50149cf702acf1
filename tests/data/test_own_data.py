"""A data set of the caller's own has no name that a file could give: a run is held to its content."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlotr import SimulationConfig, run_simulation, simulate
from fedlotr.errors import InputError

ROWS = [{"text": f"{('cats', 'dogs')[at % 2]} number {at}", "label": at % 2} for at in range(40)]


def small(model: Path | str, out: Path, **fields: Any) -> SimulationConfig:
    return SimulationConfig(
        **{
            "model": str(model),
            "clients": 2,
            "sample": 2,
            "rounds": 1,
            "method": "lotr",
            "rank": 4,
            "partition": "iid",
            "public_examples": 4,
            "engine": "local",
            "threads": 1,
            "dtype": "float32",
            "quiet": True,
            "out": out,
            **fields,
        }
    )


def test_what_a_run_on_own_data_leaves_never_trains_on_other_data(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tiny_bert, tmp_path / "run")
    summary = run_simulation(config, data={"train": ROWS}).summary
    kept = tmp_path / "run" / "config.yaml"
    named = yaml.safe_load(kept.read_text(encoding="utf-8"))["data"]
    assert named == summary["data"] == f"own:{summary['data_sha256'][:12]}"

    reason = "this run used the caller's own data; pass run_simulation(data=...)"
    assert simulate.main([str(kept), "--out", str(tmp_path / "again")]) == simulate.BAD_INPUT
    assert capsys.readouterr().err == f"error: data: {named} in {kept}: {reason}\n"
    assert not (tmp_path / "again").exists()
    from_yaml = config.model_copy(update={"data": named, "out": tmp_path / "again"})
    with pytest.raises(InputError) as refused:
        run_simulation(from_yaml)
    assert refused.value.problems == [f"data='{named}': {reason}"]
    with pytest.raises(InputError, match=f"data={named}: the data given to run_simulation is own:"):
        run_simulation(from_yaml, data={"train": ROWS[1:]})
    assert run_simulation(from_yaml, data={"train": ROWS}).summary["trained_sha256"] == summary["trained_sha256"]

    more = config.model_copy(update={"rounds": 2, "resume": True})
    with pytest.raises(InputError, match=rf"--data pydoc: the run in .* was begun with {named}, the caller's own"):
        run_simulation(more)
    assert run_simulation(more, data={"train": ROWS}).summary["rounds"] == 2
