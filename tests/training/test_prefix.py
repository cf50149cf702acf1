"""Blocks below all that is trained run once an example, and change nothing but rounding."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_packed import some_examples

from fedlotr.adapters import CoreConfig
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise
from fedlotr.privacy.noise import NoiseStream
from fedlotr.training.cohort import ClientResult, ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel
from fedlotr.training.varlen import Ragged
from tests.support import UNIT, rounding

ROWS = {"a": np.arange(0, 9), "b": np.arange(9, 25), "c": np.arange(25, 40)}
EXAMPLES = some_examples()
TRAINING = LocalTraining(epochs=2, optimizer="sgd", lr=0.1, head_lr=0.1)


def upper(folder: Path, targets: str) -> TrainableModel:
    """The tiny BERT, which has two blocks, with cores in some layers; targets "": the head alone."""
    spec = ModelSpec(str(folder), "classification", 3, True, 0)
    base = load_base(spec)
    core = CoreConfig(method="lora-xs", r=4, target_modules=adaptable_layers(base, targets)) if targets else None
    return TrainableModel(base, spec, core)


def trained(model: TrainableModel, clients: str) -> list[ClientResult]:
    work = [ClientWork(ROWS[client], np.random.default_rng(ord(client))) for client in clients]
    return train_cohort(model, START[len(model.trained)], EXAMPLES, work, TRAINING)


def assert_moved_alike(model: TrainableModel, found: ClientResult, wanted: ClientResult) -> None:
    start = START[len(model.trained)]
    for name, value in wanted.tensors.items():
        # The values are float32, so a step that is short beside them is known no better than they are.
        most = rounding(model.module) * float((value - start[name]).norm()) + 2 * UNIT * float(value.norm())
        assert float((found.tensors[name] - value).norm()) <= most, name


START: dict[int, dict[str, torch.Tensor]] = {}
"""Any two models here that train as many tensors start from the same ones."""


@pytest.fixture(autouse=True)
def small_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients here have fewer tokens than it takes for a pass of their own to pay."""
    monkeypatch.setattr("fedlotr.training.frozen_prefix.FULL_PASS", 1)


@pytest.fixture(params=[r".*layer\.1\..*", ""], ids=["upper block", "head alone"])
def model(tiny_bert: Path, request: pytest.FixtureRequest) -> TrainableModel:
    found = upper(tiny_bert, request.param)
    torch.manual_seed(0)
    START.setdefault(len(found.trained), {n: v + 0.1 * torch.randn_like(v) for n, v in found.values().items()})
    return found


def test_training_above_kept_states_is_training_of_the_whole_model(
    model: TrainableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.prefix is not None
    found = trained(model, "abc")
    monkeypatch.setitem(model.__dict__, "takes_ragged", False)
    for one, other in zip(found, trained(model, "abc"), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=rounding(model.module))
        assert_moved_alike(model, one, other)


def test_the_blocks_below_run_once_for_each_client(model: TrainableModel) -> None:
    assert model.takes_ragged  # which is tried, in passes of its own
    runs: list[int] = []
    model.module.get_submodule("encoder.encoder.layer.0").register_forward_hook(lambda *_: runs.append(1))
    trained(model, "ab")
    trained(model, "abc")
    trained(model, "abc")
    assert len(runs) == 3


def test_bits_do_not_depend_on_what_a_worker_has_seen(model: TrainableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, prefix = trained(model, "bc"), model.prefix
    assert prefix is not None and len(prefix._kept) == 31
    each = 4 * model.module.config.hidden_size
    tokens = {client: int(EXAMPLES.lengths[rows].sum()) for client, rows in ROWS.items()}
    monkeypatch.setattr("fedlotr.training.frozen_prefix.KEPT_BYTES", each * (tokens["b"] + tokens["c"]))
    trained(model, "a")
    assert len(prefix._kept) == 9, "there was no room for it beside the others"
    trained(model, "ab")
    for one, other in zip(fresh, trained(model, "bc"), strict=True):
        assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_a_pass_below_is_over_the_examples_of_one_client_whatever_is_kept(
    model: TrainableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    whole = Ragged.of
    monkeypatch.setattr(
        "fedlotr.training.frozen_prefix.Ragged",
        SimpleNamespace(of=lambda examples, rows, how: (seen.append(rows.tolist()), whole(examples, rows, how))[1]),
    )
    for clients in ("ab", "bc"):
        trained(model, clients)
    assert seen == [ROWS[client].tolist() for client in "abc"]


def test_whether_states_are_used_depends_on_the_cohort_alone(
    model: TrainableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlotr.training.frozen_prefix.FULL_PASS", 75)
    tokens = {client: int(EXAMPLES.lengths[rows].sum()) for client, rows in ROWS.items()}
    assert tokens["a"] < 75 < tokens["b"]
    trained(model, "b")
    prefix = model.prefix
    assert prefix is not None and len(prefix._kept) == 16 and prefix._used
    trained(model, "a")
    assert len(prefix._kept) == 16 and not prefix._used
    trained(model, "b")
    noise = DPSGD(ExampleNoise(1.0, 0.1), [NoiseStream()])
    work = [ClientWork(ROWS["b"], np.random.default_rng(0))]
    train_cohort(model, model.values(), EXAMPLES, work, LocalTraining(), None, 1, noise)
    assert not prefix._used, "its batches are drawn, and may leave examples out"


def test_a_cohort_whose_states_are_too_many_is_trained_without(
    model: TrainableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as small:
        small.setattr("fedlotr.training.frozen_prefix.KEPT_BYTES", 8)
        found, prefix = trained(model, "ab"), model.prefix
    assert prefix is not None and not prefix._kept
    for one, other in zip(found, trained(model, "ab"), strict=True):
        assert_moved_alike(model, other, one)


def test_where_the_first_block_is_adapted_nothing_is_kept(tiny_bert: Path) -> None:
    assert upper(tiny_bert, "all-linear").prefix is None


def test_steps_that_may_not_see_all_examples_keep_nothing(tiny_bert: Path) -> None:
    model = upper(tiny_bert, "")
    work = [ClientWork(ROWS["a"], np.random.default_rng(0))]
    train_cohort(model, model.values(), EXAMPLES, work, LocalTraining(steps=1))
    assert model.prefix is not None and not model.prefix._kept


def test_rows_of_other_data_are_not_taken_for_those_that_are_kept(tiny_bert: Path) -> None:
    other = some_examples(60)

    def trained_on(model: TrainableModel, examples: Examples) -> ClientResult:
        work = [ClientWork(ROWS["a"], np.random.default_rng(0))]
        (result,) = train_cohort(model, model.values(), examples, work, TRAINING)
        return result

    used = upper(tiny_bert, "")
    trained_on(used, EXAMPLES)
    found, wanted = trained_on(used, other).tensors, trained_on(upper(tiny_bert, ""), other).tensors
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
