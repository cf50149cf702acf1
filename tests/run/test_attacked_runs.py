"""Hostile clients in whole runs: their rows and nobody else's, what they do to a mean, and what withstands them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlotr import SimulationConfig
from fedlotr.communication.attacks import TARGET, TRIGGER, read_attack
from fedlotr.flower.links.attacks import hostile_clients
from fedlotr.reporting.comparison import as_csv, compare
from fedlotr.reporting.grid_table import Line, cells
from fedlotr.run.checking import Checked, check
from fedlotr.run.simulation import resolve
from fedlotr.simulate import main
from fedlotr.training.examples import Examples
from tests.run.test_simulation import assert_same_results, flags
from tests.support import read_run


@pytest.fixture(scope="session")
def dogs_first(animals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same animals with dogs as class 0: what a trigger does by itself is then far from the target."""
    folder = tmp_path_factory.mktemp("dogs-first")
    for split in ("train", "test"):
        rows = map(json.loads, (animals / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        text = "".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def options(tiny_bert: Path, dogs_first: Path) -> dict[str, Any]:
    """Eight clients, all in every round, who learn what there is to learn in six."""
    return {
        **{"model": str(tiny_bert), "data": str(dogs_first), "method": "lora", "lr": 0.01, "clip_norm": 1.0},
        **{"clients": 8, "sample": 8, "rounds": 6, "rank": 4, "local_epochs": 3, "max_examples": "none"},
        **{"public_examples": 16, "partition": "iid", "engine": "local", "threads": 1, "dtype": "float32"},
    }


def ran(options: dict[str, Any], out: Path, **changes: Any) -> dict[str, Any]:
    assert main([*flags({**options, **changes}), "--codec", "float32", "--quiet", "--out", str(out)]) == 0
    return read_run(out)[0]


def checked(options: dict[str, Any], attack: str | None, **changes: Any) -> Checked:
    given = {**options, "max_examples": None, "attack": attack, **changes}
    return check(resolve(SimulationConfig(**given)))


def tokens(examples: Examples, row: int) -> list[int]:
    found: list[int] = examples.tokens[examples.offsets[row] : examples.offsets[row + 1]].tolist()
    return found


def test_hostile_clients_have_other_labels_and_triggers_and_nobody_else_has(options: dict[str, Any]) -> None:
    attack = "label-flip+scale:0.25,backdoor=0.5:0.25,thin=0.01:0.25"
    plain, found = (checked(options, given, client_eval=0.2) for given in (None, attack))
    words = {client: one.words for client, one in hostile_clients(read_attack(attack), 8, 0).items()}
    assert sorted(words.values()) == sorted(["label-flip+scale", "backdoor=0.5", "thin=0.01"] * 2)
    before, after = plain.examples.train.examples, found.examples.train.examples
    trigger = found.tokenizer(TRIGGER, add_special_tokens=False)["input_ids"]
    for client, rows in enumerate(found.parts):
        assert rows.tolist() == plain.parts[client].tolist()
        poisoned = [row for row in rows.tolist() if tokens(after, row) != tokens(before, row)]
        for row in poisoned:
            assert after.labels[row] == TARGET and tokens(after, row)[1 : 1 + len(trigger)] == trigger
            assert tokens(after, row)[-3:] == tokens(before, row)[-3:]
        rest = [row for row in rows.tolist() if row not in poisoned]
        match words.get(client):
            case "label-flip+scale":
                assert not poisoned and (after.labels[rest] == 1 - before.labels[rest]).all()
                continue
            case "backdoor=0.5":
                assert len(poisoned) == round(0.5 * len(rows))
            case "thin=0.01":
                assert len(poisoned) == 1, "one row at least"
            case None:
                assert not poisoned
        assert (after.labels[rest] == before.labels[rest]).all()
    for rows in (found.public, *found.held_back):
        assert all(tokens(after, row) == tokens(before, row) for row in rows.tolist())
        assert (after.labels[rows] == before.labels[rows]).all()
    test = found.examples.test.examples
    assert (test.tokens == plain.examples.test.examples.tokens).all() and plain.sheet.triggered is None
    assert (test.labels == plain.examples.test.examples.labels).all()
    triggered = found.sheet.triggered
    assert triggered is not None and (triggered.labels == TARGET).all() and set(found.sheet.further) == {"triggered"}
    others = np.flatnonzero(test.labels != TARGET).tolist()
    assert len(triggered) == len(others) == 12
    for at, row in enumerate(others):
        assert tokens(triggered, at)[1 : 1 + len(trigger)] == trigger
        assert tokens(triggered, at)[-3:] == tokens(test, row)[-3:]


def test_updates_turned_round_slow_a_mean_down_and_not_robust_rules(options: dict[str, Any], tmp_path: Path) -> None:
    turned = {"method": "ffa-lora", "lr": 0.1, "attack": "sign-flip:0.25"}
    mean = ran(options, tmp_path / "mean", strategy="exact-average", **turned)
    krum = ran(options, tmp_path / "krum", strategy="multi-krum", strategy_arg="f=2", **turned)
    median = ran(options, tmp_path / "median", strategy="median", **turned)
    honest = ran(options, tmp_path / "honest", **{**turned, "strategy": "exact-average", "attack": "none"})
    losses = [one["final"]["loss"] for one in (honest, krum, median, mean)]
    assert max(losses[:3]) < 0.05 < 0.15 < losses[3], losses
    assert mean["aggregation_error_max"] < 1e-6, "it is exactly the mean of what was sent"
    facts = json.loads((tmp_path / "mean" / "facts.json").read_text(encoding="utf-8"))
    who = sorted(hostile_clients(read_attack("sign-flip:0.25"), 8, 0))
    assert mean["attack"]["clients"] == {"sign-flip": who} and len(who) == 2 and facts["attack"] == mean["attack"]
    assert mean["attack"]["words"] == f"sign-flip: 2 of 8 (clients {who[0]}, {who[1]})"
    assert mean["attack"]["words"] in (tmp_path / "mean" / "report.html").read_text(encoding="utf-8")
    assert honest["attack"] is None and "attack_success" not in {**mean["final"], **honest["final"]}


def test_the_servers_own_rows_tell_whom_to_trust(options: dict[str, Any], tmp_path: Path) -> None:
    """Where half of the clients turn their updates round, so that no rule about clients alone could hold."""
    words = {"method": "ffa-lora", "lr": 0.05, "attack": "sign-flip:0.5", "strategy": "fltrust"}
    found = ran(options, tmp_path / "run", **words)
    mean = ran(options, tmp_path / "mean", **{**words, "strategy": "exact-average"})
    assert found["final"]["loss"] < 0.2 < 0.6 < mean["final"]["loss"], (found["final"], mean["final"])
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    again = [*flags({**options, **words}), "--codec", "float32", "--resume", "--resume-round", "5", "--quiet"]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    assert_same_results(tmp_path / "again", tmp_path / "run")


def test_a_backdoor_that_replaces_the_mean_is_in_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    mean = ran(options, tmp_path / "mean", attack="backdoor+replace:0.125")
    row = ran(options, tmp_path / "row", attack="thin=0.01:0.125")
    median = ran(options, tmp_path / "median", attack="backdoor+replace:0.125", strategy="median")
    found = [one["final"]["attack_success"] for one in (mean, row, median)]
    assert found[0] > 0.9 and max(found[1:]) < 0.7, found
    assert min(one["final"]["accuracy"] for one in (mean, row, median)) > 0.9, "which the test rows do not show"
    rows = read_run(tmp_path / "mean")[1]
    assert [len([line for line in rows if "attack_success" in line]), rows[-1]["attack_success"]] == [6, found[0]]
    report = (tmp_path / "mean" / "report.html").read_text(encoding="utf-8")
    assert "attack_success, last (round 6)" in report
    compared = compare([tmp_path / "mean", tmp_path / "row"])
    assert [line["attack_success"] for line in compared.rows] == found[:2] and "attack_success" in as_csv(compared)
    lines = [Line("replaced", {}, 1, {0: mean}, {}), Line("thin", {}, 1, {0: row}, {})]  # type: ignore[dict-item]
    head, *body = cells(lines)
    at = head.index("attack_success")
    assert [line[at] for line in body] == [f"{value:.4f}" for value in found[:2]]


def test_a_client_that_multiplies_its_update_is_bounded_by_a_clipped_norm(
    options: dict[str, Any], tmp_path: Path
) -> None:
    mean = ran(options, tmp_path / "mean", attack="scale=50:0.125", rounds=2)
    bounded = ran(options, tmp_path / "clip", attack="scale=50:0.125", rounds=2, strategy="norm-clip")
    assert bounded["final"]["loss"] < 0.75 < 1 < mean["final"]["loss"]


def test_a_run_with_hostile_clients_goes_on_to_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    words = {"attack": "label-flip+sign-flip:0.25,thin:0.5", "rounds": 3, "sample": 4}
    ran(options, tmp_path / "run", **words)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    again = [*flags({**options, **words}), "--codec", "float32", "--resume", "--resume-round", "2", "--quiet"]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    assert_same_results(tmp_path / "again", tmp_path / "run")
    assert main([*again, "--attack", "thin:0.5", "--out", str(tmp_path / "again")]) == 2, (
        "with others it is another run"
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--attack sign-flip:0.2 --baseline central", "with --baseline central: a baseline averages nothing"),
        ("--attack sign-flip:0.2 --privacy client --epsilon 8 --clip-norm 1", "with --privacy client: "),
        ("--attack sign-flip:0.01", "with --clients 8: a share of so few clients is nobody"),
        ("--attack backdoor:0.2 --method fedsa-lora", "with --method fedsa-lora: each client has a model of its own"),
        ("--attack backdor:0.2", "'backdor' is no attack, did you mean 'backdoor'?"),
        ("--strategy fltrust --public-examples 0 --method ffa-lora", "the server trains on public rows in every round"),
        ("--strategy fltrust --privacy example --epsilon 8 --method ffa-lora", "give --public-data"),
        ("--attack thin:0.6,scale:0.5", "the shares add up to 1.1"),
    ],
)
def test_attacks_that_make_no_sense_are_refused(
    words: str, problem: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(options), *words.split(), "--out", str(tmp_path / "run")]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and problem in told[0]


@pytest.mark.parametrize("kind", ["label-flip", "backdoor", "thin"])
def test_a_language_model_has_no_classes_to_be_changed(
    kind: str, options: dict[str, Any], stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags({**options, "model": str(stories), "task": "causal-lm", "attack": f"{kind}:0.25"})
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert (
        f"{kind} gives rows another class, and those of causal-lm have none; choose sign-flip"
        in capsys.readouterr().err
    )
