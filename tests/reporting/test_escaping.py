"""What a user's data can name does nothing where it is shown: no formula, no markup, no code for a terminal."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import rich.console

from fedlotr import SimulationConfig, cli, run_simulation
from fedlotr.commands.door import refuse
from fedlotr.reporting.console import Console
from fedlotr.reporting.escaping import cell, code_span, markdown
from fedlotr.reporting.fitting import show_table
from tests.reporting.test_compare import made

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
BREAK = "good\n\n```python\nimport os; os.system('x')\n```\n"
NASTY = (ESCAPE, BREAK, "[click](javascript:x)", "<img src=x onerror=y>", "a|b`c*d", "\u202ereversed", "\x9b31m")


def test_labels_and_clients_stay_text_in_the_readme_the_log_and_on_the_console(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"the {('cat', 'dog')[at % 2]} {at}", "label": NASTY[at % 7], "client": f"{ESCAPE}{at % 2}"}
        for at in range(70)
    ]
    stream = io.StringIO()
    config = SimulationConfig(
        **{"model": str(tiny_bert), "partition": "natural", "clients": 2, "sample": 2, "rounds": 1, "rank": 2},
        **{"public_examples": 8, "engine": "local", "threads": 1, "dtype": "float32"},
        out=tmp_path / "run",
    )
    run_simulation(config, data={"train": rows}, console=Console(stream=stream))
    readme = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<img" not in page and "\\u202ereversed" in page
    for text in (stream.getvalue(), page, readme, (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")):
        assert not [character for character in text if not character.isprintable() and character != "\n"]
    assert "\\x1b" in stream.getvalue()
    fences = re.findall(r"^```.*$", readme, re.MULTILINE)
    assert fences == ["```python", "```"], "the block of ours alone"
    labels = next(line for line in readme.splitlines() if line.startswith("Labels:"))
    assert "\\[click\\](javascript:x)" in labels and "&lt;img" in labels and "a\\|b\\`c\\*d" in labels


@pytest.mark.parametrize("name", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\uff1d1", " =1"])
def test_what_a_spreadsheet_would_compute_is_text_in_csv(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / f"r{name}".replace("/", "∕")[1:], 0.9, 10, strategy=name)
    made(tmp_path / "plain", 0.8, 10)
    assert cli.main(["compare", str(tmp_path), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["strategy"] for row in rows} == {"exact-average", f"'{name}"}
    assert {row["run"] for row in rows} > {"plain"} and all(row["run"][0] in "'p" for row in rows)


def test_numbers_in_csv_stay_numbers() -> None:
    assert [cell(value) for value in ("-0.5", "+1e3", -2, None, "a=b", "-inf")] == [
        "-0.5",
        "+1e3",
        -2,
        None,
        "a=b",
        "-inf",
    ]


def test_markdown_of_a_comparison_has_no_markup_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "a", 0.9, 10, strategy=BREAK, data="![x](http://tracker/)")
    made(tmp_path / "b", 0.9, 10, strategy=ESCAPE)
    assert cli.main(["compare", str(tmp_path), "--markdown"]) == 0
    out, err = capsys.readouterr()
    assert "```" not in out.replace("\\`", "") and "![x](" not in out and "\x1b" not in out + err


def test_what_is_refused_cannot_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    refuse([f"--data {ESCAPE}: no such folder\nerror: all is well"])
    assert capsys.readouterr().err == "error: --data \\x1b]0;owned\\x07\\x1b[2J: no such folder error: all is well\n"


def test_tables_and_code_spans_hold_any_text() -> None:
    out = io.StringIO()
    show_table(rich.console.Console(file=out, width=60), ["client"], [[ESCAPE]], title=ESCAPE)
    assert "\x1b" not in out.getvalue()
    assert code_span("a`b``c") == "```a`b``c```" and code_span("`") == "`` ` ``" and code_span("x\ny") == "`x\\ny`"
    assert markdown("snake_case _emphasis_ a\nb") == "snake_case \\_emphasis\\_ a\\\\nb"
    assert json.loads(f'"{markdown("plain name 1.5")}"') == "plain name 1.5"
