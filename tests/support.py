"""Plain functions and types that several tests use."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fedlotr import SimulationConfig

Simulate = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs `python -m fedlotr.simulate` with the given words."""


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
    done = subprocess.run([sys.executable, "-c", program, str(out)], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [load_file(out / f"logits-{at}.safetensors")["logits"] for at in range(len(adapters))]


def our_logits(config: SimulationConfig, run_dir: Path, texts: list[list[str]]) -> torch.Tensor:
    """The trained model's logits, from our layers and the last checkpoint, unmerged and in float32."""
    from fedlotr.flower.carried import restored
    from fedlotr.preparation import check, prepare
    from fedlotr.simulation import resolve
    from fedlotr.training.examples import Batch

    checked = check(resolve(config.model_copy(update={"out": None})))
    model = prepare(checked, run_dir / "again").model
    last = sorted((run_dir / "checkpoints").glob("*.safetensors"))[-1]
    model.assign(load_file(last))
    about = json.loads(last.with_suffix(".json").read_text(encoding="utf-8")).get("carry")
    if about is not None:
        model.carry(restored(load_numpy(last), about))
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.pad_token_id, tokenizer.padding_side = model.spec.pad_id, "right"
    batch = tokenizer(*texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model.logits(
            Batch(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"), torch.zeros(0))
        )
