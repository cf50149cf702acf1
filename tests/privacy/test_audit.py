"""Privacy audited: each tensor's noise, when a round is paid for, and adversaries who come close to what is claimed."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta, norm

from fedlotr.flower.client_app import Worker
from fedlotr.flower.link import Job
from fedlotr.privacy import clipping
from fedlotr.privacy.accounting import Releases, epsilon
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise, client_stream
from fedlotr.privacy.guard import Adaptive, ClientGuard
from fedlotr.privacy.ledger import Ledger, Promise
from fedlotr.privacy.noise import NoiseStream
from fedlotr.privacy.opacus_engine import train_by_opacus
from fedlotr.simulate import main
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel
from tests.privacy.test_private_runs import guard, ledger_of, words
from tests.support import read_run
from tests.training.test_training import build, examples_for, model

__all__ = ["model", "words"]  # the fixtures: models of four kinds; options of a run of six clients
DELTA = 1e-3


def has_deviation_one(drawn: np.ndarray, what: str, lost: int = 0) -> None:
    """As n independent standard normals have it, within five standard errors. lost: of n, to a mean taken off."""
    n = drawn.size
    assert abs(drawn.std() / np.sqrt(1 - lost / n) - 1) < 5 / np.sqrt(2 * n), f"{what}: deviation {drawn.std():.3f}"
    assert abs(drawn.mean()) < 5 / np.sqrt(n), f"{what}: mean {drawn.mean():.3f}"


def are_unlike(one: np.ndarray, other: np.ndarray, what: str) -> None:
    """As independent normals are: six standard errors."""
    assert abs(float(np.corrcoef(one.ravel(), other.ravel())[0, 1])) < 6 / np.sqrt(one.size), what


@pytest.fixture
def tiny(tiny_bert: Path) -> TrainableModel:
    return build(tiny_bert, "classification", "lora")


@pytest.mark.parametrize("engine", ["cohort", "opacus"])
def test_every_tensor_of_a_step_has_the_noise_that_was_paid_for(engine: str, model: TrainableModel) -> None:
    every_tensor_has_its_noise(engine, "sgd", model)


@pytest.mark.parametrize("engine", ["cohort", "opacus"])
def test_every_tensor_of_a_step_of_adamw_has_its_noise(engine: str, tiny: TrainableModel) -> None:
    every_tensor_has_its_noise(engine, "adamw", tiny)


def every_tensor_has_its_noise(engine: str, optimizer: Any, model: TrainableModel) -> None:
    # So much noise that the gradients beside it are nothing; and so large an eps that a step of AdamW is its gradient.
    clients, held, bound, sigma, rate = 32, 1, 0.05, 1e4, 1e9
    lr = 1.0 if optimizer == "sgd" else rate
    training = LocalTraining(steps=1, batch_size=held, optimizer=optimizer, lr=lr, head_lr=lr, eps=rate)
    examples, start, noise = examples_for(model.spec), model.values(), ExampleNoise(sigma, bound)
    work = [ClientWork(np.arange(k, k + held), np.random.default_rng(0)) for k in range(clients)]
    if engine == "opacus":
        found = train_by_opacus(
            model, [start] * clients, examples, work, training, noise, [str(k) for k in range(clients)]
        )
        model.assign(start)
    else:
        streams = [client_stream(False, 0, 1, client) for client in range(clients)]
        found = train_cohort(model, start, examples, work, training, None, 1, DPSGD(noise, streams))
    unit = sigma * bound / held
    drawn = {n: np.stack([((start[n] - one.tensors[n]) / unit).numpy() for one in found]) for n in found[0].tensors}
    assert drawn.keys() == start.keys()  # all that is trained is released, and so looked at
    for name, each in drawn.items():
        has_deviation_one(each, name)
    joint = np.concatenate([each.reshape(clients, -1) for each in drawn.values()], 1)
    are_unlike(joint[:-1], joint[1:], "two clients share noise")
    for one, other in combinations(drawn, 2):
        if drawn[one].shape == drawn[other].shape:
            are_unlike(drawn[one], drawn[other], f"{one} and {other} share noise")


SPY = """
import numpy as np
from fedlotr.flower import Strategy, weighted_mean

class Spy(Strategy):
    \"\"\"Keeps what a server sees.\"\"\"
    averages = True
    def __init__(self, out: str) -> None:
        self.out = out
    def combine(self, updates, server_round):
        seen = {name: np.stack([update.arrays[name] for update in updates]) for name in updates[0].arrays}
        np.savez(f"{self.out}/{server_round}.npz", **seen)
        return weighted_mean(updates)
"""


def spied(words: Sequence[str], folder: Path, data: list[dict[str, Any]] | None = None) -> list[dict[str, np.ndarray]]:
    """What the server sees of a run that the command line starts: round by round, tensors by name, client by client."""
    (folder / "spy.py").write_text(SPY, encoding="utf-8")
    if data is not None:
        (folder / "data").mkdir()
        for split, held in (("train", data), ("test", [{**data[0], "text": "nobody has this one", "label": 1}])):
            text = "".join(json.dumps(row) + "\n" for row in held)
            (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
        words = [*words, "--data", str(folder / "data"), "--partition", "natural:client", "--label-names", "a,b"]
    strategy = ["--strategy", f"{folder / 'spy.py'}:Spy", "--strategy-arg", f"out={folder}"]
    assert main([*words, *strategy, "--quiet", "--out", str(folder / "run"), "--lr-schedule", "constant"]) == 0
    rounds = sorted(folder.glob("*.npz"), key=lambda path: int(path.stem))
    return [dict(np.load(path)) for path in rounds]


@pytest.mark.parametrize("engine", ["cohort", pytest.param("opacus", marks=pytest.mark.slow)])
def test_every_tensor_that_clients_send_has_its_noise_in_every_round(
    engine: str, words: list[str], tmp_path: Path
) -> None:
    private = "--privacy example --noise-multiplier 1000 --clip-norm 0.1 --clients 40 --sample 40 --max-examples 3"
    training = "--local-steps 1 --local-epochs none --optimizer sgd --lr 0.01 --head-lr 0.01 --eval-every 2"
    rounds = spied([*words, *f"{private} {training} --privacy-engine {engine}".split()], tmp_path)
    noise = [{n: (x - x.mean(0)) / (0.01 * 1000 * 0.1 / 3) for n, x in seen.items()} for seen in rounds]
    assert len(noise) == 2 and len(noise[0]) > 3
    for name in noise[0]:
        for number, drawn in enumerate(noise):
            has_deviation_one(drawn[name], f"{name}, round {number + 1}", lost=drawn[name][0].size)
    first, second = (np.concatenate([x.reshape(40, -1) for x in drawn.values()], 1) for drawn in noise)
    are_unlike(first, second, "two rounds share noise")
    are_unlike(first[::2], first[1::2], "two clients share noise")


def test_every_tensor_that_a_server_publishes_of_hidden_clients_has_its_noise(words: list[str], tmp_path: Path) -> None:
    private = "--privacy client --noise-multiplier 1000 --clip-norm 0.0001 --sample 2 --rounds 40 --eval-every 40"
    rounds = spied([*words, *private.split(), "--local-steps", "1", "--local-epochs", "none"], tmp_path)
    for name in rounds[0]:
        published = np.stack([seen[name][0] for seen in rounds])
        has_deviation_one(np.diff(published, axis=0) / (1000 * 0.0001 / 2), name)
        drawn = np.diff(published, axis=0)
        are_unlike(drawn[:-1], drawn[1:], f"{name}: two rounds share noise")


def test_the_count_that_moves_an_adaptive_bound_is_noised(tmp_path: Path) -> None:
    here, start, moves = guard(tmp_path, adaptive=Adaptive(0.5)), {"a": np.zeros(1)}, []
    for server_round in range(400):
        before = here.bound
        here.draw(server_round)
        here.mean(start, [])  # nobody came: a share of one half, and its noise
        moves.append(np.log(here.bound / before) / -0.2)
    has_deviation_one(np.array(moves) * here.cohort / Adaptive(0.5).count_noise(here.cohort, 1.0), "the count")


@pytest.mark.parametrize("words_of", ["cohort", "opacus", "client", "central"])
def test_a_round_is_on_paper_when_its_messages_arrive(
    words_of: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = {
        "cohort": "--privacy example",
        "opacus": "--privacy example --privacy-engine opacus",
        "client": "--privacy client --clip-norm 1 --sample 6",
        "central": "--privacy example --baseline central",
    }[words_of]
    train, arrived = Worker.train, []

    def watched(self: Worker, jobs: Sequence[Job]) -> None:
        number = jobs[0].round
        charges = ledger_of(self.workplace.folder.parents[1])[1:]
        assert [charge["round"] for charge in charges] == list(range(1, number + 1))
        wanted = {0} if words_of in ("client", "central") else {job.client for job in jobs}
        assert wanted <= set(charges[-1]["accounts"])
        arrived.append(number)
        train(self, jobs)

    monkeypatch.setattr(Worker, "train", watched)
    told = [*words, *private.split(), "--noise-multiplier", "2", "--quiet", "--out", str(tmp_path / "run")]
    assert main(told) == 0 and set(arrived) == {1, 2}


def test_batches_and_cohorts_are_poisson_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    def is_binomial(sizes: Sequence[int], n: int, rate: float, what: str) -> None:
        seen, variance = np.array(sizes), n * rate * (1 - rate)
        assert abs(seen.mean() - n * rate) < 5 * np.sqrt(variance / len(seen)), what
        assert abs(seen.var() / variance - 1) < 5 * np.sqrt(2 / len(seen)) + 0.05, f"{what}: variance {seen.var():.2f}"

    training = LocalTraining(steps=200, batch_size=10)
    mechanism = DPSGD(ExampleNoise(1.0, 1.0), [NoiseStream()])
    is_binomial([len(batch) for batch in mechanism.batches(0, np.arange(40), training)], 40, 0.25, "cohort")
    here = guard(tmp_path)
    is_binomial([len(here.draw(number)) for number in range(400)], 40, 0.25, "clients")
    sizes: list[int] = []
    batch = Examples.batch

    def counted(self: Examples, rows: Any, *more: Any) -> Any:
        sizes.append(len(rows))
        return batch(self, rows[:1], *more)

    monkeypatch.setattr(Examples, "batch", counted)
    work = [ClientWork(np.arange(40), np.random.default_rng(0))]
    training = LocalTraining(steps=100, batch_size=10)
    train_by_opacus(tiny, [tiny.values()], examples_for(tiny.spec), work, training, ExampleNoise(1e-6, 1.0), ["a"])
    is_binomial([*sizes, *[0] * (100 - len(sizes))], 40, 0.25, "opacus")


# The games. A mechanism of one Gaussian release is exactly as private as telling N(0, 1) from N(mu, 1) is hard, so the
# error rates of whoever tells two worlds apart bound mu from below, and mu gives epsilon at any delta: Dong et al. 2022
# (arXiv:1905.02383), corollary 1; used to audit as by Nasr et al. 2023 (arXiv:2302.07956).


def epsilon_of(mu: float) -> float:
    """At DELTA, of telling N(0, 1) from N(mu, 1)."""

    def excess(e: float) -> float:
        return float(norm.cdf(mu / 2 - e / mu) - np.exp(e) * norm.cdf(-mu / 2 - e / mu)) - DELTA

    return 0.0 if mu <= 0 or excess(0.0) <= 0 else float(brentq(excess, 0.0, 200.0))


def lower_bound(seen: np.ndarray, present: np.ndarray) -> float:
    """Of epsilon, with 99.9 % confidence: direction and threshold from one half of the trials, errors from the other.

    seen: (trials, features). Linear discriminant with a variance of each feature; Clopper-Pearson on both error rates.
    """
    first = np.arange(len(seen)) % 4 < 2
    yes, no = seen[first & present], seen[first & ~present]
    spread = (yes.var(0) + no.var(0)) / 2 + 1e-30
    weights = (yes.mean(0) - no.mean(0)) / spread
    scores, threshold = seen @ weights, float((yes.mean(0) + no.mean(0)) @ weights) / 2
    rates = []
    for wrong in ((scores > threshold)[~first & ~present], (scores <= threshold)[~first & present]):
        errors, trials = int(wrong.sum()), len(wrong)
        rates.append(float(beta.ppf(0.9995, errors + 1, trials - errors)) if errors < trials else 1.0)
    return epsilon_of(float(-norm.ppf(min(rates[0], 0.5)) - norm.ppf(min(rates[1], 0.5))))


def test_an_epsilon_of_a_gaussian_release_is_what_accountants_say() -> None:
    for sigma in (0.5, 1.0, 3.0):
        assert epsilon_of(1 / sigma) == pytest.approx(epsilon(Releases(sigma, 1.0, 1), DELTA), abs=2e-3)


LOUD = 1e3
PLAYERS, ROUNDS = 240, 8
NEAR = 0.5
"""That far the adversary comes in any case: noise is new in every game, and at this confidence
the bound scatters, of a claim of 3.14 from 0.8 to 2.6 in 600 simulated games of 1,920 trials."""


def loud_canaries(
    model: TrainableModel, stacks: Any, examples: Any, batches: Sequence[np.ndarray]
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """In place of examples' gradients: of a canary (label 1) one that is far too long, over all tensors; else zeros."""
    owners = torch.cat([torch.full((len(rows),), at, dtype=torch.long) for at, rows in enumerate(batches)])
    canary = torch.from_numpy(examples.labels[np.concatenate(batches)] == 1).float()
    each = {}
    for name, stack in stacks.items():
        along = torch.full(stack.shape[1:], LOUD / (len(stacks) * stack[0].numel()) ** 0.5)
        each[name] = canary.reshape(-1, *[1] * along.dim()) * along
    yield owners, each


def play(words: list[str], folder: Path, patch: pytest.MonkeyPatch) -> tuple[float, float]:
    """(lower bound that the adversary reaches, epsilon that was claimed) of one release, by the command line.

    Every second of some hundred clients holds the canary, the others in its place an example without a gradient: how
    many each holds is public. Each client is a trial in every round.
    """
    patch.setattr("fedlotr.training.cohort.example_gradients", loud_canaries)
    data = [
        {"text": f"{player} {at}", "label": int(at == 1 and player % 2 == 1), "client": f"{player:04d}"}
        for player in range(PLAYERS)
        for at in range(2)
    ]
    private = f"--privacy example --noise-multiplier 1 --clip-norm 0.5 --delta {DELTA} --clients {PLAYERS}"
    training = f"--sample {PLAYERS} --local-steps 1 --local-epochs none --batch-size 2 --optimizer sgd --lr 0.1"
    more = f"{private} {training} --head-lr 0.1 --rounds {ROUNDS} --eval-every {ROUNDS}"
    sent = spied([*words, *more.split()], folder, data)
    # Of each tensor the mean of its entries, which is where the canary shows; the broadcast is known to all.
    seen = np.concatenate(
        [np.stack([(x - x.mean(0)).reshape(PLAYERS, -1).mean(1) for x in tensors.values()], 1) for tensors in sent]
    )
    return lower_bound(seen, np.arange(len(seen)) % 2 == 1), read_run(folder / "run")[1][0]["epsilon"]


@pytest.mark.slow
def test_an_adversary_comes_near_the_claim_and_stays_below(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, claimed = play(words, tmp_path, monkeypatch)
    print(f"lower bound {reached:.2f}, claimed {claimed:.2f}")
    assert 2.9 < claimed < 3.3 and NEAR < reached < claimed


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fedlotr.privacy.dp_sgd.clipped", lambda each, bound: each)


def clipped_tensor_by_tensor(patch: pytest.MonkeyPatch) -> None:
    def apart(each: Any, bound: float) -> Any:
        return {name: clipping.clipped({name: rows}, bound)[name] for name, rows in each.items()}

    patch.setattr("fedlotr.privacy.dp_sgd.clipped", apart)


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    normal = NoiseStream.normal
    patch.setattr(NoiseStream, "normal", lambda self, like: normal(self, like) / 2)


def one_noise_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fedlotr.flower.client_app.client_stream", lambda *_: NoiseStream("shared"))


def one_tensor_without_noise(patch: pytest.MonkeyPatch) -> None:
    release = DPSGD.release

    def forgets(self: DPSGD, client: int, total: Any, expected: float) -> Any:
        last = max(total)
        return release(self, client, total, expected) | {last: total[last] / expected}

    patch.setattr(DPSGD, "release", forgets)


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    defect.__name__: defect
    for defect in (
        no_clipping,
        clipped_tensor_by_tensor,
        half_the_noise,
        one_noise_for_all,
        one_tensor_without_noise,
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", BROKEN)
def test_an_adversary_refutes_a_broken_mechanism(
    defect: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BROKEN[defect](monkeypatch)
    reached, claimed = play(words, tmp_path, monkeypatch)
    print(f"{defect}: lower bound {reached:.2f}, claimed {claimed:.2f}")
    assert reached > claimed


def play_whole_clients(folder: Path, trials: int = 2400) -> tuple[float, float]:
    """The same game about one client that is there or is not, in a round of all; each round is a trial."""
    promise = Promise("client", None, DELTA, 1.0, [1.0], [1])
    here = ClientGuard(Ledger.begin(folder / "privacy.jsonl", promise), {"clip_norm": 0.5}, 4, 0.5, 0)
    rng = np.random.default_rng(0)
    start = {"a": np.zeros((4, 2)), "b": np.zeros(3), "c": np.zeros(1)}
    loud = {name: np.full(value.shape, LOUD / np.sqrt(3 * value.size)) for name, value in start.items()}
    present = np.arange(trials) % 2 == 1
    seen = np.zeros((trials, len(start)))
    for trial in range(trials):
        others = [{name: rng.normal(size=value.shape) * 0.01 for name, value in start.items()} for _ in range(2)]
        here.draw(trial)
        released = here.mean(start, [*others, *([loud] if present[trial] else [])])
        seen[trial] = [value.mean() for value in released.values()]
    return lower_bound(seen, present), epsilon(promise.releases(0, 1), DELTA)


def test_an_adversary_comes_near_what_is_claimed_of_a_client(tmp_path: Path) -> None:
    reached, claimed = play_whole_clients(tmp_path)
    assert NEAR < reached < claimed, f"lower bound {reached:.2f}, claimed {claimed:.2f}"


def _no_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fedlotr.privacy.guard.clipped", lambda each, bound: {n: x.double() for n, x in each.items()})


def _bound_of_each_tensor(patch: pytest.MonkeyPatch) -> None:
    def apart(each: Any, bound: float) -> Any:
        return {name: clipping.clipped({name: rows}, bound)[name] for name, rows in each.items()}

    patch.setattr("fedlotr.privacy.guard.clipped", apart)


@pytest.mark.parametrize("defect", [_no_bound, _bound_of_each_tensor, half_the_noise])
def test_an_adversary_refutes_what_is_claimed_of_a_client(
    defect: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect(monkeypatch)
    reached, claimed = play_whole_clients(tmp_path)
    assert reached > claimed, f"lower bound {reached:.2f}, claimed {claimed:.2f}"
