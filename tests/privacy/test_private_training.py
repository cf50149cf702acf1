"""What hides an example: its gradient alone, clipped, summed, noised once, divided by what was expected."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlotr.privacy.clipping import clip_factors, clipped
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise, client_stream
from fedlotr.privacy.noise import NoiseStream
from fedlotr.privacy.opacus_engine import hooked, train_by_opacus
from fedlotr.training.backward import example_gradients
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.model import Tensors, TrainableModel
from tests.support import rounding
from tests.training.test_training import SIZES, examples_for, model

__all__ = ["model"]  # the fixture: pooled BERT on packed tokens, BERT with LoRA, GPT-2 with Conv1D, a causal Llama


def micro_batches(model: TrainableModel, values: Tensors, examples: Any, rows: np.ndarray) -> list[Tensors]:
    """The oracle: backward of one example at a time, by plain autograd on the model's own parameters."""
    model.assign(values)
    parameters = {name: model.parameter(name).requires_grad_() for name in model.trained}
    found = []
    try:
        for row in rows:
            gradients = torch.autograd.grad(
                model.losses(examples.batch([row])).sum(), list(parameters.values()), allow_unused=True
            )
            pairs = zip(parameters.items(), gradients, strict=True)
            found.append({name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return found


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def joint(each: Tensors) -> torch.Tensor:
    return torch.cat([each[name].flatten(1) for name in sorted(each)], 1)


@pytest.mark.parametrize("numbers", [2**24, 3000], ids=["all at once", "in parts"])
def test_an_examples_gradient_is_that_of_a_batch_of_its_own(
    model: TrainableModel, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlotr.training.backward.COPIED_NUMBERS", numbers)
    examples, start = examples_for(model.spec), model.values()
    torch.manual_seed(2)
    # Three clients, each somewhere else; one of them has drawn an empty batch.
    values = [{n: v + 0.05 * torch.randn_like(v) for n, v in start.items()} for _ in range(3)]
    batches = [np.arange(0, 9), np.arange(0), np.arange(20, 31)]
    stacks = {name: torch.stack([own[name] for own in values]) for name in start}
    parts = list(example_gradients(model, stacks, examples, batches))
    owners, each = torch.cat([own for own, _ in parts]), {n: torch.cat([p[n] for _, p in parts]) for n in start}
    assert owners.tolist() == [0] * 9 + [2] * 11
    wanted = [*micro_batches(model, values[0], examples, batches[0])]
    wanted += micro_batches(model, values[2], examples, batches[2])
    model.assign(start)
    oracle = {name: torch.stack([one[name] for one in wanted]) for name in start}
    assert apart(joint(each), joint(oracle)) < rounding(model.module)
    # What is trained is covered: no tensor's gradient is zero for all examples.
    assert all(float(oracle[name].abs().max()) > 0 for name in start)
    bound = float(joint(oracle).norm(dim=1).median())
    sums = {name: rows.sum(0)[None] for name, rows in clipped(each, bound).items()}
    plain = joint(oracle).double()
    plain = (plain * (bound / plain.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    assert apart(joint(sums)[0], plain) < rounding(model.module)


def test_opacus_finds_the_same_gradients(model: TrainableModel) -> None:
    examples, start, rows = examples_for(model.spec), model.values(), np.arange(40, 47)
    _, ours = next(example_gradients(model, {n: v[None] for n, v in start.items()}, examples, [rows]))
    with hooked(model, sorted(start)) as parameters:
        model.losses(examples.batch(rows)).sum().backward()
        theirs = {name: p.grad_sample.detach().clone() for name, p in parameters.items()}
    assert apart(joint(ours), joint(theirs)) < rounding(model.module)
    assert model.values().keys() == start.keys()  # the model is as it was


def test_opacus_trains_as_we_do_where_nothing_is_left_to_chance(model: TrainableModel) -> None:
    # Every example in every batch, and next to no noise.
    examples, start, noise = examples_for(model.spec), model.values(), ExampleNoise(1e-9, 0.05, True)
    training = LocalTraining(steps=3, batch_size=40, optimizer="sgd", momentum=0.9, lr=0.5, head_lr=0.2)
    work = [ClientWork(np.arange(a, b), np.random.default_rng(0)) for a, b in ((0, 20), (20, 33))]
    streams = [NoiseStream("a"), NoiseStream("b")]
    ours = train_cohort(model, start, examples, work, training, None, 1, DPSGD(noise, streams))
    theirs = train_by_opacus(model, [start, start], examples, work, training, noise, ["a", "b"])
    model.assign(start)
    for one, other in zip(ours, theirs, strict=True):
        moved = joint({name: (value - start[name])[None] for name, value in other.tensors.items()})
        error = joint({name: (value - one.tensors[name])[None] for name, value in other.tensors.items()})
        assert float(error.norm()) < 1e-4 * float(moved.norm())
        assert (one.steps, one.examples) == (other.steps, other.examples)


def one_step(model: TrainableModel, sigma: float, **options: Any) -> tuple[Tensors, Tensors, list[np.ndarray]]:
    """(update of client 0 in one step of SGD at rate 1, its clipped sum, the batches that were drawn)."""
    rows, examples, start = np.arange(30), examples_for(model.spec), model.values()
    training = LocalTraining(steps=1, optimizer="sgd", lr=1.0, head_lr=1.0, batch_size=10)
    drawn: list[np.ndarray] = []

    class Watched(DPSGD):
        def batches(self, client: int, rows: np.ndarray, training: LocalTraining) -> list[np.ndarray]:
            drawn.extend(super().batches(client, rows, training))
            return drawn[-1:]

    mechanism = Watched(ExampleNoise(sigma, 0.05), [options.get("stream") or NoiseStream("a")])
    work = [ClientWork(rows, np.random.default_rng(0))]
    result = train_cohort(model, start, examples, work, training, None, 1, mechanism)[0]
    assert result.loss is None
    update = {name: start[name] - value for name, value in result.tensors.items()}
    _, each = next(example_gradients(model, {n: v[None] for n, v in start.items()}, examples, drawn), (None, None))
    total = {} if each is None else {name: r.sum(0) for name, r in clipped(each, 0.05).items()}
    return update, total, drawn


def test_a_step_is_the_clipped_sum_and_its_noise_over_the_expected_batch(model: TrainableModel) -> None:
    update, total, (batch,) = one_step(model, 0.0)
    assert 0 < len(batch) != 10  # as the stream "a" has it: a divisor of the batch that was drawn would show
    found, wanted = joint({n: v[None] for n, v in update.items()})[0], joint({n: v[None] for n, v in total.items()})[0]
    assert apart(found, wanted.float() / 10) < 1e-4  # a difference of float32 values
    noisy, _, _ = one_step(model, 2.0)
    noise = 10 * (joint({n: v[None] for n, v in noisy.items()})[0] - found) / (2.0 * 0.05)
    # σ · bound / expected batch, once: as standard normals those of the whole vector have deviation 1.
    assert float(noise.std()) == pytest.approx(1, abs=5 / np.sqrt(2 * len(noise)))


class Nobody(NoiseStream):
    """Draws an empty batch."""

    def chosen(self, among: int, rate: float) -> np.ndarray:
        return np.zeros(0, np.int64)


def test_an_empty_batch_moves_a_client_by_noise_alone(model: TrainableModel) -> None:
    update, total, (batch,) = one_step(model, 1.0, stream=Nobody("b"))
    assert not len(batch) and not total
    noise = joint({n: v[None] for n, v in update.items()})[0] * 10 / 0.05
    assert float(noise.std()) == pytest.approx(1, abs=5 / np.sqrt(2 * len(noise)))
    still, _, _ = one_step(model, 0.0, stream=Nobody("b"))
    assert not any(float(value.abs().max()) for value in still.values())


def test_private_clients_train_together_as_they_would_alone(model: TrainableModel) -> None:
    edges = np.cumsum([0, *SIZES])
    work = [ClientWork(np.arange(a, b), np.random.default_rng(0)) for a, b in pairwise(edges)]
    examples, start = examples_for(model.spec), model.values()
    training = LocalTraining(epochs=2, optimizer="sgd", lr=0.1, head_lr=0.1)

    def train(chosen: list[int]) -> list[Tensors]:
        streams = [client_stream(True, 0, 1, k) for k in chosen]
        mechanism = DPSGD(ExampleNoise(0.5, 0.1), streams)
        done = train_cohort(model, start, examples, [work[k] for k in chosen], training, None, 1, mechanism)
        return [result.tensors for result in done]

    together = train(list(range(len(work))))
    for k, found in enumerate(together):
        alone = train([k])[0]
        moved = joint({n: (alone[n] - start[n])[None] for n in alone})
        assert apart(joint({n: (found[n] - start[n])[None] for n in found}), moved) < 1e-5, k


def test_noise_is_neither_shared_nor_repeated_nor_the_users_to_seed() -> None:
    like = torch.zeros(1000)
    torch.manual_seed(0)
    np.random.seed(0)
    first = client_stream(False, 7, 1, 0).normal(like)
    torch.manual_seed(0)
    np.random.seed(0)
    again = client_stream(False, 7, 1, 0).normal(like)
    assert not torch.equal(first, again)
    known = {key: client_stream(True, 7, *key).normal(like) for key in ((1, 0), (1, 1), (2, 0))}
    assert torch.equal(known[1, 0], client_stream(True, 7, 1, 0).normal(like))
    for one, other in combinations([*known.values(), first], 2):
        assert abs(float(one @ other)) / 1000 < 0.2  # 6 deviations
    stream = NoiseStream("c")
    assert abs(float(stream.normal(like) @ stream.normal(like))) / 1000 < 0.2


def test_a_million_draws_are_normal_in_moments_tails_and_lags() -> None:
    drawn = NoiseStream().normal(torch.zeros(1_000_000)).numpy()
    n = len(drawn)
    assert abs(drawn.mean()) < 5 / np.sqrt(n)
    assert abs(drawn.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs(stats.skew(drawn)) < 5 * np.sqrt(6 / n) and abs(stats.kurtosis(drawn)) < 5 * np.sqrt(24 / n)
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    for far in (3.0, 4.0):
        expected = 2 * stats.norm.sf(far) * n
        assert abs((np.abs(drawn) > far).sum() - expected) < 5 * np.sqrt(expected)
    assert np.abs(drawn).max() > 4
    for lag in (1, 2, 3, 64, 4096):
        assert abs(drawn[lag:] @ drawn[:-lag]) / n < 5 / np.sqrt(n)


def test_a_poisson_sample_takes_each_row_at_its_rate_alone() -> None:
    stream = NoiseStream()
    taken = np.zeros((4000, 20))
    for one in taken:
        one[stream.chosen(20, 0.3)] = 1
    assert np.abs(taken.mean(0) - 0.3).max() < 6 * np.sqrt(0.21 / 4000)
    sizes = taken.sum(1)  # binomial: a fixed size, or a shuffled epoch, would have less spread
    assert sizes.var() == pytest.approx(20 * 0.21, rel=0.2) and len(stream.chosen(20, 1.0)) == 20
    assert np.abs(np.corrcoef(taken.T) - np.eye(20)).max() < 6 / np.sqrt(4000)


NORMS = st.floats(-30, 30).map(lambda power: 10.0**power)
ODD = st.sampled_from([0.0, float("nan"), float("inf"), -float("inf"), 3e38, 1e-45])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(NORMS, ODD), min_size=1, max_size=6), st.floats(-6, 6), st.integers(0, 2**32 - 1))
def test_no_example_counts_for_more_than_the_bound(sizes: list[float], power: float, seed: int) -> None:
    bound = 10.0**power
    rng = np.random.default_rng(seed)
    directions = torch.from_numpy(rng.standard_normal((len(sizes), 5))).float()
    rows = directions / directions.norm(dim=1, keepdim=True) * torch.tensor(sizes, dtype=torch.float32)[:, None]
    each = {"a": rows[:, :2].reshape(-1, 2, 1), "b": rows[:, 2:]}
    kept = joint(clipped(each, bound))
    assert bool(torch.isfinite(kept).all())
    assert float(kept.norm(dim=1).max()) <= bound
    finite = torch.isfinite(rows).all(1)
    assert not kept[~finite].any()
    # What is below the bound stays as it is.
    small = finite & (rows.double().norm(dim=1) < bound * (1 - 2**-19))
    assert torch.equal(kept[small], joint(each)[small].double())
    assert bool(((clip_factors(each, bound) == 1) >= small).all())
