"""What `fedlotr export` hands on is the run's model, says how it was made, and names no place on this machine."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedlotr import SimulationConfig, cli, run_simulation
from fedlotr.run.resumption import saved_configuration
from tests.adapters.test_reduce import lora
from tests.support import TEXTS, assert_logits, our_logits, plain_logits, read_run


@pytest.fixture(scope="module")
def options(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    return {
        **{"model": str(tiny_bert), "data": str(animals), "clients": 4, "sample": 2, "rounds": 3, "rank": 4},
        **{"public_examples": 16, "engine": "local", "threads": 1, "dtype": "float32", "lr": 0.02, "head_lr": 0.02},
        **{"method": "fed-sb", "quiet": True},
    }


@pytest.fixture(scope="module")
def run(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished one, with the adapter of each round."""
    out = tmp_path_factory.mktemp("here") / "run"
    run_simulation(SimulationConfig(**options, adapter_every=1, out=out))
    return out


def export(*words: object) -> int:
    return cli.main(["export", *map(str, words)])


def places(*paths: Path) -> Iterator[bytes]:
    """What no file that is handed on may hold."""
    for path in (*paths, Path.home(), Path.cwd(), Path(sys.prefix), Path(os.environ.get("TMPDIR", "/tmp"))):
        yield str(path).encode()


def assert_placeless(folder: Path, *paths: Path) -> None:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for place in places(*paths):
            assert place not in content, f"{file.name} names {place.decode()}"


@pytest.mark.parametrize("to", ["peft", "merged", "card"])
def test_no_file_that_is_handed_on_names_a_place_on_this_machine(
    to: str, run: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(run, "--to", to, "--out", out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert_placeless(out, run.parent, Path(options["model"]).parent, Path(options["data"]).parent)
    assert {"peft": "adapter_model.safetensors", "merged": "config.json", "card": "README.md"}[to] in {
        path.name for path in out.iterdir()
    }
    assert not [path for path in tmp_path.iterdir() if path != out], "nothing half made is left"
    assert export(run, "--to", to, "--out", out) == 2
    assert "there is something already" in capsys.readouterr().err


def test_the_card_says_what_the_run_says(run: Path, tmp_path: Path) -> None:
    assert export(run, "--to", "card", "--out", tmp_path / "card", "--base", "org/tiny") == 0
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    card, (summary, rows) = ModelCard(text, ignore_metadata_errors=False), read_run(run)
    data = card.data.to_dict()
    assert (data["base_model"], data["library_name"], data["pipeline_tag"]) == (
        "org/tiny",
        "peft",
        "text-classification",
    )
    told = data["fedlotr"]
    assert (told["method"], told["rounds"], told["clients"], told["rank"]) == ("fed-sb", 3, 4, 4)
    assert told["wire_bytes"] == summary["communication"]["total_wire_bytes"]
    assert told["update_bytes"] == summary["communication"]["upload_payload_bytes_per_client_round"]
    assert told["aggregation_error_max"] == summary["aggregation_error_max"]
    assert told["data"] == summary["data"] and "privacy" not in told and told["initial"] == summary["initial"]
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {name: rows[-1][name] for name in ("accuracy", "loss")}
    assert f"accuracy {rows[-1]['accuracy']:.4f} (before training {summary['initial']['accuracy']:.4f})" in text
    assert "none is promised" in text and f"{summary['aggregation_error_max']:.1e}" in text
    # Of an earlier round, what was true then.
    assert export(run, "--to", "card", "--out", tmp_path / "first", "--round", 1) == 0
    first = ModelCard((tmp_path / "first" / "README.md").read_text(encoding="utf-8"))
    assert first.data.to_dict()["fedlotr"]["rounds"] == 1 and "base_model" not in first.data.to_dict()
    assert first.data.to_dict()["fedlotr"]["wire_bytes"] == rows[0]["bytes_up"] + rows[0]["bytes_down"]
    assert first.data.eval_results[0].metric_value == rows[0]["accuracy"]


def test_the_card_of_a_private_run_has_its_epsilon(options: dict[str, Any], tmp_path: Path) -> None:
    given = {**options, "method": "lora-xs", "privacy": "client", "noise_multiplier": 2.0, "label_names": "0,1"}
    given |= {"public_eval": True, "eval_data": None, "clip_norm": 1.0, "sample": 2, "rounds": 2}
    given.pop("public_examples")
    run_simulation(SimulationConfig(**{k: v for k, v in given.items() if v is not None}, out=tmp_path / "run"))
    assert export(tmp_path / "run", "--to", "card") == 0
    text = (tmp_path / "run" / "export" / "card" / "README.md").read_text(encoding="utf-8")
    summary, _ = read_run(tmp_path / "run")
    told = ModelCard(text).data.to_dict()["fedlotr"]["privacy"]
    assert told == {"unit": "client", **{name: summary["privacy"][name] for name in ("epsilon", "delta")}}
    assert f"one client: epsilon {told['epsilon']:.3g} at delta" in text and "wire_bytes" not in text


KINDS = ("classifier", "mean-pooled", "regression", "language-model", "carried", "4bit")


def of_kind(kind: str, options: dict[str, Any], folder: Path, gpt2: Path) -> dict[str, Any]:
    """The options of a run of one kind."""
    if kind == "mean-pooled":
        model = shutil.copytree(options["model"], folder / "encoder")
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
        (model / "modules.json").write_text("[]", encoding="utf-8")
        return {**options, "model": str(model)}
    if kind == "regression":
        (folder / "scores").mkdir()
        for split, first in (("train", 0), ("test", 60)):
            rows = [{"text": f"a text of {n}", "label": n / 7 + 0.5} for n in range(first, first + 40)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "scores" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        return {**options, "data": str(folder / "scores")}
    if kind == "language-model":
        (folder / "texts").mkdir()
        for split, first in (("train", 0), ("test", 60)):
            rows = [{"prompt": f"What is {n}?", "answer": f"It is {n}."} for n in range(first, first + 40)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "texts" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        return {**options, "data": str(folder / "texts"), "model": str(gpt2), "samples": 0, "partition": "iid"}
    if kind == "carried":
        return {**options, "method": "lora", "strategy": "fedex-lora"}
    pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
    return {**options, "quantize": "4bit"} if kind == "4bit" else options


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_merged_weights_give_the_runs_logits(
    kind: str, options: dict[str, Any], tiny_gpt2: Path, tmp_path: Path
) -> None:
    given = of_kind(kind, {**options, "rounds": 2}, tmp_path, tiny_gpt2)
    run_simulation(SimulationConfig(**given, out=tmp_path / "run"))
    assert export(tmp_path / "run", "--to", "merged") == 0
    merged = tmp_path / "run" / "export" / "merged"
    assert not (merged / "adapter_config.json").exists()
    (found,) = plain_logits(merged)
    config = saved_configuration(tmp_path / "run")
    assert config is not None
    if kind != "regression":  # whose exported head is in the labels' own unit
        texts = [TEXTS[0][:1]] if kind == "language-model" else TEXTS
        assert_logits(found, our_logits(config, tmp_path / "run", texts))
    (plain,) = plain_logits(tmp_path / "run" / "adapter")
    if kind != "4bit":  # whose README's lines load the base as it is
        assert_logits(found, plain)
    assert_placeless(merged, tmp_path, Path(options["model"]).parent)
    assert export(tmp_path / "run", "--to", "merged", "--dtype", "bfloat16", "--out", tmp_path / "half") == 0
    assert {str(t.dtype) for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {"torch.bfloat16"}


@pytest.mark.parametrize("more", [{}, {"method": "lora", "strategy": "fedex-lora"}, {"method": "lotr", "basis": "svd"}])
def test_a_checkpoint_gives_the_adapter_that_the_run_wrote_after_that_round(
    more: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_simulation(SimulationConfig(**{**options, **more}, adapter_every=1, out=out))
    written = {number: out / "adapters" / f"round-{number:05d}" for number in (1, 2, 3)}
    names = ("adapter_model.safetensors", "adapter_config.json", "README.md")
    assert all((written[3] / name).read_bytes() == (out / "adapter" / name).read_bytes() for name in names)
    before = {name: (written[2] / name).read_bytes() for name in names}
    assert before["adapter_model.safetensors"] != (written[3] / "adapter_model.safetensors").read_bytes()
    assert export(out, "--to", "peft", "--round", 2, "--out", tmp_path / "kept") == 0
    shutil.rmtree(out / "adapters")
    assert export(out, "--to", "peft", "--round", 2, "--out", tmp_path / "again") == 0
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()
    assert (tmp_path / "again" / names[0]).read_bytes() == before[names[0]]


def test_what_cannot_be_handed_over_is_refused_in_a_line(
    options: dict[str, Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        assert export(*words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and len(said.splitlines()) == 1
        return said

    assert "is not a run" in refused(tmp_path, "--to", "card")
    assert "has 3 rounds so far" in refused(run, "--to", "card", "--round", 7)
    assert "name the repository" in refused(run, "--to", "hub")
    assert "give --to merged" in refused(run, "--to", "peft", "--dtype", "float16")
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "adapters")
    assert "choose one of 2, 3" in refused(copy, "--to", "card", "--round", 1)
    shutil.rmtree(copy / "adapter")
    assert "--round N takes a round's (checkpoints: 2, 3)" in refused(copy, "--to", "peft")
    other = shutil.copytree(options["model"], tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is not that of the model" in refused(copy, "--to", "peft", "--round", 2, "--model", other)
    assert "no such folder" in refused(copy, "--to", "peft", "--round", 2, "--data", tmp_path / "none")


def test_ranks_are_lowered_and_made_one_and_the_error_is_said(
    options: dict[str, Any], tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = lora(AutoModelForCausalLM.from_pretrained(tiny_gpt2), tmp_path / "lora", c_attn=12)
    given = of_kind("language-model", {**options, "rounds": 1, "method": "lora-xs"}, tmp_path, tiny_gpt2)
    given["targets"] = ".*(c_attn|c_proj)"
    run_simulation(SimulationConfig(**given, init_adapter=str(start), out=tmp_path / "run"))
    readme = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    ranks = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert ranks["rank_pattern"] and "--uniform-rank" in readme and "llama.cpp" in readme
    assert export(tmp_path / "run", "--to", "peft", "--uniform-rank", "--base", tiny_gpt2) == 0
    uniform = tmp_path / "run" / "export" / "peft"
    config = json.loads((uniform / "adapter_config.json").read_text(encoding="utf-8"))
    assert not config["rank_pattern"] and config["r"] == config["lora_alpha"] == max(ranks["rank_pattern"].values())
    assert "llama.cpp" not in (uniform / "README.md").read_text(encoding="utf-8")
    before, after = plain_logits(tmp_path / "run" / "adapter", uniform)
    assert_logits(after, before)
    capsys.readouterr()
    assert export(tmp_path / "run", "--to", "peft", "--rank", 2, "--out", tmp_path / "small") == 0
    said = capsys.readouterr().err
    found = re.search(r"relative Frobenius error (\S+) in all, (\S+) at most, in (\S+)", said)
    assert found is not None and 0 < float(found[1]) < float(found[2].rstrip(",")) < 1
    assert found[0] in (tmp_path / "small" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert max(t.shape[0] for name, t in tensors.items() if "lora_A" in name) == 2
    assert torch.isfinite(next(iter(tensors.values()))).all()
