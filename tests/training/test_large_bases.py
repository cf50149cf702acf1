"""Large bases: the loss never meets all logits at once; layers may run again; weights stay as they were saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from fedlotr.adapters.tuner import CoreConfig
from fedlotr.commands import simulate
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import evaluate
from fedlotr.models.checkpointing import run_again
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.models.precision import saved_dtype
from fedlotr.training import token_losses
from fedlotr.training.backward import backward, example_gradients
from fedlotr.training.examples import IGNORED
from fedlotr.training.model import TrainableModel
from fedlotr.training.token_losses import predictions, target_losses
from tests.support import network_bound, read_run, rounding
from tests.training.test_training import build, examples_for

VOCABULARY, TOKENS = 11, 7


@pytest.fixture(scope="module")
def llama(stories: Path) -> TrainableModel:
    return build(stories, "causal-lm", "lora-xs")


def cut_at(tokens: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many tokens have logits at a time."""
    monkeypatch.setattr(token_losses, "CHUNK_LOGITS", tokens * vocabulary)


def mean_losses(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return tokens.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def plain_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return mean_losses(tokens.view(labels.shape), labels)


@pytest.mark.parametrize("tokens", [1, 3, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_in_chunks_is_the_plain_loss(tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_at(tokens, VOCABULARY, monkeypatch)
    torch.manual_seed(0)
    output = torch.nn.Linear(5, VOCABULARY, bias=bias).requires_grad_(False)
    labels = torch.randint(0, VOCABULARY, (4, TOKENS))
    labels[0, 3:], labels[2] = IGNORED, IGNORED  # padding, and a sequence without any target
    weights = torch.tensor([0.5, 2.0, 3.0, -1.0])
    found, wanted = [], []
    for losses, into in (
        (lambda h: mean_losses(target_losses(h, labels, output), labels), found),
        (lambda h: plain_losses(output(h), labels), wanted),
    ):
        hidden = torch.randn(4, TOKENS, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        each = losses(hidden)
        torch.dot(each, weights).backward()
        into += [each.detach(), hidden.grad]
    for ours, plain in zip(found, wanted, strict=True):
        assert float((ours - plain).norm()) <= network_bound(4, 2 * VOCABULARY) * float(plain.norm())
    likeliest = predictions(hidden.detach(), labels, output)
    kept = labels != IGNORED
    assert torch.equal(likeliest[kept], output(hidden).argmax(-1)[kept]) and (likeliest[~kept] == IGNORED).all()


def test_gradients_of_clients_and_of_single_examples_are_those_of_whole_logits(
    llama: TrainableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llama.output is not None
    examples, start = examples_for(llama.spec), llama.values()
    batches = [np.arange(0, 9), np.arange(9, 20)]
    rows = np.arange(30)

    def everything() -> list[torch.Tensor]:
        stacks = {name: torch.stack([value] * 2).requires_grad_() for name, value in start.items()}
        losses = backward(llama, stacks, examples, batches)
        ((_, each),) = example_gradients(llama, stacks, examples, batches)
        found = Results.empty(len(rows))
        scores = evaluate(llama, examples, rows, found)
        tensors = [torch.from_numpy(losses), torch.tensor([scores.loss, scores.units])]
        tensors += [torch.from_numpy(np.asarray(value, np.float64)) for _, value in sorted(found.arrays().items())]
        return tensors + [s.grad for s in stacks.values() if s.grad is not None] + list(each.values())

    cut_at(5, 512, monkeypatch)
    in_chunks = everything()
    monkeypatch.setitem(vars(llama), "output", None)
    whole = everything()
    assert len(in_chunks) == len(whole)
    for ours, plain in zip(in_chunks, whole, strict=True):
        assert float((ours - plain).norm()) <= rounding(llama.module) * float(plain.norm())


def test_no_more_logits_exist_at_a_time_than_are_allowed(
    llama: TrainableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    linear = torch.nn.functional.linear

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found = linear(x, weight, bias)
        sizes.append(found.numel() if len(weight) == 512 else 0)
        return found

    assert llama.output is not None  # found by trying, with two tokens' logits
    cut_at(5, 512, monkeypatch)
    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    examples = examples_for(llama.spec)
    stacks = {name: torch.stack([value]).requires_grad_() for name, value in llama.values().items()}
    backward(llama, stacks, examples, [np.arange(30)])
    evaluate(llama, examples, np.arange(30))
    assert max(sizes) == 5 * 512


def test_a_model_that_squashes_its_logits_is_given_all_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": 500, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    outputs = []
    for cap in (None, 0.05):
        folder = tmp_path / str(cap)
        Gemma2ForCausalLM(Gemma2Config(**config, **heads, final_logit_softcapping=cap)).save_pretrained(folder)
        model = build(folder, "causal-lm", "lora-xs")
        outputs.append(model.output)
        batch = examples_for(model.spec).batch([0, 1])
        wanted = plain_losses(model.logits(batch), batch.labels)
        torch.testing.assert_close(model.losses(batch), wanted, rtol=rounding(model.module), atol=0)
    assert outputs[0] is not None and outputs[1] is None


def checkpointed(folder: Path, kind: Any, *, pooled: bool) -> list[TrainableModel]:
    """The same model without and with checkpointing."""
    models = []
    for again in (False, True):
        spec = ModelSpec(str(folder), kind, 0 if kind == "causal-lm" else 3, pooled, 0, checkpointed=again)
        base = load_base(spec)
        core = CoreConfig(method="lora", r=4, target_modules=adaptable_layers(base, "all-linear"))
        models.append(TrainableModel(base, spec, core))
        torch.manual_seed(1)
        models[-1].assign({name: v + 0.1 * torch.randn_like(v) for name, v in models[-1].values().items()})
    return models


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_blocks_that_run_again_hold_less_and_give_the_same_gradients(name: str, stories: Path, tiny_bert: Path) -> None:
    causal = name == "llama"
    kind = "causal-lm" if causal else "classification"
    plain, again = checkpointed(stories if causal else tiny_bert, kind, pooled=True)
    assert plain.takes_ragged and again.takes_ragged
    examples, gradients, held = examples_for(plain.spec), [], []
    for model in (plain, again):
        stacks = {name: torch.stack([value] * 2).requires_grad_() for name, value in model.values().items()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            backward(model, stacks, examples, [np.arange(0, 9), np.arange(9, 20)])
        gradients.append({name: stack.grad for name, stack in stacks.items()})
        held.append(sum(kept.values()))
    assert held[1] < held[0] / 2
    for tensor, wanted in gradients[0].items():
        found = gradients[1][tensor]
        assert wanted is not None and found is not None and torch.equal(found, wanted)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear has no blocks that could be run again"):
        run_again(torch.nn.Linear(2, 2))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_weights_in_the_format_of_the_file_stay_in_the_file(stories: Path) -> None:
    def mapped_from(address: int) -> str:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            span, *_, name = line.split(maxsplit=5)
            start, stop = (int(edge, 16) for edge in span.split("-"))
            if start <= address < stop:
                return Path(name).name
        return ""

    assert saved_dtype(stories) == "float32"
    for dtype, kept in (("float32", True), ("bfloat16", False)):
        base = load_base(ModelSpec(str(stories), "causal-lm", 0, False, 0, dtype))
        weight = base.get_submodule("model.layers.0.mlp.up_proj").weight
        assert isinstance(weight, torch.Tensor)
        assert (mapped_from(weight.data_ptr()) == "model.safetensors") == kept


def test_the_format_of_a_model_is_that_of_most_of_its_numbers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9, dtype=torch.bfloat16), "b": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert saved_dtype(tmp_path) == "bfloat16"
    save_file({"a": torch.zeros(9, dtype=torch.float16), "b": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="saved as F16; a base is run in float32 or bfloat16"):
        saved_dtype(tmp_path)


def test_a_run_with_both_ends_with_equal_bytes(stories: Path, animals: Path, tmp_path: Path) -> None:
    words = f"--model {stories} --data {animals} --clients 2 --rounds 1 --local-steps 1 --method lora-xs".split()
    words += ["--rank", "4", "--engine", "local", "--threads", "1", "--public-examples", "20", "--quiet"]
    trained = []
    lean = ["--dtype", "saved", "--gradient-checkpointing"]
    for name, further in (("plain", ["--dtype", "float32"]), ("lean", lean)):
        assert simulate.main([*words, *further, "--out", str(tmp_path / name)]) == 0
        summary, _ = read_run(tmp_path / name)
        assert summary["timing"]["dtype"] == "float32", "the log of a run says which format it was"
        trained.append(summary["trained_sha256"])
    assert trained[0] == trained[1]
