"""Bases in 4 and 8 bits: less memory, and in everything else a run like any other."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from fedlotr import SimulationConfig, cli, simulate
from fedlotr.adapters import quantised
from fedlotr.adapters.bases import leading_singular_vectors
from fedlotr.adapters.gradient_bases import initialize_basis
from fedlotr.adapters.layer import weight_of
from fedlotr.adapters.quantised import check_quantiser, dequantised, is_quantised, quantise
from fedlotr.adapters.tuner import CoreConfig, factored_layers
from fedlotr.models.loading import ModelSpec, adaptable_layers, count_parameters, load_base
from fedlotr.models.source import pad_id
from fedlotr.training.backward import backward
from fedlotr.training.model import TrainableModel
from tests.support import TEXTS, assert_within, float32_bound, our_logits, read_run, rounding
from tests.training.test_training import examples_for

pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")

FORMS = ("4bit", "8bit")
UP = "model.layers.0.mlp.up_proj"


def spec_of(folder: Path, kind: Any = "causal-lm", form: str = "4bit", **options: Any) -> ModelSpec:
    return ModelSpec(str(folder), kind, 0 if kind == "causal-lm" else 3, True, 0, quantize=form, **options)


def trainable(spec: ModelSpec, method: str = "lora-xs", **options: Any) -> TrainableModel:
    base = load_base(spec)
    targets = adaptable_layers(base, "all-linear")
    model = TrainableModel(base, spec, CoreConfig(method=method, r=4, target_modules=targets, **options))
    torch.manual_seed(1)
    model.assign({name: v + 0.1 * torch.randn_like(v) for name, v in model.values().items()})
    return model


def plain_twin(model: TrainableModel) -> TrainableModel:
    """The same model with linear layers that hold in full what the quantised ones stand for."""
    spec = spec_of(Path(model.spec.path), model.spec.kind, "none", dtype=model.spec.dtype)
    twin = trainable(spec)
    for name, layer in factored_layers(twin.module).items():
        other = factored_layers(model.module)[name]
        base, stored = layer.get_base_layer(), other.get_base_layer()
        assert is_quantised(stored) and not is_quantised(base)
        base.weight.data = dequantised(stored).to(base.weight.dtype)
        for mine, its in zip(layer.core_basis.buffers(), other.core_basis.buffers(), strict=True):
            mine.copy_(its)
    return twin


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conv", [False, True])
def test_a_quantised_layer_multiplies_by_what_it_stands_for(form: str, conv: bool) -> None:
    torch.manual_seed(0)
    plain = Conv1D(48, 100) if conv else nn.Linear(100, 48)  # type: ignore[no-untyped-call]
    layer = quantise(plain, form, torch.float32)
    weight, x = dequantised(layer), torch.randn(5, 100)
    assert weight.shape == (48, 100) and weight.dtype == torch.float32 and torch.equal(weight_of(layer), weight)
    lost = (weight - weight_of(plain)).norm() / weight.norm()
    assert 0 < lost < {"4bit": 0.12, "8bit": 0.012}[form]
    for _ in range(2):  # a call without gradient changes nothing for those with one
        with torch.no_grad():
            first = layer.eval()(x)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        assert torch.equal(first, y) and leaf.grad is not None
        most = x.abs() @ weight.T.abs() + plain.bias.abs()
        assert_within(y, x.double() @ weight.T.double() + plain.bias.double(), float32_bound(100 + 1, most))
        assert_within(leaf.grad, 2 * y.double() @ weight.double(), float32_bound(48, 2 * y.abs() @ weight.abs()))
    one_by_one = torch.cat([layer(row[None]) for row in torch.cat([x, 100 * x[:1]])])
    assert_within(one_by_one[:5], layer(x), float32_bound(100 + 1, most))  # whatever stands beside it


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_embeddings_and_logits_stay_as_they_are(form: str, dtype: str, stories: Path, tiny_bert: Path) -> None:
    for folder, kind in ((stories, "causal-lm"), (tiny_bert, "classification")):
        base, plain = (load_base(spec_of(folder, kind, of, dtype=dtype)) for of in (form, "none"))
        stored = [name for name, module in base.named_modules() if is_quantised(module)]
        assert set(adaptable_layers(base, "all-linear")) <= set(stored)
        assert count_parameters(base) == count_parameters(plain)
        others = dict(plain.named_parameters())
        kept = {name: p for name, p in base.named_parameters() if name.removesuffix(".weight") not in stored}
        assert all(torch.equal(p, others[name]) and p.dtype == others[name].dtype for name, p in kept.items())
        assert any("embed" in name for name in kept) and any("norm" in name.lower() for name in kept)
        packed, whole = (sum(p.numel() * p.element_size() for p in b.parameters()) for b in (base, plain))
        assert packed < 0.9 * whole


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_beside_a_quantised_base_are_those_beside_what_it_stands_for(
    form: str, name: str, stories: Path, tiny_bert: Path
) -> None:
    model = trainable(spec_of(*((stories, "causal-lm") if name == "llama" else (tiny_bert, "classification")), form))
    twin = plain_twin(model)
    assert model.takes_ragged and twin.takes_ragged
    examples = examples_for(model.spec)
    found = []
    for each in (model, twin):
        with torch.inference_mode():
            each.losses(examples.batch([0, 1]))
        stacks = {name: torch.stack([value] * 2).requires_grad_() for name, value in model.values().items()}
        losses = backward(each, stacks, examples, [np.arange(0, 9), np.arange(9, 20)])
        found.append([torch.from_numpy(losses), *(s.grad for s in stacks.values() if s.grad is not None)])
    assert len(found[0]) > 10
    for ours, plain in zip(*found, strict=True):
        assert plain is not None and float((ours - plain).norm()) <= rounding(twin.module) * float(plain.norm())


def test_bases_are_made_of_what_quantised_weights_stand_for(stories: Path) -> None:
    base = load_base(spec_of(stories))
    wanted, _ = leading_singular_vectors(weight_of(base.get_submodule(UP)).double(), 4, 0)
    layer = factored_layers(TrainableModel(base, spec_of(stories), core_of(base, "lora-xs")).module)[UP]
    basis = layer.basis("default")
    assert basis is not None
    torch.testing.assert_close(basis.B, wanted.float())


def core_of(base: nn.Module, method: str) -> CoreConfig:
    return CoreConfig(method=method, r=4, target_modules=adaptable_layers(base, "all-linear"))


def test_the_basis_update_takes_the_gradient_of_what_a_quantised_weight_stands_for(stories: Path) -> None:
    spec = spec_of(stories)
    model, bases, examples = trainable(spec), [], examples_for(spec)
    for base in (load_base(spec), plain_base(model)):
        bare = TrainableModel(base, spec, None)

        def loss(_: nn.Module, rows: list[int], bare: TrainableModel = bare) -> torch.Tensor:
            return bare.losses(examples.batch(rows)).sum()

        bases.append(initialize_basis(base, [[0, 1, 2], [3]], loss, core_of(base, "fed-sb")).bases)
        assert not any(layer._forward_hooks for layer in base.modules())
    for name, pair in bases[0].items():
        for ours, wanted in zip(pair, bases[1][name], strict=True):
            # A few signs of a first step are those of numbers near zero.
            assert float((ours - wanted).norm()) <= 0.05 * float(wanted.norm())


def plain_base(model: TrainableModel) -> nn.Module:
    base = load_base(spec_of(Path(model.spec.path), form="none"))
    for name, layer in factored_layers(model.module).items():
        base.get_submodule(name).weight.data = dequantised(layer.get_base_layer())  # type: ignore[union-attr]
    return base


@pytest.mark.parametrize("form", FORMS)
def test_a_model_saved_quantised_is_the_same_base(
    form: str, stories: Path, animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = BitsAndBytesConfig(**four if form == "4bit" else {"load_in_8bit": True})
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(stories, quantization_config=how, dtype=torch.float32).save_pretrained(saved)
    AutoTokenizer.from_pretrained(stories).save_pretrained(saved)
    trained = []
    for name, model, further in (("ours", stories, ["--quantize", form]), ("again", saved, [])):
        assert simulate.main([*words(animals), "--model", str(model), "--out", str(tmp_path / name), *further]) == 0
        trained.append(read_run(tmp_path / name)[0]["trained_sha256"])
    assert trained[0] == trained[1]
    capsys.readouterr()
    assert simulate.main([*words(animals), "--model", str(saved), "--quantize", "4bit"]) == 2
    said = capsys.readouterr().err
    assert "its weights were saved quantised (bitsandbytes) and stay so; leave out --quantize 4bit" in said


def words(animals: Path, method: str = "fed-sb") -> list[str]:
    said = f"--data {animals} --task causal-lm --partition iid --clients 3 --sample 3 --rounds 2 --local-steps 1"
    said += f" --method {method} --rank 4 --cohort 2 --dtype float32 --public-examples 20 --eval-examples 8 --quiet"
    return [*said.split(), "--engine", "local", "--threads", "1"]


@pytest.mark.parametrize("method", ["fed-sb", "lora", "full"])
def test_a_run_beside_a_quantised_base_sends_what_any_run_sends_and_resumes_to_the_same_bytes(
    method: str, stories: Path, animals: Path, tmp_path: Path
) -> None:
    given = [*words(animals, method), "--model", str(stories)]
    runs = []
    for name, further in (("plain", []), ("four", ["--quantize", "4bit"])):
        assert simulate.main([*given, *further, "--out", str(tmp_path / name)]) == 0
        runs.append(read_run(tmp_path / name)[0])
    assert runs[0]["communication"] == runs[1]["communication"]
    assert runs[0]["trained_numbers"] == runs[1]["trained_numbers"]
    assert method == "lora" or runs[1]["aggregation_error_max"] < 1e-6
    assert abs(runs[0]["final"]["loss"] - runs[1]["final"]["loss"]) < 0.5 and runs[0]["final"] != runs[1]["final"]
    facts = [json.loads((tmp_path / name / "facts.json").read_text()) for name in ("plain", "four")]
    assert facts[0]["parameters"] == facts[1]["parameters"]
    given += ["--quantize", "4bit", "--lr-schedule", "constant", "--out"]
    assert simulate.main([*given, str(tmp_path / "half"), "--rounds", "1"]) == 0
    assert simulate.main([*given, str(tmp_path / "half"), "--resume"]) == 0
    assert simulate.main([*given, str(tmp_path / "whole")]) == 0
    assert read_run(tmp_path / "half")[0]["trained_sha256"] == read_run(tmp_path / "whole")[0]["trained_sha256"]


def test_another_form_does_not_go_on_with_a_run(
    stories: Path, animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words(animals), "--model", str(stories), "--out", str(tmp_path / "run")]
    assert simulate.main([*given, "--rounds", "1", "--quantize", "8bit"]) == 0
    assert simulate.main([*given, "--resume", "--quantize", "4bit"]) == 2
    assert "--quantize 4bit: the run in" in capsys.readouterr().err


def test_the_exported_adapter_goes_with_plain_peft_on_either_base(stories: Path, animals: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert simulate.main([*words(animals), "--model", str(stories), "--quantize", "4bit", "--out", str(run)]) == 0
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    how = re.search(r"quantization_config=transformers\.BitsAndBytesConfig\((.*)\)", text)
    assert how is not None
    config = eval(f"BitsAndBytesConfig({how[1]})", {"BitsAndBytesConfig": BitsAndBytesConfig, "torch": torch})
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.pad_token_id, tokenizer.padding_side = pad_id(tokenizer), "right"
    batch = tokenizer(*TEXTS, padding=True, return_tensors="pt")
    logits = []
    for options in ({"quantization_config": config}, {}):
        base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32, **options)
        model = PeftModel.from_pretrained(base, str(run / "adapter")).train()  # no dropout; see `quantised` on eval
        with torch.no_grad():
            logits.append(model(**batch).logits)
    ours = our_logits(SimulationConfig(**yaml.safe_load((run / "config.yaml").read_text())), run, TEXTS)
    torch.testing.assert_close(ours, logits[0], rtol=1e-4, atol=1e-3)
    assert 1e-3 < float((logits[1] - ours).norm() / ours.norm()) < 0.3


@pytest.mark.slow
@pytest.mark.serial
def test_any_number_of_workers_leaves_the_same_bytes(
    stories: Path, animals: Path, tmp_path: Path, ray_session: None
) -> None:
    given = [*words(animals)[:-4], "--model", str(stories), "--quantize", "4bit"]
    trained = set()
    for how in ("--engine ray --workers 2", "--engine local --threads 1"):
        out = tmp_path / how.replace(" ", "")
        assert simulate.main([*given, *how.split(), "--out", str(out)]) == 0
        trained.add(read_run(out)[0]["trained_sha256"])
    assert len(trained) == 1


def test_without_bitsandbytes_the_option_is_refused_with_what_to_install(
    stories: Path, animals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert simulate.main([*words(animals), "--model", str(stories), "--quantize", "4bit"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --quantize 4bit: the package bitsandbytes is not installed; "
        "install it (pip install 'fedlotr[quantized]'), or leave it out"
    )


def test_a_bitsandbytes_that_does_not_work_here_is_found_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no library for this machine")

    monkeypatch.setattr(quantised, "dequantised", broken)
    with pytest.raises(ValueError, match=r"bitsandbytes does not work here \(RuntimeError: no library"):
        check_quantiser("4bit")


def test_doctor_foretells_less_memory(stories: Path, animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {}
    for form in ("none", *FORMS):
        assert cli.main(["doctor", *words(animals), "--model", str(stories), "--quantize", form, "--json"]) == 0
        needs = json.loads(capsys.readouterr().out)["needs"]
        base = load_base(spec_of(stories, form=form))
        stored = sum(p.numel() * p.element_size() for p in base.parameters())
        needed[form] = needs["weights_bytes"]
        assert 0.9 < needs["weights_bytes"] / stored < 1.1
    assert needed["4bit"] < needed["8bit"] < needed["none"]
