"""What a user sees of a run in virtual time: on the console, in its report, in comparisons and in a grid's table."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedlotr import cli
from fedlotr.commands import simulate
from fedlotr.fleet.modes import OUTCOMES
from fedlotr.flower.timed import OF_THE_FLEET, USED
from fedlotr.reporting import arrivals
from fedlotr.reporting import lines as lines_of_files
from fedlotr.reporting.card import Card
from fedlotr.reporting.comparison import compare
from fedlotr.reporting.console import readable_seconds
from fedlotr.reporting.grid_table import Line, as_csv, as_markdown
from fedlotr.reporting.report import report_page, write_report
from fedlotr.reporting.run_record import read_run
from tests.reporting.test_compare import made
from tests.reporting.test_report import Page
from tests.support import read_run as on_disk

FLEET = """
devices: flops=1M,flops=3M
links: 3g
availability: bernoulli:0.8:1
dropout: 0.25
"""


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, animals: Path) -> Callable[..., Path]:
    """A run of these words; one a set of words."""
    folder = tmp_path_factory.mktemp("virtual")
    (folder / "fleet.yaml").write_text(FLEET, encoding="utf-8")

    def run(words: str, name: str) -> Path:
        out = folder / name
        if not out.exists():
            given = (
                "--engine local --threads 1 --dtype float32 --clients 10 --sample 6 --rounds 5 --rank 2 --partition iid"
            )
            given += " --local-epochs 1 --max-examples 6 --public-examples 16 --max-length 16 --lr 0.05"
            where = ["--model", str(tiny_bert), "--data", str(animals), "--out", str(out)]
            fleet = [] if not words else ["--fleet", str(folder / "fleet.yaml")]
            assert simulate.main([*given.split(), *where, *fleet, *words.split(), "--quiet"]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def run(virtual: Callable[..., Path]) -> Path:
    return virtual("--mode async --buffer 3", "async")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def arrived(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "arrivals.jsonl").read_text(encoding="utf-8").splitlines()]


def ledger(folder: Path) -> Mapping[str, int]:
    rows = [row for part in (folder / "ledger").iterdir() for row in pq.read_table(part).to_pylist()]
    return {way: sum(row["wire_bytes"] for row in rows if row["direction"] == way) for way in ("down", "up")}


def test_the_outcomes_that_are_explained_are_those_that_there_are() -> None:
    assert set(OUTCOMES) == OF_THE_FLEET | {USED} and arrivals.USED == USED


def test_the_page_has_the_virtual_seconds_of_metrics_jsonl(run: Path, page: Page) -> None:
    summary, rows = on_disk(run)
    before = 0.0
    for name, key in (("accuracy-virtual", "accuracy"), ("loss-virtual", "loss")):
        shown = page.rows(name)
        assert [(row["virtual seconds"], row[key]) for row in shown] == [(r["virtual_seconds"], r[key]) for r in rows]
    for shown_row, row in zip(page.rows("virtual-rounds"), rows, strict=True):
        for key in ("used", "staleness_mean", "bytes_in_vain", "under_way"):
            assert shown_row[key] == row[key]
        assert shown_row["seconds of the round"] == pytest.approx(row["virtual_seconds"] - before)
        before = row["virtual_seconds"]
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "In virtual time" in html and f"{summary['virtual']['fleet'].split(';')[0]}" in html


@pytest.mark.parametrize("words", ["--mode async --buffer 3", "--mode deadline --deadline 1.5", "--mode over-select"])
def test_what_became_of_messages_adds_up_to_the_ledger(words: str, virtual: Callable[..., Path]) -> None:
    folder = virtual(words, words.split()[1])
    shown = {
        row["outcome"]: row
        for row in Page((folder / "report.html").read_text(encoding="utf-8")).rows("virtual-outcomes")
    }
    told, sent = arrived(folder), ledger(folder)
    _, rows = on_disk(folder)
    for outcome in {arrival["outcome"] for arrival in told}:
        same = [arrival for arrival in told if arrival["outcome"] == outcome]
        assert shown[outcome]["messages"] == len(same)
        for way in ("down", "up"):
            assert shown[outcome][f"bytes {way}"] == sum(arrival[f"bytes_{way}"] for arrival in same)
    every = shown.pop("all")
    assert len({arrival["outcome"] for arrival in told}) > 1, "the case loses nothing"
    for way in ("down", "up"):
        assert every[f"bytes {way}"] == sent[way] == sum(row[f"bytes {way}"] for row in shown.values())
    assert ("under way" in shown) == bool(rows[-1]["under_way"])
    assert "arrivals.jsonl is not whole" not in (folder / "report.html").read_text(encoding="utf-8")


def test_each_client_is_told_with_what_it_waited_for(run: Path, page: Page) -> None:
    told = arrived(run)
    shown = {row["client"]: row for row in page.rows("virtual-clients")}
    assert shown.keys() == {arrival["client"] for arrival in told}
    for client, row in shown.items():
        own = [arrival for arrival in told if arrival["client"] == client]
        used = [arrival for arrival in own if arrival["outcome"] == "used"]
        assert (row["asked"], row["used"]) == (len(own), len(used))
        for kind in {arrival["outcome"] for arrival in told} - {"used"}:
            assert row[f"lost: {kind}"] == sum(arrival["outcome"] == kind for arrival in own)
        took = [arrival["ended"] - arrival["asked"] for arrival in used]
        assert row["seconds computing"] == pytest.approx(sum(arrival["computing"] for arrival in used))
        assert row["seconds computing"] + row["seconds on its links"] == pytest.approx(sum(took))
        every = sum(arrival["ended"] - arrival["asked"] for arrival in own)
        assert row["seconds in vain"] == pytest.approx(every - sum(took))
        staleness = [arrival["staleness"] for arrival in used]
        assert row["mean staleness"] == (pytest.approx(sum(staleness) / len(used)) if used else None)


def timed(
    folder: Path, values: list[float], ends: list[float | None], *, start: float | None = 0.2, **more: Any
) -> Path:
    """A run, as on disk, whose metric has these values at these virtual seconds, in 300 bytes a round."""
    made(folder, 0.5, 100, rounds=len(values), **more)
    metric = more.get("metric", "accuracy")
    told = [
        {"round": n, "loss": 1.0, metric: value, "bytes_up": 200, "bytes_down": 100, "failed": 0}
        | ({} if end is None else {"virtual_seconds": end, "used": 1, "under_way": 0})
        for n, (value, end) in enumerate(zip(values, ends, strict=True), 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told), encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary |= {"rounds": len(values), "initial": {} if start is None else {metric: start}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    for number in range(3, len(values) + 1):
        shutil.copy(folder / "ledger" / "round-00001.parquet", folder / "ledger" / f"round-{number:05}.parquet")
    return folder


def test_time_to_quality_is_of_the_first_round_that_was_so_good(tmp_path: Path) -> None:
    shown = Page(report_page(read_run(timed(tmp_path / "up", [0.5, 0.9, 0.6, 1.2], [10, 15, 40, 80])))).rows(
        "virtual-quality"
    )
    found = [(row["of the way"], row["round"], row["virtual seconds"], row["bytes so far"]) for row in shown]
    assert found[:2] == [("50 %", 2, 15, 600), ("75 %", 4, 80, 1200)] and found[-1] == ("100 %", 4, 80, 1200)
    assert shown[0]["accuracy"] == pytest.approx(0.7) and [row[0] for row in found[2:5]] == ["90 %", "95 %", "99 %"]
    lower = timed(tmp_path / "down", [9.0, 5.0, 4.0], [1, 2, 3], metric="perplexity", start=12.0)
    shown = Page(report_page(read_run(lower))).rows("virtual-quality")
    assert [row["round"] for row in shown] == [2, 2, 3, 3, 3, 3], "half the way from 12 to 4 is 8"
    worse = report_page(read_run(timed(tmp_path / "worse", [0.1, 0.15], [1, 2])))
    assert "never better than before the first round, 0.2" in worse
    assert "Time to quality" not in report_page(read_run(timed(tmp_path / "unknown", [0.5], [1], start=None)))


def test_a_run_without_virtual_time_has_nothing_of_it(virtual: Callable[..., Path]) -> None:
    folder = virtual("", "plain")
    assert "virtual seconds" not in (folder / "report.html").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("lines", "line 2 is nothing that became of a message: a gap"),
        ("missing", "arrivals.jsonl is missing"),
        ("huge", "more than the 10 that are read"),
        ("folder", "cannot be read"),
        ("short", "arrivals.jsonl is not whole"),
    ],
)
def test_damaged_arrivals_are_a_gap_and_a_note(
    damage: str,
    said: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "arrivals.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "lines":
        wrong = json.loads(lines[1])
        odd = [
            {**wrong, "asked": -1},
            {**wrong, "ended": float("nan")},
            {**wrong, "client": True},
            {**wrong, "outcome": "\x1b"},
        ]
        odd += [{**wrong, "bytes_up": 10**400}, {**wrong, "asked": 9e9}, [], {}]
        bad = [json.dumps(value).encode() + b"\n" for value in odd] + [
            b"{" * 2_000_000 + b"\n",
            b"\xff\n",
            b"[" * 60_000 + b"\n",
        ]
        path.write_bytes(b"".join([lines[0], *bad, *lines[1:], lines[1][:-9]]))
    elif damage == "short":
        path.write_bytes(b"".join(lines[:-2]))
    elif damage == "huge":
        monkeypatch.setattr(lines_of_files, "MOST_BYTES", 10)
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    assert cli.main(["report", str(folder)]) == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert said in html and (damage == "short" or said in capsys.readouterr().err)
    if damage == "lines":
        shown = Page(html).rows("virtual-outcomes")
        assert sum(row["messages"] for row in shown if row["outcome"] not in ("all", "under way")) == len(lines)


def test_lines_of_rounds_that_do_not_count_are_none(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = (folder / "report.html").read_text(encoding="utf-8")
    with (folder / "arrivals.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**arrived(run)[-1], "round": 6}) + "\n")
    write_report(folder)
    assert Page((folder / "report.html").read_text(encoding="utf-8")).rows("virtual-outcomes") == Page(before).rows(
        "virtual-outcomes"
    )


def test_the_console_says_mode_and_fleet_and_what_was_lost(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "fleet.yaml").write_text(FLEET.replace("links: 3g", ""), encoding="utf-8")
    words = "--mode over-select --over-select 1.5 --buffer none --link 3g --rounds 2"
    where = ["--fleet", str(tmp_path / "fleet.yaml"), "--out", str(tmp_path / "run")]
    assert simulate.main([str(run / "config.yaml"), *words.split(), *where]) == 0
    said = capsys.readouterr().err
    assert "simulated" not in said
    assert re.search(r"clients +9 of 10 a round", said)
    assert re.search(
        r"virtual time +over-select: 9 are asked, and the first 6 to answer are a round; later updates are dropped",
        said,
    )
    assert re.search(r"fleet +fleet.yaml: 5 flops=1M, 5 flops=3M; on 3g; there with a chance of 0.8", said)
    summary, rows = on_disk(tmp_path / "run")
    virtual, lost = summary["virtual"], {kind: sum(of.values()) for kind, of in summary["failures"].items()}
    assert lost and lost.keys() <= OUTCOMES.keys(), "the case loses something, by nobody's failure"
    shown = dict(re.findall(r"│ +(.*?) +│ +(.*?) +│", said.partition("Result")[2]))
    assert shown["virtual seconds"] == readable_seconds(virtual["seconds_total"])
    assert int(shown["updates used"]) == virtual["used"] == sum(row["used"] for row in rows)
    assert int(shown["updates lost"]) == sum(lost.values()) and shown["failed clients"] == "0"
    for kind, times in lost.items():
        assert shown[kind].startswith(f"{times} of ")
    assert f"{virtual['bytes_in_vain']:,}" in shown["bytes in vain"]
    assert "their mean staleness" in shown
    card = Card(read_run(tmp_path / "run"), 2, "tiny", base_id=None, notes=())
    assert (card.facts()["mode"], card.facts()["fleet"]) == ("over-select", "fleet.yaml")
    assert "| clients in virtual time | fleet.yaml |" in card.body() and "hostile" not in card.body()
    assert [row["failed"] for row in compare([tmp_path / "run", run]).rows] == [0, 0]
    assert " FAILED" not in said and all(f", {len(row['failures'])} lost" in said for row in rows)
    assert f"at {rows[0]['virtual_seconds']:,.6g} virtual s" in said


def test_virtual_seconds_are_readable() -> None:
    assert [readable_seconds(s) for s in (0.25, 90.0, 4000.0, 86_400.0)] == [
        "0.25 s",
        "90 s (1.5 min)",
        "4,000 s (1.11 h)",
        "86,400 s (1 d)",
    ]


def test_runs_are_compared_by_the_seconds_to_what_all_have_come_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = timed(tmp_path / "one", [0.3, 0.6, 0.9], [10, 20, 30])
    two = timed(tmp_path / "two", [0.2, 0.5, 0.4], [5, 6, 7], rank=3)
    three = timed(tmp_path / "three", [0.7, 0.8], [None, None], rank=4)
    assert cli.main(["compare", str(one), str(two), "--csv"]) == 0
    captured = capsys.readouterr()
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(captured.out))}
    assert "virtual" not in captured.err
    assert [float(rows[name]["virtual_seconds"]) for name in ("one", "two")] == [30, 7]
    assert [float(rows[name]["common_accuracy"]) for name in ("one", "two")] == [0.5, 0.5]
    assert [float(rows[name]["virtual_seconds_to_common"]) for name in ("one", "two")] == [20, 6]
    assert (
        cli.main(["compare", str(one), str(two), str(three), "--markdown", "--out", str(tmp_path / "page.html")]) == 0
    )
    captured = capsys.readouterr()
    rows_of_page = {row["run"]: row for row in Page((tmp_path / "page.html").read_text(encoding="utf-8")).rows("runs")}
    assert rows_of_page["three"]["virtual_seconds_to_common"] is None and rows_of_page["one"]["common_accuracy"] == 0.5
    assert "Not in virtual time: three" in captured.out + captured.err
    assert {
        row["run"] for row in Page((tmp_path / "page.html").read_text(encoding="utf-8")).rows("curves-virtual")
    } == {"one", "two"}


def test_of_a_lower_metric_the_worst_best_is_the_highest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = timed(tmp_path / "one", [9.0, 5.0], [1, 2], metric="perplexity")
    two = timed(tmp_path / "two", [8.0, 7.0], [3, 4], metric="perplexity", rank=3)
    assert cli.main(["compare", str(one), str(two), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["common_perplexity"], row["virtual_seconds_to_common"]) for row in rows] == [
        ("7.0", "2"),
        ("7.0", "4"),
    ]


def test_a_grids_table_has_virtual_seconds_where_a_run_has_them(run: Path, virtual: Callable[..., Path]) -> None:
    timed_run, plain = on_disk(run)[0], on_disk(virtual("", "plain"))[0]
    lines = [Line("async", {}, 1, {0: timed_run}, {}), Line("plain", {}, 1, {0: plain}, {})]
    table: list[Any] = [row.strip("| ").split(" | ") for row in as_markdown(lines).splitlines()[:4]]
    assert table[0][-1] == "virtual seconds" and table[2][-1] == f"{timed_run['virtual']['seconds_total']:,.6g}"
    rows = list(csv.DictReader(io.StringIO(as_csv(lines))))
    assert [row["virtual_seconds"] for row in rows] == [repr(timed_run["virtual"]["seconds_total"]), ""]
    assert "virtual" not in as_markdown(lines[1:]) and "virtual" not in as_csv(lines[1:])
