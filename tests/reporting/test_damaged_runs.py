"""Whatever lies in a run's folder, a report and a comparison are made or refused in a line, and JSON stays JSON."""

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlotr import cli
from fedlotr.communication.ledger import Entry, write_part
from fedlotr.errors import InputError
from fedlotr.files import as_json
from fedlotr.flower.serialize import pack, unpack
from fedlotr.reporting.comparison import as_csv, as_markdown, as_page, compare
from fedlotr.reporting.report import report_page
from fedlotr.reporting.run_record import read_run
from fedlotr.run.directory import RunDirectory
from tests.reporting.test_compare import made
from tests.reporting.test_report import Page

FACTS: dict[str, Any] = {
    "partition": [
        {"client": "a", "examples": 3, "labels": {"x": 1, "y": 2}},
        {"client": "b", "examples": 1, "labels": {}},
    ],
    "labels": ["x", "y"],
    "metric": "accuracy",
    "higher_is_better": True,
    "clients_per_round": 2,
    "shapes": {"layers": [["layer", "attention", 8, 8]], "heads": [16]},
    "losses": {"loss": "of the model"},
    "versions": {"torch": "2"},
}
SUMMARY: dict[str, Any] = {
    **{"initial": {"accuracy": 0.1}, "communication": {"total_wire_bytes": 12}, "timing": {"seconds_total": 1.5}},
    **{"warnings": ["a word"], "privacy": {"unit": "client", "epsilon": 1.0, "delta": 1e-5}, "codec": None},
}


def whole(folder: Path) -> Path:
    """A run with all that reports look into."""
    run = made(folder, 0.9, 100, rank=2, codec="float32", broadcast_codec="float32", epsilon=0.5)
    found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (run / "summary.json").write_text(json.dumps({**found, **SUMMARY}), encoding="utf-8")
    (run / "facts.json").write_text(json.dumps(FACTS), encoding="utf-8")
    return run


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value inside another, by the keys that lead there."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def broken(value: Any, draw: random.Random) -> Any:
    """With something else at one place."""
    value = copy.deepcopy(value)
    *path, last = draw.choice([path for path in places(value) if path])
    inside = value
    for key in path:
        inside = inside[key]
    odd = [None, "text", float("nan"), float("inf"), -1, 10**400, [], {}, True, 1e308, [None], {"a": []}, ""]
    if draw.random() < 0.2:
        del inside[last]
    else:
        inside[last] = draw.choice(odd)
    return value


def test_no_damage_ends_in_anything_but_a_page_or_a_line(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    run, other = whole(tmp_path / "runs" / "one"), whole(tmp_path / "runs" / "other")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for _ in range(150):
        for path, content in before.items():
            path.write_bytes(content)
        for name in draw.sample(["summary.json", "facts.json", "metrics.jsonl"], draw.randint(1, 3)):
            path = run / name
            lines = (
                path.read_text(encoding="utf-8").splitlines()
                if name.endswith("l")
                else [path.read_text(encoding="utf-8")]
            )
            at = draw.randrange(len(lines))
            lines[at] = json.dumps(broken(json.loads(lines[at]), draw))
            if draw.random() < 0.1:
                lines[at] = lines[at][: draw.randrange(len(lines[at]))]
            path.write_text("\n".join(lines), encoding="utf-8")
        for make in (lambda: report_page(read_run(run)), lambda: compare([run, other])):
            try:
                made_of = make()
            except InputError as error:
                assert all("\n" not in problem for problem in error.problems)
                continue
            if not isinstance(made_of, str):
                for form in (as_csv, as_markdown, as_page):
                    form(made_of)


def test_a_damaged_line_is_a_gap_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    more = [{**rows[0], "round": at} for at in (3, 4)]
    for at in (3, 4):
        write_part(run / "ledger", at, [Entry(at, 0, "down", "broadcast", 1, 1)])
    lines = [json.dumps({**rows[0], "loss": float("nan")}), "{ not", *map(json.dumps, more)]
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert cli.main(["report", str(run)]) == 0
    said = capsys.readouterr().err
    assert "line 1: loss not as a run writes it: a gap" in said and "line 2 is no row of a round: a gap" in said
    page = (run / "report.html").read_text(encoding="utf-8")
    assert [row["round"] for row in Page(page).rows("loss")] == [1, 3, 4] and "line 2 is no row" in page
    assert Page(page).rows("loss")[0]["loss"] is None


def test_what_we_write_is_json_whatever_happened(tmp_path: Path) -> None:
    odd = {"loss": float("nan"), "best": {"perplexity": float("inf")}, "several": (1, [-math.inf])}
    directory = RunDirectory.create(tmp_path / "run", "x")
    directory.open_round_folders()
    directory.append_metrics(odd)
    directory.write_summary(odd)
    directory.write_facts(odd)
    directory.write_checkpoint(1, {}, [odd], [], {"watch": odd})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for path in [*directory.path.glob("*.json*"), *directory.checkpoints.glob("*.json")]:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        assert "NaN" not in str(found)
    assert directory.last_checkpoint() is not None
    assert as_json(odd) == '{"loss": null, "best": {"perplexity": null}, "several": [1, [null]]}'


@pytest.mark.parametrize("value", [float("nan"), -math.inf, complex(math.inf, 1.0), [{"lowest": math.inf}]])
def test_the_state_of_a_strategy_keeps_what_json_has_no_number_for(value: Any) -> None:
    packed = json.loads(json.dumps(pack(value, {}, "s"), allow_nan=False))
    assert repr(unpack(packed, {})) == repr(value)


def test_rounds_that_are_missing_twice_there_or_none_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole(tmp_path / "run")
    path, rounds = run / "metrics.jsonl", json.loads((run / "summary.json").read_text(encoding="utf-8"))["rounds"]
    content = path.read_text(encoding="utf-8")
    for damage, words in [
        (content + content, "is round 1 once more and is left out"),
        (content + json.dumps({**json.loads(content.splitlines()[0]), "round": 0}), "is no row of a round: a gap"),
        (
            content[: content.rstrip().rindex("\n")] if rounds > 1 else "",
            f"of the {rounds} rounds in summary.json: a gap",
        ),
        (None, f"has 0 of the {rounds} rounds in summary.json: a gap"),
    ]:
        path.unlink() if damage is None else path.write_text(damage, encoding="utf-8")
        assert cli.main(["report", str(run)]) == 0
        said = capsys.readouterr().err
        assert words in said and words in (run / "report.html").read_text(encoding="utf-8")
