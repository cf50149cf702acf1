"""One table of methods and strategies; every row through the same properties, and two rounds from the command line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import TinyLoraConfig, get_peft_model

from fedlotr.adapters import CORES, METHODS, CoreConfig
from fedlotr.adapters.bases import (
    Request,
    ldu_basis,
    leading_singular_vectors,
    nystrom_basis,
    root_svd_basis,
    scaled_svd_basis,
    spectral_basis,
    tucker_basis,
)
from fedlotr.adapters.cores import expand_heads, mixed_matrices
from fedlotr.adapters.moves import read_rebase
from fedlotr.commands import simulate
from fedlotr.communication.ledger import read_ledger
from fedlotr.communication.wire_form import UNCODED, Coding
from fedlotr.cost.architectures import read_architecture
from fedlotr.cost.formulas import bill
from fedlotr.flower import Update, weighted_mean
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.traits import traits_of
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.testing import check_strategy
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel
from tests.support import UNIT, read_run, rounding

ROWS = [(method, row.strategy) for method, row in METHODS.items()]
OTHERS = [
    ("lotr", name) for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad", "median", "trimmed-mean", "krum")
] + [
    *(("lotr", name) for name in ("multi-krum", "geometric-median", "norm-clip", "fltrust", "q-fedavg")),
    ("rolora", "fedadam"),
    ("ravan", "fedavgm"),
    ("lora", "flora"),
    ("lora", "fedex-lora"),
    ("lora", "flexlora"),
    ("lora", "hetlora"),
    ("lotr", "fedprox"),
    ("lotr", "scaffold"),
    ("rolora", "scaffold"),
]
INEXACT = ("fedit", "flexlora")
ROBUST = ("median", "trimmed-mean", "krum", "multi-krum", "geometric-median")
OF_THREE = {"trimmed-mean": {"beta": 0.34}, "krum": {"f": 0}, "multi-krum": {"f": 0}}
"""With what arguments a rule that wants more clients takes three."""
NOT_MEANS = (*ROBUST, "norm-clip", "fltrust", "q-fedavg", "hetlora")

R, WIDE, NARROW = 4, 48, 32
"""Rank, and the widths of the tiny BERT: in each of two blocks four 32×32 matrices and two of
48×32, and the pooler."""
SUM_OUT, SUM_IN = 2 * (5 * NARROW + WIDE) + NARROW, 2 * (5 * NARROW + WIDE) + NARROW
HEAD = 2 * NARROW + 2
NUMBERS = {
    "loldu": 13 * R,
    "ravan": 13 * R * R // 4,
    "tiny-lora": 13 * min(64, R * R),
    "lora": R * (SUM_OUT + SUM_IN),
    # Seven types of layers, each with one A and one B.
    "lotr-trained": 13 * R * R + R * 2 * (6 * NARROW + WIDE),
    "ffa-lora": R * SUM_OUT,
    "fedsvd": R * SUM_OUT,
    "frlora": R * (SUM_OUT + SUM_IN),
    "rolora": R * SUM_OUT,  # of either factor: the sums are equal here
    "full": 9 * NARROW * NARROW + 4 * NARROW * WIDE,
    "fedsa-lora": R * SUM_IN,
    "personal-core": R * (SUM_OUT + SUM_IN),
    "head": 0,
}
"""Numbers that a client sends in a round, without the head; 13 r² for all others."""


@pytest.mark.parametrize(("method", "strategy"), ROWS + OTHERS)
def test_two_rounds_from_the_command_line(
    method: str, strategy: str, tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    words = f"--model {tiny_bert} --data {animals} --method {method} --strategy {strategy} --rank {R}"
    words += (
        " --clients 3 --sample 3 --rounds 2 --max-examples 12 --public-examples 16 --eval-examples 6 --partition iid"
    )
    words += f" --engine local --threads 1 --dtype float32 --quiet --out {tmp_path / 'run'}"
    words += "".join(f" --strategy-arg {name}={value}" for name, value in OF_THREE.get(strategy, {}).items())
    assert simulate.main(words.split()) == 0
    summary, rows = read_run(tmp_path / "run")
    errors = [row["aggregation_error"] for row in rows]
    if method == "head" or strategy in NOT_MEANS or METHODS[method].personal:
        assert errors == [None, None] and summary["aggregation_error_reason"]
    elif strategy in INEXACT:
        assert all(error is not None and error > 1e-6 for error in errors)
    else:
        assert all(error is not None and error <= 1e-6 for error in errors)
    sent = summary["communication"]["upload_payload_bytes_per_client_round"]
    assert sent == 4 * (NUMBERS.get(method, 13 * R * R) + HEAD), "the ledger says what the formula says"
    check_the_bill(tmp_path / "run", tiny_bert, method, strategy, [R, R, R], rounds=2)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def check_the_bill(
    run: Path, model: Path, method: str, strategy: str, ranks: list[int], *, rounds: int, coding: Coding = UNCODED
) -> None:
    """The bytes of every round, in both directions, and the one-off are those of the formulas, to the byte."""
    architecture = read_architecture(str(model), "classification", 2, "all-linear")
    traits = traits_of(load_strategy(strategy, {}, len(ranks), clients=len(ranks)))
    coding = replace(coding, basis_codec="int2")  # as where nothing is said
    asked = METHODS[method], architecture.layers, architecture.heads, ranks, rounds, coding
    words = METHODS[method].rebase
    owed = bill(*asked, merged=traits.merges(ranks), rebase=None if words is None else read_rebase(words))
    ledger = read_ledger(run / "ledger")

    def paid(kinds: set[str], number: int) -> int:
        return sum(row.payload_bytes for row in ledger if row.kind in kinds and row.round == number)

    ups = [paid({"update"}, number) for number in range(1, rounds + 1)]
    downs = [paid({"broadcast", "carry"}, number) for number in range(1, rounds + 1)]
    if coding.update.zstd or coding.broadcast.zstd:
        assert all(u <= most for u, most in zip(ups + downs, owed.ups + owed.downs, strict=True))
        assert ups < list(owed.ups), "it pays here"
    elif strategy == "hetlora":  # it lowers clients' ranks as it goes
        assert all(u <= most for u, most in zip(ups + downs, owed.ups + owed.downs, strict=True))
    else:
        assert (ups, downs) == (list(owed.ups), list(owed.downs))
    assert paid({"basis"}, 1) == len(ranks) * owed.one_off and paid({"basis"}, 2) == 0
    if traits.controls:
        # Beside the trained tensors control variates of their size, each way; what is left are plain values.
        twice = bill(*asked, controls=True)
        for direction, with_them, without in (("up", twice.ups, owed.ups), ("down", twice.downs, owed.downs)):
            sizes = sorted(e.payload_bytes for e in ledger if e.kind == "control" and e.direction == direction)
            assert sum(sizes[-len(ranks) * rounds :]) == sum(with_them) - sum(without)


@pytest.mark.parametrize(
    ("method", "strategy"),
    [("lora", "fedit"), ("lora", "flora"), ("lora", "fedex-lora"), ("rolora", "rolora"), ("fed-sb", "exact-average")],
)
def test_the_bill_of_clients_with_ranks_of_their_own(
    method: str, strategy: str, tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    words = f"--model {tiny_bert} --data {animals} --method {method} --strategy {strategy} --rank 16"
    words += " --client-rank 16,2,8 --clients 3 --sample 3 --rounds 4 --max-examples 4 --public-examples 16"
    words += " --eval-examples 6 --eval-every 4 --partition iid --engine local --threads 1 --dtype float32 --quiet"
    assert simulate.main([*words.split(), "--out", str(tmp_path / "run")]) == 0
    # Four rounds: FLoRA's and FedEx's ranks then add up to more than a full matrix has, which is sent instead.
    check_the_bill(tmp_path / "run", tiny_bert, method, strategy, [16, 2, 8], rounds=4)


@pytest.mark.parametrize(("method", "strategy"), ROWS + OTHERS)
def test_every_row_keeps_the_properties(method: str, strategy: str) -> None:
    check_strategy(strategy, method=method)


@pytest.mark.parametrize(
    ("method", "alpha"),
    [
        (method, alpha)
        for method, row in METHODS.items()
        for alpha in ((None, 6.0) if row.factored else (None,))  # a whole matrix has no scale
        if row.adapts and not row.personal
    ],
)
def test_federated_equals_central(method: str, alpha: float | None, tiny_gpt2: Path) -> None:
    """One full-batch SGD step a client, averaged by examples, is one step on the pooled data (Conv1D layers)."""
    spec = ModelSpec(str(tiny_gpt2), "causal-lm", 0, False, 0)
    base = load_base(spec)
    config = CoreConfig(method=method, r=4, alpha=alpha, basis="svd" if METHODS[method].basis == "update" else None)
    config.target_modules = adaptable_layers(base, "all-linear")
    model = TrainableModel(base, spec, config)
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 12)
    tokens = rng.integers(3, 500, lengths.sum()).astype(np.int32)
    data = Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.ones(12, np.int64), causal=True)
    # Columns of these small weights make int-tune's gradient short.
    training = LocalTraining(batch_size=12, optimizer="sgd", lr=10.0 if method == "int-tune" else 0.1)
    parts = [np.arange(0, 2), np.arange(2, 5), np.arange(5, 12)]
    start = model.values()

    def train(rows: list[Any]) -> list[Any]:
        return train_cohort(model, start, data, [ClientWork(r, np.random.default_rng(1)) for r in rows], training)

    apart = [
        Update(k, {n: t.double().numpy() for n, t in result.tensors.items()}, result.examples)
        for k, result in enumerate(train(parts))
    ]
    central = train([np.arange(12)])[0].tensors
    steps = []
    for name, mean in weighted_mean(apart).items():
        moved = central[name].double().numpy()
        steps.append(float(np.abs(moved - start[name].numpy()).max()))
        # The values are float32, so a step that is short beside them is known no better than they are.
        most = rounding(model.module) * steps[-1] + 2 * UNIT * float(np.abs(moved).max())
        np.testing.assert_allclose(mean, moved, rtol=0, atol=most, err_msg=name)
        assert steps[-1] > 100 * most or steps[-1] == 0, "the step is far longer than what it may differ by"
    assert max(steps) > 1e-3


def test_check_strategy_sees_a_sum_where_the_weights_were_forgotten(tmp_path: Path) -> None:
    (tmp_path / "unweighted.py").write_text(
        "from fedlotr.flower import Strategy\n"
        "class Unweighted(Strategy):\n"
        "    averages = True\n"
        "    def combine(self, updates, server_round):\n"
        "        return {k: sum(u.arrays[k] for u in updates) / len(updates) for k in updates[0].arrays}\n"
        "class Hoarding(Strategy):\n"
        "    averages = True\n"
        "    def __init__(self): self.seen = []\n"
        "    def combine(self, updates, server_round):\n"
        "        self.seen += updates\n"
        "        total = sum(u.weight for u in self.seen)\n"
        "        return {k: sum(u.weight * u.arrays[k] for u in self.seen) / total for k in updates[0].arrays}\n"
        "class First(Strategy):\n"
        "    averages = True\n"
        "    def combine(self, updates, server_round):\n"
        "        p = updates[0].weight / sum(u.weight for u in updates)\n"
        "        return {k: p * v for k, v in updates[0].arrays.items()}\n"
    )
    for name in ("Unweighted", "Hoarding", "First"):  # fed_agg.py; client_model_dicts; weighted_sindgle_weights
        with pytest.raises(AssertionError, match="the mean of the updates"):
            check_strategy(f"{tmp_path / 'unweighted.py'}:{name}")


def test_every_core_starts_at_zero_and_publishes_what_it_expands_to() -> None:
    mixed = mixed_matrices(8, 0, "q").double()
    for core in CORES.values():
        if not core.trained:
            continue
        torch.manual_seed(0)
        theta = {name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in core.shapes(8).items()}
        whole = core.expand(theta, mixed)
        assert whole.shape == (3, 8, 8), "copies axes lead"
        published = core.publish(theta)
        assert set(published) == {"C"}
        torch.testing.assert_close(core.expand(published, mixed), whole)
        torch.testing.assert_close(core.expand({"C": published["C"].mean(0)}, mixed), whole.mean(0))


def test_heads_are_blocks_with_a_scale_each() -> None:
    blocks, scales = torch.randn(4, 2, 2), torch.randn(4)
    expected = torch.block_diag(*(s * h for s, h in zip(scales, blocks, strict=True)))
    torch.testing.assert_close(expand_heads({"C": blocks, "S": scales}), expected)


def test_diag_and_mix_are_their_papers_sums() -> None:
    """ΔW = s B diag(v) A (LoLDU), and s B (Σ v_i P_i) A normal P_i of variance 1/r, number by number."""
    rng = np.random.default_rng(0)
    r = 8
    b, a, v = rng.standard_normal((5, r)), rng.standard_normal((r, 6)), rng.standard_normal(r)
    core = CORES["diag"].expand({"C": torch.from_numpy(v)}, None).numpy()
    outer = sum(v[k] * np.outer(b[:, k], a[k]) for k in range(r))
    np.testing.assert_allclose(b @ core @ a, outer, rtol=1e-12)
    mixed = mixed_matrices(r, 0, "q")
    assert mixed.shape == (64, r, r) and abs(float(mixed.var()) * r - 1) < 0.1 and abs(float(mixed.mean())) < 0.02
    weights = rng.standard_normal(64)
    core = CORES["mix"].expand({"C": torch.from_numpy(weights)}, mixed.double()).numpy()
    for i in range(r):
        for j in range(r):
            assert core[i, j] == pytest.approx(sum(weights[k] * float(mixed[k, i, j]) for k in range(64)))
    assert torch.equal(mixed, mixed_matrices(r, 0, "q")) and not torch.equal(mixed, mixed_matrices(r, 1, "q"))
    assert not torch.equal(mixed, mixed_matrices(r, 0, "k"))


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("rolora", "rolora"),
        ("rolora", "fedadam"),
        *(("lotr", name) for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad")),
    ],
)
def test_what_a_strategy_keeps_comes_back_to_the_same_bytes(
    method: str, strategy: str, tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    words = f"--model {tiny_bert} --data {animals} --method {method} --strategy {strategy} --rank {R} --clients 3"
    words += (
        " --sample 2 --max-examples 12 --public-examples 16 --eval-examples 6 --partition iid --lr-schedule constant"
    )
    words += " --engine local --threads 1 --dtype float32 --quiet"
    for ending in ("--rounds 4 --out whole", "--rounds 1 --out run", "--rounds 4 --out run --resume"):
        options, folder = ending.split(" --out ")
        name, *resume = folder.split()
        assert simulate.main([*words.split(), *options.split(), "--out", str(tmp_path / name), *resume]) == 0
    whole, resumed = read_run(tmp_path / "whole"), read_run(tmp_path / "run")
    assert whole[0]["trained_sha256"] == resumed[0]["trained_sha256"]
    assert [row["aggregation_error"] for row in whole[1]] == [row["aggregation_error"] for row in resumed[1]]


def request(*matrices: torch.Tensor, r: int) -> Request:
    return Request("q", matrices[0].shape[1], matrices[0].shape[0], r, 0, lambda: iter(matrices))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_ldu_and_nystrom_are_the_papers_factors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64)
    r = min(shape)
    pair = ldu_basis(request(w, r=r))
    diagonal = torch.linalg.lu(w).U.diagonal()
    torch.testing.assert_close(pair.B.double() @ torch.diag(diagonal) @ pair.A.double(), w, atol=1e-5, rtol=1e-5)
    low = w[:, :2] @ w[:2, :]
    pair = nystrom_basis(request(low, r=2))
    middle = torch.linalg.pinv(low[:2, :2])
    torch.testing.assert_close(pair.B.double() @ middle @ pair.A.double(), low, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_svds_that_keep_the_singular_values_are_those_of_lora_xs_and_of_pefts_tiny_lora(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear, r = torch.nn.Linear(shape[1], shape[0], bias=False), 3
    w = linear.weight.detach().clone()
    u, sigma, vh = torch.linalg.svd(w)
    leading = u[:, :r] @ torch.diag(sigma[:r]) @ vh[:r]
    xs = scaled_svd_basis(request(w, r=r))
    torch.testing.assert_close(xs.B @ xs.A, leading)
    torch.testing.assert_close(xs.B.T @ xs.B, torch.eye(r))
    torch.testing.assert_close(xs.A @ xs.A.T, torch.diag(sigma[:r] ** 2))
    tiny = root_svd_basis(request(w, r=r))
    theirs: Any = get_peft_model(torch.nn.Sequential(linear), TinyLoraConfig(r=r, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    assert layer.tinylora_A["default"].shape == tiny.A.shape
    signs = torch.sign((layer.tinylora_A["default"] * tiny.A).sum(1))  # which an SVD leaves free
    torch.testing.assert_close(tiny.A * signs[:, None], layer.tinylora_A["default"])
    torch.testing.assert_close(tiny.B * signs, layer.tinylora_B["default"])


def test_randomised_leading_directions_hold_nearly_all_that_the_best_ones_hold() -> None:
    """Of signs, whose singular values hardly fall: the hardest case."""
    matrix = torch.randint(0, 2, (1100, 1100), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    _, v = leading_singular_vectors(matrix, 32, seed=0)
    best = torch.linalg.eigvalsh(matrix.T @ matrix)[-32:].sum()
    assert (matrix @ v).square().sum() > 0.98 * best


def test_ldu_of_a_singular_matrix_is_finite() -> None:
    pair = ldu_basis(request(torch.zeros(4, 5), r=3))
    assert torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()


def test_tucker_holds_at_least_what_the_higher_order_svd_holds() -> None:
    torch.manual_seed(0)
    members = [torch.randn(9, 7) for _ in range(4)]

    def held(pair: Any) -> float:
        return sum(float((pair.B.T @ m @ pair.A.T).square().sum()) for m in members)

    best = tucker_basis(request(*members, r=2))
    torch.testing.assert_close(best.A @ best.A.T, torch.eye(2), atol=1e-6, rtol=0)
    assert held(best) > held(spectral_basis(request(*members, r=2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "ravan", "r": 6}, "cannot be cut into the 4 blocks"),
        ({"method": "loldu", "tie": "type"}, "made from one layer's weights"),
        ({"method": "lora", "core": "diag"}, "does not go with method 'lora'"),
        ({"method": "lotr", "core": "identity"}, "does not go with method 'lotr'"),
        ({"core": "heds"}, "did you mean 'heads'"),
    ],
)
def test_points_of_the_grid_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoreConfig(**fields)


def test_tie_all_needs_one_shape(tiny_bert: Path, animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--model {tiny_bert} --data {animals} --method lotr --tie all --rank 4 --clients 3 --engine local"
    assert simulate.main(words.split()) == 2
    assert "--tie all: layers that share one pair need one shape" in " ".join(capsys.readouterr().err.split())


def test_adding_lora_xs_again_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "again", replace(METHODS["lora-xs"], title="once more"))
    check_strategy("exact-average", method="again")


def test_server_optimizers_follow_their_formulas() -> None:
    start, x = {"C": np.array([1.0, 2.0])}, {"C": np.array([1.5, 1.0])}
    delta = x["C"] - start["C"]
    square, tau = delta**2, 1e-3
    wanted = {
        "fedavgm": delta,
        "fedadam": 1e-2 * 0.1 * delta / (np.sqrt(0.99 * tau**2 + 0.01 * square) + tau),
        "fedyogi": 1e-2 * 0.1 * delta / (np.sqrt(tau**2 - 0.01 * square * np.sign(tau**2 - square)) + tau),
        "fedadagrad": 1e-2 * delta / (np.sqrt(tau**2 + square) + tau),
    }
    for name, step in wanted.items():
        made: Any = load_strategy(name, {}, 2)
        made.current = start
        np.testing.assert_allclose(made.combine([Update(0, x, 2.0)], 1).arrays["C"], start["C"] + step)


def test_robust_rules_ignore_one_hostile_client() -> None:
    updates = [Update(i, {"C": np.full(3, 1.0 + 0.01 * i)}, 1.0) for i in range(6)] + [
        Update(6, {"C": np.full(3, 1e9)}, 1.0)
    ]
    for name in ROBUST:
        found = load_strategy(name, {}, 7).combine(updates, 1)["C"]  # type: ignore[attr-defined]
        assert np.all((found >= 1) & (found <= 1.05)), name
    assert weighted_mean(updates)["C"].max() > 1e8
