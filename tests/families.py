"""A tiny model of every family, built at random: as language models, and with heads of their own that classify."""

from collections.abc import Callable
from typing import Any

import transformers as hf

SIZES: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 130, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
WINDOWED: dict[str, Any] = GROUPED | {"sliding_window": 6}
HALVED: dict[str, Any] = WINDOWED | {"use_sliding_window": True, "max_window_layers": 1}
OPT: dict[str, Any] = {
    **{"vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 16},
    **{"num_attention_heads": 4, "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GPT: dict[str, Any] = {
    **{"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 130, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
DISTIL: dict[str, Any] = {
    **{"vocab_size": 512, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 130},
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NEO = [[["global", "local"], 1]]
LOCAL: dict[str, Any] = SIZES | {"local_attention": 12, "global_attn_every_n_layers": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**HALVED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=24),
    "mistral": lambda: hf.MistralConfig(**WINDOWED),
    "gemma2": lambda: hf.Gemma2Config(**WINDOWED, head_dim=8, attn_logit_softcapping=2.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**WINDOWED, head_dim=8),
    "phi3": lambda: hf.Phi3Config(**WINDOWED),
    "gpt2": lambda: hf.GPT2Config(**GPT),
    "pythia": lambda: hf.GPTNeoXConfig(**SIZES),
    "opt": lambda: hf.OPTConfig(**OPT),
    "bert": lambda: hf.BertConfig(**SIZES),
    "roberta": lambda: hf.RobertaConfig(**SIZES | {"pad_token_id": 1}),
    "distilbert": lambda: hf.DistilBertConfig(**DISTIL),
    "electra": lambda: hf.ElectraConfig(**SIZES, embedding_size=16),
    "albert": lambda: hf.AlbertConfig(**SIZES, embedding_size=16),
    "mpnet": lambda: hf.MPNetConfig(**SIZES | {"pad_token_id": 1}),
    "modernbert": lambda: hf.ModernBertConfig(**LOCAL),
    "modernbert, averaged": lambda: hf.ModernBertConfig(**LOCAL, classifier_pooling="mean"),
    "falcon": lambda: hf.FalconConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "bloom": lambda: hf.BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4),
    "gpt-neo": lambda: hf.GPTNeoConfig(vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, attention_types=NEO),
    "gptj": lambda: hf.GPTJConfig(**GPT, rotary_dim=4),
    "gpt-oss": lambda: hf.GptOssConfig(**WINDOWED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=24),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=8),
}

DECODERS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "pythia",
    "opt",
    "gpt-oss",
    "mixtral",
    "qwen2-moe",
    "gptj",
)
ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "mpnet", "modernbert", "modernbert, averaged")
PADDED = ("falcon", "bloom", "gpt-neo")
"""Decoders that keep no packed sequences apart."""


def language_model(family: str) -> Any:
    """With random weights; seed before."""
    return hf.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype="float32")


def classifier(family: str) -> Any:
    """Of three classes, with random weights; seed before."""
    config = CONFIGS[family]()
    config.num_labels = 3
    return hf.AutoModelForSequenceClassification.from_config(config, dtype="float32")
