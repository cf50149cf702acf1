"""Which layers --targets means, what is adapted, and what is left out and why: in the header and in summary.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.pytorch_utils import Conv1D

from fedlotr import SimulationConfig
from fedlotr.adapters.experts import unfuse
from fedlotr.commands import doctor
from fedlotr.errors import InputError
from fedlotr.models.adapted import what_is_adapted
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.models.meta import chosen_layers
from fedlotr.models.mixtures import expert_tensors
from fedlotr.models.targets import alternatives, matches
from fedlotr.simulate import main
from tests.support import read_run

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 16, "max_position_embeddings": 40}


def llama() -> Any:
    with torch.device("meta"):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))


ENDS = [
    ("k_proj,o_proj", {"k_proj", "o_proj"}),
    ("up_proj", {"up_proj"}),
    (" gate_proj , self_attn.q_proj", {"gate_proj", "q_proj"}),
    (".*k_proj,.*o_proj", {"k_proj", "o_proj"}),
    (r".*\.(k|o)_proj", {"k_proj", "o_proj"}),
    (r"(?i).*\.(K_proj|O_PROJ)|.*up_proj", {"k_proj", "o_proj", "up_proj"}),
    (r".*layers\.[01]{1,2}\.mlp\.(?:down|up)_proj", {"down_proj", "up_proj"}),
    (r".*\.(?!k_proj|lm_head)(\w)_proj", {"q_proj", "v_proj", "o_proj"}),
]


@pytest.mark.parametrize(("targets", "ends"), ENDS)
def test_names_are_taken_as_peft_takes_them_and_expressions_as_they_are(targets: str, ends: set[str]) -> None:
    found = adaptable_layers(llama(), targets)
    assert {name.rpartition(".")[2] for name in found} == ends and len(found) == 2 * len(ends)


def test_a_list_of_names_is_one_text() -> None:
    given: Any = ["k_proj", "o_proj"]
    assert SimulationConfig(targets=given).targets == "k_proj,o_proj"
    assert matches("k_proj,o_proj", "a.1.o_proj") and not matches("k_proj,o_proj", "a.1.go_proj")


@pytest.mark.parametrize(
    ("targets", "part", "hint"),
    [
        ("q_proj,v_porj", "v_porj", "'v_proj'"),
        ("q_proj,self_atn", "self_atn", "'self_attn'"),
        (r".*\.(q_proj|key)", "key", "there are q_proj, k_proj"),
        (r".*\.q_proj|.*\.gate_projs", r".*\.gate_projs", "'gate_proj'"),
        (r".*\.(?:self_attn\.(q_proj|dense)|mlp\.up_proj)", "dense", "there are q_proj"),
    ],
)
def test_an_alternative_that_matches_nothing_is_refused_with_the_nearest_names(
    targets: str, part: str, hint: str
) -> None:
    with pytest.raises(ValueError, match="matches no layer that can be adapted") as caught:
        adaptable_layers(llama(), targets)
    assert repr(part) in str(caught.value) and hint in str(caught.value)


@pytest.mark.parametrize("targets", [r"(a|b)+c", r"(?=a|b)ab", r"(a|b)\1", r"a\|b", "[a|b]", "all-linear", "x{1,3}"])
def test_what_is_no_choice_of_layers_is_left_as_it_is(targets: str) -> None:
    assert not list(alternatives(targets))


def test_a_model_says_what_is_adapted_and_what_is_left_out_and_why(tiny_bert: Path) -> None:
    model = llama()
    told = what_is_adapted(model, adaptable_layers(model, "q_proj,up_proj"), "q_proj,up_proj")
    assert told.types == {"self_attn.q_proj": 2, "mlp.up_proj": 2} and told.layers == 4
    assert told.left_out["the output layer"] == {"lm_head": 1}
    assert told.left_out["not in --targets q_proj,up_proj"]["self_attn.k_proj"] == 2
    pooled = load_base(ModelSpec(str(tiny_bert), "classification", 2, True, 0), meta=True)
    told = what_is_adapted(pooled, adaptable_layers(pooled, "all-linear"), "all-linear")
    assert told.left_out == {
        "not used where tokens are averaged": {"encoder.pooler.dense": 1},
        "the head, trained whole": {"classifier": 1},
    }


def test_layers_that_meet_no_batch_and_experts_are_told() -> None:
    with torch.device("meta"):
        deberta = hf.DebertaV2ForMaskedLM(
            hf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"])
        )
        mixture = hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**SMALL, num_experts=2, moe_intermediate_size=8, num_key_value_heads=1, head_dim=8)
        )
    told = what_is_adapted(deberta, adaptable_layers(deberta, "all-linear"), "all-linear")
    assert told.left_out["they also meet an input without a batch axis"] == {
        **{f"attention.self.{name}": 2 for name in ("query_proj", "key_proj", "pos_key_proj", "pos_query_proj")}
    }
    both = {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 2}
    told = what_is_adapted(mixture, adaptable_layers(mixture, "q_proj"), "q_proj")
    assert told.left_out["experts that cannot be taken apart"] == both
    unfuse(mixture)
    told = what_is_adapted(mixture, adaptable_layers(mixture, "q_proj"), "q_proj")
    assert told.left_out["not in --targets q_proj"].items() >= {name: 4 for name in both}.items()


@pytest.mark.parametrize("targets", ["lm_head", "lm_head,up_proj", ".*o_proj|.*lm_head", ".*(lm_head|q_proj)"])
def test_the_output_layer_is_refused_with_the_reason(targets: str) -> None:
    with pytest.raises(InputError, match="means lm_head: the output layer is never adapted: the loss reads its weight"):
        chosen_layers(llama(), targets)


SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 8, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 2, "head_dim": 8},
    "granitemoe": {"num_local_experts": 2},
}
EACH = {f"experts.{place}.{part}" for place in (0, 1) for part in ("gate_up_proj", "down_proj")}
MEANT: dict[str, set[str]] = {
    "all-linear": {"q_proj", *EACH},
    SEVEN: {"q_proj", *EACH},
    ".*_proj": {"q_proj", *EACH},
    ".*experts.*": EACH,
    "mlp.experts.down_proj": {"experts.0.down_proj", "experts.1.down_proj"},
    "experts.1.up_proj": {"experts.1.gate_up_proj"},
}


def mixture(kind: str, **more: Any) -> Any:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(
            hf.AutoConfig.for_model(kind, **SMALL, num_key_value_heads=1, **more)
        )


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("targets", MEANT)
def test_experts_are_meant_by_the_names_that_peft_and_other_models_have(kind: str, targets: str) -> None:
    """The first layer's; of the others as many."""
    model = mixture(kind, **MIXTURES[kind])
    unfuse(model)
    block = "block_sparse_moe." if kind == "granitemoe" else "mlp."
    chosen = chosen_layers(model, targets.replace("mlp.", block))
    first = {name.removeprefix("model.layers.0.") for name in chosen if name.startswith("model.layers.0.")}
    assert {name for name in first if "experts." in name} == {f"{block}{name}" for name in MEANT[targets] & EACH}
    assert ("self_attn.q_proj" in first) == ("q_proj" in MEANT[targets]) and len(chosen) == 2 * len(first)
    assert not [name for name in chosen if "router" in name or name.rpartition(".")[2].endswith("gate")]


@pytest.mark.parametrize("targets", ["shared_expert_gate", "q_proj,shared_expert_gate"])
def test_a_router_is_refused_with_the_reason(targets: str) -> None:
    model = mixture("qwen2_moe", **MIXTURES["qwen2_moe"])
    unfuse(model)
    with pytest.raises(InputError, match=r"shared_expert_gate and 1 more: it cannot be adapted, a router stays as"):
        chosen_layers(model, targets)


OTHERWISE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama4": (
        lambda: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(
                **SMALL | {"head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2}, num_key_value_heads=1
            )
        ),
        r".*experts\..*",
        "feed_forward.experts.gate_up_proj and 3 more",
    ),
    "jetmoe": (
        lambda: hf.JetMoeForCausalLM(hf.JetMoeConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1)),
        r".*put_linear.*",
        "mlp.input_linear.weight and 3 more",
    ),
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_experts_that_are_held_in_another_way_are_refused_by_name(kind: str) -> None:
    make, targets, named = OTHERWISE[kind]
    with torch.device("meta"):
        model = make()
    unfuse(model)
    for given in ("all-linear", targets):
        with pytest.raises(InputError, match=f"of this mixture of experts it means .*{named}: experts that are one"):
            chosen_layers(model, given)


def test_experts_side_by_side_in_a_matrix_are_no_layers_either() -> None:
    with torch.device("meta"):
        block = nn.ModuleDict({"experts": DbrxExperts(hf.DbrxConfig(ffn_config={"ffn_hidden_size": 8}).ffn_config)})
    unfuse(block)
    assert expert_tensors(block) == [f"experts.mlp.{name}" for name in ("w1", "v1", "w2")]
    layers = [nn.Linear(2, 2), Conv1D(2, 2), nn.Embedding(2, 2)]
    assert not expert_tensors(nn.ModuleDict({"experts": nn.ModuleList(layers)}))


def test_a_tower_for_images_is_left_out_and_named() -> None:
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(text_config=text, vision_config={**seen, "image_size": 28, "patch_size": 14})
        )
    chosen = adaptable_layers(model, "all-linear")
    assert chosen and not any("vision" in name for name in chosen)
    left = what_is_adapted(model, chosen, "all-linear").left_out["no text goes through them"]
    assert sum(left.values()) >= 6


def test_header_facts_and_summary_of_a_run_and_doctor_say_it(
    tiny_bert: Path, animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"--model {tiny_bert} --data {animals} --clients 2 --sample 2 --rounds 1 --partition iid --method lora"
    given += " --rank 2 --engine local --threads 1 --dtype float32 --public-examples 4 --targets value,key --out"
    assert main([*given.split(), str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    told = read_run(tmp_path / "run")[0]["adapted"]
    assert told["layers"] == 4 and told["types"] == {"attention.self.key": 2, "attention.self.value": 2}
    assert told["words"].startswith("4 layers: 2 attention.self.key, 2 attention.self.value; left out: ")
    assert told["words"] in shown and "(the head, trained whole)" in shown
    assert json.loads((tmp_path / "run" / "facts.json").read_text(encoding="utf-8"))["adapted"] == told
    assert doctor.main([*given.split(), str(tmp_path / "other"), "--json"]) == 0
    assert told["words"] in capsys.readouterr().out
