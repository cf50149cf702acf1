"""What is generated is what transformers generates from the exported adapter, whatever batch a prompt is in."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fedlotr.adapters import prepared
from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.export import export_lora
from fedlotr.adapters.tuner import CoreConfig, factored_layers
from fedlotr.evaluation.generation import BATCH_ROWS, end_of_turn, generate, positions, stop_ids
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.training.model import TrainableModel

TEXTS = ["Once upon a time", "The cat", "Lily and her mom went to the park. They saw a big", "One day, a dog", "Tim"]
CHAT = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|over|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def build(folder: Path, method: str = "lora-xs", **spec: Any) -> TrainableModel:
    """Its trained tensors away from where they start, as far as the model goes on speaking."""
    of = ModelSpec(str(folder), "causal-lm", 0, False, 0, **spec)
    base = load_base(of)
    core = CoreConfig(method=method, r=4, target_modules=adaptable_layers(base, "all-linear"))
    model = TrainableModel(base, of, core)
    torch.manual_seed(1)
    model.assign({name: value + 0.1 * torch.randn_like(value) for name, value in model.values().items()})
    return model


def prompts_of(folder: Path) -> list[list[int]]:
    return [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in TEXTS]


def plainly(module: Any, prompt: Sequence[int], tokens: int, stops: Sequence[int]) -> list[int]:
    """One prompt, by itself, as anybody would have transformers go on from it."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=0
            ),
        )
    answer = out[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stops else answer


@pytest.mark.parametrize("method", ["lora-xs", "lotr", "lora", "full"])
def test_it_says_what_the_exported_and_the_merged_adapter_say(method: str, stories: Path, tmp_path: Path) -> None:
    model = build(stories, method)
    layers = factored_layers(model.module)
    torch.manual_seed(2)
    widths = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    carried = {name: Factors(torch.randn(3, a) * 0.02, torch.randn(b, 3) * 0.02) for name, (a, b) in widths.items()}
    model.carry(Carry().grown(carried))
    prompts = prompts_of(stories)
    found = generate(model, prompts, 24, [2])
    export_lora(tmp_path, layers, base=str(stories), task=None)
    there = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), tmp_path).eval()
    assert found == [plainly(there, prompt, 24, [2]) for prompt in prompts]
    merged = there.merge_and_unload()
    assert found == [plainly(merged, prompt, 24, [2]) for prompt in prompts]
    untouched = AutoModelForCausalLM.from_pretrained(stories)
    assert found != [plainly(untouched, prompt, 24, [2]) for prompt in prompts], "the adapter changes nothing here"


@pytest.mark.parametrize("form", [{}, {"checkpointed": True}], ids=str)
@pytest.mark.parametrize("name", ["stories", "tiny_gpt2"])
def test_a_batch_says_what_each_prompt_says_by_itself(
    name: str, form: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    model, prompts = build(folder, **form), prompts_of(folder)
    assert len({len(prompt) for prompt in prompts}) > 2, "nothing is padded"
    together = generate(model, prompts, 16, [2])
    assert together == [generate(model, [prompt], 16, [2])[0] for prompt in prompts]
    assert together == generate(model, prompts, 16, [2]), "not the same twice"
    many = [prompts[row % len(prompts)] for row in range(BATCH_ROWS + 3)]
    assert generate(model, many, 2, []) == [together[row % len(prompts)][:2] for row in range(len(many))]
    assert all(len(answer) == 2 for answer in generate(model, many, 2, []))


def test_a_base_in_bfloat16_says_the_same_twice(stories: Path) -> None:
    model, prompts = build(stories, dtype="bfloat16"), prompts_of(stories)
    found = generate(model, prompts, 16, [2])
    assert found == generate(model, prompts, 16, [2]) and all(found)


def test_weights_that_training_has_laid_out_are_used_and_change_no_bit(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not prepared.room():
        pytest.skip("oneDNN multiplies no bfloat16 on this processor")
    model, prompts = build(stories, dtype="bfloat16"), prompts_of(stories)
    logits: list[torch.Tensor] = []
    times, used = prepared.times, list[int]()
    monkeypatch.setattr(prepared, "times", lambda *given: used.append(len(given[0])) or times(*given))  # type: ignore[func-returns-value]
    model.module.register_forward_hook(lambda _, inputs, out: logits.append(out.logits.clone()))
    wanted = generate(model, prompts, 12, [])
    assert not used, "generation lays nothing out: that takes memory"
    layers = factored_layers(model.module).values()
    assert all(prepared.prepared(layer.base_layer.weight) for layer in layers)  # type: ignore[arg-type]
    assert generate(model, prompts, 12, []) == wanted
    assert len(used) == 12 * len(layers)
    assert all(torch.equal(one, other) for one, other in zip(logits[:12], logits[12:], strict=True))
    layer = next(iter(layers))
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    layer.merge()
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.base_layer.weight)), (
            "merged weights are others"
        )  # type: ignore[arg-type]


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operation makes, or reads another as."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, list | tuple) else [made]:
            if isinstance(one, torch.Tensor):
                self.found = max(self.found, one.numel() * one.element_size())
        return made


@pytest.mark.parametrize("method", ["lora-xs", "lora"])
def test_no_tensor_of_an_answer_is_larger_than_any_that_transformers_makes(method: str, stories: Path) -> None:
    """Not the attention of all heads, nor the vocabulary's matrix for each row, nor an update in float32 for all."""
    model = build(stories, method, dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16).eval()
    prompts = [[1 + (row + place) % 500 for place in range(400)] for row in range(16)]
    with Largest() as ours:
        generate(model, prompts, 2, [])
    ids = torch.tensor(prompts)
    with Largest() as theirs, torch.inference_mode():
        plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert theirs.found <= ours.found <= 2 * theirs.found
    assert model.module.config._attn_implementation == "eager", "as it trains"


def test_every_stop_token_ends_an_answer_and_is_none_of_it(stories: Path) -> None:
    model, prompts = build(stories), prompts_of(stories)
    whole = generate(model, prompts, 20, [])
    assert all(len(answer) == 20 for answer in whole)
    stops = {whole[0][3], whole[1][7]}
    for answer, free in zip(generate(model, prompts, 20, stops), whole, strict=True):
        first = next((at for at, token in enumerate(free) if token in stops), len(free))
        assert answer == free[:first]


def test_an_answer_that_is_over_ends_and_so_does_a_batch_of_such(stories: Path) -> None:
    model, prompts = build(stories), prompts_of(stories)
    passes: list[int] = []
    model.module.register_forward_hook(lambda *_: passes.append(1))

    def said(tokens: int, *over: Any) -> tuple[list[list[int]], int]:
        passes.clear()
        return generate(model, prompts, tokens, [2], 0.0, 0, *over), len(passes)

    whole, most = said(24)
    assert most == 24, "one pass for each token of the longest answer"
    asked = [len(answer) for answer in whole]
    ends = {tuple(answer[: 3 + row]): 3 + row for row, answer in enumerate(whole)}
    found, passed = said(24, lambda answer: tuple(answer) in ends)
    assert found == [answer[: 3 + row] for row, answer in enumerate(whole)]
    assert passed == 3 + len(prompts) - 1 < min(asked), "the pass that makes the last token of the longest one"
    del ends[tuple(whole[0][:3])]
    found, passed = said(24, lambda answer: tuple(answer) in ends)
    assert (found[0], passed) == (whole[0], 24), "one that is not over goes on to its end"
    assert found[1:] == [answer[: 4 + row] for row, answer in enumerate(whole[1:])]


def test_no_answer_goes_beyond_the_positions_and_none_is_cut_by_its_neighbour(tiny_gpt2: Path) -> None:
    model = build(tiny_gpt2)
    assert positions(model.module) == 128
    long, short = [3 + at % 500 for at in range(120)], [5, 6, 7]
    found = generate(model, [long, short], 30, [])
    assert [len(answer) for answer in found] == [8, 30]
    assert found == [generate(model, [prompt], 30, [])[0] for prompt in (long, short)]
    for prompt, said in (([], "no tokens"), ([5] * 128, "128 tokens, and the model 128 positions")):
        with pytest.raises(ValueError, match=said):
            generate(model, [short, prompt], 4, [])


def test_what_the_models_files_say_of_sampling_changes_nothing_and_nothing_is_said(
    stories: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model: Any = build(stories)
    wanted = generate(model, prompts_of(stories), 12, [2])
    own = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, max_length=6)
    model.module.generation_config = own
    with caplog.at_level(logging.WARNING):
        assert generate(model, prompts_of(stories), 12, [2]) == wanted
    assert model.module.generation_config is own
    assert not caplog.records and capfd.readouterr() == ("", "") and not [str(one.message) for one in recwarn]


def test_all_that_ends_a_turn_is_a_stop(stories: Path) -> None:
    model: Any = build(stories)
    tokenizer: Any = AutoTokenizer.from_pretrained(stories)
    assert stop_ids(model.module, tokenizer) == (2,)
    model.module.generation_config = GenerationConfig(eos_token_id=[2, 7])
    assert stop_ids(model.module, tokenizer) == (2, 7)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|over|>"]})
    over = tokenizer.convert_tokens_to_ids("<|over|>")
    tokenizer.chat_template = CHAT
    assert end_of_turn(tokenizer) == over and stop_ids(model.module, tokenizer) == (2, 7, over)
    for template in (CHAT.replace("<|over|>", " the end "), "{{ raise_exception('no') }}", "{{ messages[0].content }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) is None


def test_a_model_that_goes_back_to_an_earlier_carried_term_says_what_it_said_then(stories: Path) -> None:
    model, prompts = build(stories), prompts_of(stories)
    before = generate(model, prompts, 12, [2])
    some = {name: layer for name, layer in list(factored_layers(model.module).items())[::2]}
    parts = {n: Factors(torch.randn(2, of.in_features), torch.randn(of.out_features, 2)) for n, of in some.items()}
    model.carry(Carry().grown(parts))
    assert generate(model, prompts, 12, [2]) != before
    model.carry(Carry())
    assert generate(model, prompts, 12, [2]) == before


def test_what_is_drawn_is_drawn_by_the_seed(stories: Path) -> None:
    model = build(stories)
    prompts = prompts_of(stories)

    def said(*how: float) -> list[list[int]]:
        return generate(model, prompts, 12, [2], *how)  # type: ignore[arg-type]

    torch.manual_seed(7)
    before = torch.get_rng_state()
    once = said(1.0, 3)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's draws are moved"
    assert said(1.0, 3) == once
    assert said(1.0, 4) != once
    assert said(0.0, 3) == said()
    assert said(1e-4, 3) == said(), "nearly without temperature the likeliest token is drawn"
