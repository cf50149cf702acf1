"""Runs side by side: the same numbers as in their directories, and the right frontier."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedlotr import cli
from fedlotr.communication.ledger import Entry, write_part
from fedlotr.reporting.comparison import compare
from tests.reporting.test_report import EVIL, Page


def made(folder: Path, accuracy: float, size: int, *, metric: str = "accuracy", **config: Any) -> Path:
    """A run of two rounds that each cost `size` bytes down and twice as many up, and its accuracy at the end."""
    (folder / "ledger").mkdir(parents=True)
    known = {
        "method": "fed-sb",
        "strategy": "exact-average",
        "model": "m",
        "data": "d",
        "rounds": 2,
        "seed": 0,
        **config,
    }
    (folder / "config.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in known.items()), encoding="utf-8")
    rows = []
    for number in (1, 2):
        write_part(folder / "ledger", number, [Entry(number, 0, "down", "broadcast", size, size)])
        result = accuracy - 0.1 * (number == 1)
        rows.append(
            {
                "round": number,
                "loss": 1.0 / number,
                metric: result,
                "bytes_up": 2 * size,
                "bytes_down": size,
                "failed": 0,
            }
            | {"epsilon": config.get("epsilon")}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary: dict[str, Any] = {
        "rounds": 2,
        "data_sha256": f"SHA-256 of {known['data'].rpartition('/')[2]}",
        "aggregation_error_max": 1e-15,
        "communication": {"upload_payload_bytes_per_client_round": size, "one_off_bytes_per_client": 40},
        "timing": {"seconds_total": 1.5},
        "privacy": None,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two methods with two seeds each, one that is worse and dearer, and one that is cheapest."""
    runs = tmp_path / "runs"
    for seed, accuracy in ((0, 0.7), (1, 0.8)):
        made(runs / f"sb-{seed}", accuracy, 1000, seed=seed)
        made(runs / f"lora-{seed}", accuracy - 0.2, 5000, seed=seed, method="lora")
    made(runs / "head", 0.5, 10, method="head")
    return runs


def test_the_csv_has_the_numbers_of_each_run(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(grid), "--csv"]) == 0
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert list(rows) == ["head", "lora-0", "lora-1", "sb-0", "sb-1"]
    row = rows["sb-1"]
    assert float(row["accuracy"]) == 0.8 and float(row["loss"]) == 0.5 and row["seed"] == "1"
    assert (int(row["bytes"]), int(row["bytes_up"]), int(row["bytes_down"])) == (6000, 4000, 2000)
    assert int(row["one_off_bytes_per_client"]) == 40 and float(row["seconds_total"]) == 1.5


def test_seeds_that_repeat_have_a_mean_and_a_spread(grid: Path) -> None:
    found = compare([grid])
    (group,) = [group for group in found.groups if "sb-0" in group.runs]
    assert group.seeds == (0, 1) and group.name == "method=fed-sb"
    assert group.metric == pytest.approx(0.75) and group.spread == pytest.approx(statistics.stdev([0.7, 0.8]))


def test_the_frontier_is_what_no_other_beats_in_metric_and_bytes(grid: Path) -> None:
    assert compare([grid]).frontier == {"method=fed-sb", "method=head"}


def test_a_baseline_stands_beside_the_others_and_is_no_point_of_the_frontier(grid: Path) -> None:
    """It sends nothing, so its zero bytes would beat every federation."""
    made(grid / "pooled", 0.9, 0, strategy=None, baseline="central")
    made(grid / "personal", 0.6, 7000, method="fedsa-lora", client_eval=0.2)
    found = compare([grid])
    assert "client_eval" in found.warnings[0], "scored on other rows"
    (pooled,) = [group for group in found.groups if "pooled" in group.runs]
    assert pooled.metric == 0.9 and pooled.bytes is None
    frontier = {group.runs for group in found.groups if group.name in found.frontier}
    assert frontier == {("sb-0", "sb-1"), ("head",)}


def test_a_lower_perplexity_is_the_better_one(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / name, value, size, metric="perplexity", rank=size)
        for name, value, size in (("a", 9.0, 10), ("b", 8.0, 20), ("c", 8.5, 30))
    ]
    assert compare(runs).frontier == {"a", "b"}


def test_there_is_a_frontier_over_epsilon_where_it_is_spent(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / name, value, 10, epsilon=epsilon)
        for name, value, epsilon in (("a", 0.6, 1.0), ("b", 0.8, 3.0), ("c", 0.7, 8.0))
    ]
    assert compare(runs).private_frontier == {"a", "b"}


def test_only_what_differs_is_named(grid: Path) -> None:
    found = compare([grid / "sb-0", grid / "sb-1"])
    assert dict(found.differing) == {"seed": [0, 1]}


def test_page_and_markdown_show_the_same_and_text_stays_text(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = made(grid / EVIL.replace("/", "∕"), 0.9, 10**6, strategy=f"|{EVIL}")
    path = tmp_path / "compare.html"
    assert cli.main(["compare", str(grid), "--out", str(path), "--markdown"]) == 0
    markdown = capsys.readouterr().out
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert {row["run"] for row in page.rows("runs")} == {run.name for run in grid.iterdir()}
    for row in page.rows("runs"):
        assert row["bytes"] == compare([grid]).runs[row["run"]].bytes_so_far[-1]
        assert f"| {row['accuracy']:.6g} |" in markdown
    assert html.count("<script") == page.tags.count("script") == 1, "its own alone"
    assert "script-src 'sha256-" in html and "connect-src" not in html and 'http-equiv="refresh' not in html
    assert "<script" not in markdown and "\\|&lt;script&gt;" in markdown
    assert evil.name in page.tables["differing"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "sb-0"], "there is no such folder"),
        (["sb-0/ledger", "sb-1"], "is no run and no folder of runs"),
        (["sb-0"], "1 run is given; comparing takes at least two"),
        (["sb-0", "sb-0"], "1 run is given"),
        (["sb-0", "text"], "sb-0 has accuracy, "),
    ],
)
def test_what_cannot_be_compared_is_said(
    grid: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    made(grid / "text", 9.0, 10, metric="perplexity")
    assert cli.main(["compare", *(str(grid / word) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_an_unfinished_run_and_other_data_are_noted(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (grid / "sb-1" / "summary.json").unlink()
    other = made(grid / "other", 0.5, 10, data="e")
    assert cli.main(["compare", str(grid / "sb-0"), str(grid / "sb-1"), str(other)]) == 0
    said = capsys.readouterr()
    for words in ("not of the same data (data differ)", "Not finished: sb-1;"):
        assert words in said.err and words in said.out


def test_a_run_that_was_never_evaluated_can_stand_beside_others(grid: Path) -> None:
    (grid / "sb-1" / "metrics.jsonl").unlink()
    (grid / "sb-1" / "summary.json").unlink()
    found = compare([grid])
    assert next(row for row in found.rows if row["run"] == "sb-1")["accuracy"] is None
    assert "sb-1" in found.warnings[0]


def test_data_that_have_moved_between_two_runs_are_the_same_data(tmp_path: Path) -> None:
    made(tmp_path / "a", 0.5, 10, data="/old/rows")
    made(tmp_path / "b", 0.7, 10, data="/new/rows", seed=1)
    found = compare([tmp_path])
    assert not found.warnings and set(found.differing) == {"seed"}
    assert [group.runs for group in found.groups] == [("a", "b")]
