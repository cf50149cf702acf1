"""What a run writes of itself holds the keys that `documents` names, each of its type, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fedlotr import SimulationConfig, run_simulation
from fedlotr.reporting.documents import Facts, MetricsRow, Summary

SMALL: dict[str, Any] = {
    **{"clients": 3, "sample": 2, "rounds": 2, "max_examples": 8, "public_examples": 8, "eval_examples": 8},
    **{"batch_size": 4, "local_epochs": 1, "max_length": 16, "engine": "local", "threads": 1, "dtype": "float32"},
    **{"rank": 2, "quiet": True},
}
PRIVATE = {"noise_multiplier": 1.0, "reproducible_noise": True, "partition": "iid", "public_eval": True}


@pytest.mark.parametrize(
    "options",
    [
        {"eval_every": 2, "max_update_norm": 0.1},
        {"codec": "int8", "broadcast_codec": "delta+int8", "link": "4g", "client_eval": 0.3},
        {"baseline": "local"},
        {"fault": "nan:0.2,duplicate:0.5"},
        {**PRIVATE, "privacy": "example"},
        {**PRIVATE, "privacy": "client", "clip_norm": 0.1, "noise_cohort": 50},
    ],
    ids=["plain", "coded", "local", "faults", "examples", "clients"],
)
def test_files_are_as_their_types_say(tmp_path: Path, animals: Path, tiny_bert: Path, options: dict[str, Any]) -> None:
    config = SimulationConfig(**SMALL | options, data=str(animals), model=str(tiny_bert), out=tmp_path / "run")
    result = run_simulation(config)
    assert str(result.run_dir) in repr(result)
    folder = tmp_path / "run"
    kinds: dict[str, Any] = {"facts.json": Facts, "summary.json": Summary, "metrics.jsonl": MetricsRow}
    for name, kind in kinds.items():
        texts = (folder / name).read_text(encoding="utf-8")
        for text in texts.splitlines() if name.endswith("l") else [texts]:
            known = TypeAdapter(kind).validate_json(text)  # without keys that the type does not have
            assert json.loads(json.dumps(known)) == json.loads(text)
