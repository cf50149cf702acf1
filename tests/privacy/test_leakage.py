"""Without privacy nothing is claimed: a small step's tokens can be read off its gradient, and privacy ends that."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from experiments.amplification import expected_noise
from experiments.attack import first_layers, in_row_space, named_tokens
from fedlotr.adapters import CoreConfig
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise
from fedlotr.privacy.noise import NoiseStream
from fedlotr.simulate import main
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel

Pairs = set[tuple[int, int]]


def build(
    folder: Path, method: str, rank: int, kind: Any = "causal-lm", basis: str | None = "random"
) -> TrainableModel:
    spec = ModelSpec(str(folder), kind, 0 if kind == "causal-lm" else 3, kind != "causal-lm", 0)
    base = load_base(spec)
    core = CoreConfig(method=method, basis=basis, r=rank, target_modules=adaptable_layers(base, "all-linear"))
    model = TrainableModel(base, spec, core)
    generator = torch.Generator().manual_seed(1)  # as after some rounds: LoRA's B and the head are not zero
    for name, value in (start := model.values()).items():
        if "core_C" not in name:
            start[name] = value + 0.02 * torch.randn(value.shape, generator=generator)
    model.assign(start)
    return model


def named(model: TrainableModel, examples: Examples, positions: list[int], **options: Any) -> Pairs:
    """What the server names that sees one client's step of SGD on all of these examples."""
    start, training = model.values(), LocalTraining(steps=1, batch_size=len(examples), optimizer="sgd", lr=1, head_lr=1)
    work = [ClientWork(np.arange(len(examples)), np.random.default_rng(0))]
    result = train_cohort(model, start, examples, work, training, **options)[0]
    model.assign(start)
    return named_tokens(model, {name: start[name] - value for name, value in result.tensors.items()}, positions)


def speech(ids: list[int]) -> Examples:
    return Examples(np.array(ids, np.int32), np.array([0, len(ids)]), np.ones(1, np.int64), causal=True)


def different(count: int, seed: int) -> list[int]:
    # Among the 256 single bytes are many that no text ever had: alike in their embeddings, so not to be told apart.
    print(f"seed {seed}")
    return [int(token) for token in np.random.default_rng(seed).permutation(np.arange(259, 512))[:count]]


@pytest.mark.parametrize("method", ["lora-xs", "lora"])
@pytest.mark.parametrize("count", [4, 9, 15])
def test_a_step_of_fewer_tokens_than_the_rank_names_them_all_and_no_other(
    stories: Path, method: str, count: int
) -> None:
    ids = different(count + 1, count)  # the last is only predicted
    assert named(build(stories, method, 16), speech(ids), [0]) == {(token, 0) for token in ids[:-1]}


def test_a_core_is_blind_where_a_step_has_more_tokens_than_the_rank_and_lora_is_not_yet(stories: Path) -> None:
    ids = different(31, 0)
    assert named(build(stories, "lora-xs", 16), speech(ids), [0]) == set()
    # Three layers that meet the same input give 16 directions each, as soon as B is no longer zero.
    assert named(build(stories, "lora", 16), speech(ids), [0]) == {(token, 0) for token in ids[:-1]}
    ids = different(63, 1)
    assert named(build(stories, "lora", 16), speech(ids), [0]) == set()


def test_noise_leaves_nothing_to_name(stories: Path) -> None:
    ids, model = different(10, 2), build(stories, "lora-xs", 16)
    hidden = DPSGD(ExampleNoise(1.0, 0.1), [NoiseStream()])
    assert named(model, speech(ids), [0]) != set() == named(model, speech(ids), [0], mechanism=hidden)


def test_an_encoder_tells_tokens_and_where_they_stood(tiny_bert: Path) -> None:
    ids = different(7, 3)
    example = Examples(np.array(ids, np.int32), np.array([0, len(ids)]), np.array([1]))
    model = build(tiny_bert, "lora-xs", 16, "classification")
    assert {name.split(".")[3] for name in first_layers(model)} == {"0"}
    assert named(model, example, list(range(10))) == {(token, at) for at, token in enumerate(ids)}


def test_a_space_that_is_everything_or_nothing_names_nothing() -> None:
    rows, tried = torch.randn(9, 4, generator=torch.Generator().manual_seed(4)), torch.eye(4)
    assert not in_row_space(rows, tried).any() and not in_row_space(torch.zeros(9, 4), tried).any()
    assert in_row_space(rows[:, :2] @ torch.eye(4)[:2], tried).tolist() == [True, True, False, False]


def test_a_run_says_once_that_its_steps_can_be_read_and_privacy_ends_both(stories: Path, tmp_path: Path) -> None:
    text = "Once upon a time there was a cat."
    (tmp_path / "data").mkdir()
    for split, told in (("train", text), ("test", "There was a dog.")):
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps({"text": told}) + "\n", encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(stories)(text)["input_ids"]
    words = f"--model {stories} --data {tmp_path / 'data'} --clients 1 --rounds 2 --method lora-xs --rank 32 --quiet"
    words += " --local-steps 1 --optimizer sgd --lr 1 --batch-size 1 --partition iid --public-examples 0"
    words += " --engine local --threads 1 --dtype float32"
    found, said = [], []
    for number, more in enumerate(([], ["--privacy", "example", "--noise-multiplier", "1", "--delta", "0.01"])):
        assert main([*words.split(), *more, "--out", str(tmp_path / f"run-{number}")]) == 0
        said.append((tmp_path / f"run-{number}" / "log.txt").read_text(encoding="utf-8").count("fewer tokens"))
        update = load_file(tmp_path / f"run-{number}" / "checkpoints" / "round-00001.safetensors")
        model = build(stories, "lora-xs", 32, basis=None)  # cores begin at zero: they are the change
        found.append(named_tokens(model, {name: value for name, value in update.items() if "core" in name}, [0]))
    assert said == [1, 0]
    assert found == [{(token, 0) for token in ids[:-1]}, set()]


@pytest.mark.parametrize("trained", ["C", "B", "A", "AB"])
@pytest.mark.parametrize("exact", [True, False])
def test_noise_in_an_update_is_as_large_as_the_closed_form_says(trained: str, exact: bool) -> None:
    seed, clients, tau, s = 5, 3, 0.3, 1.5
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    plain = {"A": rng.normal(size=(4, 9)), "C": np.eye(4), "B": rng.normal(size=(7, 4))}
    found = []
    for _ in range(2000):
        noisy = [
            {n: f + tau * rng.normal(size=f.shape) if n in trained else f for n, f in plain.items()}
            for _ in range(clients)
        ]
        if not exact:
            noisy = [{name: np.mean([one[name] for one in noisy], 0) for name in plain}]
        mean = np.mean([s * one["B"] @ one["C"] @ one["A"] for one in noisy], 0)
        found.append(np.square(mean - s * plain["B"] @ plain["A"]).sum())
    factors = {name: torch.from_numpy(plain[name]) for name in "AB"}
    expected = expected_noise(factors, set(trained), tau, s, clients, exact)
    assert np.mean(found) == pytest.approx(expected, abs=5 * np.std(found) / np.sqrt(len(found)))
