"""Any model that takes packed sequences gives the losses and gradients of single ones; which ones do is tried."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from fedlotr.adapters import CoreConfig
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import evaluate
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.training import varlen_attention
from fedlotr.training.backward import backward, example_gradients
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel
from fedlotr.training.varlen import SAME_SHAPE
from fedlotr.training.varlen_attention import Attendance, attending, attention

ALIKE = 1e-5
"""What packed sequences promise, relative, in float32."""

SIZES: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 130, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
WINDOWED: dict[str, Any] = GROUPED | {"sliding_window": 6}
OPT: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 16, "num_attention_heads": 4}
GPT: dict[str, Any] = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}

PACKS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**WINDOWED, use_sliding_window=True, max_window_layers=1)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=24)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**WINDOWED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WINDOWED, head_dim=8, attn_logit_softcapping=2.0)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**WINDOWED, head_dim=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**WINDOWED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT, n_positions=130, initializer_range=0.2)),
    "pythia": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(vocab_size=512, num_hidden_layers=2, **OPT, init_std=0.2)),
}
PADS: dict[str, Callable[[], Any]] = {
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT, rotary_dim=4)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**WINDOWED, head_dim=8, num_local_experts=2)),
}


def examples(count: int = 24) -> Examples:
    """Of up to 30 tokens: some longer than the windows; not all tokens after the first target are targets."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, count)
    total = int(lengths.sum())
    first = np.array([int(rng.integers(1, length)) for length in lengths])
    targets = rng.random(total) < 0.8
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Examples(rng.integers(3, 500, total).astype(np.int32), offsets, first, causal=True, targets=targets)


def trainable(
    folder: Path, made: Callable[[], Any], method: str, dtype: str = "float32", **more: Any
) -> TrainableModel:
    if not folder.exists():
        torch.manual_seed(0)
        made().save_pretrained(folder)
    spec = ModelSpec(str(folder), "causal-lm", 0, False, 0, dtype, **more)
    base = load_base(spec)
    layers = adaptable_layers(base, "all-linear")
    model = TrainableModel(base, spec, CoreConfig(method=method, r=4, target_modules=layers))
    torch.manual_seed(1)
    model.assign({name: value + 0.1 * torch.randn_like(value) for name, value in model.values().items()})
    return model


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
    found = {name: torch.zeros_like(stack) for name, stack in stacks.items()}
    for client, batch in enumerate(BATCHES):
        model.assign({name: stack[client].detach() for name, stack in stacks.items()})
        parameters = {name: model.parameter(name).requires_grad_() for name in stacks}
        for row in batch:
            loss = model.losses(rows.batch([row]))[0]
            losses[client] += loss.detach()
            for name, part in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                found[name][client] += part / len(batch)
    return {"losses": losses, "gradients": flat(found)}


def gradients(stacks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(stack) if stack.grad is None else stack.grad for name, stack in stacks.items()}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("method", ["lora-xs", "lora"])
@pytest.mark.parametrize("kind", PACKS)
def test_packed_is_padded_is_one_by_one(
    kind: str, method: str, checkpointed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlotr.training.varlen_pass.RAGGED_TOKENS", 100)  # some passes within a batch
    model, rows = trainable(tmp_path / kind, PACKS[kind], method, checkpointed=checkpointed), examples()
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
    np.testing.assert_allclose(noted.losses, wanted_notes.losses, rtol=ALIKE, atol=ALIKE)
    assert (
        noted.targets.tolist() == wanted_notes.targets.tolist()
        and noted.correct.tolist() == wanted_notes.correct.tolist()
    )


def work() -> list[ClientWork]:
    return [ClientWork(rows, np.random.default_rng(int(rows[0]))) for rows in BATCHES]


@pytest.mark.parametrize("method", ["lotr", "lora", "ravan", "tiny-lora"])
def test_a_round_of_packed_decoders_is_one_of_padded_ones(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = trainable(tmp_path / "qwen2", PACKS["qwen2"], method), examples()
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
        model = trainable(tmp_path / "llama", PACKS["llama"], "lora", dtype)
        assert model.takes_ragged
        monkeypatch.setitem(model.__dict__, "takes_ragged", packed)
        found[dtype, packed] = of_cohort(model, rows)["gradients"]
    exact = found["float32", False]
    packed, padded = (float((found["bfloat16", how] - exact).norm() / exact.norm()) for how in (True, False))
    assert packed < 2 * padded + 1e-3, (packed, padded)


@pytest.mark.parametrize("kind", PACKS)
def test_a_step_computes_its_tokens_and_no_padding(kind: str, tmp_path: Path) -> None:
    model, rows, seen = trainable(tmp_path / kind, PACKS[kind], "lora"), examples(), list[int]()
    assert model.takes_ragged
    layer = next(m for name, m in model.module.named_modules() if name.endswith("base_layer"))
    name = next(name for name, m in model.module.named_modules() if m is layer).removesuffix(".base_layer")
    model.module.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[:-1].numel())
    )
    backward(model, stacks_of(model, len(BATCHES)), rows, BATCHES)
    evaluate(model, rows, np.arange(24))
    assert len(seen) == 2 and all(rows.lengths.sum() <= tokens < rows.lengths.sum() + SAME_SHAPE for tokens in seen)


@pytest.mark.parametrize("kind", PADS)
def test_what_keeps_no_sequences_apart_is_given_padded_rows(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    PADS[kind]().save_pretrained(tmp_path)
    spec = ModelSpec(str(tmp_path), "causal-lm", 0, False, 0)
    assert not TrainableModel(load_base(spec), spec, None).takes_ragged


@pytest.mark.parametrize(
    ("kind", "forgotten", "dtype"),
    [
        ("mistral", {"sliding_window": None}, "float32"),
        ("mistral", {"sliding_window": None}, "bfloat16"),
        ("llama", {"is_causal": False}, "bfloat16"),
        ("gemma2", {"softcap": None}, "float32"),
    ],
)
def test_an_attention_that_forgets_something_is_found_out(
    kind: str, forgotten: dict[str, Any], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 4,096 tokens too: they are short while the model is tried, and long again behind it."""
    torch.manual_seed(0)
    whole = PACKS[kind]()
    if kind == "mistral":
        whole.config.sliding_window = 4096
    whole.save_pretrained(tmp_path)
    spec = ModelSpec(str(tmp_path), "causal-lm", 0, False, 0, dtype)
    base = load_base(spec)
    assert TrainableModel(base, spec, None).takes_ragged
    assert kind != "mistral" or base.config.sliding_window == 4096
    careless = lambda *given, **more: attention(*given, **more | forgotten)  # noqa: E731
    hf.AttentionInterface.register(varlen_attention.NAME, careless)
    try:
        assert not TrainableModel(base, spec, None).takes_ragged
    finally:
        hf.AttentionInterface.register(varlen_attention.NAME, attention)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("cap", "window"), [(None, None), (1.5, None), (None, 3), (1.5, 2)])
@pytest.mark.parametrize(("heads", "shared"), [(2, 2), (4, 2), (3, 1)])
def test_gradients_of_attention_are_those_of_its_formula(
    heads: int, shared: int, cap: float | None, window: int | None, causal: bool
) -> None:
    if window is not None and not causal:
        pytest.skip("windows to both sides are refused")
    lengths = np.array([5, 9, 1, 3])
    stream = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, count, 18, size, generator=stream, dtype=torch.float64, requires_grad=True)
        for count, size in ((heads, 4), (shared, 4), (shared, 6))
    )

    class Told:
        class config:  # noqa: N801 (as transformers names it)
            _attn_implementation = "eager"

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"softcap": cap, "sliding_window": window, "is_causal": causal}
        with attending(Told(), Attendance(lengths)):
            return attention(torch.nn.Identity(), *tensors, None, scaling=0.7, **options)[0]

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
        back = torch.arange(18)[:, None] - torch.arange(18)
        seen = (owner[:, None] == owner) & ((back >= 0) | (not causal)) & (back < (window or 18))
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
        scores = 0.7 * q @ k.transpose(2, 3)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        return (torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v).transpose(1, 2)

    torch.testing.assert_close(ours(q, k, v), formula(q, k, v))
    assert torch.autograd.gradcheck(ours, (q, k, v))


def test_attention_refuses_what_it_does_not_do() -> None:
    q = torch.zeros(1, 2, 3, 4)

    class Told:
        class config:  # noqa: N801 (as transformers names it)
            _attn_implementation = "eager"

    for more in (
        {"s_aux": torch.zeros(2)},
        {"position_bias": q},
        {"temperature": 2.0},
        {"is_causal": False, "sliding_window": 3},
    ):
        with attending(Told(), Attendance(np.array([3]))), pytest.raises(RuntimeError, match="not kept apart"):
            attention(torch.nn.Identity(), q, q, q, None, **more)  # type: ignore[arg-type]
