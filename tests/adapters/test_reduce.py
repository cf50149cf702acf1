"""An exported adapter of lower rank is the best of that rank, says what it lost, and padding loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.reduce import pad_adapter, reduce_adapter, truncated
from fedlotr.adapters.start import read_lora


def lora(base: nn.Module, folder: Path, **ranks: int) -> Path:
    """A PEFT adapter of a tiny GPT-2, with a rank for each kind of layer, and its own scales."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["c_attn", "c_proj"],
        rank_pattern=ranks,
        alpha_pattern={name: 3 * rank for name, rank in ranks.items()},
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    get_peft_model(base, config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapter(tiny_gpt2: Path, tmp_path: Path) -> Path:
    return lora(AutoModelForCausalLM.from_pretrained(tiny_gpt2), tmp_path / "lora", c_attn=12)


def logits(base: Path, folder: Path) -> torch.Tensor:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(1, 20)[None]).logits
    return found


@pytest.mark.parametrize(("d_out", "d_in", "k"), [(9, 7, 5), (4, 11, 4), (6, 6, 6), (5, 4, 9)])
def test_what_is_kept_is_the_best_of_its_rank(d_out: int, d_in: int, k: int) -> None:
    pair = Factors(torch.randn(k, d_in), torch.randn(d_out, k))
    whole = pair.B.double() @ pair.A.double()
    values = torch.linalg.svdvals(whole)
    for rank in (1, 2, 3):
        found, lost, size = truncated(pair, rank)
        assert found.A.shape == (rank, d_in) and found.B.shape == (d_out, rank)
        off = (whole - found.B.double() @ found.A.double()).norm() ** 2
        wanted = values[rank:].square().sum()
        assert torch.isclose(off, wanted, rtol=1e-4) and lost == pytest.approx(float(wanted), rel=1e-9)
        assert size == pytest.approx(float(whole.norm() ** 2), rel=1e-9)


def test_an_adapter_of_lower_rank_says_what_it_lost_in_all_and_in_its_worst_layer(adapter: Path) -> None:
    before = {name: pair.B.double() @ pair.A.double() for name, pair in read_lora(adapter).layers.items()}
    said = reduce_adapter(adapter, 3)
    after = {name: pair.B.double() @ pair.A.double() for name, pair in read_lora(adapter).layers.items()}
    assert {len(pair.A) for pair in read_lora(adapter).layers.values()} == {3}
    errors = {name: float((before[name] - after[name]).norm() / before[name].norm()) for name in before}
    total = sum(float((before[name] - after[name]).norm()) ** 2 for name in before)
    assert said.error == pytest.approx((total / sum(float(m.norm()) ** 2 for m in before.values())) ** 0.5, rel=1e-4)
    assert said.where == max(errors, key=lambda name: errors[name])
    assert said.worst == pytest.approx(max(errors.values()), rel=1e-4)
    assert 0.05 < said.error < said.worst < 1 and (said.layers, said.of) == (6, 6)
    assert f"relative Frobenius error {said.error:.3g} in all" in said.in_words() and said.where in said.in_words()


def test_layers_of_no_more_than_the_rank_stay_as_they_are(adapter: Path, tiny_gpt2: Path) -> None:
    files = [(adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    said = reduce_adapter(adapter, 12)
    assert (said.layers, said.error) == (0, 0.0) and "nothing is lost" in said.in_words()
    assert [(adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")] == files
    small = {name: pair for name, pair in read_lora(adapter).layers.items() if len(pair.A) == 4}
    assert reduce_adapter(adapter, 6).layers == 2
    now = read_lora(adapter).layers
    assert all(torch.equal(now[name].A, pair.A) and torch.equal(now[name].B, pair.B) for name, pair in small.items())
    assert sorted({len(pair.A) for pair in now.values()}) == [4, 6]
    assert logits(tiny_gpt2, adapter).isfinite().all()  # PEFT reads its patterns


def test_one_rank_for_all_layers_changes_no_logit_and_leaves_no_pattern(adapter: Path, tiny_gpt2: Path) -> None:
    before = logits(tiny_gpt2, adapter)
    assert pad_adapter(adapter) == 12
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (12, 12, {}, {})
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {t.shape[0] if "lora_A" in name else t.shape[1] for name, t in tensors.items()} == {12}
    assert torch.allclose(logits(tiny_gpt2, adapter), before, atol=1e-5)
