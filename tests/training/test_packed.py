"""Packed tokens give what padded rows give: the plain formula in float64 is the oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters import CoreConfig
from fedlotr.adapters.packed import Spans, factored_linear
from fedlotr.evaluation.scores import evaluate
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.memory import keep_freed_memory
from fedlotr.training.model import TrainableModel
from fedlotr.training.packing import runs
from fedlotr.training.varlen import Ragged, Reading
from fedlotr.training.varlen_attention import Attendance, attending, attention
from tests.support import network_bound, rounding

D_IN, D_OUT, R, COUNTS = 5, 7, 3, (4, 1, 3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    stream = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=stream, dtype=torch.float64)


@pytest.mark.parametrize("base", [nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT, bias=False), Conv1D(D_OUT, D_IN)])
@pytest.mark.parametrize("copied", ["", "C", "B", "AB", "ABC"])
@pytest.mark.parametrize("core", [True, False])
def test_each_span_meets_its_own_copy_and_gives_it_its_gradient(base: nn.Module, copied: str, core: bool) -> None:
    base = base.double().requires_grad_(False)
    copies, scale, spans = len(COUNTS), 0.5, Spans(COUNTS)
    shapes = {"A": (R, D_IN), "C": (R, R), "B": (D_OUT, R)}
    factors = {
        name: random(*([copies] if name in copied else []), *shape).requires_grad_(name in copied)
        for name, shape in shapes.items()
    }
    x = random(sum(COUNTS), D_IN, seed=1).requires_grad_()

    def formula() -> torch.Tensor:
        found, at = [], 0
        for copy, count in enumerate(COUNTS):
            a, c, b = (f[copy] if name in copied else f for name, f in factors.items())
            tokens = x[at : at + count]
            found.append(base(tokens) + scale * tokens @ (b @ c @ a if core else b @ a).T)
            at += count
        return torch.cat(found)

    wanted, found = (
        formula(),
        factored_linear(base, x, factors["A"], factors["C"] if core else None, factors["B"], scale, spans),
    )
    torch.testing.assert_close(found, wanted)
    weights = random(*wanted.shape, seed=2)
    leaves = [x, *(f for name, f in factors.items() if f.requires_grad and (core or name != "C"))]
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


COUNTED = st.lists(st.integers(0, 40) | st.just(0), min_size=1, max_size=20).filter(any)
"""Tokens of each client; of an expert they may be none."""


@settings(deadline=None, max_examples=30)
@given(COUNTED, st.sampled_from([4, 16, 192]), st.sampled_from([(2, 5), (5, 2)]))
def test_products_of_spans_are_those_of_each_alone(counts: list[int], long: int, shape: tuple[int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlotr.adapters.packed.LONG", long)
        spans, (d_out, d_in), total = Spans(counts), shape, sum(counts)
        x, dy, y = random(total, d_in), random(total, d_out, seed=1), random(total, d_out, seed=2)
        weight = random(len(counts), d_out, d_in)
        each = list(zip(x.split(counts), dy.split(counts), weight, strict=True))
        wanted = torch.cat([rows @ w.T for rows, _, w in each])
        torch.testing.assert_close(spans.times(x, weight), wanted)
        torch.testing.assert_close(spans.gradient(dy, x, weight), torch.stack([d.T @ rows for rows, d, _ in each]))
        summed = y.clone()
        spans.add_times(summed, x, weight)
        torch.testing.assert_close(summed, y + wanted)


@given(COUNTED, st.randoms(use_true_random=False))
def test_spans_of_some_tokens_are_those_of_their_clients(counts: list[int], stream: Any) -> None:
    owners = np.repeat(np.arange(len(counts)), counts)
    some = np.flatnonzero([stream.random() < 0.5 for _ in owners])
    found = Spans(counts).of(torch.from_numpy(some))
    assert found.counts == tuple(np.bincount(owners[some], minlength=len(counts)))


def test_what_is_not_a_number_stays_with_its_client() -> None:
    counts = [3, 5, 2, 6]
    spans, x, weight = Spans(counts), random(16, 5), random(4, 3, 5)
    wanted = spans.times(x, weight), spans.gradient(random(16, 3), x, weight)
    x[3:8], weight[1] = torch.nan, torch.inf
    found = spans.times(x, weight), spans.gradient(random(16, 3), x, weight)
    others = torch.tensor([0, 2, 3])
    assert torch.equal(found[0][:3], wanted[0][:3]) and torch.equal(found[0][8:], wanted[0][8:])
    assert torch.equal(found[1][others], wanted[1][others])
    idle = Spans([3, 0, 5, 8]).gradient(random(16, 3).index_fill_(0, torch.arange(3, 8), torch.nan), x, weight)
    assert not idle[1].any(), "who has no tokens has no neighbour's either"


class Products(TorchDispatchMode):
    """Counts the matrix products inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "addmm_", "baddbmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lotr", "lora"])
def test_a_step_of_more_clients_takes_no_more_products(tiny_bert: Path, method: str) -> None:
    model, examples = pooled(tiny_bert, method), equal_examples(64)
    training, found = LocalTraining(batch_size=64, optimizer="sgd"), {}
    for clients in (2, 8, 64):  # one step over the same rows
        work = [ClientWork(rows, np.random.default_rng(0)) for rows in np.split(np.arange(64), clients)]
        with Products() as products:
            train_cohort(model, model.values(), examples, work, training)
        found[clients] = products.count
    assert found[8] <= found[2] and found[64] <= found[2], found


@pytest.mark.parametrize("lengths", [[3, 1, 4, 4], [2], [5, 5]])
def test_attention_of_packed_sequences_is_each_sequences_own(lengths: list[int]) -> None:
    heads, size, total = 2, 3, sum(lengths)
    q, k, v = (random(1, total, heads, size, seed=n).transpose(1, 2).requires_grad_() for n in range(3))

    class Told:
        class config:  # noqa: N801 (as transformers names it)
            _attn_implementation = "eager"

    def formula() -> torch.Tensor:
        found, at = [], 0
        for length in lengths:
            qs, ks, vs = (x[0, :, at : at + length] for x in (q, k, v))
            found.append((torch.softmax(qs @ ks.transpose(1, 2) * 0.7, -1) @ vs).transpose(0, 1))
            at += length
        return torch.cat(found).unsqueeze(0)

    with attending(Told(), Attendance(np.array(lengths))):
        found, _ = attention(nn.Identity(), q, k, v, None, scaling=0.7, is_causal=False)
    wanted = formula()
    # Between the products it computes in float32: a softmax over at most five, and its two products.
    assert (found - wanted).norm() <= network_bound(3, 5) * wanted.norm()
    weights = random(*wanted.shape, seed=4)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weights).sum(), (q, k, v)),
        strict=True,
    ):
        assert (one - other).norm() <= network_bound(6, 5) * other.norm()


def test_attention_refuses_what_is_not_packed() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="packed sequences"):
        attention(nn.Identity(), q, q, q, None)


def pooled(folder: Path, method: str, dtype: str = "float32") -> TrainableModel:
    spec = ModelSpec(str(folder), "classification", 3, True, 0, dtype)
    base = load_base(spec)
    model = TrainableModel(
        base, spec, CoreConfig(method=method, r=4, target_modules=adaptable_layers(base, "all-linear"))
    )
    torch.manual_seed(1)
    model.assign({name: value + 0.1 * torch.randn_like(value) for name, value in model.values().items()})
    return model


def some_examples(count: int = 40, *, pairs: bool = False) -> Examples:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 14, count)
    total = int(lengths.sum())
    segments = rng.integers(0, 2, total).astype(np.int8) if pairs else None
    tokens = rng.integers(3, 500, total).astype(np.int32)
    return Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, 3, count), segments)


def equal_examples(count: int) -> Examples:
    tokens = np.random.default_rng(0).integers(3, 500, 8 * count).astype(np.int32)
    return Examples(tokens, np.arange(0, 8 * count + 1, 8), np.zeros(count, np.int64))


@pytest.mark.parametrize("method", ["lotr", "lora", "ravan", "tiny-lora"])
@pytest.mark.parametrize(("pairs", "long"), [(False, 512), (True, 512), (True, 4)])
def test_packed_training_and_evaluation_equal_those_of_padded_rows(
    tiny_bert: Path, method: str, pairs: bool, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlotr.adapters.packed.LONG", long)  # spans one by one, where they are long
    monkeypatch.setattr("fedlotr.training.varlen_pass.RAGGED_TOKENS", 40)  # some passes within a batch
    model, examples = pooled(tiny_bert, method), some_examples(pairs=pairs)
    assert model.takes_ragged
    work = lambda: [ClientWork(np.arange(a, b), np.random.default_rng(a)) for a, b in ((0, 9), (9, 11), (11, 40))]  # noqa: E731
    training = LocalTraining(optimizer="sgd", lr=0.1, head_lr=0.1)
    start, found = model.values(), {}
    for packed in (True, False):
        monkeypatch.setitem(model.__dict__, "takes_ragged", packed)
        found[packed] = train_cohort(model, start, examples, work(), training), evaluate(model, examples, np.arange(40))
    for one, other in zip(found[True][0], found[False][0], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=rounding(model.module))
        moved = torch.cat([(other.tensors[n] - start[n]).flatten() for n in other.tensors])
        error = torch.cat([(other.tensors[n] - one.tensors[n]).flatten() for n in other.tensors])
        assert error.norm() < rounding(model.module) * moved.norm()
    scores, wanted = found[True][1], found[False][1]
    assert (scores.units, scores.correct) == (wanted.units, wanted.correct)
    assert scores.loss == pytest.approx(wanted.loss, rel=rounding(model.module))


def test_in_bfloat16_packed_training_is_as_near_to_float32_as_padded_training_is(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, training = some_examples(), LocalTraining(optimizer="sgd", lr=0.1, head_lr=0.1)
    work: Any = lambda: [ClientWork(np.arange(a, a + 20), np.random.default_rng(a)) for a in (0, 20)]  # noqa: E731

    def trained(dtype: str, packed: bool) -> torch.Tensor:
        model = pooled(tiny_bert, "lotr", dtype)
        monkeypatch.setitem(model.__dict__, "takes_ragged", packed)
        results = train_cohort(model, start, examples, work(), training)
        return torch.cat([r.tensors[n].flatten() - start[n].flatten() for r in results for n in r.tensors])

    start = pooled(tiny_bert, "lotr").values()
    exact = trained("float32", False)
    packed, padded = (float((trained("bfloat16", how) - exact).norm() / exact.norm()) for how in (True, False))
    assert packed < 2 * padded + 1e-3, (packed, padded)


def test_token_vectors_average_over_their_own_sequence() -> None:
    batch = Ragged.of(some_examples(), np.array([3, 0, 7]), Reading(read_out="mean"))
    lengths = some_examples().lengths[[3, 0, 7]]
    assert batch.tokens % 16 == 0 and 0 <= batch.tokens - lengths.sum() < 16
    assert batch.read is not None and batch.read.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert (batch.read > 0).sum(1).tolist() == lengths.tolist()
    assert batch.position_ids[0].tolist()[: lengths.sum()] == [at for length in lengths for at in range(length)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 90))
@settings(deadline=None)
def test_runs_hold_every_row_once_in_order(lengths: list[int], tokens: int) -> None:
    cut = list(runs(np.array(lengths), tokens))
    assert [i for run in cut for i in range(len(lengths))[run]] == list(range(len(lengths)))
    assert all(run.stop - run.start == 1 or sum(lengths[run]) <= tokens for run in cut)


def test_freed_memory_is_kept_only_where_the_allocator_is_known() -> None:
    assert keep_freed_memory() in (True, False)
    torch.ones(2**20)  # whatever was set, memory is still given out
