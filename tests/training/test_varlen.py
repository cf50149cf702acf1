"""Any model that takes packed sequences gives the losses and gradients of single ones; which ones do is tried."""

from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from fedlotr.adapters import CoreConfig
from fedlotr.adapters.experts import slots
from fedlotr.adapters.gradient_bases import _mean_gradients
from fedlotr.adapters.layer import CopiesLinear, FactoredLayer
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import evaluate
from fedlotr.models.loading import ModelSpec, adaptable_layers, head_layers, load_base
from fedlotr.training import varlen_attention
from fedlotr.training.backward import backward, example_gradients
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.head import fit_head
from fedlotr.training.model import TrainableModel
from fedlotr.training.varlen import SAME_SHAPE, Reading, ReadOut
from fedlotr.training.varlen_attention import Attendance, Branching, attending, attention
from fedlotr.training.varlen_pass import Passes
from tests.families import CONFIGS, DECODERS, ENCODERS, LOCAL, PADDED, WINDOWED, classifier, language_model

ALIKE = 1e-5
"""What packed sequences promise, relative, in float32."""

KINDS = [*((family, "causal-lm") for family in DECODERS), *((one, "classification") for one in (*DECODERS, *ENCODERS))]
KINDS += [(family, "mean-pooled") for family in ENCODERS if family != "modernbert, averaged"]
"""Every family as what it can be."""
of_every_kind = pytest.mark.parametrize(("family", "kind"), KINDS, ids=lambda part: part)


def examples(kind: str = "causal-lm", count: int = 24) -> Examples:
    """Of up to 30 tokens: some longer than the windows; not all tokens after the first target are targets.

    To classify: some have padding among their tokens, or end in it, as a text can that spells it out.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, count)
    total = int(lengths.sum())
    first = np.array([int(rng.integers(1, length)) for length in lengths])
    targets = rng.random(total) < 0.8
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(3, 500, total).astype(np.int32)
    if kind == "causal-lm":
        return Examples(tokens, offsets, first, causal=True, targets=targets)
    tokens[rng.random(total) < 0.1] = 1
    tokens[rng.random(total) < 0.1] = 0
    return Examples(tokens, offsets, rng.integers(0, 3, count))


def trainable(
    folder: Path, family: str, method: str, dtype: str = "float32", kind: str = "causal-lm", **more: Any
) -> TrainableModel:
    base, spec = saved(folder, family, kind, dtype, **more)
    layers = adaptable_layers(base, "all-linear")
    model = TrainableModel(base, spec, CoreConfig(method=method, r=4, target_modules=layers))
    torch.manual_seed(1)
    model.assign({name: value + 0.1 * torch.randn_like(value) for name, value in model.values().items()})
    return model


def saved(folder: Path, family: str, kind: str, dtype: str = "float32", **more: Any) -> tuple[nn.Module, ModelSpec]:
    """A base as a run loads it."""
    headed, pooled = kind != "causal-lm", kind == "mean-pooled"
    folder = folder / f"{family}-{kind}"
    if not folder.exists():
        torch.manual_seed(0)
        (classifier if headed else language_model)(family).save_pretrained(folder)
    pad_id = CONFIGS[family]().pad_token_id or 0
    spec = ModelSpec(
        str(folder), "classification" if headed else "causal-lm", 3 * headed, pooled, pad_id, dtype, **more
    )
    return load_base(spec), spec


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def stacks_of(model: TrainableModel, copies: int) -> dict[str, torch.Tensor]:
    """Copies that differ, as those of clients do after a step."""
    values = model.values()
    return {n: torch.stack([v * (1 + 0.1 * k) for k in range(copies)]).requires_grad_() for n, v in values.items()}


def assert_alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).norm()) <= ALIKE * float(wanted.norm())


Found = dict[str, torch.Tensor]
BATCHES = [np.arange(0, 5), np.arange(5, 6), np.arange(6, 24)]


def of_cohort(model: TrainableModel, rows: Examples) -> Found:
    stacks = stacks_of(model, len(BATCHES))
    losses = backward(model, stacks, rows, BATCHES)
    each = [flat(part) for _, part in example_gradients(model, stacks_of(model, len(BATCHES)), rows, BATCHES)]
    return {"losses": torch.from_numpy(losses), "gradients": flat(gradients(stacks)), "of examples": torch.cat(each)}


def one_by_one(model: TrainableModel, rows: Examples) -> Found:
    """Each client's examples in padded rows of their own, with the model's own tensors: no copies, no packing."""
    stacks, losses = stacks_of(model, len(BATCHES)), torch.zeros(len(BATCHES), dtype=torch.float64)
    each: dict[str, list[torch.Tensor]] = {name: [] for name in stacks}
    found = {name: torch.zeros_like(stack) for name, stack in stacks.items()}
    for client, batch in enumerate(BATCHES):
        model.assign({name: stack[client].detach() for name, stack in stacks.items()})
        parameters = {name: model.parameter(name).requires_grad_() for name in stacks}
        for row in batch:
            loss = model.losses(rows.batch([row], model.spec.pad_id))[0]
            losses[client] += loss.detach()
            for name, part in zip(parameters, _each(loss, parameters), strict=True):
                found[name][client] += part / len(batch)
                each[name].append(part)
    single = {name: torch.stack(parts) for name, parts in each.items()}
    return {"losses": losses, "gradients": flat(found), "of examples": flat(single)}


def _each(loss: torch.Tensor, parameters: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Gradients; zero of an expert that no token goes to."""
    return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)


def gradients(stacks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(stack) if stack.grad is None else stack.grad for name, stack in stacks.items()}


@pytest.mark.parametrize(("method", "checkpointed"), [("lora-xs", False), ("lora", True)], ids=["", "checkpointed"])
@of_every_kind
def test_packed_is_padded_is_one_by_one(
    family: str, kind: str, method: str, checkpointed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checkpointed and family in ("albert", "mpnet"):
        checkpointed = False  # they have no blocks that could be run again
    monkeypatch.setattr("fedlotr.training.varlen_pass.RAGGED_TOKENS", 100)  # some passes within a batch
    model, rows = trainable(tmp_path, family, method, kind=kind, checkpointed=checkpointed), examples(kind)
    assert model.takes_ragged
    found, noted, wanted_notes = of_cohort(model, rows), Results.empty(24), Results.empty(24)
    scores = evaluate(model, rows, np.arange(24), noted)
    monkeypatch.setitem(model.__dict__, "takes_ragged", False)
    wanted = of_cohort(model, rows)
    expected = evaluate(model, rows, np.arange(24), wanted_notes)
    for name, values in found.items():
        assert_alike(values, wanted[name])
    for name, values in one_by_one(model, rows).items():
        assert_alike(found[name], values)
    assert (scores.units, scores.loss) == (expected.units, pytest.approx(expected.loss, rel=ALIKE))
    assert scores.correct == expected.correct
    np.testing.assert_allclose(noted.losses, wanted_notes.losses, rtol=ALIKE, atol=ALIKE)
    assert (
        noted.targets.tolist() == wanted_notes.targets.tolist()
        and noted.correct.tolist() == wanted_notes.correct.tolist()
    )


QUESTIONS = ((9, (1, 3, 1)), (1, (2, 2)), (14, (6, 2)), (14, (1, 1, 1, 1)), (5, (4,)))
"""Tokens of each prompt, and of each of its choices."""


@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_is_computed_once_for_all_its_choices(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, texts, firsts = np.random.default_rng(0), [], []
    for prompt, choices in QUESTIONS:
        begin = rng.integers(3, 500, prompt)
        texts += [np.concatenate([begin, rng.integers(3, 500, count)]) for count in choices]
        firsts += [prompt] * len(choices)
    offsets = np.cumsum([0, *map(len, texts)])
    rows = Examples(np.concatenate(texts).astype(np.int32), offsets, np.array(firsts), causal=True)
    model, every, seen = trainable(tmp_path, family, "lora-xs"), np.arange(len(rows)), list[int]()
    assert model.takes_ragged and model.branches
    embedding = model.module.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    found, wanted = Results.empty(len(rows)), Results.empty(len(rows))
    evaluate(model, rows, every, found)
    once = sum(prompt - 1 + sum(choices) + len(choices) for prompt, choices in QUESTIONS)
    assert seen == [once + -once % SAME_SHAPE]
    with monkeypatch.context() as patched:
        patched.setattr("fedlotr.evaluation.scores.EVALUATION_TOKENS", 20)
        again = Results.empty(len(rows))
        evaluate(model, rows, every, again)
        assert max(seen[1:]) < 20 + SAME_SHAPE, "no more than what has room in a pass"
    monkeypatch.setitem(model.__dict__, "takes_ragged", False)
    evaluate(model, rows, every, wanted)
    for one in (found, again):
        np.testing.assert_allclose(one.losses, wanted.losses, rtol=ALIKE)
        assert one.targets.tolist() == wanted.targets.tolist() and one.correct.tolist() == wanted.correct.tolist()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "classification"), ("roberta", "classification"), ("qwen2", "causal-lm")]
)
def test_the_public_gradient_and_a_fitted_head_are_those_of_padded_rows(
    family: str, kind: str, checkpointed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlotr.training.varlen_pass.PASS_TOKENS", 100)
    base, spec = saved(tmp_path, family, kind, checkpointed=checkpointed)
    model, rows, public = TrainableModel(base, spec, None), examples(kind), np.arange(24)
    layers = [(name, base.get_submodule(name)) for name in adaptable_layers(base, "all-linear")]

    def gradient() -> torch.Tensor:
        passes, seen = Passes(model, rows, public), list[int]()
        hook = layers[0][1].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        found = _mean_gradients(base, layers, passes, lambda _, batch: model.losses(batch).sum())
        hook.remove()
        assert model.takes_ragged == (set(seen) == {1})  # all of a pass are one row
        return torch.cat([part.flatten() for part in found])

    def fitted() -> torch.Tensor:
        base.load_state_dict(begun)
        fit_head(model, rows, public)
        return torch.cat(
            [p.flatten() for layer in head_layers(base).values() for p in layer.parameters()] or [torch.ones(1)]
        )

    begun = {name: value.clone() for name, value in base.state_dict().items()}
    assert model.takes_ragged
    head = fitted()
    found = gradient()
    assert base.config._attn_implementation != varlen_attention.NAME
    monkeypatch.setitem(model.__dict__, "takes_ragged", False)
    assert_alike(found, gradient())
    assert float((head - fitted()).norm()) <= 0.05 * float(head.norm())  # L-BFGS stops where it is near enough


def test_kept_states_of_a_prefix_have_the_positions_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlotr.training.frozen_prefix.FULL_PASS", 1)
    base, spec = saved(tmp_path, "roberta", "mean-pooled")
    layers = adaptable_layers(base, r".*layer\.1\..*")
    model, rows = TrainableModel(base, spec, CoreConfig(method="lora", r=4, target_modules=layers)), examples("mean")
    start, training = model.values(), LocalTraining(optimizer="sgd", lr=0.1, head_lr=0.1)
    found = train_cohort(model, start, rows, work(), training)
    assert model.prefix is not None and model.prefix._kept
    monkeypatch.setitem(model.__dict__, "takes_ragged", False)
    monkeypatch.setitem(model.__dict__, "prefix", None)
    for one, other in zip(found, train_cohort(model, start, rows, work(), training), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=ALIKE)
        moved = flat(other.tensors) - flat({name: start[name] for name in other.tensors})
        assert float((flat(one.tensors) - flat(other.tensors)).norm()) <= ALIKE * float(moved.norm()) + 1e-7


def work() -> list[ClientWork]:
    return [ClientWork(rows, np.random.default_rng(int(rows[0]))) for rows in BATCHES]


@pytest.mark.parametrize("method", ["lotr", "lora", "ravan", "tiny-lora"])
def test_a_round_of_packed_decoders_is_one_of_padded_ones(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = trainable(tmp_path, "qwen2", method), examples()
    assert model.takes_ragged
    start, training = model.values(), LocalTraining(optimizer="sgd", lr=0.1)
    found = train_cohort(model, start, rows, work(), training)
    monkeypatch.setitem(model.__dict__, "takes_ragged", False)
    for one, other in zip(found, train_cohort(model, start, rows, work(), training), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=ALIKE)
        moved = flat(other.tensors) - flat({name: start[name] for name in other.tensors})
        assert float((flat(one.tensors) - flat(other.tensors)).norm()) <= ALIKE * float(moved.norm()) + 1e-7


def test_in_bfloat16_a_packed_decoder_is_as_near_to_float32_as_a_padded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, found = examples(), {}
    for dtype, packed in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model = trainable(tmp_path, "llama", "lora", dtype)
        assert model.takes_ragged
        monkeypatch.setitem(model.__dict__, "takes_ragged", packed)
        found[dtype, packed] = of_cohort(model, rows)["gradients"]
    exact = found["float32", False]
    packed, padded = (float((found["bfloat16", how] - exact).norm() / exact.norm()) for how in (True, False))
    assert packed < 2 * padded + 1e-3, (packed, padded)


@of_every_kind
def test_a_step_computes_its_tokens_and_no_padding(family: str, kind: str, tmp_path: Path) -> None:
    """In every layer of the trunk; a head's see one vector of each sequence."""
    model, rows = trainable(tmp_path, family, "lora", kind=kind), examples(kind)
    seen = defaultdict[str, list[int]](list)
    assert model.takes_ragged
    for name, layer in model.module.named_modules():
        if isinstance(layer, FactoredLayer | CopiesLinear):
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: seen[name].append(inputs[0].shape[:-1].numel())  # type: ignore[misc]
            )
    backward(model, stacks_of(model, len(BATCHES)), rows, BATCHES)
    evaluate(model, rows, np.arange(24))
    trunk = f"{getattr(model.module, 'base_model_prefix', 'encoder')}."
    once = [name for name in seen if not name.startswith(trunk) or "pooler" in name]
    total, counted = int(rows.lengths.sum()), [seen.pop(name) for name in once]
    for name, slot in slots(model.module).items():  # two experts see each token
        seen[slot.parameter] += seen.pop(name, [])
    shared = [tokens for name, tokens in seen.items() if "experts" in name.split(".")]
    assert all(sum(tokens) == 2 * sum(seen[f"{trunk}layers.0.self_attn.q_proj"]) for tokens in shared)
    seen = defaultdict(list, {name: tokens for name, tokens in seen.items() if "experts" not in name.split(".")})
    times = (2, 4) if family == "albert" else (2,)  # whose two layers are one
    assert all(
        len(tokens) in times and all(total <= n < total + SAME_SHAPE for n in tokens) for tokens in seen.values()
    )
    assert counted == [[24, 24]] * len(counted) and bool(counted) == (kind != "causal-lm") and seen


@pytest.mark.parametrize("family", PADDED)
def test_what_keeps_no_sequences_apart_is_given_padded_rows(family: str, tmp_path: Path) -> None:
    assert not TrainableModel(*saved(tmp_path, family, "causal-lm"), None).takes_ragged


@pytest.mark.parametrize(
    ("family", "forgotten", "dtype"),
    [
        ("mistral", {"sliding_window": None}, "float32"),
        ("mistral", {"sliding_window": None}, "bfloat16"),
        ("llama", {"is_causal": False}, "bfloat16"),
        ("gemma2", {"softcap": None}, "float32"),
        ("gpt-oss", {"s_aux": None}, "float32"),
        ("modernbert", {"sliding_window": None}, "float32"),
        ("mpnet", {"position_bias": None}, "float32"),
    ],
)
@pytest.mark.parametrize("kind", ["causal-lm", "classification"])
def test_an_attention_that_forgets_something_is_found_out(
    family: str, forgotten: dict[str, Any], dtype: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 4,096 tokens too: they are short while the model is tried, and long again behind it."""
    if family in ENCODERS and kind == "causal-lm":
        pytest.skip("it is no language model")
    if family == "modernbert":
        monkeypatch.setitem(CONFIGS, family, lambda: hf.ModernBertConfig(**LOCAL | {"local_attention": 128}))
    if family == "mistral":
        monkeypatch.setitem(CONFIGS, family, lambda: hf.MistralConfig(**WINDOWED | {"sliding_window": 4096}))
    base, spec = saved(tmp_path, family, kind, dtype)
    before = windows_in(base)
    assert TrainableModel(base, spec, None).takes_ragged
    assert windows_in(base) == before
    careless = lambda *given, **more: attention(*given, **more | forgotten)  # noqa: E731
    monkeypatch.setattr("fedlotr.training.own_attention.attention", careless)
    hf.AttentionInterface.register(varlen_attention.NAME, careless)
    try:
        assert not TrainableModel(base, spec, None).takes_ragged
    finally:
        hf.AttentionInterface.register(varlen_attention.NAME, attention)


def windows_in(base: nn.Module) -> list[tuple[str, Any]]:
    """How far each layer sees, and what the configuration says."""
    holders = (vars(base.config), *map(vars, base.modules()))
    return [
        (name, value) for holder in holders for name, value in holder.items() if "window" in name or "local" in name
    ]


READS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("bert", "distilbert", "electra", "albert", "modernbert"), (0, "first")),
    **dict.fromkeys(("roberta", "mpnet"), (2, "first")),
    "modernbert, averaged": (0, "mean"),
    **dict.fromkeys((*DECODERS, "qwen3-moe"), (0, "last that is no padding")),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", READS)
def test_what_a_head_reads_is_found_and_nothing_else_is_taken_for_it(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, spec = saved(tmp_path, family, "classification", dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    first, read_out = READS[family]
    assert TrainableModel(base, spec, None).reading == Reading(first, read_out, spec.pad_id)  # type: ignore[arg-type]
    others = [one for one in get_args(ReadOut) if one != read_out]
    with monkeypatch.context() as patched:  # a wrong token
        patched.setattr("fedlotr.training.varlen_trial.get_args", lambda _: others)
        assert TrainableModel(base, spec, None).reading is None
    with monkeypatch.context() as patched:  # a wrong position
        patched.setattr("fedlotr.training.varlen_trial.first_positions", lambda _: [first + 1])
        assert TrainableModel(base, spec, None).reading is None or family not in LEARNED
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


LEARNED = ("bert", "distilbert", "electra", "albert", "roberta", "mpnet", "gpt2", "opt")
"""Families whose positions are absolute: of the others' rotary ones, only differences matter."""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("cap", "window"), [(None, None), (1.5, None), (None, 3), (1.5, 2), (None, 1)])
@pytest.mark.parametrize(("heads", "shared"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("more", ["", "a bias and sinks"])
def test_gradients_of_attention_are_those_of_its_formula(
    heads: int, shared: int, cap: float | None, window: int | None, causal: bool, more: str
) -> None:
    lengths = np.array([5, 9, 1, 3])
    stream = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, count, 18, size, generator=stream, dtype=torch.float64, requires_grad=True)
        for count, size in ((heads, 4), (shared, 4), (shared, 6))
    )

    bias = torch.randn(1, heads, 16, 16, generator=stream, dtype=torch.float64) if more else None
    sinks = torch.randn(heads, generator=stream, dtype=torch.float64) if more else None

    class Told:
        class config:  # noqa: N801 (as transformers names it)
            _attn_implementation = "eager"

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        told: dict[str, Any] = {"softcap": cap, "sliding_window": window, "is_causal": causal}
        told |= {"scaling": 0.7, "position_bias": bias, "s_aux": sinks}
        with attending(Told(), Attendance(lengths)):
            return attention(torch.nn.Identity(), *tensors, None, **told)[0]

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
        back = torch.arange(18)[:, None] - torch.arange(18)
        seen = (owner[:, None] == owner) & ((back >= 0) | (not causal)) & (back.abs() < (window or 18))
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
        scores = 0.7 * q @ k.transpose(2, 3)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        if bias is not None:
            place = torch.cat([torch.arange(length) for length in lengths.tolist()])
            scores = scores + bias[:, :, place[:, None], place]
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, heads, 18, 1)], -1)
        return (torch.softmax(scores, -1)[..., :18] @ v).transpose(1, 2)

    torch.testing.assert_close(ours(q, k, v), formula(q, k, v))
    assert torch.autograd.gradcheck(ours, (q, k, v), fast_mode=True)


def test_attention_refuses_what_it_does_not_do() -> None:
    q = torch.zeros(1, 2, 3, 4)

    class Told:
        class config:  # noqa: N801 (as transformers names it)
            _attn_implementation = "eager"

    for more in (
        {"s_aux": torch.zeros(2, requires_grad=True)},
        {"position_bias": torch.zeros(1, 2, 8, 8, requires_grad=True)},
        {"temperature": 2.0},
        {"cu_seqlens": q},
    ):
        with attending(Told(), Attendance(np.array([3]))), pytest.raises(RuntimeError, match="not kept apart"):
            attention(torch.nn.Identity(), q, q, q, None, **more)  # type: ignore[arg-type]
    branches = Attendance(np.array([3]), Branching(np.array([0, 1, 1]), np.array([0, 1, 2])))
    for more in ({"position_bias": torch.zeros(1, 2, 8, 8)}, {"is_causal": False}):
        with attending(Told(), branches), pytest.raises(RuntimeError, match="branches are not kept apart"):
            attention(torch.nn.Identity(), q, q, q, None, **more)  # type: ignore[arg-type]
