"""Labels that are numbers on a scale: seen and said, learnt by squared error, scored and handed over in their unit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from fedlotr.commands import compare, grid
from fedlotr.models.loading import ModelSpec, load_base
from fedlotr.simulate import main
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.head import RIDGE, fit_head
from fedlotr.training.model import TrainableModel
from tests.support import plain_logits, read_run

WORDS = ("red", "blue", "green", "cat", "dog", "house", "sun", "moon", "tree", "river", "stone", "bird")


def write(folder: Path, *, unit: float = 50.0, least: float = 100.0, rows: int = 120) -> Path:
    """Texts whose label is the share of colours among their words, on a scale far from 0 to 1; a column client."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("test", 30)):
        texts = [rng.choice(WORDS, int(rng.integers(2, 9))).tolist() for _ in range(count)]
        held = [
            {
                "text": " ".join(words),
                "label": round(least + unit * sum(word in WORDS[:3] for word in words) / len(words), 3),
                "client": f"farm {at % 3}",
            }
            for at, words in enumerate(texts)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def pooled_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pooled") / "bert"
    shutil.copytree(tiny_bert, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    listed = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    return folder


def words(model: Path, data: Path, out: Path, *more: object) -> list[str]:
    common = f"--model {model} --data {data} --clients 3 --sample 3 --rounds 2 --engine local --threads 1 --rank 4"
    common += f" --dtype float32 --public-examples 30 --batch-size 16 --local-epochs 1 --out {out}"
    return [*common.split(), *map(str, more)]


def squared(adapter: Path, base: Path, data: Path) -> tuple[float, float]:
    """(mean squared error, Pearson's correlation) of an exported adapter on the test split, by README's own lines."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    readme = adapter / "README.md"
    text = readme.read_text(encoding="utf-8")
    sample = "[['A first text.', 'And a second, somewhat longer text.']]"
    assert sample in text
    readme.write_text(text.replace(sample, repr([[row["text"] for row in rows]])), encoding="utf-8")
    found = plain_logits(adapter)[0].squeeze(-1).double().numpy()
    readme.write_text(text, encoding="utf-8")
    labels = np.array([row["label"] for row in rows])
    return float(np.square(found - labels).mean()), float(np.corrcoef(found, labels)[0, 1])


@pytest.mark.parametrize("kind", ["pooler", "mean", "decoder"])
@pytest.mark.parametrize("method", ["lora", "head"])
def test_what_is_exported_predicts_in_the_labels_unit_what_was_scored(
    kind: str, method: str, scores: Path, tiny_bert: Path, pooled_bert: Path, stories: Path, tmp_path: Path
) -> None:
    base = {"pooler": tiny_bert, "mean": pooled_bert, "decoder": stories}[kind]
    out = tmp_path / "run"
    assert main(words(base, scores, out, "--method", method, "--quiet")) == 0
    summary, rows = read_run(out)
    mse, pearson = squared(out / "adapter", base, scores)
    assert mse == pytest.approx(summary["final"]["loss"], rel=1e-3)
    assert pearson == pytest.approx(summary["final"]["pearson"], abs=1e-3)
    assert summary["final"]["rmse"] == pytest.approx(summary["final"]["loss"] ** 0.5, rel=1e-12)
    assert summary["metric"] == "rmse" and summary["best"]["rmse"] == min(row["rmse"] for row in rows)
    assert "accuracy" not in summary["final"] and not (out / "adapter" / "labels.json").exists()


@pytest.mark.parametrize(("least", "unit"), [(0.0, 1e-3), (-4e4, 1e4)])
def test_the_unit_of_the_labels_changes_nothing_but_the_unit_of_the_results(
    least: float, unit: float, pooled_bert: Path, tmp_path: Path
) -> None:
    found = []
    for name, (of, to) in {"one": (0.0, 1.0), "other": (least, unit)}.items():
        rows = write(tmp_path / name / "data", least=0.0, unit=5.0)
        for path in rows.glob("*.jsonl"):
            held = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            lines = (json.dumps(row | {"label": of + to * row["label"]}) + "\n" for row in held)
            path.write_text("".join(lines), encoding="utf-8")
        out = tmp_path / name / "run"
        assert main(words(pooled_bert, rows, out, "--method", "lora", "--optimizer", "sgd", "--quiet")) == 0
        found.append((read_run(out), to))
    (one, _), (other, to) = found
    for before, after in zip(one[1], other[1], strict=True):
        assert after["rmse"] == pytest.approx(before["rmse"] * to, rel=1e-3)
        assert after["train_loss"] == pytest.approx(before["train_loss"] * to**2, rel=1e-3)
        assert after["pearson"] == pytest.approx(before["pearson"], abs=1e-3)


def pooled_examples(count: int = 40) -> Examples:
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 14, count)
    tokens, offsets = rng.integers(3, 500, lengths.sum()).astype(np.int32), np.cumsum([0, *lengths])
    return Examples(tokens, offsets, rng.normal(size=count).astype(np.float32))


@pytest.mark.parametrize("pooled", [True, False])
def test_the_head_begins_as_ridge_regression_has_it(pooled: bool, tiny_bert: Path, stories: Path) -> None:
    """The minimum of mean (w h + b - y)² + RIDGE / 2 |w|², in closed form and in float64."""
    spec = ModelSpec(str(tiny_bert if pooled else stories), "regression", 1, pooled, 0)
    model, examples = TrainableModel(load_base(spec), spec, None), pooled_examples()
    head = model.module.get_submodule(model.heads[-1])
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for row in range(len(examples)):
            model.logits(examples.batch([row]))
    hook.remove()
    features = torch.stack([one.reshape(-1, one.shape[-1])[-1] for one in seen]).double()
    labels = torch.from_numpy(np.asarray(examples.labels)).double()
    if pooled:
        features = torch.cat([features, torch.ones(len(features), 1).double()], dim=1)
    penalty = RIDGE * torch.eye(features.shape[1]).double()
    if pooled:
        penalty[-1, -1] = 0  # the bias is free
    wanted = torch.linalg.solve(
        2 * features.T @ features / len(labels) + penalty, 2 * features.T @ labels / len(labels)
    )
    fit_head(model, examples, np.arange(len(examples)))
    found = torch.cat([p.detach().flatten() for p in head.parameters()]).double()
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    excess = [
        (features @ w - labels).square().mean() + RIDGE / 2 * w[: head.in_features].square().sum()
        for w in (found, wanted)
    ]
    assert float(excess[0] / excess[1]) - 1 < 1e-4


def test_a_step_down_the_squared_error_is_torchs_own(pooled_bert: Path) -> None:
    """Of the whole model in the plain way: the mean of (f(x) - y)², of labels in steps of 3 from 7 on."""
    spec = ModelSpec(str(pooled_bert), "regression", 1, True, 0, shift=7.0, step=3.0)
    examples, training = pooled_examples(16), LocalTraining(steps=1, batch_size=16, optimizer="sgd", head_lr=0.1)
    model = TrainableModel(load_base(spec), spec, None)
    start = {name: torch.full_like(value, 0.01) for name, value in model.values().items()}
    (result,) = train_cohort(model, start, examples, [ClientWork(np.arange(16), np.random.default_rng(0))], training)
    model.assign(start)
    encoder: Any
    encoder, head = model.module.get_submodule("encoder"), model.module.get_submodule("classifier")
    batch = examples.batch(np.arange(16))
    with torch.no_grad():
        hidden = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1)
        features = (hidden * mask).sum(1) / mask.sum(1)
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (head.weight, head.bias))
    loss = ((features @ weight.T + bias).squeeze(1) - batch.labels).square().mean()
    loss.backward()
    for name, parameter in (("weight", weight), ("bias", bias)):
        assert parameter.grad is not None
        wanted = parameter.detach() - 0.1 * parameter.grad
        assert torch.allclose(result.tensors[f"base_model.model.classifier.{name}"], wanted, rtol=1e-4, atol=1e-6)
    assert result.loss == pytest.approx(9 * float(loss), rel=1e-4), "in the labels' own unit"


def test_a_run_goes_on_to_the_same_bytes(scores: Path, tiny_bert: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--method", "lora", "--quiet", "--optimizer-state", "keep", "--lr-schedule", "constant")
    assert main(words(tiny_bert, scores, whole, *more)) == 0
    assert main([*words(tiny_bert, scores, parts, *more), "--rounds", "1"]) == 0
    assert main([str(parts / "config.yaml"), "--resume", "--out", str(parts), "--rounds", "2", "--quiet"]) == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/README.md"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert read_run(whole)[0]["trained_sha256"] == read_run(parts)[0]["trained_sha256"]


def test_a_run_that_starts_from_an_adapter_starts_where_that_ended(
    scores: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(words(tiny_bert, scores, first, "--method", "lora", "--quiet")) == 0
    start = ("--init-adapter", first, "--public-examples", 20, "--method", "lora", "--quiet")
    assert main(words(tiny_bert, scores, second, *start)) == 0
    assert read_run(second)[0]["initial"]["loss"] == pytest.approx(read_run(first)[0]["final"]["loss"], rel=1e-3)


@pytest.mark.parametrize("privacy", ["example", "client"])
def test_private_labels_are_learnt_and_nothing_is_told_of_them(
    privacy: str, scores: Path, pooled_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = write(tmp_path / "public", least=90.0, rows=40) / "train.jsonl"
    lines = [json.loads(line) for line in public.read_text(encoding="utf-8").splitlines()]
    public.write_text("".join(json.dumps(row | {"text": row["text"] + " p"}) + "\n" for row in lines), encoding="utf-8")
    out, more = tmp_path / "run", ("--privacy", privacy, "--epsilon", 8, "--public-data", public, "--method", "lora")
    bound = ("--clip-norm", 1) if privacy == "client" else ()
    assert main(words(pooled_bert, scores, out, *more, *bound)) == 0
    summary, rows = read_run(out)
    assert summary["privacy"]["epsilon"] <= 8 and rows[-1]["train_loss"] is None
    assert "numbers on a scale (--task regression would settle it" in summary["privacy"]["not_hidden"]
    mse, _ = squared(out / "adapter", pooled_bert, scores)
    assert mse == pytest.approx(summary["final"]["loss"], rel=1e-3)
    assert main(words(pooled_bert, scores, tmp_path / "told", *more, *bound, "--task", "regression")) == 0
    assert "on a scale" not in read_run(tmp_path / "told")[0]["privacy"]["not_hidden"]
    capsys.readouterr()
    bare = [*more[:4], "--method", "lora", *bound]
    assert main(words(pooled_bert, scores, tmp_path / "bare", *bare)) == 0
    assert "no public rows tell how large labels are" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("more", [("--baseline", "local"), ("--baseline", "central"), ("--client-eval", 0.3)])
def test_baselines_and_clients_scores_are_of_the_same_metric(
    more: tuple[object, ...], scores: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(words(tiny_bert, scores, out, "--method", "lora", *more)) == 0
    summary, shown = read_run(out)[0], capsys.readouterr()
    assert summary["final"]["rmse"] > 0 and "rmse, final" in shown.out + shown.err
    if "local" in more:
        worst, mean = summary["over_clients"]["rmse_worst_tenth"], summary["final"]["rmse"]
        assert worst >= mean, "the worst are those with the largest error"
    if "--client-eval" in more:
        own = summary["client_evaluation"]
        assert own["metric"] == "rmse" and own["worst_tenth"] >= own["mean"]


def test_what_a_run_says_of_its_scale(
    scores: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*words(tiny_bert, scores, out, "--method", "lora"), "--show-examples", "1"]) == 0
    shown = capsys.readouterr()
    text = " ".join((shown.out + shown.err).split())
    assert re.search(r"regression, \d+ examples to train, 30 to test, labels 100 to 1\d\d, deviation \d", text)
    assert "tokens, label 1" in text and "natural" in text and "not read" not in text, (
        "the client column deals, where labels are no classes"
    )
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "in squared units of the labels" in page and "in nats" not in page and "pearson" in page
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    assert (facts["task"], facts["metric"], facts["higher_is_better"]) == ("regression", "rmse", False)
    assert facts["labels"] == [] and "largest_class" not in facts
    shutil.copytree(out, tmp_path / "copy")
    assert compare.main([str(out), str(tmp_path / "copy")]) == 0 and "rmse" in capsys.readouterr().out


def test_a_grid_chooses_the_rate_with_the_smallest_error(scores: Path, tiny_bert: Path, tmp_path: Path) -> None:
    file, common = tmp_path / "grid.yaml", words(tiny_bert, scores, tmp_path)[:-2]
    base: dict[str, Any] = {common[at][2:].replace("-", "_"): common[at + 1] for at in range(0, len(common), 2)}
    base |= {"rounds": 1, "method": "lora"}
    lines = [f"  {key}: {value}" for key, value in base.items()]
    file.write_text("\n".join(["base:", *lines, "seeds: [0]", "tune: {lr: [0.001, 50.0]}"]), encoding="utf-8")
    assert grid.main([str(file), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "rmse" in table.splitlines()[0] and "lr 0.001 chosen" in table


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "dealt by label": (
        ("--partition", "dirichlet:0.5"),
        "these labels are numbers on a scale, not classes; choose iid",
    ),
    "names": (("--task", "regression", "--label-names", "a,b"), "its labels are numbers on a scale, and no classes"),
    "joined": (("--task", "regression", "--join-labels"), "its labels are numbers on a scale, and no classes"),
    "classes": (("--task", "classification"), "holds numbers with a decimal point"),
    "a format of classes": (
        ("--task", "regression", "--format", "text+label"),
        "--format text+label with --task regression: its labels are classes",
    ),
    "a format of scores": (
        ("--task", "classification", "--format", "text+score"),
        "--format text+score with --task classification: its labels are numbers on a scale",
    ),
    "samples": (("--samples", 3), "a regression says nothing that could be shown"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_refused(
    what: str, scores: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = REFUSED[what]
    assert main(words(tiny_bert, scores, tmp_path / "run", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_a_head_that_the_base_has_is_dropped_and_that_is_said(
    scores: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small: dict[str, Any] = {
        "num_labels": 1,
        "vocab_size": 512,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = BertConfig(**small, intermediate_size=16, max_position_embeddings=130)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "base")
    assert main(words(tmp_path / "base", scores, tmp_path / "run", "--method", "lora")) == 0
    assert "it has a head for 1 label, which is dropped" in " ".join(capsys.readouterr().err.split())
