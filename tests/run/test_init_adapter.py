"""A run that starts from a LoRA starts where plain PEFT has it, and exports one adapter that contains both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from fedlotr import SimulationConfig, run_simulation
from fedlotr.adapters import CORES, bases_of
from fedlotr.adapters.bases import Factors
from fedlotr.adapters.layer import Basis, FactoredLayer
from fedlotr.adapters.start import carrying
from fedlotr.data import encode
from fedlotr.errors import InputError
from fedlotr.run.checking import check
from fedlotr.run.preparation import prepare
from fedlotr.run.resumption import saved_configuration
from fedlotr.simulate import main
from fedlotr.training.examples import IGNORED
from fedlotr.training.model import TrainableModel
from tests.models.test_models import pooled
from tests.support import TEXTS, assert_logits, assert_within, float32_bound, our_logits, plain_logits, read_run

WEIGHTS = "adapter_model.safetensors"


def random_lora(model: Any, folder: Path, **config: Any) -> Path:
    """A LoRA of random A and B (and head), as plain PEFT saves it."""
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        adapted = get_peft_model(model, LoraConfig(**(options | config)))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data = (0.3 if "lora_" in name else 1.0) * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return folder


def classifier(bert: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2, pad_token_id=0, dtype=torch.float32)


@pytest.fixture(scope="session")
def bert_lora(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks and scales, with a head."""
    return random_lora(
        classifier(tiny_bert),
        tmp_path_factory.mktemp("lora") / "bert",
        task_type=TaskType.SEQ_CLS,
        target_modules=["query", "output.dense"],
        rank_pattern={"query": 2},
        alpha_pattern={"layer.1.attention.self.query": 5},
    )


@pytest.fixture
def options(tiny_bert: Path, animals: Path) -> dict[str, Any]:
    """A run of a second."""
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 4,
        "sample": 3,
        "rounds": 1,
        "rank": 4,
        "public_examples": 16,
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
        "lr": 0.01,
        "head_lr": 0.03,
    }


def words(options: dict[str, Any]) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]


def assert_exported_whole(run: Path, texts: list[list[str]], start: Path) -> None:
    """Plain PEFT on the plain base gives the trained model's logits."""
    config = saved_configuration(run)
    assert config is not None
    (plain,) = plain_logits(run / "adapter")
    ours = our_logits(config, run, texts)
    assert_logits(plain, ours)
    held, before = load_file(run / "adapter" / WEIGHTS), load_file(start / WEIGHTS)
    for name in (name for name in before if name.endswith(".lora_A.weight")):
        assert torch.equal(held[name][: len(before[name])], before[name]), "stacked on top, to the bit"


@pytest.mark.parametrize("method", ["fed-sb", "lora"])
def test_a_classifier_starts_where_plain_peft_has_it_and_exports_both(
    method: str, bert_lora: Path, options: dict[str, Any], animals: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = [*words(options), "--basis-codec=float32"]  # so few rows and steps that what they learn hangs on a hair
    assert main([*given, f"--method={method}", f"--init-adapter={bert_lora}", f"--out={run}", "--quiet"]) == 0
    rows = [json.loads(line) for line in (animals / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    tokenizer.pad_token_id, tokenizer.padding_side = 0, "right"
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    model = PeftModel.from_pretrained(classifier(Path(options["model"])), str(bert_lora)).eval()
    with torch.no_grad():
        loss = model(**batch, labels=torch.tensor([row["label"] for row in rows])).loss
    summary, _ = read_run(run)
    assert summary["initial"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert summary["final"]["loss"] < summary["initial"]["loss"] and summary["failed_clients"] == 0
    assert summary["aggregation_error_max"] <= 1e-6 or method == "lora"
    assert "the head is the adapter's" in (run / "log.txt").read_text(encoding="utf-8")
    assert_exported_whole(run, TEXTS, bert_lora)


def test_a_language_model_of_conv1d_starts_where_plain_peft_has_it_and_exports_both(
    tiny_gpt2: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    lora = random_lora(
        base,
        tmp_path / "lora",
        task_type=TaskType.CAUSAL_LM,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        use_rslora=True,
    )
    texts = ["Once there was a cat.", "The dog ran and ran.", "A bird sat there."] * 8
    data = tmp_path / "tales"
    data.mkdir()
    for split, count in (("train", 24), ("test", 3)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[:count]]
        (data / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    run = tmp_path / "run"
    given = options | {"model": tiny_gpt2, "data": data, "method": "fed-sb", "partition": "iid", "public_examples": 4}
    assert main([*words(given), f"--init-adapter={lora}", f"--out={run}", "--quiet"]) == 0
    config = saved_configuration(run)
    assert config is not None
    checked = check(config)
    examples = encode(checked.task, checked.source.test, checked.tokenizer, config.max_length)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32), str(lora)
    ).eval()
    total, tokens = 0.0, 0
    for row in range(len(examples)):
        batch = examples.batch(np.array([row]), checked.spec.pad_id)
        with torch.no_grad():
            logits = plain(batch.input_ids).logits[0]
        total += float(cross_entropy(logits, batch.labels[0], ignore_index=IGNORED, reduction="sum"))
        tokens += int((batch.labels != IGNORED).sum())
    assert read_run(run)[0]["initial"]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert_exported_whole(run, [TEXTS[0][:1]], lora)


def test_a_run_starts_from_another_run(bert_lora: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """Twice, so that what is stacked is stacked again; svd bases, which clients make again by themselves."""
    first = run_simulation(
        SimulationConfig(**options, method="lora-xs", init_adapter=str(bert_lora), out=tmp_path / "a")
    )
    second = run_simulation(
        SimulationConfig(**options, method="lora-xs", init_adapter=str(first.run_dir), out=tmp_path / "b")
    )
    assert second.summary["initial"]["loss"] == pytest.approx(first.loss, rel=1e-5)
    assert second.summary["bases_sha256"] == first.summary["bases_sha256"], "of W, which is never written"
    assert_exported_whole(second.run_dir, TEXTS, first.run_dir / "adapter")


def test_a_sentence_encoder_starts_from_a_run_that_trained_its_head_alone(
    tiny_bert: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """Whose adapter has a placeholder of zeros for a layer, and its head in a file of its own."""
    encoder = pooled(tiny_bert, tmp_path / "encoder", "mean_tokens")
    given = options | {"model": str(encoder)}
    head = run_simulation(SimulationConfig(**given, method="head", out=tmp_path / "head"))
    again = {"method": "fed-sb", "init_adapter": str(head.run_dir)}
    first = run_simulation(SimulationConfig(**given | again, out=tmp_path / "a"))
    assert first.summary["initial"]["loss"] == head.loss
    again["init_adapter"] = str(first.run_dir / "adapter")
    second = run_simulation(SimulationConfig(**given | again, out=tmp_path / "b"))
    assert second.summary["initial"]["loss"] == pytest.approx(first.loss, rel=1e-5)
    assert_exported_whole(second.run_dir, TEXTS, first.run_dir / "adapter")


def test_the_heads_fit_and_update_bases_see_the_carried_model(
    bert_lora: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """The oracle is the LoRA without its head, merged into a base."""
    headless = with_tensors(
        bert_lora, tmp_path / "lora", lambda t: [t.pop(name) for name in [*t] if "classifier" in name]
    )
    merged = PeftModel.from_pretrained(classifier(Path(options["model"])), str(bert_lora)).merge_and_unload()
    merged.bert.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(options["model"]).save_pretrained(tmp_path / "merged")
    model, oracle, unlike = (
        prepare(check(SimulationConfig(**options | changes)), tmp_path / f"work-{at}").model
        for at, changes in enumerate([{"init_adapter": str(headless)}, {"model": str(tmp_path / "merged")}, {}])
    )
    for name in oracle.head_names:
        # One adds U V x beside W, the other has it rounded into W: in float32 the two fits were seen to end 1.2e-4
        # apart, of weights up to 0.17, and further iterations did not bring them together.
        torch.testing.assert_close(model.values()[name], oracle.values()[name], rtol=1e-2, atol=1e-3)
        assert not torch.allclose(model.values()[name], unlike.values()[name], rtol=1e-1, atol=1e-2)

    def apart(one: TrainableModel, other: TrainableModel) -> list[float]:
        """By layer how far the subspaces of B are apart, 0 to 1."""
        pairs = zip(bases_of(one.module).values(), bases_of(other.module).values(), strict=True)
        return [1 - float((a.B.T @ b.B).square().sum()) / a.B.shape[1] for a, b in pairs]

    assert max(apart(model, oracle)) < 0.01 and min(apart(model, unlike)) > 0.1


def test_a_head_for_other_labels_is_fitted_anew(
    tiny_bert: Path, options: dict[str, Any], bert_lora: Path, tmp_path: Path
) -> None:
    lora = changed(bert_lora, tmp_path / "lora")
    tensors = load_file(lora / WEIGHTS)
    for part in ("weight", "bias"):
        name = f"base_model.model.classifier.{part}"
        tensors[name] = torch.cat([tensors[name]] * 2)
    save_file(tensors, lora / WEIGHTS)
    run_simulation(SimulationConfig(**options, method="lotr", init_adapter=str(lora), out=tmp_path / "run"))
    assert "its head for 4 labels is left" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("conv", [False, True])
def test_a_carried_term_is_computed_disabled_merged_and_taken_out_again(conv: bool) -> None:
    torch.manual_seed(0)
    base = Conv1D(6, 5) if conv else nn.Linear(5, 6)
    weight = base.weight.detach().clone()
    w = weight.T if conv else weight
    x, v, u = torch.randn(3, 5), torch.randn(2, 5), torch.randn(6, 2)
    plain = base(x).detach()
    core, a, b = torch.randn(4, 4), torch.randn(4, 5), torch.randn(6, 4)
    moved = 0.5 * b.double().abs() @ core.double().abs() @ a.double().abs() + u.double().abs() @ v.double().abs()
    # W x, B C A, U V and what is added to what; a weight that is merged and taken out again is off by its roundings.
    bound = float32_bound(5 + 8 + 2 + 5, x.double().abs() @ (w.double().abs() + 2 * moved).T + base.bias.double().abs())
    apart = float32_bound(8 + 2 + 3, w.double().abs() + 2 * moved)
    with carrying(nn.Sequential(base), {"0": Factors(v, u)}):
        assert_within(base(x), plain.double() + x.double() @ (u.double() @ v.double()).T, bound)
    assert torch.equal(base(x), plain), "and gone again"
    basis = Basis(5, 6, 4, persistent=False)
    basis.A.copy_(a)
    basis.B.copy_(b)
    layer = FactoredLayer(base)
    layer.add("default", r=4, scaling=0.5, basis=basis, parameters={"C": core}, core=CORES["full"])
    layer.add_carry("default", v, u)
    layer.set_adapter(["default"])
    delta = 0.5 * b.double() @ core.double() @ a.double() + u.double() @ v.double()
    expected = plain.double() + x.double() @ delta.T
    assert_within(layer(x), expected, bound)
    assert_within(layer.get_delta_weight("default"), delta, apart)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), plain)
    layer.enable_adapters(True)
    layer.merge()
    merged = base.weight.T if conv else base.weight
    assert_within(merged, w.double() + delta, apart)
    assert_within(layer(x), expected, bound)
    layer.unmerge()
    assert_within(base.weight.T if conv else base.weight, w, apart)
    assert_within(layer(x), expected, bound)
    layer.delete_adapter("default")
    assert layer.carry("default") is None


def changed(folder: Path, at: Path, **config: object) -> Path:
    """A copy of an adapter with another adapter_config.json."""
    shutil.copytree(folder, at)
    before = json.loads((at / "adapter_config.json").read_text(encoding="utf-8"))
    (at / "adapter_config.json").write_text(json.dumps(before | config), encoding="utf-8")
    return at


def with_tensors(folder: Path, at: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(folder, at)
    tensors = load_file(at / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, at / WEIGHTS)
    return at


def without_weights(folder: Path, at: Path, *left: str) -> Path:
    shutil.copytree(folder, at)
    (at / WEIGHTS).unlink()
    for name in left:
        (at / name).write_bytes(b"pickled")
    return at


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path, Path], Path], dict[str, Any], list[str]]] = {
    "no folder": (lambda lora, at: at, {}, ["no such folder"]),
    "no adapter": (lambda lora, at: lora.parent, {}, ["no adapter_config.json there"]),
    "no weights": (without_weights, {}, [f"no {WEIGHTS} there; expected"]),
    "pickled": (lambda lora, at: without_weights(lora, at, "adapter_model.bin"), {}, ["pickled", "save it again"]),
    "torn": (lambda lora, at: without_weights(lora, at, WEIGHTS), {}, [f"its {WEIGHTS} cannot be read"]),
    "another type": (lambda lora, at: changed(lora, at, peft_type="LOHA"), {}, ["'LOHA'", "only LORA"]),
    "dora": (lambda lora, at: changed(lora, at, use_dora=True), {}, ["more than a plain LoRA (use_dora)"]),
    "biases": (lambda lora, at: changed(lora, at, bias="all"), {}, ["bias='all'"]),
    "pissa": (lambda lora, at: changed(lora, at, init_lora_weights="pissa"), {}, ["'pissa' changes the base"]),
    "another rank": (lambda lora, at: changed(lora, at, rank_pattern={}), {}, ["have rank 2", "says r 3"]),
    "a broken pattern": (
        lambda lora, at: changed(lora, at, alpha_pattern={"(": 2}),
        {},
        ["no rank and alpha for bert.encoder.layer.0."],
    ),
    "no such layer": (
        lambda lora, at: with_tensors(
            lora, at, lambda t: t.update({k.replace("layer.1", "layer.7"): t.pop(k) for k in [*t] if "layer.1" in k})
        ),
        {},
        ["the model has no layer bert.encoder.layer.7.", "take the model that the adapter"],
    ),
    "another shape": (
        lambda lora, at: with_tensors(lora, at, lambda t: t.update({QUERY: t[QUERY][:, :30]})),
        {},
        ["layer.0.attention.self.query is 30 in, 32 out and the model's (32, 32)"],
    ),
    "another module": (
        lambda lora, at: with_tensors(
            lora, at, lambda t: t.update({"base_model.model.bert.embeddings.LayerNorm.weight": torch.ones(32)})
        ),
        {},
        ["bert.embeddings.LayerNorm.weight: neither a LoRA of a linear layer nor the model's head"],
    ),
    "half a head": (
        lambda lora, at: with_tensors(lora, at, lambda t: t.pop("base_model.model.classifier.bias")),
        {},
        ["its head lacks classifier.bias"],
    ),
    "not finite": (
        lambda lora, at: with_tensors(lora, at, lambda t: t[QUERY].fill_(torch.nan)),
        {},
        ["query.lora_A.weight holds values that are not finite"],
    ),
    "targets": (lambda lora, at: lora, {"targets": ".*query"}, ["output.dense", "widen --targets"]),
    "head": (lambda lora, at: lora, {"method": "head"}, ["--method head adapts no layer"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_cannot_be_started_from_is_refused_by_name(
    kind: str, bert_lora: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, more, parts = REFUSED[kind]
    folder = make(bert_lora, tmp_path / "lora")
    assert main([*words(options | more), f"--init-adapter={folder}", f"--out={tmp_path / 'run'}", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --init-adapter {folder}: "), line
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists(), "before anything heavy"


def test_a_run_goes_on_from_its_adapter_and_is_refused_with_another(
    bert_lora: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    lora = changed(bert_lora, tmp_path / "lora")
    given = options | {"method": "lotr", "init_adapter": str(lora)}
    whole = run_simulation(SimulationConfig(**given | {"rounds": 2, "lr_schedule": "constant", "out": tmp_path / "w"}))
    given |= {"lr_schedule": "constant", "out": tmp_path / "run"}
    run_simulation(SimulationConfig(**given))
    resumed = run_simulation(SimulationConfig(**given | {"rounds": 2, "resume": True}))
    assert resumed.summary["trained_sha256"] == whole.summary["trained_sha256"]
    tensors = load_file(lora / WEIGHTS)
    tensors[QUERY][0, 0] += 1
    save_file(tensors, lora / WEIGHTS)
    with pytest.raises(InputError, match=r"--init-adapter .*lora: its content has changed since the run in"):
        run_simulation(SimulationConfig(**given | {"rounds": 3, "resume": True}))


def assert_goes_on(first: Path, second: Path, before: dict[str, Any]) -> None:
    """With what was learnt in the same factors: nothing is carried, and the rank is what it was."""
    assert read_run(second)[0]["initial"]["loss"] == pytest.approx(before["final"]["loss"], rel=1e-5)
    tensors, others = (load_file(run / "adapter" / WEIGHTS) for run in (first, second))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: t.shape for name, t in others.items()}
    assert any(not torch.equal(tensor, others[name]) for name, tensor in tensors.items()), "and it has learnt more"


SAME_FACTORS = {
    "update bases": {"method": "fed-sb"},
    "bases of W, another seed": {"method": "lora-xs", "alpha": 8.0},
    "a diagonal": {"method": "loldu"},
    "blocks": {"method": "ravan", "clients": 2, "sample": 2},
    "mixed": {"method": "tiny-lora"},
    "shared over depth, ranks by pattern": {"method": "lotr", "rank_pattern": {"query|key": 6}},
    "A and B": {"method": "lora", "alpha": 8.0},
    "in turns": {"method": "rolora"},
    "B alone": {"method": "ffa-lora"},
    "whole": {"method": "full"},
}


@pytest.mark.parametrize("case", SAME_FACTORS)
def test_a_run_of_the_same_factors_goes_on_instead_of_growing(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    given = options | SAME_FACTORS[case]
    first = run_simulation(SimulationConfig(**given, out=tmp_path / "a"))
    given |= {"init_adapter": str(first.run_dir)} | ({"seed": 1} if "another seed" in case else {})
    second = run_simulation(SimulationConfig(**given, out=tmp_path / "b"))
    assert "the run's factors go on with the adapter in 13 of 13 layers" in (second.run_dir / "log.txt").read_text(
        encoding="utf-8"
    )
    assert_goes_on(first.run_dir, second.run_dir, first.summary)
    (plain,) = plain_logits(second.run_dir / "adapter")
    config = saved_configuration(second.run_dir)
    assert config is not None
    assert_logits(plain, our_logits(config, second.run_dir, TEXTS))


def test_what_a_run_stacked_goes_on_and_what_it_carried_is_carried(
    bert_lora: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """A LoRA of rank 2 and 3 under cores of rank 4, and both again under the same cores: 6 and 7, not 10 and 11."""
    given = options | {"method": "lora-xs", "init_adapter": str(bert_lora)}
    first = run_simulation(SimulationConfig(**given, out=tmp_path / "a"))
    given["init_adapter"] = str(first.run_dir)
    second = run_simulation(SimulationConfig(**given, out=tmp_path / "b"))
    assert_goes_on(first.run_dir, second.run_dir, first.summary)
    resumed = run_simulation(SimulationConfig(**given | {"rounds": 2, "resume": True}, out=tmp_path / "b"))
    assert resumed.summary["rounds"] == 2 or len(resumed.history) == 2


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"strategy": "flora", "method": "lora"}, {"method": "fedsa-lora"}, {"rank": 5}],
    ids=["other bases", "merged each round", "factors that stay", "another rank"],
)
def test_other_factors_carry_the_adapter_as_ever(
    changes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    given = options | {"method": "lotr"}
    first = run_simulation(SimulationConfig(**given, out=tmp_path / "a"))
    second = run_simulation(SimulationConfig(**given | changes, init_adapter=str(first.run_dir), out=tmp_path / "b"))
    if "fedsa" not in str(changes):  # which is scored on rows of the clients
        assert second.summary["initial"]["loss"] == pytest.approx(first.loss, rel=1e-5)
    assert "go on with the adapter" not in (second.run_dir / "log.txt").read_text(encoding="utf-8")


def test_an_adapter_of_the_output_layer_is_refused_with_the_reason(
    stories: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    lora = random_lora(base, tmp_path / "lora", task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "lm_head"])
    (tmp_path / "tales").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"text": f"Once there were {n} cats."}) + "\n" for n in range(8)]
        (tmp_path / "tales" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    given = options | {"model": stories, "data": tmp_path / "tales", "partition": "iid", "public_examples": 0}
    given |= {"clients": 2, "sample": 2, "method": "lora"}
    assert main([*words(given), f"--init-adapter={lora}", f"--out={tmp_path / 'run'}", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "it adapts lm_head: the output layer is never adapted" in said and "widen" not in said, said
