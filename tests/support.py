"""Plain functions and types that several tests use."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from fedlotr import SimulationConfig
from tests import forks

if TYPE_CHECKING:
    from fedlotr.run.checking import Checked
    from fedlotr.run.preparation import Prepared

Simulate = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs `python -m fedlotr.simulate` with the given words, and environment by name."""


UNIT = 2.0**-24
"""Of float32: the most by which one operation is off, of its result."""


def float32_bound(terms: int, magnitude: torch.Tensor | float) -> torch.Tensor:
    """How far two float32 computations of the same sums and products may be apart, whatever the order they add in.

    A chain of matrix products and sums of n terms in all is off by at most n u / (1 - n u) of the same chain of
    absolute values, entry by entry, in any order and with or without fused operations (Higham 2002, Accuracy and
    Stability of Numerical Algorithms, section 3.5). Two of them: twice that, on any processor.

    terms: the lengths of its sums, added up. magnitude: the chain of absolute values. A value in float64 beside one in
    float32 is half as far; what is stored in float32 is one term more.
    """
    return torch.as_tensor(magnitude, dtype=torch.float64) * (2 * terms * UNIT / (1 - terms * UNIT))


def assert_within(found: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor) -> None:
    """Entry by entry."""
    over = (found.detach().double() - wanted.detach().double()).abs() / bound
    assert not over.isnan().any() and float(over.max()) <= 1, f"{float(over.max()):.3g} times as far apart as may be"


def network_bound(products: int, terms: int) -> float:
    """How far two float32 runs of the same passes may be apart, relative to the norm of what comes out.

    Of a product with sums of n terms, roundings of random sign make √n u (Higham & Mary 2019, A New Approach to
    Probabilistic Rounding Error Analysis: λ √n u but for a chance of 2 exp(-λ²/2)); those of k products in a row add up
    as random signs do too, √(k n) u. λ = 4; and twice, for two runs. The worst case, k n u, is never met.

    products: matrix products that a number goes through, forward and backward. terms: of the longest of their sums.
    """
    return 2 * 4 * float(np.sqrt(products * terms)) * UNIT


def rounding(model: torch.nn.Module) -> float:
    """`network_bound` of a forward and a backward through a model: of gradients, and of a few steps along them."""
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    # A factored layer is three products; a block of attention has two without weights for its four to seven.
    return network_bound(2 * 3 * len(weights), max(max(weight.shape) for weight in weights))


def assert_logits(found: torch.Tensor, wanted: torch.Tensor, *, layers: int = 36, width: int = 172) -> None:
    """Logits of one model computed in two ways, merged and unmerged.

    layers, width: of the model, each layer three products; those of the largest model of these tests but MiniLM.
    A merged weight is rounded once more, and is a sum of the rank's terms more; both are far below the products' own.
    """
    most = max(1.0, float(wanted.abs().max()))
    assert float((found - wanted).abs().max()) <= network_bound(3 * layers, width) * most, "not the same model"


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """summary.json and the rows of metrics.jsonl."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return summary, [json.loads(line) for line in lines]


TEXTS = [["A first text.", "And a second, somewhat longer text."]]
"""What the lines of adapter/README.md are about."""


def plain_logits(*adapters: Path) -> list[torch.Tensor]:
    """What the lines of each adapter/README.md compute, in one process that cannot import fedlotr."""
    program = "import os, sys; sys.modules['fedlotr'] = None\nfrom safetensors.torch import save_file\n"
    for at, adapter in enumerate(adapters):
        code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        assert code is not None
        program += (
            f"os.chdir({str(adapter)!r})\n{code[1]}\n"
            f"save_file({{'logits': logits.contiguous()}}, sys.argv[1] + '/logits-{at}.safetensors')\n"
        )
    out = adapters[0].parent
    done = forks.server(*forks.PLAIN).run(program, out, cwd=out)
    assert done.returncode == 0, done.stderr
    return [load_file(out / f"logits-{at}.safetensors")["logits"] for at in range(len(adapters))]


def prepare_again(checked: "Checked", place: Path) -> "Prepared":
    """What a run prepares, as the run did: the number of threads decides the bits of a gradient.

    With them go the signs that the basis `update` is made of, and where the fit of the head ends. So it is the run's
    number, whatever this process has.
    """
    from fedlotr.run.preparation import prepare
    from fedlotr.run.simulation import limited_threads

    with limited_threads(checked.config.threads):
        return prepare(checked, place)


def our_logits(config: SimulationConfig, run_dir: Path, texts: list[list[str]]) -> torch.Tensor:
    """The trained model's logits, from our layers and the last checkpoint, unmerged and in float32."""
    from fedlotr.adapters.carry import Carry
    from fedlotr.flower.links.carry import CarriedTerm
    from fedlotr.flower.serialize import unpack
    from fedlotr.run.checking import check
    from fedlotr.run.resumption import saved_configuration
    from fedlotr.run.simulation import resolve
    from fedlotr.training.examples import Batch

    ran = saved_configuration(run_dir)
    assert ran is not None
    same = {"out": None, "threads": ran.threads, "dtype": ran.dtype, "device": ran.device}
    checked = check(resolve(config.model_copy(update=same)))
    prepared = prepare_again(checked, run_dir / "again")
    model = prepared.model
    assert prepared.bases_sha256 == read_run(run_dir)[0]["bases_sha256"], "other bases than the run's"
    last = sorted((run_dir / "checkpoints").glob("*.safetensors"))[-1]
    model.assign(load_file(last))
    link, packed = (
        CarriedTerm(Carry()),
        json.loads(last.with_suffix(".json").read_text(encoding="utf-8"))["links"]["carry"],
    )
    link.load_state(unpack(packed, load_numpy(last)))
    if link.carry.version:
        model.carry(link.carry)
    tokenizer = AutoTokenizer.from_pretrained(checked.spec.path)
    tokenizer.pad_token_id, tokenizer.padding_side = model.spec.pad_id, "right"
    batch = tokenizer(*texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model.logits(
            Batch(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"), torch.zeros(0))
        )


def deadly(folder: Path, of: str, *, in_round: int) -> str:
    """A strategy of ours, by module:Class, whose process is killed as it combines in a round, once."""
    module, _, name = of.partition(":")
    (folder / "deadly.py").write_text(
        "import os, pathlib, signal\n"
        f"from fedlotr.strategies.{module} import {name}\n"
        f"class Deadly({name}):\n"
        "    def combine(self, updates, server_round):\n"
        f"        if server_round == {in_round} and not pathlib.Path(__file__).with_name('killed').exists():\n"
        "            pathlib.Path(__file__).with_name('killed').touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().combine(updates, server_round)\n",
        encoding="utf-8",
    )
    return f"{folder / 'deadly.py'}:Deadly"
