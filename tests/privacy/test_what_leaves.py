"""What a run that hides its data lets out: nothing that a noiseless look at private rows or at a cohort would tell."""

import csv
import io
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from fedlotr import Callbacks, SimulationConfig, cli, run_simulation
from fedlotr.commands import doctor
from fedlotr.errors import InputError
from fedlotr.flower import asking
from fedlotr.flower.replies import Failure
from fedlotr.privacy.dp_sgd import DPSGD
from fedlotr.privacy.guard import ClientGuard
from fedlotr.reporting.console import Console
from fedlotr.reporting.grid_table import spending
from fedlotr.reporting.report import write_report
from fedlotr.simulate import main
from tests.privacy.test_private_runs import Run, run, words
from tests.support import read_run

__all__ = ["run", "words"]  # the fixtures: six clients of 20 examples, two rounds
EXAMPLE = ("--privacy", "example", "--noise-multiplier", "1")
CLIENT = ("--privacy", "client", "--noise-multiplier", "1", "--clip-norm", "1")
Rows = list[dict[str, Any]]


def rows(count: int, first: int = 0, labels: tuple[str, ...] = ("flu", "cold")) -> Rows:
    """Different texts from `first` on."""
    return [
        {"text": f"case {number} of {number % 3}", "label": labels[number % len(labels)]}
        for number in range(first, first + count)
    ]


def write(path: Path, held: Rows) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(held[0]))
            writer.writeheader()
            writer.writerows(held)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    return path


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """Files that a run may be given: private rows, a test split of its own, and others."""
    folder = tmp_path / "ward"
    for name in ("train", "alone/train"):
        write(folder / f"{name}.jsonl", rows(120))
    write(folder / "test.jsonl", rows(24, 1000))
    write(folder / "extra.jsonl", rows(24, 1100))
    write(folder / "elsewhere" / "copied.csv", [{**row, "text": f" {row['text'].upper()}"} for row in rows(120)])
    write(folder / "elsewhere" / "large.jsonl", rows(900, 5000) + rows(60, 30, ("cold", "flu")))
    write(folder / "elsewhere" / "public.jsonl", rows(40, 3000))
    shutil.copytree(folder / "alone", folder / "repeated")
    write(folder / "repeated" / "validation.jsonl", rows(30, 40) + rows(30, 4000))
    return folder


REFUSED = {
    "alone": "with --privacy example: the run would be evaluated on a seeded tenth of train",
    "alone --public-eval": "a seeded tenth of train, whose rows are as private as the others",
    ". --eval-split held-out --public-eval": "--eval-split held-out with --privacy example: the run would be evaluated",
    "repeated": "many rows of validation are rows of train too",
    "repeated --public-eval": "many rows of validation are rows of train too",
    ". --eval-split extra": "--eval-split extra with --privacy example: its rows are scored without noise",
    ". --eval-data {}/elsewhere/public.jsonl": "where they are nobody's secret, say so by --public-eval",
    ". --eval-data {}/elsewhere/copied.csv --public-eval": "are rows of train too",
    ". --public-data {}/elsewhere/copied.csv": "many of its rows are rows of --data too",
    ". --public-data {}/elsewhere/large.jsonl": "many of its rows are rows of --data too",
    ". --public-data {}": "many of its rows are rows of --data too",
    ". --label-names flu,pox": "train: some label is none of the 2 that --label-names gives",
}


@pytest.mark.parametrize("given", REFUSED)
def test_no_private_row_is_scored_or_fitted_on_in_the_clear(
    given: str, words: list[str], ward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, *more = given.format(ward).split()
    told = [*words, *EXAMPLE, "--data", str(ward / data), *more]
    assert main([*told, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert REFUSED[given] in said and not (tmp_path / "run").exists()
    assert "cold" not in said  # of what the rows hold nothing is told
    if given in ("alone", ". --public-data {}"):  # and doctor says the same
        assert doctor.main([*told, "--quiet"]) == 2 and REFUSED[given] in capsys.readouterr().err


def test_data_from_python_are_asked_the_same_and_called_by_no_hash(tiny_bert: Path, tmp_path: Path) -> None:
    config = SimulationConfig(
        model=str(tiny_bert), clients=3, sample=1.0, rounds=1, rank=2, partition="iid", engine="local", threads=1,
        dtype="float32", privacy="client", noise_multiplier=1.0, clip_norm=1.0, quiet=True, out=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(InputError, match="evaluated on a seeded tenth of train"):
        run_simulation(config, data={"train": rows(30)})
    result = run_simulation(config, data={"train": rows(30), "dev": rows(9, 500)})
    assert result.summary["data"] == "own:hidden" and "data_sha256" not in result.summary
    more = config.model_copy(update={"rounds": 2, "resume": True})
    with pytest.raises(InputError, match="content has changed"):
        run_simulation(more, data={"train": rows(30, 1), "dev": rows(9, 500)})
    assert run_simulation(more, data={"train": rows(30), "dev": rows(9, 500)}).summary["rounds"] == 2


def test_what_is_scored_is_named_and_said_to_be_public_or_assumed(run: Run, ward: Path) -> None:
    summary, _, folder = run(*EXAMPLE, "--rounds", 1, "--data", ward, out="own split")
    promise = summary["privacy"]
    assert promise["scored_on"] == "test, assumed public: a split that no client holds"
    assert promise["scored_on"] in promise["not_hidden"] and "which labels occur" in promise["not_hidden"]
    assert "assumed public" in (folder / "report.html").read_text(encoding="utf-8")
    assert "the removal of an example does not change them" in promise["taken_as_public"]
    elsewhere = ("--eval-data", ward / "elsewhere" / "public.jsonl", "--public-eval", "--label-names", "cold,flu")
    summary, _, folder = run(*EXAMPLE, "--rounds", 1, "--data", ward / "alone", *elsewhere, out="elsewhere")
    assert "said to be public" in summary["privacy"]["scored_on"]
    assert "which labels" not in summary["privacy"]["not_hidden"]
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    assert facts["test_examples"] == 40 and facts["train_examples"] == 120  # no row of train is taken for it


def test_label_names_settle_the_classes_and_their_order(run: Run, ward: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\ufeffflu\n\ncold\nno cold, no flu\n", encoding="utf-8")
    once = ("--data", ward, "--rounds", 1, "--public-examples", 8)
    _, _, folder = run(*once, "--label-names", names, out="file")
    readme = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Labels: 0 = flu, 1 = cold, 2 = no cold, no flu." in readme
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["label_names"] == (
        '["flu", "cold", "no cold, no flu"]'
    )
    names.write_text("cold\nflu\nno cold, no flu\n", encoding="utf-8")  # what a file says may change
    assert main([str(folder / "config.yaml"), "--out", str(folder), "--resume", "--quiet", "--rounds", "2"]) == 0
    again = [str(folder / "config.yaml"), "--out", str(folder), "--resume", "--rounds", "3"]
    assert main([*again, "--label-names", str(names)]) == 2
    numbers = write(
        tmp_path / "stars" / "train.jsonl", [{**row, "label": at % 3 + 1} for at, row in enumerate(rows(60))]
    )
    write(numbers.with_name("test.jsonl"), [{**row, "label": 2} for row in rows(9, 200)])
    config = SimulationConfig(data=str(numbers.parent), label_names="3,2,1,4")
    from fedlotr.data import resolve_task
    from fedlotr.run.checking import read_source

    source = read_source(config)
    task = resolve_task("auto", source, config.labels)
    assert task.labels(source.train)[:3].tolist() == [2, 1, 0] and task.labels(source.test).tolist() == [1] * 9


class Notes(Callbacks):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_client(self, event: Any) -> None:
        self.told.append(event)

    def on_round(self, event: Any) -> None:
        self.told.append(dict(event.metrics))


SERVERS_OWN = {"checkpoints", "ledger", "privacy.jsonl", "privacy.key", "log.txt", ".work"}
"""What `promise.SEES` keeps from the adversary."""


def world(config: SimulationConfig, data: dict[str, Rows], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All that a run lets out, by the file or by who is told."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), process_time=lambda: 0.0)  # a busy machine
    for module in ("run.rounds", "run.summary", "run.simulation", "flower.round"):
        patch.setattr(f"fedlotr.{module}.time", clock)
    notes, shown = Notes(), io.StringIO()
    assert config.out is not None
    with Console(stream=shown) as console:
        result = run_simulation(config, data=data, callbacks=notes, console=console)
    write_report(config.out)
    files = {path.relative_to(config.out): path for path in config.out.rglob("*") if path.is_file()}
    out = {str(name): path.read_bytes() for name, path in files.items() if name.parts[0] not in SERVERS_OWN}
    shutil.rmtree(config.out)
    return {**out, "callbacks": notes.told, "console": shown.getvalue(), "history": result.history}


def still(self: ClientGuard, start: Any, updates: Any) -> Any:
    """In place of the mechanism, which other tests are about: a release that tells nothing."""
    return dict(start)


@pytest.mark.parametrize("level", ["client", "example"])
def test_two_worlds_that_differ_in_what_is_hidden_let_out_the_same(
    level: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"model": str(tiny_bert), "clients": 4, "sample": 4, "rounds": 2, "rank": 2, "engine": "local"}
    common |= {
        "threads": 1,
        "dtype": "float32",
        "max_examples": None,
        "partition": "natural:who",
        "noise_multiplier": 1,
    }
    common |= {"label_names": "cold,flu,pox", "privacy": level, "clip_norm": 1, "out": tmp_path / "run", "seed": 3}
    config = SimulationConfig.model_validate(common)
    test = rows(12, 900)
    held = [{**row, "who": f"p{at % 4}"} for at, row in enumerate(rows(40))]
    monkeypatch.setattr(ClientGuard, "mean", still)
    monkeypatch.setattr(DPSGD, "release", lambda _, client, total, expected: {n: v * 0 for n, v in total.items()})
    monkeypatch.setattr(ClientGuard, "draw", lambda self, server_round, admitted: [])
    one = world(config, {"train": held, "test": test}, monkeypatch)
    # One example another, with a label that nobody else has; or one client another, who is there, and fails.
    other = [{**held[0], "text": "a case unlike all others", "label": "pox"}, *held[1:]]
    if level == "client":
        other = [{**row, "who": "q0"} if row["who"] == "p3" else row for row in other]
        other += [{**row, "who": "q0"} for row in rows(7, 300)]
        monkeypatch.setattr(ClientGuard, "draw", lambda self, server_round, admitted: list(range(server_round + 2)))
        check = asking.check_replies

        def one_fails(*given: Any) -> Any:
            good, failures = check(*given)
            return good[1:], failures | {0: Failure("not finite", "of client q0, with the pox")}

        monkeypatch.setattr(asking, "check_replies", one_fails)
    assert {"report.html", "summary.json", "facts.json", "metrics.jsonl", "adapter/README.md"} <= one.keys()
    found = world(config, {"train": other, "test": test}, monkeypatch)
    assert [name for name in one if one[name] != found[name]] == [] and found.keys() == one.keys()


def test_a_client_that_fails_does_not_quote_its_examples(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def quotes(*_: Any) -> None:
        raise ValueError("the text 'patient zero'")

    monkeypatch.setattr(DPSGD, "bound", quotes)
    assert main([*words, *EXAMPLE, "--out", str(tmp_path / "run"), "--quiet"]) == 1
    said = capsys.readouterr().err + (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "HiddenError: ValueError" in said and "patient zero" not in said


def test_trackers_are_told_nothing_that_grows_with_a_cohort(run: Run) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tests.reporting.test_loggers import told_to_tensorboard

    _, _, folder = run(*CLIENT, "--tensorboard")
    assert set(told_to_tensorboard(folder)) == {"loss", "accuracy", "epsilon", "transport_error", "evaluate_seconds"}


def test_a_grid_tells_what_its_runs_and_trials_spend_together(
    tiny_bert: Path, ward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"model": str(tiny_bert), "data": str(ward), "clients": 4, "sample": 2, "rounds": 1, "rank": 2}
    base |= {"engine": "local", "threads": 1, "dtype": "float32", "privacy": "example", "noise_multiplier": 1.0}
    file = tmp_path / "grid.yaml"
    grid: dict[str, Any] = {"base": base, "seeds": [0, 1], "tune": {"lr": [0.01, 0.1]}}
    file.write_text(yaml.safe_dump(grid), encoding="utf-8")
    assert cli.main(["grid", str(file), "--out", str(tmp_path / "out"), "--in-process"]) == 2
    assert "--eval-split held-out with --privacy example" in capsys.readouterr().err
    grid["tune"]["on"], grid["base"]["public_eval"] = "extra", True
    file.write_text(yaml.safe_dump(grid), encoding="utf-8")
    assert cli.main(["grid", str(file), "--out", str(tmp_path / "out"), "--in-process"]) == 0
    shown, said = capsys.readouterr()
    summaries = [read_run(path.parent)[0] for path in (tmp_path / "out").rglob("summary.json")]
    assert len(summaries) == 4
    together = sum(summary["privacy"]["epsilon"] for summary in summaries)
    with open(tmp_path / "out" / "table.csv", newline="", encoding="utf-8") as table:
        (row,) = csv.DictReader(table)
    assert float(row["epsilon_together"]) == pytest.approx(together)
    assert float(row["epsilon"]) == max(summary["privacy"]["epsilon"] for summary in summaries)
    for text in (shown, " ".join(said.split()), (tmp_path / "out" / "table.md").read_text(encoding="utf-8")):
        assert f"these 4 runs, trials included, tell epsilon {together:.3g}" in text
    assert "| epsilon |" in shown
    # Again: what is finished is recognised by its content, although no hash of it is published.
    assert cli.main(["grid", str(file), "--out", str(tmp_path / "out"), "--in-process", "--quiet"]) == 0
    write(ward / "train.jsonl", rows(121))
    assert cli.main(["grid", str(file), "--out", str(tmp_path / "out"), "--in-process"]) == 2
    assert "its content is not what runs in" in capsys.readouterr().err


def test_epsilons_are_added_by_data_and_unit() -> None:
    def told(data: str, unit: str, epsilon: float | None) -> dict[str, Any]:
        return {"data": data, "privacy": {"unit": unit, "epsilon": epsilon, "delta": 0.01}}

    runs = [told("a", "example", 1.5), told("a", "example", 2.0), told("b", "example", 4.0), told("a", "client", 8.0)]
    (note,) = spending([*runs, told("a", "example", None), {"privacy": None}])
    assert (
        "one example of a these 2 runs" in note and "epsilon 3.5 at delta 0.02" in note and "1 that claim none" in note
    )
    assert spending(runs[2:]) == []
