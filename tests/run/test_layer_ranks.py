"""Ranks and scales of single layers: trained, billed and exported as they were asked for, by whatever method."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedlotr import SimulationConfig
from fedlotr.commands import doctor
from fedlotr.communication.ledger import read_ledger
from fedlotr.config.configuration import load
from fedlotr.errors import InputError
from fedlotr.run.checking import check
from fedlotr.run.resumption import saved_configuration
from fedlotr.simulate import main
from tests.support import TEXTS, assert_logits, our_logits, plain_logits, read_run

PATTERNS = ["--rank-pattern", r"query|attention\.output\.dense=8", "--rank-pattern", "value=2"]
RANKS = {"query": 8, "key": 4, "value": 2, "attention.output.dense": 8, "intermediate.dense": 4}


@pytest.fixture
def words(tiny_bert: Path, animals: Path) -> list[str]:
    """A run of a second."""
    given = f"--model {tiny_bert} --data {animals} --clients 4 --sample 3 --rounds 2 --rank 4 --public-examples 16"
    more = "--engine local --threads 1 --dtype float32 --partition iid --max-examples 6"
    return [*given.split(), *more.split()]


CASES = {
    "fed-sb": "--method fed-sb",
    "depth": "--method lotr --client-rank 2,8,4 --codec int8",
    "trained together": "--method lotr-trained",
    "blocks": "--method ravan --rank-pattern key=12",
    "mixed": "--method tiny-lora",
    "lora": "--method lora --client-rank 8,3 --alpha 8 --alpha-pattern key=2 --rslora",
    "turns": "--method rolora --codec top-k:0.2",
    "flora": "--method lora --strategy flora --client-rank 2,8",
    "fedex": "--method lora --strategy fedex-lora",
    "flexlora": "--method lora --strategy flexlora",
    "hetlora": "--method lora --strategy hetlora --client-rank 8,2",
    "own factors": "--method fedsa-lora",
}


@pytest.mark.parametrize("case", CASES)
def test_layers_have_the_ranks_that_their_patterns_say_and_doctor_bills_them(
    case: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patterns = [word.replace("value=2", "value=4") for word in PATTERNS] if case == "blocks" else PATTERNS
    given = [*words, *patterns, *CASES[case].split(), "--out"]
    assert doctor.main([*given, str(tmp_path / "other"), "--json"]) == 0
    needs = json.loads(capsys.readouterr().out)["needs"]
    assert main([*given, str(tmp_path / "run"), "--quiet"]) == 0, capsys.readouterr().err
    summary, _ = read_run(tmp_path / "run")
    assert summary["failed_clients"] == 0
    assert summary["trained_numbers"] == needs["trained_adapter"] + needs["trained_head"]
    traffic = summary["communication"]
    sent = sum(entry.payload_bytes for entry in read_ledger(tmp_path / "run" / "ledger") if entry.kind != "control")
    assert sent == needs["total_bytes"] or case == "hetlora"
    if case != "hetlora":
        assert traffic["upload_payload_bytes_per_client_round"] == pytest.approx(needs["upload_bytes"], rel=1e-12)
        assert traffic["download_payload_bytes_per_client_round"] == pytest.approx(needs["download_bytes"], rel=1e-12)
    if CASES[case].startswith("--method lora ") or case in ("turns", "own factors", "flora", "trained together"):
        assert summary["aggregation_error_max"] is None or summary["aggregation_error_max"] < 2
    else:
        assert summary["aggregation_error_max"] < 1e-6
    config = saved_configuration(tmp_path / "run")
    assert config is not None and check(config).core is not None
    if case != "own factors":
        (plain,) = plain_logits(tmp_path / "run" / "adapter")
        assert_logits(plain, our_logits(config, tmp_path / "run", TEXTS))
    if case in ("flora", "fedex"):  # they carry what they merge
        return
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ranks = RANKS | ({"value": 4, "key": 12} if case == "blocks" else {})
    for end, rank in ranks.items():
        found = {len(tensor) for name, tensor in tensors.items() if name.endswith(f"{end}.lora_A.weight")}
        assert found == {rank}, end


def test_patterns_and_scales_are_those_of_peft(words: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    """PEFT, given the same patterns, has the same ranks and scales; and the export's product is that of the run."""
    given = [*words, "--method", "lora", *PATTERNS, "--alpha", "8", "--alpha-pattern", "value|key=6", "--rslora"]
    core = check(load([*given, "--out", str(tmp_path / "run")])).core
    assert core is not None
    peft = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tiny_bert),
        LoraConfig(
            r=4,
            lora_alpha=8,
            use_rslora=True,
            target_modules="all-linear",
            rank_pattern={r"query|attention\.output\.dense": 8, "value": 2},
            alpha_pattern={"value|key": 6},
        ),
    )
    layers = {name: module for name, module in peft.named_modules() if hasattr(module, "lora_A")}
    compared = 0
    for name in core.target_modules or []:
        layer: Any = layers[f"base_model.model.{name}"]
        assert (core.rank_of(name), core.scaling_of(name)) == (layer.r["default"], layer.scaling["default"]), name
        compared += 1
    assert compared == 13


def test_narrow_layers_take_the_rank_that_they_have_room_for_where_that_is_asked(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, "--method", "lora-xs", "--rank", "40", "--tie", "layer", "--out", str(tmp_path / "run")]
    assert main([*given, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"--rank 40: above the width 32 of \S+query; choose a rank of at most 32, for that layer", said)
    assert "--rank-pattern 'query=32', or give --cap-rank" in said
    assert main([*given, "--cap-rank", "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "facts.json").read_text(encoding="utf-8"))["trained_adapter"] == 13 * 32**2
    (plain,) = plain_logits(tmp_path / "run" / "adapter")
    config = saved_configuration(tmp_path / "run")
    assert config is not None
    assert_logits(plain, our_logits(config, tmp_path / "run", TEXTS))


WRONG = [
    (["--rank-pattern", "k_porj=8"], "--rank-pattern k_porj=8: 'k_porj' matches no layer that is adapted; "),
    (["--rank-pattern", "query|kez=8"], "--rank-pattern query|kez=8: 'kez' matches no layer that is adapted; did you"),
    (["--alpha-pattern", "valeu=3"], "--alpha-pattern valeu=3: 'valeu' matches no layer that is adapted; did you mean"),
    (["--rank-pattern", "query"], "--rank-pattern query: expected a pattern of layers' names and a number"),
    (["--rank-pattern", "(query=8"], "no regular expression of layers' names"),
    (["--rank-pattern", "query=x"], "--rank-pattern"),
    (["--rank-pattern", "query=40"], "above the width 32 of "),
    (["--rank-pattern", r"layer\.0\..*query=2", "--method", "lotr"], "--tie type: layers that share one pair need one"),
    (
        ["--rank-pattern", "query=2", "--tie", "all", "--targets", "query,key"],
        "layers that share one pair need one rank",
    ),
    (["--rank-pattern", "query=6", "--method", "ravan"], "rank 6 cannot be cut into the 4 blocks"),
    (["--rank-pattern", "query=8", "--method", "full"], "this method trains whole matrices, without factors"),
    (["--rank-pattern", "query=8", "--method", "head"], "this method adapts no layer"),
    (["--rank-pattern", "query=8", "--client-rank", "2,4"], "the largest must be --rank; give --rank 4, or one of 8"),
    (["--rslora"], "it says what alpha is divided by; give --alpha"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_a_pattern_that_cannot_hold_is_refused_by_name(
    options: list[str], said: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *options, "--out", str(tmp_path / "run"), "--quiet"]) == 2
    found = capsys.readouterr().err
    assert said in found and not (tmp_path / "run").exists(), found


def test_a_runs_own_configuration_and_python_take_patterns_too(words: list[str], tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert main([*words, *PATTERNS, "--method", "lora-xs", "--out", str(first), "--quiet"]) == 0
    assert main([str(first / "config.yaml"), "--out", str(again), "--quiet"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / "adapter" / name).read_bytes() == (again / "adapter" / name).read_bytes()
    config = saved_configuration(first)
    assert config is not None and config.rank_pattern == {r"query|attention\.output\.dense": 8, "value": 2}
    with pytest.raises(InputError, match="rank_pattern"):
        SimulationConfig(rank_pattern={"query": 0})
