"""A basis or a core is one entry: all that a run and its bill need to know of it is read there, and nowhere else."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedlotr import cli, simulate
from fedlotr.adapters import BASES, CORES, METHODS, BasisKind, CoreKind
from fedlotr.adapters.bases import Factors, Request
from fedlotr.communication.ledger import read_ledger
from tests.support import read_run
from tests.test_layers import MODULES

R = 4
SENT, KEPT = "of-gradients", "of-the-seed"


def cosines(request: Request) -> Factors:
    """Rows of a cosine transform."""
    a, b = (
        torch.cos(torch.pi * torch.arange(R)[:, None] * (torch.arange(width) + 0.5) / width) / width**0.5
        for width in (request.d_in, request.d_out)
    )
    return Factors(a, b.T.contiguous())


def cosines_of_a_step(request: Request) -> Factors:
    """The same with the signs of a gradient in B, so that nobody can make it without."""
    a, b = cosines(request)
    return Factors(a, b * next(request.matrices())[:, :1])


def circulant(theta: Any, shifts: torch.Tensor) -> torch.Tensor:
    """C = s Σ v_k (P shifted k times)."""
    vector = theta["C"] * theta["S"] if "S" in theta else theta["C"]
    return torch.tensordot(vector, shifts.to(vector.dtype), dims=1)


@pytest.fixture(params=[KEPT, SENT])
def basis(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A toy basis and the toy core `circulant`, each added as one entry, and a method that takes both."""
    name: str = request.param
    kinds = {
        KEPT: BasisKind(text="cosines", make=cosines, made_of="seed", one_layer=True),
        SENT: BasisKind(text="cosines and signs", make=cosines_of_a_step, made_of="gradient", one_layer=True),
    }
    monkeypatch.setitem(BASES, name, kinds[name])
    core = CoreKind(
        text="one number for each shift",
        shapes=lambda r: {"C": (r,), "S": (1,)},
        numbers="r, cyclic",
        source="a test",
        expand=circulant,
        publish=lambda theta: {"C": theta["C"] * theta["S"]},
        constant=lambda r, seed, tag: torch.stack([torch.eye(r).roll(k, 0) for k in range(r)]),
        blocks=2,
    )
    monkeypatch.setitem(CORES, "circulant", core)
    monkeypatch.setitem(METHODS, "toy", replace(METHODS["fed-sb"], basis=name, core="circulant"))
    return name


def as_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_entry_each_is_all_that_a_run_and_its_bill_need(
    basis: str, tiny_bert: Path, animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--model {tiny_bert} --data {animals} --method fed-sb --basis {basis} --core circulant --rank {R}"
    words += " --clients 3 --sample 3 --max-examples 12 --public-examples 16 --eval-examples 6 --partition iid"
    words += " --lr-schedule constant --engine local --threads 1 --dtype float32 --quiet"
    for ending in ("--rounds 2 --out whole", "--rounds 1 --out run", "--rounds 2 --out run --resume"):
        options, folder = ending.split(" --out ")
        name, *resume = folder.split()
        assert simulate.main([*words.split(), *options.split(), "--out", str(tmp_path / name), *resume]) == 0
    (whole, rows), (resumed, _) = read_run(tmp_path / "whole"), read_run(tmp_path / "run")
    assert whole["trained_sha256"] == resumed["trained_sha256"]
    assert all(row["aggregation_error"] <= 1e-6 for row in rows), "the mean is certified through the toy's expand"

    exported = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    name = next(name.removesuffix(".lora_A.weight") for name in exported if name.endswith("lora_A.weight"))
    down, up = (exported[f"{name}.lora_{side}.weight"].double() for side in "AB")
    rows_of_a = cosines(Request("", down.shape[1], up.shape[0], R, 0, lambda: iter(()))).A.double()
    outside = down - down @ torch.linalg.pinv(rows_of_a) @ rows_of_a
    assert (up @ down).any() and float(outside.abs().max()) < 1e-6, "it learnt, in the span of the toy's A"

    listed = next(row for row in as_json(["ls", "methods"], capsys) if row["method"] == "toy")
    assert (listed["basis"], listed["core"], listed["upload a layer"]) == (basis, "circulant", "r, cyclic")
    assert listed["one-off"].startswith("r·(d_in + d_out)" if basis == SENT else "seed and hash")
    asked = f"cost --model {tiny_bert} --labels 2 --methods toy --rank {R} --clients 3 --rounds 2"
    owed = next(row for row in as_json(asked.split(), capsys)["rows"] if "exact-average" in row["strategies"])
    entries = read_ledger(tmp_path / "whole" / "ledger")

    def paid(kind: str) -> int:
        return sum(entry.payload_bytes for entry in entries if entry.kind == kind)

    assert owed["upload_bytes"] == paid("update") / 6 and owed["download_bytes"] == paid("broadcast") / 6
    assert owed["one_off_bytes"] == paid("basis") / 3 and owed["total_bytes"] == paid("update") + paid(
        "broadcast"
    ) + paid("basis")
    foretold = as_json(["doctor", *words.replace(" --quiet", "").split(), "--rounds", "2"], capsys)["needs"]
    assert foretold["one_off_bytes"] == owed["one_off_bytes"] and foretold["total_bytes"] == owed["total_bytes"]


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert simulate.main([str(word) for word in words]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_an_entry_says_of_itself_is_what_is_refused(
    basis: str, tiny_bert: Path, animals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*f"--model {tiny_bert} --data {animals} --public-examples 16 --engine local --method toy".split()]
    assert "did you mean 'circulant'" in refusal(capsys, *words, "--core", "circulent")
    assert "the core 'circulant' has no leading block; choose 'full' or 'diag'" in refusal(
        capsys, *words, "--rank", 4, "--client-rank", "2,4"
    )
    assert "cannot be cut into the 2 blocks of core 'circulant'" in refusal(capsys, *words, "--rank", 5)
    assert "made from one layer's weights" in refusal(capsys, *words, "--rank", 4, "--tie", "type")
    assert "start again in every round" in refusal(capsys, *words, "--rank", 4, "--strategy", "scaffold")
    if basis == SENT:
        said = refusal(capsys, *words, "--rank", 4, "--public-examples", 0)
        assert f"the basis '{SENT}' takes its gradient from public examples" in said


def test_every_entry_names_functions_that_there_are() -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 8)))
    for kind in BASES.values():
        pair = kind.make(Request("q", 8, 9, R, 0, lambda: iter([matrix])))
        assert pair.A.shape == (R, 8) and pair.B.shape == (9, R)
        assert bool(pair.B.any()) != kind.zero_b
    for core in CORES.values():
        if core.trained:
            theta = {name: torch.ones(shape) for name, shape in core.shapes(R).items()}
            constant = None if core.constant is None else core.constant(R, 0, "q")
            assert core.expand(theta, constant).shape == (R, R) and core.publish(theta)["C"].numel() == core.count(R)


MEANT = {
    ("adapters.methods", None): "the table of methods, whose rows name their basis and core",
    ("adapters.kinds", None): "the tables themselves",
    ("adapters.moves", None): "the table of ways to move, some of which are called as the bases that they make",
    ("adapters.cores", "mix"): "the name of a stream of random numbers, which decides the matrices",
    ("cost.billing", "lora"): "the method that others are compared with",
    ("cost.formulas", "lora"): "methods whose counts papers published",
    ("communication.ledger", "update"): "the kind of a message",
    ("reporting.card", "lora"): "a tag on the hub",
    ("run.harness", "random"): "the generator of Python's module of that name",
    ("reporting.console", "update"): "the codec of updates, in summary.json",
    ("reporting.run_record", "heads"): "the numbers of the classification head, in facts.json",
    ("run.summary", "update"): "the codec of updates, in summary.json",
    ("run.summary", "heads"): "the numbers of the classification head, in facts.json",
    ("flower.serialize", "random"): "the kind of a generator in the state of a strategy",
}
"""(module below fedlotr, the name or all names): what a word that is also a basis or a core means there."""


def named(text: str) -> set[str]:
    """The bases and cores that a string is, puts in quotes, or gives as an option's value."""
    return {
        name
        for name in {*BASES, *CORES}
        if text == name or re.search(rf"""(['"`]|--(basis|core)[ =]){name}(['"`]|\b(?!-))""", text)
    }


def test_no_basis_or_core_is_named_outside_of_the_tables() -> None:
    found: set[tuple[str, str]] = set()
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words:
                found |= {(module.removeprefix("fedlotr."), name) for name in named(node.value)}
    strangers = sorted(pair for pair in found if not {pair, (pair[0], None)} & set(MEANT))
    assert not strangers, f"a basis or a core is named; ask its entry instead: {strangers}"
    idle = set(MEANT) - found - {(module, None) for module, _ in found}
    assert not idle, f"no longer there: {idle}"
