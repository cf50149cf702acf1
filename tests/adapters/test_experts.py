"""Experts as layers: views of transformers' tensors that compute the same, and that plain PEFT has as parameters."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedlotr.adapters import CoreConfig, initialize_basis
from fedlotr.adapters.experts import Experts, slots, unfuse
from fedlotr.adapters.export import export_lora
from fedlotr.adapters.layer import copies
from fedlotr.adapters.reduce import pad_adapter, reduce_adapter
from fedlotr.adapters.start import read_lora
from fedlotr.adapters.tuner import factored_layers, target_layers
from fedlotr.errors import InputError
from fedlotr.models.loading import ModelSpec, adaptable_layers, count_parameters, load_base
from fedlotr.training.model import TrainableModel
from tests.families import CONFIGS, language_model

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")
IDS = torch.arange(3, 19).view(2, 8)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(family: str) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            language_model(family).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


def loaded(folder: Path) -> nn.Module:
    return load_base(ModelSpec(str(folder), "causal-lm", 0, False, 0))


def plain(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(folder: Path, config: CoreConfig, targets: str = "all-linear") -> TrainableModel:
    """With random factors."""
    base, spec = loaded(folder), ModelSpec(str(folder), "causal-lm", 0, False, 0)
    config.target_modules = adaptable_layers(base, targets)
    model = TrainableModel(base, spec, config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.assign({name: value + 0.1 * torch.randn_like(value) for name, value in model.values().items()})
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def export(folder: Path, model: TrainableModel) -> Path:
    export_lora(folder, factored_layers(model.module), base=model.spec.path, slots=slots(model.module))
    return folder


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_layers_that_hold_the_tensors_and_compute_what_these_do(family: str, saved: Any) -> None:
    folder = saved(family)
    whole, base = plain(folder), loaded(folder)
    found = slots(base)
    assert len(found) == 2 * 2 * 4 and not [name for name, p in base.named_parameters() if p.dim() == 3]
    assert count_parameters(base) == count_parameters(whole)
    for name, slot in found.items():
        block, _, part = slot.parameter.rpartition(".")
        held, layer = getattr(base.get_submodule(block).whole, part), base.get_submodule(name)
        assert layer.weight.untyped_storage().data_ptr() == held.untyped_storage().data_ptr(), "a copy"
        matrix = whole.get_parameter(slot.parameter)[slot.place]
        assert torch.equal(layer.weight, matrix.T if family == "gpt-oss" else matrix)
    assert torch.equal(logits(base), logits(whole)), "untouched, transformers' own path"
    base.get_submodule(next(iter(found))).weight.requires_grad_()  # and where a gradient is wanted, one by one
    assert torch.allclose(base(IDS).logits, logits(whole), atol=1e-5)


def test_a_layer_that_was_changed_is_not_passed_over(saved: Any) -> None:
    """By what is merged into it, or by a hook beside it."""
    base = loaded(saved("mixtral"))
    before = logits(base)
    layer = base.get_submodule("model.layers.0.mlp.experts.1.down_proj")
    hook = layer.register_forward_hook(lambda _, inputs, y: y + 1)
    assert not torch.allclose(logits(base), before, atol=1e-3)
    hook.remove()
    assert torch.equal(logits(base), before)
    layer.weight.data = layer.weight.data + 0.1
    assert not torch.allclose(logits(base), before, atol=1e-3)


METHODS = {
    "lora": {},
    "fed-sb": {"basis": "random"},
    "lora-xs": {"basis": "svd", "tie": "layer", "alpha": 8.0, "rank_pattern": {r"self_attn\..*": 3}},
    "lotr": {"basis": "random", "tie": "type"},
    "full": {},
}
TARGETS = (
    ".*experts.*",
    "down_proj,q_proj",
    "gate_proj,up_proj",
    r".*layers\.1\.mlp\.experts\.[02]\.gate_up_proj",
)


@pytest.mark.parametrize(
    ("family", "method", "targets"),
    [
        *((family, method, "all-linear") for family in MIXTURES for method in ("lora", "fed-sb")),
        *(("mixtral", method, "all-linear") for method in ("lora-xs", "lotr", "full")),
        *(("qwen2-moe", "lora", targets) for targets in TARGETS),
    ],
)
def test_an_adapter_of_experts_is_what_plain_peft_loads(
    family: str, method: str, targets: str, saved: Any, tmp_path: Path
) -> None:
    folder = saved(family)
    model = adapted(folder, CoreConfig(method=method, r=4, **METHODS[method]), targets)
    adapter, wanted = export(tmp_path / "adapter", model), logits(model.module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded_plainly = PeftModel.from_pretrained(plain(folder), str(adapter)).eval()
    assert not torch.allclose(wanted, logits(plain(folder)), atol=1e-2)
    assert torch.allclose(logits(loaded_plainly), wanted, atol=1e-5)
    assert not [str(w.message) for w in caught if "were ignored" in str(w.message)], "where experts have one rank"
    missing = [name for name, p in loaded_plainly.named_parameters() if ".lora_B." in name and not p.any()]
    assert not missing, "PEFT adapts something that no tensor is for"
    assert torch.allclose(logits(loaded_plainly.merge_and_unload()), wanted, atol=1e-4)
    read = read_lora(adapter)
    for name, layer in factored_layers(model.module).items():
        pair = read.layers.pop(name)
        delta = layer.get_delta_weight("default")
        assert torch.allclose(pair.B @ pair.A, delta, atol=1e-5)
    assert not any(pair.B.any() for pair in read.layers.values()), "the others of a parameter's experts are zero"


def test_a_block_without_experts_keeps_its_layers_in_plain_peft(tmp_path: Path) -> None:
    """PEFT takes the ends of their names for those of experts, in the families that it converts."""
    config = CONFIGS["qwen3-moe"]()
    config.mlp_only_layers = [0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.AutoModelForCausalLM.from_config(config, dtype="float32").save_pretrained(tmp_path / "base")
    for number, targets in enumerate(("all-linear", "q_proj,layers.0.mlp.up_proj")):
        model = adapted(tmp_path / "base", CoreConfig(method="lora", r=4), targets)
        adapter, wanted = export(tmp_path / f"adapter-{number}", model), logits(model.module)
        assert torch.allclose(
            logits(PeftModel.from_pretrained(plain(tmp_path / "base"), str(adapter))), wanted, atol=1e-5
        )
        before = {name: pair.B @ pair.A for name, pair in read_lora(adapter).layers.items()}
        assert before.keys() == factored_layers(model.module).keys()
        assert pad_adapter(adapter) == 4 and reduce_adapter(adapter, 3).error > 0
        assert {len(pair.A) for pair in read_lora(adapter).layers.values()} == {3}
        PeftModel.from_pretrained(plain(tmp_path / "base"), str(adapter))


def test_ranks_that_differ_are_filled_up_cut_and_brought_to_one(saved: Any, tmp_path: Path) -> None:
    folder = saved("qwen2-moe")
    patterns = {r"experts\.1\.gate_up_proj": 6, r"shared_expert\.down_proj": 3, r"experts\.2\.down_proj": 2}
    model = adapted(folder, CoreConfig(method="lora", r=4, rank_pattern=patterns))
    adapter, wanted = export(tmp_path / "adapter", model), logits(model.module)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(config["rank_pattern"].values()) == [3, 3, 6, 6], "shared experts', and the parameters that have more"
    for rank, change in ((6, pad_adapter), (None, lambda folder: reduce_adapter(folder, 6))):
        found = change(adapter)
        assert found == rank or "nothing is lost" in found.in_words()
        assert torch.allclose(logits(PeftModel.from_pretrained(plain(folder), str(adapter))), wanted, atol=1e-5)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 6 and not config["rank_pattern"]
    lost = reduce_adapter(adapter, 2)
    assert 0 < lost.error < 1 and lost.layers == len(factored_layers(model.module))
    assert {len(pair.A) for pair in read_lora(adapter).layers.values()} == {2}
    PeftModel.from_pretrained(plain(folder), str(adapter))


@pytest.mark.parametrize("family", MIXTURES)
def test_an_adapter_that_peft_made_is_read_as_layers(family: str, saved: Any, tmp_path: Path) -> None:
    folder = saved(family)
    asked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = get_peft_model(
            plain(folder),
            LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=asked, init_lora_weights=False),
        )
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_lora(tmp_path / "theirs")
    base, spec = loaded(folder), ModelSpec(str(folder), "causal-lm", 0, False, 0)
    config = CoreConfig(method="lora", r=4, target_modules=adaptable_layers(base, "all-linear"))
    model = TrainableModel(base, spec, config, read.layers)
    assert torch.allclose(logits(model.module), logits(theirs), atol=1e-5)
    again = export(tmp_path / "again", model)
    assert torch.allclose(logits(PeftModel.from_pretrained(plain(folder), str(again))), logits(theirs), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_parameters": ["mlp.router.weights"]}, "target_parameters mlp.router.weights"),
        ({"r": 7, "rank_pattern": {}}, "are not those of experts of rank 7"),
    ],
)
def test_what_is_no_adapter_of_experts_is_refused(
    change: dict[str, Any], said: str, saved: Any, tmp_path: Path
) -> None:
    model = adapted(saved("mixtral"), CoreConfig(method="lora", r=4), ".*experts.*")
    adapter = export(tmp_path / "adapter", model)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_lora(adapter)


def test_rows_that_are_padded_are_of_their_own_copies(saved: Any) -> None:
    """Of whole matrices too, which packed passes never see."""
    for method in ("lora", "full"):
        model = adapted(saved("mixtral"), CoreConfig(method=method, r=4), ".*experts.*")
        values = model.values()
        stacks = {name: torch.stack([value, -value]) for name, value in values.items()}
        with copies(model.module, model.as_copies(stacks)):
            both = logits(model.module)
        for row, sign in enumerate((1, -1)):
            model.assign({name: sign * value for name, value in values.items()})
            assert torch.allclose(both[row], logits(model.module)[row], atol=1e-5), method


def test_an_expert_that_no_public_row_reaches_has_the_basis_of_its_weight(
    saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    base = loaded(saved("mixtral"))
    block = base.get_submodule("model.layers.0.mlp")
    forward = block.gate.forward

    def towards(states: torch.Tensor) -> Any:
        """Of four experts the router knows two."""
        found, weights, chosen = forward(states)
        return found, weights, chosen % 2

    block.gate.forward = towards
    layers = adaptable_layers(base, ".*experts.*")
    config = CoreConfig(method="fed-sb", r=4, basis="update", target_modules=layers)
    loss = lambda m, b: m(b).logits.square().sum()  # noqa: E731
    made = initialize_basis(base, [IDS], loss, config)
    name = "model.layers.0.mlp.experts.3.down_proj"
    u, _, vt = torch.linalg.svd(base.get_submodule(name).weight.double())
    pair = (made.bases or {})[name]
    assert torch.allclose(pair.B.double() @ pair.B.T.double(), u[:, :4] @ u[:, :4].T, atol=1e-5)
    assert torch.allclose(pair.A.T.double() @ pair.A.double(), vt[:4].T @ vt[:4], atol=1e-5)
    assert (
        "no public row reaches the expert of model.layers.0.mlp.experts.2.gate_up_proj and 3 more of 16" in caplog.text
    )
    with pytest.raises(ValueError, match=r"experts\.0\.gate_up_proj is zero"):
        initialize_basis(base, [IDS], lambda m, b: 0.0 * loss(m, b), config)


def test_a_copy_of_a_model_is_one_of_its_experts_too(saved: Any) -> None:
    base = loaded(saved("mixtral"))
    assert torch.equal(logits(copy.deepcopy(base)), logits(base))
    whole = plain(saved("mixtral"))
    unfuse(whole)
    unfuse(whole)
    assert sum(isinstance(module, Experts) for module in whole.modules()) == 2, "taken apart once"
    assert len(target_layers(whole, CoreConfig(r=2, target_modules=["gate_up_proj"]))) == 8
