"""Models people have train, resume and export with the same flags; those that cannot be used are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fedlotr import cli
from fedlotr.adapters.layer import widths
from fedlotr.models.loading import Kind, ModelSpec, head_layers
from fedlotr.models.meta import chosen_layers, meta_model
from fedlotr.run.resumption import saved_configuration
from fedlotr.simulate import main
from tests.support import TEXTS, assert_logits, our_logits, plain_logits, read_run

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,  # as a random model's first token says little of the others where weights are small
}
DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA: dict[str, Any] = {**DECODER, "head_dim": 24, "sliding_window": 8, "eos_token_id": [2, 3]}

BASES: dict[str, Callable[[], Any]] = {
    # As on the hub, without what a classifier has on top of the encoder.
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES), add_pooling_layer=False),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES), add_pooling_layer=False),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(
            vocab_size=512,
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=48,
            max_position_embeddings=130,
            initializer_range=0.2,
        )
    ),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**SIZES, embedding_size=16)),
    "deberta-v2": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=32)
    ),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=512, n_positions=130, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=24, tie_word_embeddings=True)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**{**GEMMA, "sliding_window": None})),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA)),
}

DRAWN_HEADS = {
    "bert": {"bert.pooler.dense", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
    "electra": {"classifier.dense", "classifier.out_proj"},
    "deberta-v2": {"pooler.dense", "classifier"},
    "modernbert": {"head.dense", "classifier"},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Callable[[str], Path]:
    """The folder of a random model of a kind, with a real tokenizer."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                BASES[kind]().save_pretrained(made[kind])
            hf.AutoTokenizer.from_pretrained(stories).save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def words(animals: Path) -> Callable[..., list[str]]:
    """A run of a second or two with some options changed."""

    def given(**changed: object) -> list[str]:
        options: dict[str, object] = {"data": animals, "clients": 6, "sample": 6, "rounds": 2, "rank": 4}
        options |= {"public_examples": 16, "engine": "local", "threads": 1, "dtype": "float32", "method": "lotr"}
        options |= {"lr": 0.01, "head_lr": 0.003, "lr_schedule": "constant", "partition": "iid"}
        return [f"--{key.replace('_', '-')}={value}" for key, value in (options | changed).items()]

    return given


def trains_resumes_exports(words: list[str], more: list[str], run: Path) -> Path:
    """The adapter of a run of two rounds and one more."""
    assert main([*words, f"--out={run}", "--quiet"]) == 0
    assert main([*more, f"--out={run}", "--quiet", "--resume"]) == 0
    summary, rows = read_run(run)
    assert [row["round"] for row in rows] == [1, 2, 3] and not any(row["failed"] for row in rows)
    assert summary["aggregation_error_max"] <= 1e-6
    assert rows[-1]["train_loss"] < rows[0]["train_loss"], "the clients learn"
    assert summary["final"]["loss"] < summary["initial"]["loss"], "and what they learn holds"
    return run / "adapter"


def assert_plain_peft_agrees(runs: list[Path], texts: list[list[str]]) -> None:
    for run, plain in zip(runs, plain_logits(*(run / "adapter" for run in runs)), strict=True):
        config = saved_configuration(run)
        assert config is not None
        ours = our_logits(config, run, texts)
        assert_logits(plain, ours)


@pytest.mark.slow
def test_classifiers_of_every_kind_train_resume_and_give_plain_peft_their_logits(
    base: Callable[[str], Path], words: Callable[..., list[str]], tmp_path: Path
) -> None:
    for kind in BASES:
        method = "fed-sb" if kind in ("roberta", "gpt2", "qwen3") else "lotr"
        given = {"model": base(kind), "method": method, "alpha": 8}
        adapter = trains_resumes_exports(words(**given), words(**given, rounds=3), tmp_path / kind)
        saved = {name.removeprefix("base_model.model.") for name in load_file(adapter / "adapter_model.safetensors")}
        head = {name.rpartition(".")[0] for name in saved if "lora_" not in name}
        assert head == DRAWN_HEADS.get(kind, {"score"}), "all that the file lacked is trained and exported"
    assert_plain_peft_agrees([tmp_path / kind for kind in BASES], TEXTS)


@pytest.mark.slow
def test_language_models_of_every_kind_train_resume_and_give_plain_peft_their_logits(
    base: Callable[[str], Path], words: Callable[..., list[str]], shared: Path, tmp_path: Path
) -> None:
    kinds = ["gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
    for kind in kinds:
        given = {"model": base(kind), "data": shared / "data" / "shakespeare", "max_examples": 8}
        given |= {"max_length": 64, "eval_examples": 16}
        trains_resumes_exports(words(**given), words(**given, rounds=3), tmp_path / kind)
    assert_plain_peft_agrees([tmp_path / kind for kind in kinds], [TEXTS[0][:1]])


def edited(folder: Path, at: Path, **changes: object) -> Path:
    """A copy of a model folder with another config.json."""
    shutil.copytree(folder, at)
    config = json.loads((at / "config.json").read_text(encoding="utf-8"))
    (at / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return at


def pickled(folder: Path, at: Path) -> Path:
    shutil.copytree(folder, at)
    (at / "model.safetensors").rename(at / "pytorch_model.bin")
    return at


def incomplete(folder: Path, at: Path, lost: str) -> Path:
    shutil.copytree(folder, at)
    tensors = load_file(at / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if lost not in k}, at / "model.safetensors", metadata={"format": "pt"})
    return at


def pooled(folder: Path, at: Path, mode: str, *modules: str) -> Path:
    shutil.copytree(folder, at)
    (at / "1_Pooling").mkdir()
    (at / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}), encoding="utf-8")
    kinds = ["Transformer", "Pooling", *modules]
    listed = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (at / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    return at


def rewritten(folder: Path, at: Path, name: str, content: str) -> Path:
    pooled(folder, at, "mean_tokens")
    (at / name).write_text(content, encoding="utf-8")
    return at


def saved(model: Any, at: Path, tokenizer: Path) -> Path:
    model.save_pretrained(at)
    hf.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(at)
    return at


def t5(at: Path, tokenizer: Path) -> Path:
    config = hf.T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return saved(hf.T5ForConditionalGeneration(config), at, tokenizer)


def vision(at: Path, tokenizer: Path) -> Path:
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return saved(hf.ViTModel(config), at, tokenizer)


def mixture(at: Path, tokenizer: Path) -> Path:
    config = hf.JetMoeConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1, intermediate_size=16, kv_channels=4)
    return saved(hf.JetMoeForCausalLM(config), at, tokenizer)


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], list[str]]] = {
    "encoder-decoder": (lambda bert, at: t5(at, bert), ["an encoder-decoder (t5)", "take an encoder"]),
    "vision": (lambda bert, at: vision(at, bert), ["a vit is no text classifier"]),
    "fused experts": (
        lambda bert, at: mixture(at, bert),
        ["mixture of experts", "the layers alone are --targets kv_proj"],
    ),
    "pickled": (pickled, ["no .safetensors file", "save it again"]),
    "remote code": (
        lambda bert, at: edited(bert, at, model_type="ours", auto_map={"AutoModel": "ours.Model"}),
        ["'ours' brings its own code (auto_map)", "never run"],
    ),
    "unknown": (lambda bert, at: edited(bert, at, model_type="ours"), ["model type 'ours' is not known"]),
    "quantised": (
        lambda bert, at: edited(bert, at, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantised (gptq)", "take the unquantised"],
    ),
    "missing weights": (
        lambda bert, at: incomplete(bert, at, "layer.1.output.dense"),
        ["lack bert.encoder.layer.1.output.dense.bias", "saved whole"],
    ),
    "max pooling": (lambda bert, at: pooled(bert, at, "max_tokens"), ["pools by max", "remove 1_Pooling"]),
    "dense": (lambda bert, at: pooled(bert, at, "mean_tokens", "Dense", "Normalize"), ["further module, Dense"]),
    "dense after cls": (lambda bert, at: pooled(bert, at, "cls_token", "Dense"), ["further module, Dense"]),
    "odd pooling": (lambda bert, at: rewritten(bert, at, "1_Pooling/config.json", "[1]"), ["is not a JSON object"]),
    "odd modules": (lambda bert, at: rewritten(bert, at, "modules.json", '["a"]'), ["is not a list of modules"]),
    "odd config": (
        lambda bert, at: rewritten(bert, at, "config.json", '{"model_type": "bert", "num_labels": "x"}'),
        ["its config.json is not one that transformers reads"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_used_is_refused_by_name(
    kind: str,
    base: Callable[[str], Path],
    words: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, parts = REFUSED[kind]
    folder = make(base("bert"), tmp_path / "model")
    capsys.readouterr()  # transformers' progress bar of saving
    assert main([*words(model=folder, out=tmp_path / "run"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --targets all-linear: " if kind == "fused experts" else f"error: --model {folder}: ")
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists(), "before anything heavy"


@pytest.mark.parametrize("kind", ["vision", "fused experts", "missing weights"])
def test_a_bill_is_refused_for_the_same_model_in_the_same_words(
    kind: str,
    base: Callable[[str], Path],
    words: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = REFUSED[kind][0](base("bert"), tmp_path / "model")
    capsys.readouterr()
    assert main([*words(model=folder, out=tmp_path / "run"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert cli.main(["cost", "--model", str(folder), "--task", "classification"]) == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "qwen3"])
def test_a_configuration_alone_makes_the_layers_of_the_folder(name: str, base: Callable[[str], Path]) -> None:
    folder = base(name)
    kind: Kind = "causal-lm" if name in ("gpt2", "qwen3") else "classification"
    spec = ModelSpec(str(folder), kind, 3, False, 0)
    whole, bare = (meta_model(name, spec, config) for config in (None, hf.AutoConfig.from_pretrained(folder)))
    found, wanted = (
        {layer: widths(model.get_submodule(layer)) for layer in chosen_layers(model, "all-linear")}
        for model in (bare, whole)
    )
    assert wanted and wanted.items() <= found.items()
    assert all(parameter.is_meta for model in (whole, bare) for parameter in model.parameters())
    assert [layer.out_features for layer in head_layers(bare).values()][-1:] == ([3] if kind != "causal-lm" else [])


def test_a_classifier_that_was_saved_whole_keeps_its_layers_and_gets_a_head_for_the_labels_at_hand(
    base: Callable[[str], Path], words: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole = saved(
        hf.DistilBertForSequenceClassification.from_pretrained(base("distilbert"), num_labels=7),
        tmp_path / "model",
        base("distilbert"),
    )
    assert main([*words(model=whole, out=tmp_path / "run"), "--quiet"]) == 0
    assert_plain_peft_agrees([tmp_path / "run"], TEXTS)
    before, after = (
        load_file(path)["pre_classifier.weight" if path.parent == whole else PRE]
        for path in (whole / "model.safetensors", tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    )
    assert 0 < (after - before).abs().max() < 0.5, "trained from where the file left it"


PRE = "base_model.model.pre_classifier.weight"


def test_sentence_encoders_that_pool_the_first_token_are_plain_encoders(
    base: Callable[[str], Path], words: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = pooled(base("bert"), tmp_path / "model", "cls_token", "Normalize")
    assert main([*words(model=folder, out=tmp_path / "run"), "--quiet"]) == 0
    assert not (tmp_path / "run" / "adapter" / "head.safetensors").exists(), "the head is BERT's own"
