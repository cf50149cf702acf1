"""The factored layer computes its formula, is a guest in PEFT, and everyone makes the same bases."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from fedlotr import CoreConfig, initialize_basis
from fedlotr.adapters import CORES, METHODS, bases_of, bases_sha256, copies
from fedlotr.adapters.bases import (
    Factors,
    Request,
    leading_singular_vectors,
    lora_basis,
    one_thread,
    random_basis,
    sha256,
    spectral_basis,
)
from fedlotr.adapters.layer import Basis, FactoredLayer, weight_of
from fedlotr.adapters.tuner import factored_layers
from tests import forks
from tests.support import assert_logits, assert_within, float32_bound

ROWS = [(method, basis) for method, row in METHODS.items() if row.factored for basis in ("random", "svd", "update")]
ROWS.remove(("frlora", "update"))  # whose adapter alone could not tell what it began with; refused


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


def ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 60, (rows, 6), generator=torch.Generator().manual_seed(1))


def summed_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch, labels=batch).loss
    return loss * len(batch)


def adapted(base: Any, **fields: Any) -> PeftModel:
    config = CoreConfig(**{"r": 4, "target_modules": "all-linear", **fields})
    if config.basis == "update":
        config = initialize_basis(base, [ids()[:2], ids()[2:]], summed_loss, config)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model


def shake(model: nn.Module) -> None:
    """Move every trained factor away from its start."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


def layer_with(base: nn.Module, r: int, scaling: float = 1.0) -> FactoredLayer:
    torch.manual_seed(3)
    layer = FactoredLayer(base)
    basis = Basis(layer.in_features, layer.out_features, r, persistent=False)
    basis.A.copy_(torch.randn_like(basis.A.nan_to_num()))
    basis.B.copy_(torch.randn_like(basis.B.nan_to_num()))
    layer.add("default", r=r, scaling=scaling, basis=basis, parameters={"C": torch.randn(r, r)}, core=CORES["full"])
    layer._active_adapter = "default"
    return layer


@pytest.mark.parametrize("base", [nn.Linear(5, 7), nn.Linear(6, 6, bias=False), Conv1D(7, 5)], ids=str)
@pytest.mark.parametrize("r", [1, 5])
@torch.no_grad()
def test_the_layer_computes_W_x_plus_s_B_C_A_x(base: nn.Module, r: int) -> None:
    layer = layer_with(base, r, scaling=0.5)
    x = torch.randn(3, 4, layer.in_features)
    a, b, c = (layer.factor(name, "default") for name in "ABC")
    assert a is not None and b is not None and c is not None
    update = 0.5 * b.double() @ c.double() @ a.double()
    w = weight_of(base).double().clone()
    bias = torch.zeros(layer.out_features) if base.bias is None else base.bias
    expected = x.double() @ (w + update).T + bias.double()
    moved = 0.5 * b.double().abs() @ c.double().abs() @ a.double().abs()
    most = x.double().abs() @ (w.abs() + moved).T + bias.double().abs()
    bound = float32_bound(layer.in_features + 2 * r + 4, most)  # the two products within, s, W + update, + bias
    assert_within(layer(x), expected, bound)
    layer.merge()
    assert_within(layer(x), expected, bound)
    assert_within(weight_of(layer), w + update, float32_bound(2 * r + 2, w.abs() + moved))
    layer.unmerge()
    assert_within(layer(x), expected, bound)


@pytest.mark.parametrize("axes", [(3,), (3, 2)])
def test_each_group_of_rows_meets_its_own_copy(axes: tuple[int, ...]) -> None:
    base = nn.Linear(5, 7)
    layer = layer_with(base, 4)
    groups = torch.Size(axes).numel()
    x = torch.randn(groups * 2, 6, 5)
    stacked = torch.randn(*axes, 4, 4, requires_grad=True)
    with copies(layer, {"": {"C": stacked}}):
        together = layer(x)
        together.square().sum().backward()
    for group, core in enumerate(stacked.detach().reshape(groups, 4, 4)):
        alone = core.clone().requires_grad_()
        with copies(layer, {"": {"C": alone}}):
            y = layer(x[group * 2 : group * 2 + 2])
            y.square().sum().backward()
        assert stacked.grad is not None and alone.grad is not None
        # y = W x + b + B C A x, and the gradient of C is the sum over 12 tokens of Bᵀ 2y (A x)ᵀ.
        rows = x[group * 2 : group * 2 + 2].reshape(-1, 5).double().abs()
        a, b = (layer.factor(name, "default") for name in "AB")
        assert a is not None and b is not None
        inner, outer = rows @ a.double().abs().T, b.double().abs()
        most = rows @ base.weight.double().abs().T + base.bias.double().abs() + inner @ core.double().abs().T @ outer.T
        own = together[group * 2 : group * 2 + 2]
        assert_within(own.reshape(-1, 7), y.reshape(-1, 7), float32_bound(5 + 5 + 8 + 3, most))
        steep = outer.T @ (2 * most).T @ inner
        assert_within(stacked.grad.reshape(groups, 4, 4)[group], alone.grad, float32_bound(16 + 7 + 5 + 12, steep))
    assert layer.copies is None


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_carried_may_be_scored_with_before_it_is_trained_with(dense: bool) -> None:
    """In bfloat16 a narrow copy of it is kept, whichever came first."""
    layer = layer_with(nn.Linear(5, 7).bfloat16(), 2)
    layer.add_carry("default", *([torch.randn(7, 5)] if dense else [torch.randn(3, 5), torch.randn(7, 3)]))
    x = torch.randn(4, 5).bfloat16()
    with torch.inference_mode():
        scored = layer(x)
    y = layer(x.requires_grad_(True))
    y.float().sum().backward()
    assert torch.equal(y, scored) and x.grad is not None and x.grad.isfinite().all()


def test_rows_that_cannot_be_shared_out_evenly_are_refused() -> None:
    layer = layer_with(nn.Linear(5, 7), 2)
    with copies(layer, {"": {"C": torch.zeros(4, 2, 2)}}), pytest.raises(ValueError, match="6 rows .* 4 copies"):
        layer(torch.zeros(6, 5))


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize(("method", "basis"), ROWS)
def test_every_row_is_a_guest_in_PEFT(build: Any, method: str, basis: str, tmp_path: Path) -> None:
    x = ids()
    model = adapted(build(), method=method, basis=basis, alpha=6.0)
    with torch.no_grad():
        start = build()(x).logits
        if METHODS[method].residual:  # it adds a product and takes it off
            assert_logits(model(x).logits, start)
        else:
            assert torch.equal(model(x).logits, start), "the first forward is the base model's"
        shake(model)
        trained = model(x).logits
        assert (trained - start).abs().max() > 1e-3
        model.save_pretrained(str(tmp_path))
        for options in ({}, {"low_cpu_mem_usage": True}):
            again = PeftModel.from_pretrained(build(), str(tmp_path), **options)
            assert torch.equal(again(x).logits, trained), "a saved adapter comes back to the bit"
        with model.disable_adapter():
            assert torch.equal(model(x).logits, start)
        merged = model.merge_and_unload()
        assert not factored_layers(merged)
        assert_logits(merged(x).logits, trained)


def test_saved_files_are_equal_byte_for_byte(tmp_path: Path) -> None:
    for name in ("one", "two"):
        adapted(llama(), method="lotr").save_pretrained(str(tmp_path / name))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_tied_layers_share_one_pair_and_survive_casting() -> None:
    model = adapted(llama(), method="lotr")
    layers = factored_layers(model)
    kinds = {name.rpartition(".")[2] for name in layers}
    assert len(layers) == 14 and len(bases_of(model)) == len(kinds) == 7
    queries = [layer.core_basis["default"] for name, layer in layers.items() if name.endswith("q_proj")]
    assert queries[0] is queries[1]
    assert len(bases_of(model.half())) == 7


def test_a_method_is_one_row_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "lora-xs-again", replace(METHODS["lora-xs"], title="the same, once more"))
    again, known = adapted(llama(), method="lora-xs-again"), adapted(llama(), method="lora-xs")
    assert bases_sha256(again) == bases_sha256(known)


def request(*matrices: torch.Tensor, r: int = 3, tag: str = "q", seed: int = 0) -> Request:
    d_out, d_in = matrices[0].shape
    return Request(tag, d_in, d_out, r, seed, lambda: iter(matrices))


def test_bases_are_orthonormal() -> None:
    torch.manual_seed(0)
    for make in (random_basis, spectral_basis):
        for matrices in ([torch.randn(6, 9)], [torch.randn(6, 9), torch.randn(6, 9)]):
            pair = make(request(*matrices))
            for q in (pair.A.double(), pair.B.T.double()):  # a vector's entries are rounded once, and it has norm one
                assert_within(q @ q.T, torch.eye(3), float32_bound(2, torch.ones(3, 3)))


def test_a_spectral_basis_holds_the_best_approximation_of_its_rank() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 5)
    pair = spectral_basis(request(w, r=2))
    u, s, vh = torch.linalg.svd(w.double())
    best = (u[:, :2] * s[:2]) @ vh[:2]
    a, b = pair.A.double(), pair.B.double()
    most = b.abs() @ (b.T.abs() @ w.double().abs() @ a.T.abs()) @ a.abs()
    assert_within(b @ (b.T @ w.double() @ a.T) @ a, best, float32_bound(4, most))  # each factor is rounded once


def test_a_tied_spectral_basis_spans_what_its_members_share() -> None:
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(8, 2)).Q, torch.linalg.qr(torch.randn(7, 2)).Q
    members = [left @ torch.randn(2, 2) @ right.T for _ in range(3)]
    pair = spectral_basis(request(*members, r=2))
    for member in members:
        most = pair.B.abs() @ (pair.B.T.abs() @ member.abs() @ pair.A.T.abs()) @ pair.A.abs()
        # A member is a product too, so it has rank 2 but for its rounding, of 2 + 2 terms and of Q's entries.
        bound = float32_bound(8 + 7 + 2 + 2 + 4 + 8, most.double() + 1)
        assert_within(pair.B @ (pair.B.T @ member @ pair.A.T) @ pair.A, member, bound)


def test_wide_matrices_are_decomposed_well_without_a_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    w = (torch.randn(80, 40) @ torch.diag(0.7 ** torch.arange(40)) @ torch.randn(40, 60)).double()
    exact = leading_singular_vectors(w, 5, 0)
    monkeypatch.setattr("fedlotr.adapters.bases.EXACT_SVD_WIDTH", 10)
    for found, wanted in zip(leading_singular_vectors(w, 5, 0), exact, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("decay", [0.7, 1e-3, 0.0])
def test_singular_vectors_are_those_of_an_svd_however_the_singular_values_fall(
    shape: tuple[int, int], decay: float
) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, min(shape), dtype=torch.float64)).Q for side in shape)
    values = decay ** torch.arange(min(shape), dtype=torch.float64)
    w = left @ torch.diag(values) @ right.T
    u, v = leading_singular_vectors(w, 3, 0)
    torch.testing.assert_close(u.T @ u, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(v.T @ v, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(u.T @ w @ v, torch.diag(values[:3]), atol=1e-12, rtol=0)
    if decay:
        torch.testing.assert_close((left[:, :3] * u).sum(0).abs(), torch.ones(3).double(), atol=1e-9, rtol=0)
        torch.testing.assert_close((right[:, :3] * v).sum(0).abs(), torch.ones(3).double(), atol=1e-9, rtol=0)


def test_lora_starts_as_lora_does() -> None:
    pair = lora_basis(request(torch.zeros(4, 100), r=50))
    assert not pair.B.any()
    assert pair.A.abs().max() <= 0.1 and abs(pair.A.std() - 0.1 / 3**0.5) < 2e-3


class Wide(nn.Module):
    """Matrices as large as MiniLM's, whose decompositions really are shared out among threads."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.Generator().manual_seed(0)
        self.square, self.rectangular = nn.Linear(384, 384, bias=False), nn.Linear(384, 1536, bias=False)
        for layer in (self.square, self.rectangular):
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape, generator=weights))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.rectangular(self.square(x))
        return y


def hash_of_bases(basis: str, threads: int) -> str:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        config = CoreConfig(r=16, basis=basis, target_modules=["square", "rectangular"])
        if basis == "update":  # one example: its gradients have the same bits on any number of threads
            config = initialize_basis(Wide(), [torch.linspace(-1, 1, 384)[None]], lambda m, x: m(x).sum(), config)
        return bases_sha256(get_peft_model(Wide(), config))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("basis", ["random", "svd", "update"])
def test_bases_have_the_same_bits_on_any_number_of_threads(basis: str) -> None:
    before = torch.get_num_threads()
    assert hash_of_bases(basis, 1) == hash_of_bases(basis, 2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("shape", [(384, 384), (384, 1536)])
@pytest.mark.parametrize("make", [random_basis, spectral_basis])
def test_a_decomposition_has_the_same_bits_in_a_process_of_any_number_of_threads(
    make: Callable[[Request], Factors], shape: tuple[int, int]
) -> None:
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with one_thread():
                found |= {sha256([("", make(request(*matrices, r=16)))]) for matrices in ([w], [w, w.flip(0)])}
            assert torch.get_num_threads() == threads, "the process gets its threads back"
    finally:
        torch.set_num_threads(before)
    assert len(found) == (1 if make is random_basis else 2), "one for the matrix, one for the tie"


@pytest.mark.parametrize("make", [random_basis, spectral_basis, lora_basis])
def test_a_basis_neither_reads_nor_moves_the_global_generator(make: Callable[[Request], Factors]) -> None:
    w = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    found = set()
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            found.add(sha256([("", make(request(w)))]))
            assert torch.equal(torch.get_rng_state(), state)
    assert len(found) == 1


def test_another_seed_or_name_gives_another_random_basis() -> None:
    w = torch.zeros(6, 9)
    found = {sha256([("", random_basis(request(w, seed=s, tag=t)))]) for s in (0, 1) for t in ("q", "k")}
    assert len(found) == 4


def test_update_takes_the_sign_of_the_mean_gradient_over_batches_of_any_size() -> None:
    """In float64: a sign is what rounding can turn, of an entry near zero, and one turned is another basis."""
    x = ids(5)
    whole = initialize_basis(llama().double(), [x], summed_loss, CoreConfig(r=4))
    parts = initialize_basis(llama().double(), [x[:1], x[1:]], summed_loss, CoreConfig(r=4))
    chunked = initialize_basis(llama().double(), [x], summed_loss, CoreConfig(r=4), memory=1)
    base = llama().double()
    name = "model.layers.0.self_attn.q_proj"
    gradient = torch.autograd.grad(summed_loss(base, x), base.get_submodule(name).weight)[0]
    oracle = spectral_basis(request(-torch.sign(gradient), r=4))
    for config in (whole, parts, chunked):
        assert torch.equal(config.bases[name].A, oracle.A) and torch.equal(config.bases[name].B, oracle.B)
    assert all(p.requires_grad and p.grad is None for p in base.parameters())


def test_update_refuses_a_gradient_of_zero() -> None:
    with pytest.raises(ValueError, match=r"gradient of .* is zero: fit the head first"):
        initialize_basis(llama(), [ids()], lambda m, b: 0.0 * summed_loss(m, b), CoreConfig(r=4))


def test_get_peft_model_with_update_names_what_to_call_first() -> None:
    with pytest.raises(ValueError, match=r"initialize_basis\(model, batches, loss"):
        get_peft_model(llama(), CoreConfig(method="fed-sb", r=4))


def test_bases_of_another_base_model_are_refused(tmp_path: Path) -> None:
    adapted(llama(), method="lora-xs").save_pretrained(str(tmp_path))
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(torch.randn(16, 16))
    with pytest.raises(ValueError, match="not those the adapter was trained with"):
        PeftModel.from_pretrained(other, str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "fedsb"}, "did you mean 'fed-sb'"),
        ({"basis": "svdd"}, "did you mean 'svd'"),
        ({"r": 0}, "at least 1"),
        ({"method": "fed-sb", "basis": "lora"}, "would never learn"),
        ({"method": "lora", "tie": "type"}, "cannot hold"),
        ({"method": "head"}, "adapts no layer"),
    ],
)
def test_configurations_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoreConfig(**fields)


def test_a_rank_above_a_layers_width_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 9 is above the width of .*k_proj"):
        adapted(llama(), method="lotr", r=9)


def test_adapters_and_training_load_neither_flower_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('flwr', 'ray'): sys.modules[name] = None\n"  # any import of them now fails
        "from fedlotr import CoreConfig, initialize_basis\n"
        "import fedlotr.training.cohort, fedlotr.evaluation.scores, fedlotr.training.head\n"
    )
    done = forks.server(*forks.PLAIN).run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
