"""The model that runs is the one that was named, and what it has no room for is found before the run."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from fedlotr import SimulationConfig, run_simulation
from fedlotr.commands import doctor
from fedlotr.config.preflight import _model_problems
from fedlotr.errors import InputError
from fedlotr.models.limits import most_positions
from fedlotr.models.loading import ModelSpec
from fedlotr.models.source import check_length, pad_id, resolve_model
from fedlotr.run.skeleton import try_longest
from fedlotr.simulate import main
from fedlotr.training.examples import Examples
from tests import forks
from tests.support import assert_logits, our_logits, plain_logits

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 16, "max_position_embeddings": 40}
GPT: dict[str, Any] = {"vocab_size": 64, "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
OPT = {"vocab_size": 64, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1, "ffn_dim": 16}
TABLES: dict[str, tuple[Any, int]] = {
    "mpnet": (lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**SMALL)), 38),
    "camembert": (lambda: hf.CamembertForSequenceClassification(hf.CamembertConfig(**SMALL)), 38),
    "longformer": (lambda: hf.LongformerForSequenceClassification(hf.LongformerConfig(**SMALL)), 38),
    "data2vec": (lambda: hf.Data2VecTextForSequenceClassification(hf.Data2VecTextConfig(**SMALL)), 38),
    "padding 3": (lambda: hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**SMALL, pad_token_id=3)), 36),
    "esm": (lambda: hf.EsmForSequenceClassification(hf.EsmConfig(**SMALL, pad_token_id=1, mask_token_id=2)), 38),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL)), 40),
    "gpt2": (lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT, pad_token_id=0)), 40),
    "opt": (
        lambda: hf.OPTForSequenceClassification(hf.OPTConfig(**OPT, num_attention_heads=2, max_position_embeddings=40)),
        40,
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_positions_are_counted_as_the_model_counts_them(kind: str) -> None:
    make, room = TABLES[kind]
    model = make().eval()
    assert most_positions(model) == room

    def take(length: int) -> None:
        ids = torch.full((1, length), 7)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    take(room)
    with pytest.raises((IndexError, RuntimeError)):
        take(room + 1)


def test_a_model_without_a_table_has_no_such_limit() -> None:
    assert most_positions(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))) is None


def test_a_padding_id_that_a_configuration_lacks_takes_no_positions() -> None:
    for padding, room in ((None, 40), (3, 36)):
        found = hf.RobertaConfig(**SMALL, pad_token_id=padding)
        check_length(found, "x", room)
        with pytest.raises(InputError, match=f"takes at most {room} tokens"):
            check_length(found, "x", room + 1)


def tokenizer_of_words(folder: Path, count: int, **special: str) -> hf.PreTrainedTokenizerBase:
    """One of the words w0, w1, ..., and these special tokens, whose ids come after them."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(count)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", **special)  # type: ignore[no-untyped-call]
    made.save_pretrained(folder)
    return made


def words_of(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    given = f"--model {model} --data {data} --clients 2 --sample 2 --rounds 1 --partition iid --method lora --rank 2"
    given += f" --engine local --threads 1 --dtype float32 --public-examples 8 --max-length 8 --out {out}"
    return [*given.split(), *more]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Texts of the words w1 to w70, two classes."""
    folder = tmp_path / "rows"
    folder.mkdir()
    held = [{"text": f"w{n % 71} w{n % 7 + 1}", "label": n % 2} for n in range(1, 143)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in held), encoding="utf-8")
    return folder


def test_a_token_without_an_embedding_is_found_by_run_and_doctor_before_the_run(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    hf.ElectraForSequenceClassification(hf.ElectraConfig(**SMALL)).save_pretrained(base)
    tokenizer_of_words(base, 100)
    given = words_of(base, rows, tmp_path / "run")
    for ask in (main, doctor.main):
        capsys.readouterr()
        assert ask([*given, "--quiet"]) == 2
        said = capsys.readouterr().err
        beyond = "its token w64 has no embedding: the tokenizer has 36 tokens beyond the model's 64"
        assert f"{rows / 'train.jsonl'}, line 64: {beyond}" in said
    assert not (tmp_path / "run").exists()
    private = ["--privacy", "example", "--noise-multiplier", "1", "--quiet"]
    few = [{"text": f"w{n} w{n + 1} w{n + 2}", "label": n % 2} for n in range(40)]
    (rows / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in few), encoding="utf-8")
    assert main([*given, *private]) == 2
    said = capsys.readouterr().err
    assert "some row's token has no embedding" in said and "w64" not in said


def test_tokens_that_no_text_has_and_padding_may_lie_beyond(rows: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "vocab_size": 71}, pad_token_id=None)).save_pretrained(base)
    tokenizer = tokenizer_of_words(base, 71, pad_token="<pad>", image_token="<image>", eos_token="w70")
    assert tokenizer.pad_token_id == 71 and pad_id(tokenizer, 71) == 70
    given = words_of(base, rows, tmp_path / "run", "--alpha", "8")
    assert main([*given, "--quiet"]) == 0
    config = SimulationConfig(**{
        "model": str(base), "data": str(rows), "clients": 2, "sample": 2, "rounds": 1, "partition": "iid", "alpha": 8.0,
        "method": "lora", "rank": 2, "engine": "local", "public_examples": 8, "max_length": 8,
    })  # fmt: skip
    (plain,) = plain_logits(tmp_path / "run" / "adapter")
    assert_logits(
        plain, our_logits(config, tmp_path / "run", [["A first text.", "And a second, somewhat longer text."]])
    )


def test_what_no_table_tells_is_tried() -> None:
    """As of a class that counts its positions in a way of its own."""

    def logits(batch: Any) -> torch.Tensor:
        return torch.nn.functional.embedding(torch.arange(batch.input_ids.shape[1]), torch.zeros(16, 2))

    spec = ModelSpec("", "causal-lm", 0, False, 0)
    short: Any = SimpleNamespace(spec=spec, device=torch.device("cpu"), logits=logits)
    tokens, offsets = np.full(27, 5, np.int32), np.array([0, 10, 27])
    examples = Examples(tokens=tokens, offsets=offsets, labels=np.ones(2, np.int64), segments=None, causal=True)
    with pytest.raises(InputError, match="--model mine: cannot take a text of 17 tokens .* less than --max-length 24"):
        try_longest(short, examples, "mine", 24)


def test_a_folder_with_an_adapter_is_not_taken_for_its_model(tiny_gpt2: Path, tmp_path: Path) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(alone)
    shutil.copytree(tiny_gpt2, both)
    for file in alone.glob("adapter*"):
        shutil.copy(file, both)
    with pytest.raises(
        InputError, match="holds weights of a model and, beside them, an adapter .*take the adapter out"
    ):
        resolve_model(str(both))
    with pytest.raises(InputError, match="holds no model but an adapter .*give that base by --model"):
        resolve_model(str(alone))
    (problem,) = _model_problems(str(alone))
    assert "no model there but an adapter" in problem


def test_a_model_object_with_an_adapter_in_it_is_refused(tiny_gpt2: Path, animals: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model.add_adapter(LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    config = SimulationConfig(data=str(animals), task="causal-lm", clients=2, out=tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="a model with an adapter in it"):
        run_simulation(config, model=(model, hf.AutoTokenizer.from_pretrained(tiny_gpt2)))


@pytest.mark.parametrize("task", ["auto", "causal-lm"])
def test_the_lines_of_a_decoder_whose_tokenizer_tells_sentences_apart_run(
    task: str, rows: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**{**SMALL, "vocab_size": 80}, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(base)
    made = tokenizer_of_words(base, 71, pad_token="<pad>", eos_token="w2")
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    made.save_pretrained(base)
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "token_type_ids" in hf.AutoTokenizer.from_pretrained(base)("w3")
    assert main([*words_of(base, rows, tmp_path / "run", "--task", task), "--quiet"]) == 0
    text = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"tokenizer.model_input_names = \['input_ids', 'attention_mask'\]", text)
    if task == "auto":
        plain_logits(tmp_path / "run" / "adapter")
        return
    lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert lines is not None
    adapter = str(tmp_path / "run" / "adapter")
    done = forks.server(*forks.PLAIN).run(f"import os; os.chdir({adapter!r})\n{lines[1]}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
