"""What a process of our own loads: no more than a run uses, and what was left out is there for whoever wants it."""

import subprocess
import sys
from pathlib import Path

UNUSED = {
    *("bitsandbytes", "scipy", "sklearn", "opacus", "dp_accounting", "matplotlib", "networkx", "functorch"),
    *("torch._dynamo.utils", "torch._inductor", "torch.onnx", "torch.distributed.tensor", "torch.distributed.fsdp"),
}
SHOWN = f"print('found', *(name for name in {UNUSED} if sys.modules.get(name) is not None))\n"
WORKER = """
import sys
from fedlotr.libraries import loading_for_good
with loading_for_good():
    import fedlotr.flower.client_app
"""


def run(program: str, folder: Path) -> list[str]:
    """What a program says in a process of its own, which has loaded nothing before."""
    found = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_a_whole_run_loads_none_of_what_it_does_not_use(tmp_path: Path) -> None:
    words = ["--engine=local", "--rounds=1", "--clients=2", "--sample=2", "--max-examples=2", "--eval-examples=4"]
    words += ["--public-examples=8", "--max-length=8", "--rank=2", "--quiet", f"--out={tmp_path / 'run'}"]
    program = f"import sys\nfrom fedlotr.commands import simulate\nassert simulate.main({words}) == 0\n{SHOWN}"
    assert run(program, tmp_path) == ["found"]
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_worker_loads_neither_and_no_table_of_rows(tmp_path: Path) -> None:
    shown = SHOWN + "print(*({'datasets', 'pandas', 'pyarrow', 'ray'} & set(sys.modules)))"
    assert run(WORKER + shown, tmp_path) == ["found"]


def test_what_was_left_out_can_be_had_afterwards(tmp_path: Path) -> None:
    program = f"""{WORKER}
import importlib.util, scipy.special, torch
assert importlib.util.find_spec("bitsandbytes") is None or sys.modules.get("bitsandbytes", 0) == 0
assert torch.distributed.is_available.__module__ == "torch.distributed"
from torch._dynamo.utils import counters
assert not any(type(finder).__name__ == "_Unreading" for finder in sys.meta_path)
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import masking_utils
assert masking_utils.TransformGetItemToIndex is TransformGetItemToIndex
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.utils.counters is counters
@torch.compile(backend="eager")
def double(x):
    return 2 * x
assert double(torch.ones(2)).tolist() == [2, 2]
"""
    run(program, tmp_path)


def test_using_the_compiler_at_once_reads_it(tmp_path: Path) -> None:
    program = f"""{WORKER}
import torch
def plain():
    return None
assert torch._dynamo.disable(plain) is plain is torch._dynamo.disable()(plain)
assert "torch._dynamo.utils" not in sys.modules
torch._dynamo.reset()
assert "torch._dynamo.utils" in sys.modules and torch._dynamo.disable(plain) is not plain
"""
    run(program, tmp_path)


def test_importing_fedlotr_loads_nothing_but_itself_and_the_standard_library(tmp_path: Path) -> None:
    """Its names load what they need when they are first used; `benchmarks/startup.py` has the seconds."""
    names = "print(*sys.modules)"
    added = set(run(f"import sys, fedlotr\n{names}", tmp_path)) - set(run(f"import sys\n{names}", tmp_path))
    assert {name for name in added if name.startswith("fedlotr")} == {"fedlotr"}
    assert {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names) == {"fedlotr"}
