"""A cohort is its clients: training together equals training one by one, with torch's own optimizers as the oracle."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model

from fedlotr.adapters import CoreConfig
from fedlotr.evaluation.scores import Scores, evaluate, shards, sum_scores
from fedlotr.models.loading import (
    UNBATCHED,
    ModelSpec,
    _belongs_to_head,
    adaptable_layers,
    head_layers,
    load_base,
    unbatched_layers,
)
from fedlotr.models.supported import is_sentence_encoder
from fedlotr.training.cohort import ClientWork, LocalTraining, client_batches, cut_cohorts, train_cohort
from fedlotr.training.examples import IGNORED, Examples
from fedlotr.training.head import fit_head
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.optimizers import OPTIMIZERS
from fedlotr.training.packing import pack
from tests.support import rounding

SIZES = [1, 3, 9, 12, 16, 17, 30]
"""Examples of seven clients: batches of 8 give them 1 to 4 steps an epoch."""


def examples_for(spec: ModelSpec, count: int = 100) -> Examples:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 14, count)
    causal = spec.kind == "causal-lm"
    labels = np.ones(count, np.int64) if causal else rng.integers(0, spec.labels, count)
    return Examples(
        rng.integers(3, 500, lengths.sum()).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
        rng.normal(size=count).astype(np.float32) if spec.scale else labels,
        causal=causal,
    )


def build(folder: Path, kind: Any, method: str = "lotr", *, pooled: bool = False) -> TrainableModel:
    spec = ModelSpec(str(folder), kind, {"causal-lm": 0, "regression": 1}.get(kind, 3), pooled, 0)
    base = load_base(spec)
    core = CoreConfig(method=method, r=4, target_modules=adaptable_layers(base, "all-linear"))
    model = TrainableModel(base, spec, core)
    torch.manual_seed(1)
    model.assign({name: value + 0.1 * torch.randn_like(value) for name, value in model.values().items()})
    return model


@pytest.fixture(scope="module", params=["bert-pooled", "bert", "gpt2", "llama", "number-pooled", "number"])
def model(request: pytest.FixtureRequest, tiny_bert: Path, tiny_gpt2: Path, stories: Path) -> TrainableModel:
    match request.param:
        case "bert-pooled":
            return build(tiny_bert, "classification", pooled=True)
        case "bert":
            return build(tiny_bert, "classification", "lora")
        case "number-pooled":
            return build(tiny_bert, "regression", pooled=True)
        case "number":
            return build(tiny_bert, "regression", "lora")
        case "gpt2":
            return build(tiny_gpt2, "classification")
        case _:
            return build(stories, "causal-lm", "lora-xs")


def clients() -> list[ClientWork]:
    edges = np.cumsum([0, *SIZES])
    return [ClientWork(np.arange(a, b), np.random.default_rng(a)) for a, b in pairwise(edges)]


def relative(found: Tensors, wanted: Tensors, start: Tensors) -> float:
    """||found - wanted|| / ||wanted - start|| over all trained tensors: the error relative to the client's update."""
    error = sum(float((found[k] - wanted[k]).double().square().sum()) for k in wanted)
    return float(np.sqrt(error / sum(float((wanted[k] - start[k]).double().square().sum()) for k in wanted)))


# AdamW divides by √v + eps: an entry whose gradient is rounding noise takes a full step of noise where eps is smaller
# than the noise, in torch's AdamW as in ours. So eps is 1e-4 where results are compared to what rounding allows.
PLANS = {
    "adamw": LocalTraining(epochs=2, lr=1e-2, head_lr=3e-2, weight_decay=0.1, eps=1e-4),
    "adamw clipped": LocalTraining(epochs=1, lr=1e-2, head_lr=1e-2, clip_norm=0.05, eps=1e-4),
    "sgd momentum": LocalTraining(epochs=2, optimizer="sgd", momentum=0.9, lr=0.05, head_lr=0.02, weight_decay=0.01),
    "steps": LocalTraining(steps=5, batch_size=4, optimizer="sgd", lr=0.1, head_lr=0.1),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_cohort_of_seven_equals_its_clients_one_by_one(model: TrainableModel, plan: str) -> None:
    training, examples, start = PLANS[plan], examples_for(model.spec), model.values()
    together = train_cohort(model, start, examples, clients(), training)
    for at, result in enumerate(together):
        alone = train_cohort(model, start, examples, [clients()[at]], training)[0]
        assert (result.examples, result.steps) == (alone.examples, alone.steps)
        assert relative(result.tensors, alone.tensors, start) < rounding(model.module), (at, plan)
        assert result.loss == pytest.approx(alone.loss, rel=rounding(model.module))


@pytest.mark.parametrize("plan", PLANS)
def test_a_client_trains_as_with_torchs_own_optimizer(model: TrainableModel, plan: str) -> None:
    training, examples, start = PLANS[plan], examples_for(model.spec), model.values()
    result = train_cohort(model, start, examples, [clients()[4]], training)[0]
    parameters = {name: model.parameter(name).requires_grad_() for name in model.trained}
    groups = [
        {"params": [p], "lr": training.head_lr if name in model.head_names else training.lr}
        for name, p in parameters.items()
    ]
    decay: dict[str, Any] = {"weight_decay": training.weight_decay}
    oracle: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, eps=training.eps, **decay)
        if training.optimizer == "adamw"
        else torch.optim.SGD(groups, momentum=training.momentum, **decay)
    )
    try:
        for rows in client_batches(clients()[4], training):
            oracle.zero_grad()
            model.losses(examples.batch(rows)).mean().backward()
            if training.clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters.values(), training.clip_norm)
            oracle.step()
        assert relative(result.tensors, model.values(), start) < rounding(model.module)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        model.assign(start)


def test_the_order_of_a_cohort_does_not_matter_to_its_clients(model: TrainableModel) -> None:
    training, examples, start = LocalTraining(optimizer="sgd", lr=0.1), examples_for(model.spec), model.values()
    there = train_cohort(model, start, examples, clients(), training)
    back = train_cohort(model, start, examples, clients()[::-1], training)[::-1]
    for one, other in zip(there, back, strict=True):
        assert relative(one.tensors, other.tensors, start) < rounding(model.module)


def test_the_transform_stands_between_backward_and_optimizer(model: TrainableModel) -> None:
    training, examples, start = LocalTraining(optimizer="sgd"), examples_for(model.spec), model.values()
    nothing = train_cohort(
        model, start, examples, clients(), training, lambda g, _: {name: 0 * value for name, value in g.items()}
    )
    assert all(torch.equal(r.tensors[name], start[name]) for r in nothing for name in start)


def test_training_leaves_the_base_as_it_was(model: TrainableModel) -> None:
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    train_cohort(model, model.values(), examples_for(model.spec), clients(), LocalTraining())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_an_epoch_sees_every_example_once_and_steps_go_round() -> None:
    work = ClientWork(np.arange(10, 29), np.random.default_rng(0))
    epochs = client_batches(work, LocalTraining(epochs=2, batch_size=8))
    assert [len(batch) for batch in epochs] == [8, 8, 3, 8, 8, 3]
    assert sorted(np.concatenate(epochs[:3])) == sorted(np.concatenate(epochs[3:])) == list(range(10, 29))
    assert not np.array_equal(epochs[0], epochs[3])
    assert [len(batch) for batch in client_batches(work, LocalTraining(steps=4))] == [8, 8, 3, 8]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 60), st.integers(0, 20))
@settings(deadline=None)
def test_passes_hold_every_row_once_at_the_least_cost(lengths: list[int], tokens: int, overhead: int) -> None:
    cut = pack(np.array(lengths), tokens, overhead)
    assert sorted(np.concatenate(cut)) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= tokens for rows in cut)
    ordered = sorted(lengths, reverse=True)

    def cheapest(rest: list[int]) -> int:  # every cut of the sorted rows
        options = [
            n * rest[0] + overhead + cheapest(rest[n:])
            for n in range(1, len(rest) + 1)
            if n == 1 or n * rest[0] <= tokens
        ]
        return min(options, default=0)

    assert sum(len(rows) * max(lengths[i] for i in rows) + overhead for rows in cut) == cheapest(ordered)


@given(st.lists(st.integers(1, 500), max_size=40), st.one_of(st.none(), st.integers(1, 9)))
def test_cohorts_hold_every_client_once_in_order(step_tokens: list[int], size: int | None) -> None:
    cut = cut_cohorts(step_tokens, size)
    assert [i for piece in cut for i in range(len(step_tokens))[piece]] == list(range(len(step_tokens)))
    assert all(piece.stop > piece.start for piece in cut)
    if size is not None:
        assert all(piece.stop - piece.start <= size for piece in cut)


def test_ten_equal_clients_make_cohorts_that_fill_two_workers_evenly() -> None:
    assert [piece.stop - piece.start for piece in cut_cohorts([400] * 10)] == [2, 3, 2, 3]


@pytest.mark.parametrize(("tokens", "cohorts"), [(16, 1), (40, 2), (128, 2)])
def test_a_round_of_few_tokens_leaves_no_second_worker_idle(tokens: int, cohorts: int) -> None:
    assert len(cut_cohorts([tokens] * 10)) == cohorts  # ten sentences, or as many batches of short ones


@pytest.mark.parametrize("clients", [6, 8, 12, 15, 20, 50])
def test_the_number_of_cohorts_is_one_that_two_and_four_workers_share_evenly(clients: int) -> None:
    assert len(cut_cohorts([330] * clients)) in {2, 4, 8, 16}


def test_scores_are_sums_that_shards_add_up_to(model: TrainableModel) -> None:
    examples = examples_for(model.spec)
    whole = evaluate(model, examples, np.arange(100))
    parts = sum_scores(evaluate(model, examples, np.arange(100)[piece]) for piece in shards(100, 30))
    assert (parts.units, parts.correct) == (whole.units, whole.correct)
    assert parts.loss == pytest.approx(whole.loss, rel=rounding(model.module))
    with torch.no_grad():
        oracle = Scores()
        for row in range(100):
            batch = examples.batch([row])
            logits = model.logits(batch)[0].double()
            if examples.causal:
                targets = batch.labels[0]
                kept = targets != IGNORED
                nats = -logits.log_softmax(-1)[kept].gather(1, targets[kept, None]).sum()
                oracle += Scores(float(nats), int(kept.sum()))
            elif model.spec.scale:
                p, y = float(logits), float(batch.labels)
                oracle += Scores((p - y) ** 2, 1, moments=(p, y, p * p, y * y, p * y))
            else:
                target = int(batch.labels)
                oracle += Scores(float(-logits.log_softmax(-1)[target]), 1, int(logits.argmax() == target))
    assert (oracle.units, oracle.correct) == (whole.units, whole.correct)
    assert whole.moments == pytest.approx(oracle.moments, rel=rounding(model.module), abs=1e-6 * oracle.units)
    assert whole.loss == pytest.approx(oracle.loss, rel=rounding(model.module))


def test_a_language_models_loss_is_on_the_answer_alone() -> None:
    examples = Examples(np.arange(10, dtype=np.int32), np.array([0, 6, 10]), np.array([4, 1]), causal=True)
    batch = examples.batch([0, 1])
    assert batch.labels.tolist() == [[IGNORED, IGNORED, IGNORED, 4, 5, IGNORED], [7, 8, 9, IGNORED, IGNORED, IGNORED]]


def test_of_a_conversation_only_what_is_marked_is_learnt(tmp_path: Path) -> None:
    marked = np.array([0, 0, 1, 0, 1, 1, 0, 1], np.bool_)
    examples = Examples(
        np.arange(8, dtype=np.int32), np.array([0, 6, 8]), np.array([2, 1]), causal=True, targets=marked
    )
    examples.save(tmp_path / "examples.safetensors")
    for held in (examples, Examples.load(tmp_path / "examples.safetensors")):
        assert held.batch([0, 1]).labels.tolist() == [
            [IGNORED, 2, IGNORED, 4, 5, IGNORED],
            [7, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED],
        ]


def test_examples_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    examples = Examples(
        np.arange(5, dtype=np.int32), np.array([0, 2, 5]), np.array([1, 0]), np.array([0, 1, 0, 0, 1], np.int8)
    )
    examples.save(tmp_path / "examples.safetensors")
    again = Examples.load(tmp_path / "examples.safetensors")
    for name in ("tokens", "offsets", "labels", "segments"):
        np.testing.assert_array_equal(getattr(again, name), getattr(examples, name))
    assert not again.causal
    assert again.batch([1]).token_type_ids.tolist() == [[0, 0, 1]]  # type: ignore[union-attr]


def test_the_head_starts_at_zero_and_is_fitted_to_the_optimum(tiny_bert: Path) -> None:
    spec = ModelSpec(str(tiny_bert), "classification", 3, True, 0)
    model = TrainableModel(load_base(spec), spec, None)
    assert all(not value.any() for value in model.values().values())
    examples = examples_for(spec)
    fit_head(model, examples, np.arange(0))
    assert all(not value.any() for value in model.values().values()), "without public examples it stays at zero"
    fit_head(model, examples, np.arange(60))
    fitted = model.values()
    parameters = [model.parameter(name).requires_grad_() for name in model.trained]
    weight = next(p for p in parameters if p.dim() == 2)
    loss = model.losses(examples.batch(np.arange(60))).mean() + 0.5 * 1e-2 * weight.square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() < 1e-3 for p in parameters), "the gradient there is zero"
    assert loss < np.log(3) and any(value.any() for value in fitted.values())


def test_layers_that_meet_an_input_without_rows_are_left_out_and_named() -> None:
    config = DebertaV2Config(
        **{"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 16, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    )
    model = DebertaV2Model(config)
    left_out = unbatched_layers(model, ".*attention.*")
    assert {name.split(".")[-1] for name in left_out} == {*UNBATCHED["deberta-v2"]} and len(left_out) == 4
    assert not {*left_out} & {*adaptable_layers(model, ".*attention.*")} and adaptable_layers(model, ".*attention.*")
    with pytest.raises(ValueError, match=r"matches encoder\S+query_proj.* alone, which cannot be adapted"):
        adaptable_layers(model, ".*query_proj")


def test_of_what_stands_beside_a_head_only_norms_may_be_missing() -> None:
    head = nn.ModuleDict({"dense": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "other": nn.Linear(2, 2)})
    model = nn.ModuleDict({"head": head})
    assert _belongs_to_head(model, "head.norm.weight", ["head.dense"])
    assert not _belongs_to_head(model, "head.other.bias", ["head.dense"])


def test_what_is_left_out_of_all_linear(tiny_bert: Path, tiny_gpt2: Path, stories: Path) -> None:
    pooled = load_base(ModelSpec(str(tiny_bert), "classification", 3, True, 0), meta=True)
    names = adaptable_layers(pooled, "all-linear")
    assert len(names) == 12 and not any("pooler" in name or "classifier" in name for name in names)
    bert = load_base(ModelSpec(str(tiny_bert), "classification", 3, False, 0), meta=True)
    assert len(adaptable_layers(bert, "all-linear")) == 13 and list(head_layers(bert)) == ["classifier"]
    llama = load_base(ModelSpec(str(stories), "causal-lm", 0, False, 0), meta=True)
    assert len(adaptable_layers(llama, "all-linear")) == 35
    assert len(adaptable_layers(llama, r".*\.q_proj")) == 5
    assert len(adaptable_layers(llama, "q_proj")) == 5
    with pytest.raises(ValueError, match="names are like model.layers.0"):
        adaptable_layers(llama, "c_attn")
    assert not is_sentence_encoder(tiny_bert)


def test_two_loads_of_a_base_are_equal_to_the_bit(tiny_bert: Path) -> None:
    # This BERT file has no pooler and no classifier: what is missing is drawn alike in every process.
    spec = ModelSpec(str(tiny_bert), "classification", 3, False, 0)
    torch.manual_seed(5)
    one = load_base(spec).state_dict()
    torch.manual_seed(6)
    other = load_base(spec).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


HELD = {
    "adamw": LocalTraining(epochs=1, lr=1e-2, head_lr=1e-2, eps=1e-4, weight_decay=0.1, optimizer_state="keep"),
    "sgd": LocalTraining(epochs=1, optimizer="sgd", momentum=0.9, lr=0.05, head_lr=0.02, optimizer_state="keep"),
}


@pytest.mark.parametrize("plan", HELD)
def test_an_optimizer_that_is_kept_goes_on_as_torchs_own(tiny_bert: Path, plan: str) -> None:
    """Three clients, each with steps of its own behind it and before it: one never trained, so with none."""
    model = build(tiny_bert, "classification", "lora")
    training, examples, start = HELD[plan], examples_for(model.spec), model.values()
    rows = [np.arange(0, 30), np.arange(30, 47), np.arange(47, 60)]
    past = [2, 1, 0]
    states: list[Any] = [{}, {}, {}]
    for k, times in enumerate(past):
        for n in range(times):
            work = ClientWork(rows[k], np.random.default_rng(n), states[k])
            states[k] = train_cohort(model, start, examples, [work], training)[0].optimizer
    last = [ClientWork(rows[k], np.random.default_rng(9), states[k]) for k in range(3)]
    together = train_cohort(model, start, examples, last, training)
    for k, times in enumerate(past):
        parameters = {name: model.parameter(name).requires_grad_() for name in model.trained}
        groups = [
            {"params": [p], "lr": training.head_lr if name in model.head_names else training.lr}
            for name, p in parameters.items()
        ]
        oracle: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, eps=training.eps, weight_decay=training.weight_decay)
            if training.optimizer == "adamw"
            else torch.optim.SGD(groups, momentum=training.momentum)
        )
        for shuffle in [*range(times), 9]:
            model.assign(start)  # every round starts from the server's model
            for batch in client_batches(ClientWork(rows[k], np.random.default_rng(shuffle)), training):
                oracle.zero_grad()
                model.losses(examples.batch(batch)).mean().backward()
                oracle.step()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        assert relative(together[k].tensors, model.values(), start) < rounding(model.module), k
        reset = train_cohort(model, start, examples, [ClientWork(rows[k], np.random.default_rng(9))], training)[0]
        assert (relative(together[k].tensors, reset.tensors, start) < rounding(model.module)) == (times == 0)
        model.assign(start)


def test_a_mean_of_moments_is_corrected_by_the_mean_of_their_weights() -> None:
    """Gradients of one size: whatever numbers of steps the moments come from, v / weight is that size squared."""
    training = LocalTraining(lr=0.1)
    held = []
    for steps in (1, 5):
        optimizer, stack = OPTIMIZERS["adamw"](training), {"x": torch.zeros(1, 2)}
        for _ in range(steps):
            optimizer.step(stack, {"x": torch.full((1, 2), 3.0)}, {"x": 0.1}, 1)
        held.append(optimizer.save(0))
    mean = {kind: {"x": sum((state[kind]["x"] for state in held), torch.zeros(2)) / 2} for kind in ("square", "weight")}
    mean["weight"]["x"][0] = 0.0
    optimizer, stack = OPTIMIZERS["adamw"](training), {"x": torch.zeros(2, 2)}
    optimizer.load([mean, {}], stack)
    optimizer.step(stack, {"x": torch.full((2, 2), 3.0)}, {"x": 0.1}, 2)
    # m̂ / √v̂ = 1 in every entry, of the copy that goes on and of the one that begins.
    torch.testing.assert_close(stack["x"], torch.full((2, 2), -0.1))
