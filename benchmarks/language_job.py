"""A language model's job for the benchmarks: real questions and answers, a decoder and its tokens; no network."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from side_by_side import HERE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from fedlotr.data import Style, load_source
from fedlotr.data.language import encode_language
from fedlotr.errors import InputError
from fedlotr.models.source import PACKAGED, gguf_file, load_tokenizer, resolve_model

GSM8K = HERE.parents[1] / "shared" / "data" / "gsm8k"
PUBLIC = 64
"""Rows that bases are made of."""
VOCABULARY = 8192
TAUGHT = 4096
"""Rows that a tokenizer is made of."""
BUILT: dict[str, dict[str, Any]] = {
    "30m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1792},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
"""Decoders of random weights in Qwen 2's architecture, with two heads of keys and values and a tied vocabulary: 31 M
parameters, and 0.6 M to show that it runs."""
MODELS = (*BUILT, "smollm2-135m")


def lacks(model: str) -> str | None:
    """Why a model cannot be had here."""
    if model in BUILT or gguf_file(model) is not None:
        return None
    return f"{model} is not installed: it needs {PACKAGED[model].install}"


def texts(count: int, split: str) -> tuple[str, list[dict[str, str]]]:
    """The name of the data, and the first rows of a split: gsm8k's, or where that is missing the chat demo's."""
    if GSM8K.is_dir():
        with gzip.open(GSM8K / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
        return "gsm8k", [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
    source = load_source("pydoc-chat")
    part = source.train if split == "train" else source.test
    chosen = part.select(range(min(count, len(part))))
    pairs = zip(chosen["prompt"], chosen["answer"], strict=True)
    return "pydoc-chat", [{"prompt": str(prompt), "answer": str(answer)} for prompt, answer in pairs]


def folder_of(model: str, place: Path) -> Path:
    """The folder of a model; one that is built, with a tokenizer that is made of the texts, lies in `place`."""
    if model not in BUILT:
        found = resolve_model(model)
        assert found is not None
        return found
    folder = place / model
    if not folder.exists():
        disable_progress_bar()  # type: ignore[no-untyped-call]
        tokenizer = _tokenizer([text for row in texts(TAUGHT, "train")[1] for text in row.values()])
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = Qwen2Config(
            **BUILT[model],
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def _tokenizer(lines: Sequence[str]) -> PreTrainedTokenizerFast:
    end, pad = "<|endoftext|>", "<|pad|>"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[end, pad], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, eos_token=end, pad_token=pad
    )


def language_job(model: str, place: Path, *, clients: int, examples: int, test: int, length: int) -> dict[str, Any]:
    """Rows of clients, public ones and held-out ones, as texts and as the tokens that every side learns."""
    count = clients * examples
    (data, rows), (_, held_out) = texts(count + PUBLIC, "train"), texts(test, "test")
    if len(rows) < count + PUBLIC:
        most = (len(rows) - PUBLIC) // examples
        raise InputError(f"--clients {clients}: {data} has {len(rows)} rows; choose at most {most}")
    folder = folder_of(model, place)
    for some in (rows, held_out):
        columns = {name: [row[name] for row in some] for name in ("prompt", "answer")}
        found = encode_language(columns, load_tokenizer(folder, model), Style(), length)
        if found.owner != list(range(len(some))):
            raise InputError(f"--length {length}: some row has no room for an answer; give a larger one")
        for row, ids, targets in zip(some, found.tokens, found.targets, strict=True):
            row |= {"ids": ids, "targets": targets}  # type: ignore[dict-item]
    return {
        "task": "causal-lm",
        "data": data,
        "model_name": model if model not in BUILT else str(folder),
        "model": str(folder),
        "parts": [rows[at : at + examples] for at in range(0, count, examples)],
        "public": rows[count:],
        "test": held_out,
        "max_length": length,
        "evaluate": True,
    }
