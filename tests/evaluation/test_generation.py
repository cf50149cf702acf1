"""What is generated is what transformers generates from the exported adapter, whatever batch a prompt is in."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

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


def test_every_stop_token_ends_an_answer_and_is_none_of_it(stories: Path) -> None:
    model, prompts = build(stories), prompts_of(stories)
    whole = generate(model, prompts, 20, [])
    assert all(len(answer) == 20 for answer in whole)
    stops = {whole[0][3], whole[1][7]}
    for answer, free in zip(generate(model, prompts, 20, stops), whole, strict=True):
        first = next((at for at, token in enumerate(free) if token in stops), len(free))
        assert answer == free[:first]


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
