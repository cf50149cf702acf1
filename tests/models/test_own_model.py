"""A model object of the caller's own trains as its files would, on every engine, and goes home as an adapter of it."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fedlotr import SimulationConfig, run_simulation, simulate
from fedlotr.errors import InputError
from fedlotr.run.brought import Brought
from fedlotr.run.checking import check
from fedlotr.run.simulation import resolve
from fedlotr.training.examples import Batch
from tests.data.test_own_data import ROWS, small
from tests.data.test_own_task import REVIEWS, Stars
from tests.own_models import BagConfig, BagOfWords, DeepClassifier
from tests.support import TEXTS, assert_logits, plain_logits, prepare_again, read_run

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories)


def seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


def bert_config() -> BertConfig:
    return BertConfig(vocab_size=512, max_position_embeddings=128, **SIZES)


OWN = {
    "transformers": lambda: BertForSequenceClassification(bert_config()),
    "deep classifier": lambda: DeepClassifier(bert_config()),
    "own architecture": lambda: BagOfWords(BagConfig()),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Two rounds of each kind of model on the local engine."""
    root = tmp_path_factory.mktemp("own")
    for kind, make in OWN.items():
        config = small("unused", root / kind, method="fed-sb", rounds=2, lr=0.05)
        run_simulation(config, data={"train": ROWS}, model=(seeded(make), tokenizer))
    return {kind: root / kind for kind in OWN}


def test_a_model_object_trains_to_the_bytes_of_its_saved_folder(
    runs: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    seeded(OWN["transformers"]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = small(tmp_path / "model", tmp_path / "run", method="fed-sb", rounds=2, lr=0.05)
    from_folder = run_simulation(config, data={"train": ROWS}).summary
    summary, _ = read_run(runs["transformers"])
    assert summary["trained_sha256"] == from_folder["trained_sha256"]
    assert summary["model"].startswith("own:") and not (runs["transformers"] / ".work").exists()


def test_its_adapter_gives_plain_peft_the_logits_of_the_trained_model(
    runs: dict[str, Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, run in runs.items():  # as the README there says
        seeded(OWN[kind]).save_pretrained(run / "adapter" / "base")
        tokenizer.save_pretrained(run / "adapter" / "base")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for (kind, run), plain in zip(runs.items(), plain_logits(*(r / "adapter" for r in runs.values())), strict=True):
        config = small("unused", run, method="fed-sb", rounds=2, lr=0.05)
        brought = Brought({"train": ROWS}, (seeded(OWN[kind]), tokenizer), folder=tmp_path / kind)
        model = prepare_again(check(resolve(config), brought=brought), tmp_path / f"work of {kind}").model
        model.assign(load_file(sorted((run / "checkpoints").glob("*.safetensors"))[-1]))
        padding = copy.deepcopy(tokenizer)
        padding.pad_token_id, padding.padding_side = model.spec.pad_id, "right"
        batch = padding(*TEXTS, padding=True, return_tensors="pt")
        with torch.inference_mode():
            ours = model.logits(Batch(batch["input_ids"], batch["attention_mask"], None, torch.zeros(0)))
        assert_logits(plain, ours)
        assert ours.abs().max() > 1e-3, "the comparison can tell"


@pytest.mark.slow
@pytest.mark.serial
def test_on_ray_a_model_class_and_a_task_of_ones_own_give_the_same_bytes(
    tokenizer: Any, tmp_path: Path, ray_session: None
) -> None:
    """Workers import the class; of the task they know nothing."""
    data, found = {"train": REVIEWS, "test": REVIEWS * 5}, []
    for engine in ({}, {"engine": "ray", "workers": 1}):
        config = small("unused", tmp_path / f"run{len(found)}", method="fed-sb", rounds=2, lr=0.05, eval_examples=0)
        model = (seeded(OWN["own architecture"]), tokenizer)
        found.append(run_simulation(config.model_copy(update=engine), data=data, model=model, task=Stars()))
    here, there = found
    assert there.summary["trained_sha256"] == here.summary["trained_sha256"] and not there.summary["failed_clients"]
    assert [row["macro_f1"] for row in there.history] == [row["macro_f1"] for row in here.history]


def test_a_language_model_of_ones_own_trains(stories: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": f"Once upon a time there were {at} cats."} for at in range(30)]
    model = AutoModelForCausalLM.from_pretrained(stories)
    summary = run_simulation(small("unused", tmp_path / "run"), data={"train": rows}, model=(model, tokenizer)).summary
    assert summary["final"]["perplexity"] > 1 and summary["model"].startswith("own:")


def test_resume_goes_on_with_the_same_model_only(
    runs: dict[str, Path], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs["own architecture"], tmp_path / "run")
    named = read_run(run)[0]["model"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = small("unused", run, method="fed-sb", rounds=3, lr=0.05, resume=True)
    other = seeded(OWN["own architecture"])
    with torch.no_grad():
        other.mix.bias[0] += 1e-3
    with pytest.raises(InputError, match=rf"--model own:\w+: the run in .* was begun with {named}, the caller's own"):
        run_simulation(more, data={"train": ROWS}, model=(other, tokenizer))
    folder = tmp_path / "bert"
    seeded(OWN["transformers"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=rf"--model {folder}: the run in .* was begun with {named}"):
        run_simulation(more.model_copy(update={"model": str(folder)}), data={"train": ROWS})
    assert simulate.main([str(run / "config.yaml"), "--out", str(run), "--resume"]) == simulate.BAD_INPUT
    assert "pass run_simulation(model=...)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    same = (seeded(OWN["own architecture"]), tokenizer)
    assert run_simulation(more, data={"train": ROWS}, model=same).summary["rounds"] == 3


def changed(change: Any) -> Any:
    model = seeded(OWN["transformers"])
    change(model)
    return model


class InTheTest(DeepClassifier):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return input_ids


class OfFiveLabels(BagOfWords):
    def __init__(self, config: BagConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(16, 5)


class NormedHead(BagOfWords):
    def __init__(self, config: BagConfig) -> None:
        super().__init__(config)
        self.score = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, config.num_labels))


class Headless(BagOfWords):
    def __init__(self, config: BagConfig) -> None:
        super().__init__(config)
        self.last = self.score
        del self.score


class Shouting(BagOfWords):
    def forward(self, *words: Any, **named: Any) -> torch.Tensor:
        return super().forward(*words, **named).unsqueeze(1)


def local_class() -> Any:
    class Local(BagOfWords):
        pass

    return Local(BagConfig())


def replaced(model: Any) -> None:
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2))


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "plain module": (lambda: nn.Linear(2, 2), ["of the type torch.nn.modules.linear.Linear", "derive its class from"]),
    "a name": (lambda: "bert-base", ["expected a transformers PreTrainedModel, got an object of the type str"]),
    "replaced head": (lambda: changed(replaced), ["its classifier is a Sequential()", "put it into a class derived"]),
    "hook": (
        lambda: changed(lambda m: m.bert.pooler.register_forward_hook(lambda *_: None)),
        ["its bert.pooler has a forward hook"],
    ),
    "patched": (lambda: changed(lambda m: setattr(m, "forward", lambda **_: None)), ["a forward that was put in"]),
    "meta": (lambda: changed(lambda m: m.to("meta")), ["on the meta device"]),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        ["an encoder-decoder (t5)"],
    ),
    "local class": (local_class, ["cannot be imported by its name", "at the top of a module"]),
    "no mask": (lambda: InTheTest(bert_config()), ["takes no attention_mask"]),
    "five labels": (lambda: OfFiveLabels(BagConfig()), ["score, gives 5 numbers and the data has 2 labels"]),
    "normed head": (lambda: NormedHead(BagConfig()), ["its head holds score.0.weight"]),
    "headless": (lambda: Headless(BagConfig()), ["call its last layers 'classifier' or 'score'"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_workers_could_not_build_again_is_refused_by_name(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    make, parts = REFUSED[kind]
    with pytest.raises(InputError) as refused:
        run_simulation(small("unused", tmp_path / "run"), data={"train": ROWS}, model=(seeded(make), tokenizer))
    (problem,) = refused.value.problems
    assert problem.startswith("model: ") and all(part in problem for part in parts), problem
    assert not (tmp_path / "run").exists()


def test_logits_that_no_loss_can_be_made_of_are_refused_before_the_first_round(tokenizer: Any, tmp_path: Path) -> None:
    model = (seeded(lambda: Shouting(BagConfig())), tokenizer)
    with pytest.raises(InputError, match=r"Shouting cannot be used: .*the shape 2×1×2; expected 2×2"):
        run_simulation(small("unused", tmp_path / "run"), data={"train": ROWS}, model=model)


def test_mistakes_in_model_data_and_configuration_come_together(tokenizer: Any, tmp_path: Path) -> None:
    config = SimulationConfig(clients=500, partition="iid", public_examples=4, out=tmp_path / "run")
    with pytest.raises(InputError) as refused:
        run_simulation(config, data={"train": ROWS}, model=(nn.Linear(2, 2), object()))
    problems = "\n".join(refused.value.problems)
    assert "--clients 500" in problems and "type torch.nn" in problems and "its tokenizer is an object" in problems, (
        problems
    )


def test_the_callers_objects_are_left_as_they_were(tokenizer: Any, tmp_path: Path) -> None:
    model = seeded(OWN["transformers"]).train()
    config, weights = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    names = list(tokenizer.model_input_names)
    run_simulation(small("unused", tmp_path / "run"), data={"train": ROWS}, model=(model, tokenizer))
    assert model.config.to_dict() == config and model.training and tokenizer.model_input_names == names
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert isinstance(model, AutoModelForSequenceClassification._model_mapping[BertConfig])
