"""Mixtures of experts as transformers 5 has them: runs that adapt the experts, or the layers beside them."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file

from fedlotr import cli
from fedlotr.simulate import main
from tests.support import read_run

SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
}
SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@pytest.fixture
def tales(tmp_path: Path) -> Path:
    (tmp_path / "tales").mkdir()
    for split, count in (("train", 16), ("test", 4)):
        lines = [json.dumps({"text": f"Once there were {n} cats and a dog."}) + "\n" for n in range(count)]
        (tmp_path / "tales" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "tales"


@pytest.fixture
def mixture(stories: Path, tmp_path: Path) -> Callable[[str], Path]:
    def save(kind: str) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **SMALL, **MIXTURES[kind]))
        base.save_pretrained(tmp_path / "model")
        hf.AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def words(folder: Path, tales: Path, out: Path, *more: str) -> list[str]:
    given = f"--model {folder} --data {tales} --partition iid --clients 4 --sample 4 --rounds 2 --rank 4 --lr 0.02"
    given += " --samples 0 --engine local --threads 1 --dtype float32 --max-length 16"
    return [*given.split(), "--out", str(out), *more]


def plain_loss(folder: Path, adapter: Path | None, tales: Path) -> float:
    """Over the target tokens of the test split, by plain transformers and PEFT."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer, losses = hf.AutoTokenizer.from_pretrained(folder), []
    for line in (tales / "test.jsonl").read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"][:, :16]
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize(
    ("kind", "targets", "method"),
    [
        ("mixtral", SEVEN, "lora"),
        ("mixtral", ".*experts.*", "fed-sb"),
        ("qwen2_moe", "all-linear", "fed-sb"),
        ("qwen3_moe", SEVEN, "lora"),
        ("gpt_oss", "mlp.experts.gate_up_proj,mlp.experts.down_proj", "lora"),
    ],
)
def test_a_run_trains_experts_and_leaves_an_adapter_that_plain_peft_loads(
    kind: str,
    targets: str,
    method: str,
    mixture: Callable[[str], Path],
    tales: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = mixture(kind)
    capsys.readouterr()
    public = "6" if method == "fed-sb" else "0"
    assert (
        main(
            words(
                folder,
                tales,
                tmp_path / "run",
                f"--method={method}",
                f"--public-examples={public}",
                "--targets",
                targets,
            )
        )
        == 0
    )
    shown = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "8 mlp.experts.gate_up_proj, 8 mlp.experts.down_proj" in shown and "sequences packed" in shown
    assert "2 mlp.shared_expert_gate (a router stays as it is)" in shown or kind != "qwen2_moe"
    summary, _ = read_run(tmp_path / "run")
    assert summary["failed_clients"] == 0 and summary["final"]["loss"] < summary["initial"]["loss"]
    adapter = tmp_path / "run" / "adapter"
    assert "adapts experts as PEFT's `target_parameters` do" in (adapter / "README.md").read_text(encoding="utf-8")
    assert plain_loss(folder, adapter, tales) == pytest.approx(summary["final"]["loss"], rel=1e-5)
    merged = tmp_path / "merged"
    assert cli.main(["export", str(tmp_path / "run"), "--to", "merged", "--out", str(merged)]) == 0
    assert plain_loss(merged, None, tales) == pytest.approx(summary["final"]["loss"], rel=1e-5)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert not any("router" in name or ".gate." in name for name in tensors)


def test_layers_beside_the_experts_are_those_of_the_run_in_plain_peft(
    mixture: Callable[[str], Path], tales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shared expert's too, which is no layer of the mixture for PEFT."""
    folder = mixture("qwen2_moe")
    layers = "q_proj,shared_expert.gate_proj,shared_expert.up_proj,shared_expert.down_proj"
    given = words(folder, tales, tmp_path / "run", "--method=lora", "--public-examples=0", "--targets", layers)
    assert main(given) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"8 mlp.experts.gate_up_proj, 8 mlp.experts.down_proj (not in --targets {layers})" in shown
    summary, _ = read_run(tmp_path / "run")
    found = plain_loss(folder, tmp_path / "run" / "adapter", tales)
    assert found == pytest.approx(summary["final"]["loss"], rel=1e-5) and found < summary["initial"]["loss"]


@pytest.mark.parametrize("targets", [".*experts.*", "shared_expert.up_proj"])
def test_opacus_whose_hooks_would_take_tokens_for_examples_is_refused(
    targets: str, mixture: Callable[[str], Path], tales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(mixture("qwen2_moe"), tales, tmp_path / "run", "--method=lora", "--targets", targets, "--quiet")
    private = ["--public-examples=0", "--privacy=example", "--epsilon=8", "--clip-norm=1", "--privacy-engine=opacus"]
    capsys.readouterr()
    assert main([*given, *private]) == 2
    said = capsys.readouterr().err
    assert "--privacy-engine opacus: model.layers.0.mlp." in said and "take each token for an example" in said


@pytest.mark.parametrize(("kind", "method"), [("mixtral", "lora"), ("gpt_oss", "lora-xs")])
def test_a_run_goes_on_from_the_experts_of_another(
    kind: str, method: str, mixture: Callable[[str], Path], tales: Path, tmp_path: Path
) -> None:
    """In its own factors, whose rank does not grow; another method carries them."""
    folder, runs = mixture(kind), [tmp_path / name for name in ("first", "second", "third")]
    layers = ["--targets", ".*experts.*", "--public-examples=0", "--quiet"]
    assert main(words(folder, tales, runs[0], *layers, f"--method={method}")) == 0
    assert main(words(folder, tales, runs[1], *layers, f"--method={method}", f"--init-adapter={runs[0]}")) == 0
    assert main(words(folder, tales, runs[2], *layers, "--method=lotr", f"--init-adapter={runs[1]}")) == 0
    summaries = [read_run(run)[0] for run in runs]
    for before, after in itertools.pairwise(summaries):
        assert after["initial"]["loss"] == pytest.approx(before["final"]["loss"], rel=1e-5)
    ranks = [json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))["r"] for run in runs]
    assert ranks == [4, 4, 8]
    found = plain_loss(folder, runs[2] / "adapter", tales)
    assert found == pytest.approx(summaries[2]["final"]["loss"], rel=1e-5)


def test_doctor_foretells_what_a_run_of_experts_sends(
    mixture: Callable[[str], Path], tales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mixture("mixtral")
    layers = ["--method=lora", "--targets", ".*experts.*", "--public-examples=0"]
    assert main(words(folder, tales, tmp_path / "run", *layers, "--quiet")) == 0
    summary, _ = read_run(tmp_path / "run")
    numbers = 2 * 4 * 4 * ((32 + 96) + (48 + 32))  # blocks, experts, rank; of both matrices d_in + d_out
    assert summary["communication"]["upload_payload_bytes_per_client_round"] == 4 * numbers
    capsys.readouterr()
    assert cli.main(["doctor", *words(folder, tales, tmp_path / "other", *layers)]) == 0
    assert f"{numbers:,} numbers" in re.sub(r"\s+", " ", capsys.readouterr().out)
    bill = ["cost", "--model", str(folder), "--rank=4", "--lora-rank=4", "--targets", ".*experts.*", "--json"]
    assert cli.main(bill) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["trained_numbers"] for row in found["rows"] if row["method"] == "lora"} == {numbers}


@pytest.mark.slow
@pytest.mark.serial
def test_experts_are_trained_by_two_workers_as_by_one(
    mixture: Callable[[str], Path], tales: Path, tmp_path: Path, ray_session: None
) -> None:
    folder, found = mixture("mixtral"), []
    for engine in (["--engine=local"], ["--engine=ray", "--workers=2"]):
        out = tmp_path / engine[0][2:].replace("=", "-")
        more = ["--method=lora", "--public-examples=0", "--targets=.*experts.*", "--cohort=2", "--quiet", *engine]
        assert main(words(folder, tales, out, *more)) == 0
        found.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
