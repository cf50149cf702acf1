"""The notebooks run, and what is kept of them is what they show, and nothing of the machine that they ran on."""

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 200_000
"""Bytes of a notebook with its outputs."""
LEAKS = re.compile(r"(?<![\w.:/])/(tmp|root|home|Users|usr|opt|var|private|mnt)/|[A-Za-z]:\\\\|\b20\d\d-\d\d-\d\d\b")
"""A place on a machine; a day."""


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def check_outputs(notebook: dict[str, Any]) -> None:
    """Nothing failed or warned, and there is a run, in a font in which tables hold together, and a picture."""
    found = outputs(notebook)
    assert not [output for output in found if output["output_type"] == "error" or output.get("name") == "stderr"]
    forms = [form for output in found for form in output.get("data", {})]
    assert "image/png" in forms and "text/html" in forms
    assert "round 3/" in in_words(notebook) and "monospace" in in_words(notebook)


def in_words(notebook: dict[str, Any]) -> str:
    """Outputs without pictures."""
    return json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs(notebook)])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_what_it_shows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    check_outputs(notebook)
    assert (leak := LEAKS.search(in_words(notebook))) is None, leak
    assert socket.gethostname() not in in_words(notebook)
    assert len(text.encode()) < LARGEST
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run whole, from top to bottom"
    assert all(not cell["metadata"] for cell in code)


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    monkeypatch.setenv("PYTHONPATH", "")
    import run

    monkeypatch.setitem(sys.modules, "run", run)  # and taken out again
    check_outputs(run.executed(path, tmp_path))
