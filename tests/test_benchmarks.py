"""The benchmarks run: each in its smallest form, so that what they use of ours cannot move without being noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SMALL_JOB = ["--clients", "2", "--examples", "4", "--rounds", "1", "--length", "16"]
SMALLEST = {
    "flower_peft": [*SMALL_JOB, "--accuracy", "--test", "8", "--sides", "flower+peft cached", "lora"],
    "scaling": [*SMALL_JOB, "--workers", "1", "--only", "workers"],
    "engine": ["--clients", "8", "--bytes", "2000", "--rounds", "1", "--only", "speed"],
    "startup": ["--repeats", "1", "--options", "--max-examples", "4", "--sample", "2", "--eval-examples", "8"],
    "privacy": ["--batch", "2", "--length", "8", "--ranks", "4", "--repeats", "1"],
    "prefix": ["--clients", "2", "--examples", "4", "--length", "8", "--blocks", "0", "--repeats", "1"],
    "gpu": ["--device", "cpu", "--small"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--json", figures, *SMALLEST[name]],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert json.loads(figures.read_text(encoding="utf-8"))


def test_every_benchmark_is_run() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    commands = {name for name, text in texts.items() if '"--json"' in text or "parser(__doc__)" in text}
    assert commands - {"side_by_side"} == set(SMALLEST)
