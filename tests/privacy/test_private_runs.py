"""Privacy as a user meets it: what a run promises, what it spends, and what it refuses."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from safetensors.numpy import load_file

from fedlotr.communication.ledger import read_ledger
from fedlotr.errors import InputError
from fedlotr.flower.link import Reply, Turn
from fedlotr.flower.links.hidden import HiddenClients
from fedlotr.flower.norms import Watch
from fedlotr.flower.replies import Failure
from fedlotr.flower.trouble import TooManyFailuresError, weigh_failures
from fedlotr.privacy.accounting import Releases, calibrate, epsilon, epsilon_by_prv, epsilon_by_rdp
from fedlotr.privacy.guard import Adaptive, ClientGuard
from fedlotr.privacy.ledger import Ledger, Promise
from fedlotr.simulate import main
from tests.support import Simulate, read_run

Run = Callable[..., tuple[dict[str, Any], list[dict[str, Any]], Path]]


@pytest.fixture
def words(tiny_bert: Path, animals: Path) -> list[str]:
    """Six clients of 20 examples, two steps a round of half of them."""
    options = {"model": tiny_bert, "data": animals, "clients": 6, "sample": 3, "rounds": 2, "rank": 4}
    options |= {"method": "fed-sb", "engine": "local", "threads": 1, "dtype": "float32", "max-examples": 20}
    options |= {"partition": "iid", "batch-size": 10, "local-epochs": 1}
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture
def run(words: list[str], tmp_path: Path) -> Run:
    def go(*more: object, out: str = "run") -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
        folder = tmp_path / out
        assert main([*words, "--quiet", "--out", str(folder), *map(str, more)]) == 0
        return *read_run(folder), folder

    return go


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "privacy.jsonl").read_text(encoding="utf-8").splitlines()]


def trained(folder: Path) -> dict[str, np.ndarray]:
    last = sorted((folder / "checkpoints").glob("*.safetensors"))[-1]
    return {name: value for name, value in load_file(last).items() if "/" not in name}


def test_known_answers_of_the_accountants() -> None:
    spent = Releases(1.0, 0.01, 1000)
    assert epsilon(spent, 1e-5) == pytest.approx(1.8282, abs=1e-4)
    assert epsilon_by_prv(spent, 1e-5) == pytest.approx(1.8384, abs=1e-4)
    assert epsilon_by_rdp(spent, 1e-5) == pytest.approx(2.1014, abs=1e-4)
    sigma = calibrate(2.0, 1e-5, [(0.1, 30), (0.1, 20), (0.05, 60)])
    spent_all = [epsilon(Releases(sigma, *plan), 1e-5) for plan in ((0.1, 30), (0.05, 60))]
    assert (
        max(spent_all) <= 2.0 < max(epsilon(Releases(0.995 * sigma, *plan), 1e-5) for plan in ((0.1, 30), (0.05, 60)))
    )


def test_a_run_spends_what_it_may_and_says_so(run: Run) -> None:
    summary, rows, folder = run("--privacy", "example", "--epsilon", 8)
    promise, (head, *charges) = summary["privacy"], ledger_of(folder)
    assert promise["unit"] == "example" and 7 < promise["epsilon"] <= 8 == promise["epsilon_budget"]
    assert promise["epsilon"] <= promise["epsilon_by_rdp"]
    assert abs(promise["epsilon"] - promise["epsilon_by_opacus_prv"]) < 0.02
    assert promise["delta"] == pytest.approx(0.1 / 20) and promise["sampling_rate"] == 0.5
    assert "operating system" in promise["noise"] and promise["public_data"] is None
    assert promise["bases_from"] == "the base model"  # fed-sb's own basis would be a gradient on private rows
    assert [charge["round"] for charge in charges] == [1, 2] and all(len(c["accounts"]) == 3 for c in charges)
    # One accountant for the whole run: R rounds of K steps cost what R·K steps do.
    steps = [2 * sum(k in charge["accounts"] for charge in charges) for k in range(6)]
    spent = [epsilon(Releases(head["sigma"], 0.5, count), head["delta"]) for count in steps]
    assert promise["epsilon"] == max(spent) and promise["steps"] == max(steps)
    assert promise["epsilon_median"] == sorted(spent)[3]  # of an even number the dearer one in the middle
    assert [row["epsilon"] for row in rows] == [epsilon(Releases(head["sigma"], 0.5, 2), head["delta"]), max(spent)]
    # A loss would tell of the examples, and no noise covers it.
    assert all(row["train_loss"] is None and row["aggregation_error"] < 1e-6 for row in rows)
    assert "Epsilon spent" in (folder / "report.html").read_text(encoding="utf-8")


def test_noise_is_new_in_every_run_unless_it_is_to_be_reproducible(run: Run) -> None:
    private = ("--privacy", "example", "--epsilon", 8, "--rounds", 1)
    one, other = run(*private, out="a")[0], run(*private, out="b")[0]
    assert one["trained_sha256"] != other["trained_sha256"]
    again = [run(*private, "--reproducible-noise", out=name)[0] for name in "cd"]
    assert again[0]["trained_sha256"] == again[1]["trained_sha256"]
    assert again[0]["privacy"]["epsilon"] is None and "seed" in again[0]["privacy"]["epsilon_reason"]


def test_opacus_is_an_engine_of_its_own(run: Run) -> None:
    opacus = ("--privacy", "example", "--epsilon", 8, "--privacy-engine", "opacus")
    for method in ("fed-sb", "lora"):
        summary, rows, _ = run(*opacus, "--method", method, out=method)
        assert "not cryptographic" in summary["privacy"]["noise"] and 7 < summary["privacy"]["epsilon"] <= 8
        assert rows[-1]["aggregation_error"] < 1 and rows[-1]["failed"] == 0
    again = [run(*opacus, "--reproducible-noise", "--rounds", 1, out=name)[0]["trained_sha256"] for name in "ab"]
    assert again[0] == again[1]


def test_clients_are_hidden_by_the_server_also_when_nobody_comes(run: Run) -> None:
    options = ("--privacy", "client", "--clip-norm", 1, "--sample", 1, "--rounds", 6, "--strategy", "fedadam")
    summary, rows, folder = run(*options, "--noise-multiplier", 1, "--reproducible-noise", "--strategy-arg", "eta=0.01")
    sent = read_ledger(folder / "ledger")
    sizes = [len({entry.client for entry in sent if entry.round == number}) for number in range(1, 7)]
    assert 0 in sizes and max(sizes) > 1  # cohorts are drawn client by client
    assert all(row["clients"] is None for row in rows)  # which nobody is told
    assert all(row["aggregation_error"] is None and row["train_loss"] is None for row in rows)
    assert "tell of them" in summary["aggregation_error_reason"]
    assert len(ledger_of(folder)) == 1 + 6  # also of rounds in which nobody came
    summary, _, folder = run("--privacy", "client", "--clip-norm", 1, "--epsilon", 2, out="real")
    assert summary["privacy"]["epsilon"] == pytest.approx(2, rel=0.02) and summary["privacy"]["delta"] < 1 / 6
    assert summary["privacy"]["sampling_rate"] == 0.5
    summary, _, _ = run("--privacy", "client", "--clip-norm", 1, "--epsilon", 2, "--noise-cohort", 300, out="large")
    assert summary["privacy"]["epsilon"] is None and "larger federation" in summary["privacy"]["epsilon_reason"]
    assert summary["privacy"]["simulation"]["population"] == 600
    assert summary["privacy"]["simulation"]["epsilon"] == pytest.approx(2, rel=0.02)


def test_what_hidden_clients_cost_is_reckoned_with_the_runs_own_core(run: Run) -> None:
    hidden = ("--privacy", "client", "--clip-norm", 1, "--epsilon", 2, "--rounds", 1)
    paid = run(*hidden, "--core", "diag")[0]["communication"]
    numbers = 13 * 4 + 2 * 32 + 2
    assert paid["upload_payload_bytes_per_client_round"] == 4 * numbers
    assert paid["download_payload_bytes_per_client_round"] == 4 * numbers
    assert paid["one_off_bytes_per_client"] == 40


def guard(folder: Path, **options: Any) -> ClientGuard:
    promise = Promise("client", None, 1e-3, options.pop("sigma", 1.0), [0.25], [1], [], True)
    return ClientGuard(Ledger.begin(folder / "privacy.jsonl", promise), {"clip_norm": 2.0}, 40, 2.0, 0, **options)


def test_the_noised_mean_is_clipped_and_divided_by_the_expected_cohort(tmp_path: Path) -> None:
    start = {"a": np.zeros((3, 2)), "b": np.ones(50_000)}
    far, near = {"a": np.full((3, 2), 100.0), "b": np.ones(50_000)}, {"a": np.full((3, 2), 0.1), "b": np.ones(50_000)}
    still = guard(tmp_path, sigma=1e-12)
    still.draw(1)
    found = still.mean(start, [far, near])
    direction = 2.0 / np.sqrt(6)
    assert found["a"] == pytest.approx((direction + 0.1) / 10, rel=1e-5) and found["b"] == pytest.approx(1.0)
    noisy = guard(tmp_path)
    for server_round, updates in ((1, []), (2, [far])):
        noisy.draw(server_round)
        noise = (noisy.mean(start, updates)["b"] - 1) * 10 / 2.0
        assert noise.std() == pytest.approx(1, abs=0.02) and abs(noise.mean()) < 0.03
    larger = guard(tmp_path, noise_cohort=100)
    larger.draw(1)
    assert (larger.mean(start, [])["b"] - 1).std() == pytest.approx(2.0 / 100, rel=0.02)


def test_an_adaptive_bound_moves_towards_the_norms(tmp_path: Path) -> None:
    start = {"a": np.zeros(4)}
    for size in (50.0, 0.01):
        here = guard(tmp_path, sigma=0.05, adaptive=Adaptive(0.5))
        for server_round in range(60):
            here.draw(server_round)
            rows = [{"a": np.full(4, size * scale / 2)} for scale in np.linspace(0.8, 1.2, 10)]
            here.mean(start, rows)
        assert here.bound == pytest.approx(size, rel=0.3)
    adaptive = Adaptive(0.5)
    sum_noise, count_noise = adaptive.sum_noise(400, 1.5), adaptive.count_noise(400, 1.5)
    assert sum_noise**-2 + (2 * count_noise) ** -2 == pytest.approx(1.5**-2)


CRASHES = """
from fedlotr.strategies.exact_average import ExactAverage

class Crashes(ExactAverage):
    asks = {"nonsense": True}
"""


def test_a_cohort_that_crashes_as_a_whole_is_no_private_round(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crashes.py").write_text(CRASHES, encoding="utf-8")
    private = ["--privacy", "client", "--clip-norm", "1", "--noise-multiplier", "1", "--sample", "6", "--quiet"]
    words = [*words, *private, "--out", str(tmp_path / "run"), "--strategy", f"{tmp_path / 'crashes.py'}:Crashes"]
    assert main(words) == 1
    assert "all clients failed" in capsys.readouterr().err
    assert len(ledger_of(tmp_path / "run")) == 2  # it was charged all the same


def test_one_hidden_client_that_fails_alone_counts_as_one_that_changed_nothing() -> None:
    run: Any = SimpleNamespace(guard=SimpleNamespace(hides_clients=True))
    failed: Any = SimpleNamespace(has_error=lambda: True)
    weigh_failures(run, 1, Watch(), {0: Failure("error", "no cheese")}, [failed], [])
    with pytest.raises(TooManyFailuresError, match="all clients failed"):
        weigh_failures(run, 1, Watch(), dict.fromkeys((0, 1), Failure("error", "no cheese")), [failed, failed], [])


def test_a_strategy_sees_one_reply_in_place_of_those_of_hidden_clients() -> None:
    guard: Any = SimpleNamespace(mean=lambda start, ends: {"C": np.full(2, 7.0 + len(ends))})
    link, tensors = HiddenClients(guard), ArrayRecord({"C": Array(np.zeros(2, np.float32))})
    link.begin(Turn(number=1, moved=tensors))
    replies = [Reply(client=client, arrays=tensors, weight=3.0, examples=5, loss=0.5) for client in (1, 2)]
    for came in (replies, []):
        (seen,) = link.gather(came)
        assert (seen.client, seen.weight, seen.examples, seen.loss, seen.records) == (0, 1.0, 1, None, {})
        assert list(seen.arrays["C"].numpy()) == [7 + len(came)] * 2


def test_the_pooled_baseline_hides_examples_too(run: Run) -> None:
    summary, _, folder = run("--privacy", "example", "--noise-multiplier", 2, "--baseline", "central")
    assert summary["privacy"]["sampling_rate"] < 1 and summary["privacy"]["delta"] == pytest.approx(0.1 / 120)
    assert [charge["accounts"] for charge in ledger_of(folder)[1:]] == [[0], [0]]


BAD = {
    "--public-data nowhere.csv --public-examples 0": "no row of it would be used",
    "--epsilon 8": "--epsilon 8.0 with --privacy none: there is no noise",
    "--privacy example": "--privacy example: how private is to be said",
    "--privacy example --epsilon 8 --noise-multiplier 1": "give one of them",
    "--privacy example --epsilon 8 --delta 0.05": "--delta 0.05: expected less than 1/20",
    "--privacy example --epsilon 8 --basis update": "rows withheld from private data are private: give --public-data",
    "--privacy example --epsilon 8 --client-eval 0.2": "no noise would cover it",
    "--privacy example --epsilon 8 --public-data nowhere.csv": "--public-data nowhere.csv: no such data set",
    "--privacy client --epsilon 8": "it needs --clip-norm",
    "--privacy client --epsilon 8 --clip-norm 1 --weights examples": "not hidden equally",
    "--privacy client --epsilon 8 --clip-norm 1 --method lora --strategy flora": "needs more of every client",
    "--privacy client --epsilon 8 --clip-norm 1 --strategy median": "needs more of every client",
    "--privacy client --epsilon 8 --clip-norm 1 --delta 0.5": "one over the clients",
    "--privacy client --epsilon 8 --clip-norm 1 --link lte": "would tell who took part",
    "--privacy client --epsilon 8 --clip-norm 1 --optimizer-state mean-v": "would travel without noise",
    "--privacy client --epsilon 8 --clip-norm 1 --baseline central": "no server that could hide clients",
    "--privacy example --epsilon 8 --privacy-engine opacus --client-rank 2,4": "it knows one rank",
    "--privacy example --epsilon 8 --method fedsa-lora": "no noise would cover",
    "--privacy-engine opacus": "it belongs to --privacy example",
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_promised_is_refused(
    bad: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "run"), *bad.split()]) == 2
    assert BAD[bad] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_public_data_are_what_bases_and_head_are_made_of(run: Run, tmp_path: Path, animals: Path) -> None:
    rows = [json.loads(line) for line in (animals / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    public = tmp_path / "public.jsonl"
    public.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    private = ("--privacy", "example", "--epsilon", 8, "--rounds", 1)
    summary, _, folder = run(*private, "--public-data", public)
    assert summary["privacy"]["bases_from"] == "a gradient on the public data"
    assert summary["privacy"]["public_data"] == str(public)
    # No row of the private data is withheld for it.
    assert json.loads((folder / "facts.json").read_text(encoding="utf-8"))["train_examples"] == 120
    # The head was fitted there.
    assert summary["initial"]["loss"] != run(*private, out="none")[0]["initial"]["loss"]


def test_the_ledger_forgets_nothing_and_refuses_what_is_over_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    sigma = calibrate(3.0, 1e-3, [(0.5, 6)])
    ledger = Ledger.begin(path, Promise("example", 3.0, 1e-3, sigma, [0.5, 0.5], [2, 2], [6, 6]))
    for server_round in (1, 2):
        ledger.charge(server_round, [0])
    mark = ledger.mark()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "acc')  # killed while it was written: nothing of round 3 had gone out
    again = Ledger.open(path)
    assert again is not None and again.spent == [4, 0] and again.affords(0)
    again.check(mark)
    again.charge(3, [0, 1])
    assert not again.affords(0) and again.affords(1)
    found = Ledger.open(path)
    assert found is not None and found.spent == [6, 2]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]), encoding="utf-8")
    with pytest.raises(InputError, match="lost or changed"):
        Ledger.open(path)


DIES_ONCE = '''
import os, pathlib, signal
from fedlotr.strategies.exact_average import ExactAverage

class DiesOnce(ExactAverage):
    """Killed in round 2, when the clients' replies are already there."""
    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = flag
    def combine(self, updates, server_round):
        if server_round == 2 and not pathlib.Path(self.flag).exists():
            pathlib.Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().combine(updates, server_round)
'''


@pytest.mark.slow
def test_a_round_that_was_released_and_lost_is_paid_twice(words: list[str], tmp_path: Path, simulate: Simulate) -> None:
    (tmp_path / "dies.py").write_text(DIES_ONCE, encoding="utf-8")
    private = [*words, "--sample", "6", "--rounds", "3", "--privacy", "example", "--epsilon", "6", "--out", "run"]
    private += ["--strategy", "dies.py:DiesOnce", "--strategy-arg", f"flag={tmp_path / 'flag'}"]
    killed = simulate(*private)
    assert killed.returncode == -signal.SIGKILL
    assert [charge["round"] for charge in ledger_of(tmp_path / "run")[1:]] == [1, 2]
    resumed = simulate(*private, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    summary, rows = read_run(tmp_path / "run")
    # Three rounds are paid for; the third of the plan would be a fourth, and is refused. What is done is kept.
    assert [charge["round"] for charge in ledger_of(tmp_path / "run")[1:]] == [1, 2, 2]
    assert summary["rounds"] == 2 == len(rows) and 5.5 < summary["privacy"]["epsilon"] <= 6
    assert rows[0]["epsilon"] < rows[1]["epsilon"] == summary["privacy"]["epsilon"]
    assert "allows no round 3" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "adapter").is_dir()
