"""The report of a run: every number is the run directory's, text is text, and it opens anywhere."""

import json
import logging
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlotr import cli
from fedlotr.commands import simulate
from fedlotr.communication.ledger import Entry, write_part
from fedlotr.reporting.report import write_report
from fedlotr.reporting.run_record import read_run
from fedlotr.reporting.svg import BARS, Series, decades, line_plot, ticks
from fedlotr.run import simulation
from fedlotr.run.directory import RunDirectory
from tests.support import read_run as on_disk

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The tables of a page by the id of their figure, cells as text or, for rounded numbers, as all their digits."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.text = self.figure = ""
        self.exact: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "figure":
            self.figure = str(dict(attrs)["id"])
        elif tag == "tr":
            self.tables.setdefault(self.figure, []).append([])
        elif tag in ("td", "th"):
            self.text, self.exact = "", None
        elif tag == "data":
            self.exact = dict(attrs)["value"]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "data":
            assert float(self.text) == pytest.approx(float(str(self.exact)), rel=1e-5)
        if tag in ("td", "th"):
            self.tables[self.figure][-1].append(self.exact or self.text)

    def rows(self, figure: str) -> list[dict[str, Any]]:
        """Each row by column, numbers as numbers, a dash as None."""
        head, *body = self.tables[figure]
        return [dict(zip(head, map(value_of, row), strict=True)) for row in body]

    def facts(self, figure: str) -> dict[str, Any]:
        return {row[0]: value_of(row[1]) for row in self.tables[figure][1:]}


def value_of(cell: str) -> Any:
    if cell == "–":
        return None
    try:
        return json.loads(cell.replace(",", ""))
    except ValueError:
        return cell


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A run whose name, clients and labels are no harmless text."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "data"
    data.mkdir()
    for split, count in (("train", 90), ("test", 24)):
        rows = [
            {"text": f"{('a cat', 'the dog')[i % 2]} {i}", "label": ("cat", EVIL)[i % 2], "client": f"{EVIL}{i % 4}"}
            for i in range(count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = folder / EVIL.replace("/", "∕")  # no file system has the other slash in a name
    words = "--engine local --threads 1 --dtype float32 --clients 4 --sample 2 --rounds 3 --rank 2 --local-epochs 1"
    words += " --partition natural --public-examples 16 --eval-every 2 --quiet"
    assert simulate.main([*words.split(), "--model", str(tiny_bert), "--data", str(data), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_the_rounds_on_the_page_are_those_of_metrics_jsonl(run: Path, page: Page) -> None:
    _, rows = on_disk(run)
    compared = set()
    for figure in ("metric", "loss", "bytes-rounds", "certificate", "norms", "time"):
        shown = [row for row in page.rows(figure) if row["round"]]
        assert [row["round"] for row in shown] == [1, 2, 3]
        for seen, row in zip(shown, rows, strict=True):
            assert seen == {key: row.get(key) for key in seen}
            compared |= seen.keys()
    missing = set(rows[0]) - compared - {"failures", "epsilon"}
    assert not missing, f"{missing} are in metrics.jsonl and not in the report"
    total = 0
    for seen, row in zip(page.rows("loss-bytes"), rows, strict=True):
        total += row["bytes_up"] + row["bytes_down"]
        assert (seen["bytes so far"], seen["loss"]) == (total, row["loss"])


def test_the_sums_on_the_page_are_those_of_summary_json(run: Path, page: Page) -> None:
    summary, _ = on_disk(run)
    shown = page.facts("outcome")
    for key, value in summary["communication"].items():
        assert shown[key.replace("_", " ")] == value
    assert shown["bytes on the wire, all rounds"] == summary["communication"]["total_wire_bytes"]
    assert shown["accuracy, last (round 3)"] == summary["final"]["accuracy"]
    assert shown[f"accuracy, best (round {summary['best']['round']})"] == summary["best"]["accuracy"]
    assert shown["loss, as tested, last (round 3)"] == summary["final"]["loss"]
    assert page.rows("metric")[0] == {"round": 0, "accuracy": summary["initial"]["accuracy"]}
    assert page.facts("timing") == summary["timing"]
    assert {name: str(value) for name, value in page.facts("versions").items()} == summary["versions"]
    assert page.facts("hashes")["trained"] == summary["trained_sha256"]


def test_the_bytes_on_the_page_are_those_of_the_ledger(run: Path, page: Page) -> None:
    ledger = [row for part in sorted((run / "ledger").iterdir()) for row in pq.read_table(part).to_pylist()]
    kinds = page.rows("bytes-kinds")
    assert {(row["direction"], row["kind"]) for row in kinds} == {(row["direction"], row["kind"]) for row in ledger}
    for row in kinds:
        same = [e for e in ledger if (e["direction"], e["kind"]) == (row["direction"], row["kind"])]
        assert row["records"] == len(same)
        for amount in ("payload", "wire"):
            assert row[f"{amount} bytes"] == sum(entry[f"{amount}_bytes"] for entry in same)
    clients = page.rows("bytes-clients")
    assert [row["client"] for row in clients] == sorted({entry["client"] for entry in ledger})
    for row in clients:
        for kind in kinds:
            same = [e for e in ledger if (e["direction"], e["kind"]) == (kind["direction"], kind["kind"])]
            mine = sum(entry["wire_bytes"] for entry in same if entry["client"] == row["client"])
            assert row[f"{kind['kind']}, {kind['direction']}"] == mine


def test_the_bill_on_the_page_is_that_of_fedlotr_cost_and_this_runs_own_is_what_it_paid(
    run: Path, page: Page, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, _ = on_disk(run)
    words = f"cost --model {tiny_bert} --task classification --labels 2 --rank 2 --clients 2 --rounds 3 --json"
    assert cli.main(words.split()) == 0
    owed = json.loads(capsys.readouterr().out)["rows"]
    shown = page.rows("bill")
    assert len(shown) == len(owed) > 20
    for seen, row in zip(shown, owed, strict=True):
        assert (
            seen["method"] == row["method"] and seen["strategies that cost the same"].split(", ") == row["strategies"]
        )
        assert [seen[key] for key in ("one off bytes", "total bytes")] == [row["one_off_bytes"], row["total_bytes"]]
    own = next(row for row in shown if row["method"] == "fed-sb" and "exact-average" in str(row))
    paid = summary["communication"]
    assert own["upload bytes"] == paid["upload_payload_bytes_per_client_round"]
    assert own["download bytes"] == paid["download_payload_bytes_per_client_round"]
    assert "fed-sb, this run: " in (run / "report.html").read_text(encoding="utf-8")


def test_both_losses_say_on_the_page_what_they_are_and_are_that(
    tmp_path: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A language model that learns nothing, tested on the rows it trains on: only the means differ."""
    texts = ["Once upon a time", "The dog ran to the park and played with a big red ball all day.", "Lily was sad."]
    for split in ("train", "test"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    words = (
        "--engine local --threads 1 --dtype float32 --clients 1 --sample 1 --rounds 1 --method lotr --rank 2 --lr 1e-9"
    )
    where = ["--model", str(stories), "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--local-epochs", "1"]
    assert simulate.main([*words.split(), *where, "--partition", "iid", "--public-examples", "0"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    inner = tokenizer(texts, add_special_tokens=False)["input_ids"]
    encoded = [torch.tensor([[tokenizer.bos_token_id, *ids]]) for ids in inner]
    counts = [ids.shape[1] - 1 for ids in encoded]
    with torch.inference_mode():
        losses = [float(model(ids, labels=ids).loss) for ids in encoded]
    summary, [row] = on_disk(tmp_path / "run")
    assert max(counts) > 2 * min(counts)
    assert row["loss"] == pytest.approx(np.average(losses, weights=counts), rel=1e-4)
    assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert abs(row["loss"] - row["train_loss"]) > 0.01, "the two means are the same here"
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert (
        f"loss, in nats, is {summary['losses']['loss']}." in html and "mean over the test split's target tokens" in html
    )
    assert f"train_loss, in nats, is {summary['losses']['train_loss']}." in html and "over the examples it sees" in html
    assert "mean over the test split's target tokens" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_clients_on_the_page_are_those_of_facts_json_and_text_stays_text(run: Path, page: Page) -> None:
    facts = json.loads((run / "facts.json").read_text(encoding="utf-8"))
    for row, held in zip(page.rows("clients"), facts["partition"], strict=True):
        assert (row["name"], row["examples"]) == (held["client"], held["examples"])
        assert {label: row[label] for label in facts["labels"]} == {
            label: held["labels"].get(label, 0) for label in facts["labels"]
        }
        assert row["name"].startswith(EVIL)
    assert EVIL in facts["labels"]
    assert "script" not in page.tags
    assert EVIL not in (run / "report.html").read_text(encoding="utf-8")


def test_every_plot_says_what_it_is_and_has_its_table(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    for figure in html.split("<figure")[1:]:
        if "<svg" in figure:
            assert 'role="img" aria-label="' in figure
        assert "<table>" in figure


def test_nothing_is_loaded_from_elsewhere(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html


def test_report_makes_it_again_also_of_an_unfinished_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "again.html"
    assert cli.main(["report", str(run), "--out", str(same)]) == 0
    assert same.read_text(encoding="utf-8") == (run / "report.html").read_text(encoding="utf-8")
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    (killed / "summary.json").unlink()
    lines = (killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (killed / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:40]]), encoding="utf-8")
    assert cli.main(["report", str(killed)]) == 0
    html = (killed / "report.html").read_text(encoding="utf-8")
    assert "not finished: 2 of 3 rounds" in html and "--resume" in html
    assert [row["round"] for row in Page(html).rows("loss")] == [1, 2]
    (killed / "metrics.jsonl").unlink()
    assert cli.main(["report", str(killed)]) == 0
    assert "0 of 3 rounds" in (killed / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: shutil.rmtree(run), "there is no such folder"),
        (lambda run: (run / "config.yaml").unlink(), "is not a run: it has no config.yaml"),
        (lambda run: (run / "summary.json").write_text("[1"), "summary.json cannot be read"),
        (lambda run: (run / "facts.json").write_text("[1]"), "facts.json holds no JSON object"),
        (lambda run: (run / "ledger" / "round-00002.parquet").unlink(), "round-00002.parquet is missing"),
        (lambda run: (run / "ledger" / "round-00002.parquet").write_bytes(b"PAR1"), "round-00002.parquet cannot be"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, said: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    damage(copy)
    assert cli.main(["report", str(copy)]) == 2
    words = capsys.readouterr().err
    assert said in words and words.startswith("error: ") and words.count("\n") == 1


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fedlotr"):
        simulation._report(tmp_path / "no run")
    assert "report.html could not be made" in caplog.text and "fedlotr report" in caplog.text


def test_clients_that_failed_are_named_with_their_rounds(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows[1:]:
        row.update(failed=1, failures={"3": "raised"})
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = Page(write_report(copy).read_text(encoding="utf-8"))
    name = json.loads((run / "facts.json").read_text(encoding="utf-8"))["partition"][3]["client"]
    assert shown.tables["failures"][1:] == [[name, "raised", "2", "2, 3"]]


def large_run(folder: Path, rounds: int, clients: int, sampled: int) -> Path:
    """A run directory of that size, by the real writers of everything but the training."""
    directory = RunDirectory.create(folder, "large")
    directory.open_round_folders()
    text = (
        f"method: fed-sb\nstrategy: exact-average\nclients: {clients}\nrounds: {rounds}\nmodel: m\ndata: d\nseed: 0\n"
    )
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    labels = [f"label {number}" for number in range(20)]
    held = [
        {"client": f"client number {n}", "examples": 64, "labels": {label: 3 + n % 2 for label in labels}}
        for n in range(clients)
    ]
    directory.write_facts({"labels": labels, "partition": held, "train_examples": 64 * clients})
    for number in range(1, rounds + 1):
        chosen = [(number * 7 + at) % clients for at in range(sampled)]
        rows = [Entry(number, c, "down", "broadcast", 49_184, 56_539) for c in chosen]
        rows += [Entry(number, c, "up", "update", 49_184, 56_638) for c in chosen]
        write_part(directory.ledger, number, rows)
        directory.append_metrics(
            {"round": number, "loss": 1 / number, "accuracy": 1 - 1 / number, "clients": sampled, "failed": 0}
            | {"train_loss": 1.1 / number, "bytes_up": 56_638 * sampled, "bytes_down": 56_539 * sampled}
            | {"aggregation_error": 1e-15 * number, "transport_error": 3e-8, "train_seconds": 1.0 / 3}
            | {"evaluate_seconds": 0.1, "epsilon": 0.01 * number}
        )
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_run(tmp_path_factory.mktemp("large") / "run", rounds=500, clients=5000, sampled=100)


@pytest.mark.slow
def test_500_rounds_of_5000_clients_stay_under_ten_megabytes(large: Path) -> None:
    path = write_report(large)
    assert path.stat().st_size < 10_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.rows("clients")) == 5000
    assert len(page.rows("loss")) == 500
    assert page.rows("epsilon")[-1] == {"round": 500, "epsilon": 5.0}
    assert f"{BARS} of 5,000 clients are drawn" in path.read_text(encoding="utf-8")
    assert sum(row["wire bytes"] for row in page.rows("bytes-kinds")) == read_run(large).bytes_so_far[-1]


def test_ticks_are_round_numbers_that_cover_the_values() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.17, 0.19)[0] <= 0.17 and ticks(0.17, 0.19)[-1] >= 0.19
    assert ticks(1, 2, whole=True) == [1, 2] and ticks(2, 2, whole=True) == [1, 2, 3]
    assert ticks(3, 3)[0] < 3 < ticks(3, 3)[-1]
    assert decades(2e-16, 5e-8)[0] == -16 and decades(2e-16, 5e-8)[-1] >= -8
    assert decades(1e-3, 1e-3) == [-3, -2]


def test_a_plot_puts_points_where_they_belong() -> None:
    plot = str(line_plot([Series("a", [(0, 0), (5, 5), (10, 10)])], x="x", y="y"))
    assert 'points="64.0,208.0 246.0,109.0 428.0,10.0"' in plot
    assert not line_plot([Series("a", [])], x="x", y="y")
