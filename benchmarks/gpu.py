"""A cohort of 64 clients against the same clients one by one, on a GPU: a 22 M encoder, and a 1 B decoder.

Both of random weights, made from their configurations; imports nothing but `fedlotr.adapters` and `fedlotr.training`.
Where there is no GPU it says so and ends with 2, having measured nothing. `--device cpu --small` shows that it runs:
both models tiny, four clients. `--quantize none 8bit 4bit` measures the base in each form in turn.

`same_bits`: whether the same cohort, trained twice, ends with equal bits.

The shares of the matmul rate say what limits: where one client alone has a small share and the cohort a large one, it
was launching operations; where both have a large one, it is arithmetic, and no cohort can help.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import product as product_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import figures_path
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fedlotr.adapters import CoreConfig
from fedlotr.adapters.layer import widths
from fedlotr.adapters.quantised import check_quantiser
from fedlotr.errors import InputError, script
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.models.precision import repeatable
from fedlotr.training import backward, varlen_pass
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel

MODELS = ("encoder", "decoder")
FORMS = ("none", "8bit", "4bit")


ENCODER: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
"""MiniLM's: 22.7 M parameters."""
DECODER: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
"""TinyLlama's: 1.1 B parameters."""
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def build(name: str, folder: Path, dtype: str, device: str, small: bool, form: str) -> TrainableModel:
    """The model on the device, its linear layers quantised or not, with fed-sb's cores between random bases."""
    path = folder / name
    encoder = name == "encoder"
    if path.exists():
        pass
    elif encoder:
        BertModel(BertConfig(**(SMALL if small else ENCODER))).save_pretrained(path)
    else:
        config = LlamaConfig(**{**DECODER, **(SMALL if small else {})}, dtype=dtype)
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    spec = ModelSpec(str(path), "classification" if encoder else "causal-lm", 4 if encoder else 0, encoder, 0, dtype)
    base = load_base(replace(spec, quantize=form, device=device))
    core = CoreConfig(method="fed-sb", basis="random", r=16, target_modules=adaptable_layers(base, "all-linear"))
    return TrainableModel(base, spec, core)


def examples_for(model: TrainableModel, count: int, length: int) -> Examples:
    """Random tokens, half to full length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(length // 2, length + 1, count)
    causal = model.spec.kind == "causal-lm"
    labels = np.ones(count, np.int64) if causal else rng.integers(0, 4, count)
    tokens = rng.integers(1000, 30000, lengths.sum()).astype(np.int32)
    return Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), labels, causal=causal)


def seconds(device: str, work: Any) -> float:
    """What it takes, the device's queue emptied before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=64)
    options.add_argument("--pass-tokens", type=int, default=16384, help="tokens in one forward and backward")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--quantize", nargs="+", choices=FORMS, default=["none"], help="forms of the frozen layers")
    options.add_argument("--small", action="store_true", help="tiny models, four clients, one repeat")
    options.add_argument("--json", type=figures_path, default=None)
    args = options.parse_args()
    if args.small:
        args.clients, args.steps, args.repeats = min(args.clients, 4), 1, 1
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: there is no GPU here (torch.cuda.is_available() is False), so nothing was measured; "
            "--device cpu --small shows that it runs"
        )
    for form in set(args.quantize) - {"none"}:
        try:
            check_quantiser(form, args.device)
        except ValueError as error:
            raise InputError(f"--quantize {form}: {error}") from None
    varlen_pass.RAGGED_TOKENS = backward.PASS_TOKENS = args.pass_tokens
    training = LocalTraining(steps=args.steps, batch_size=args.batch)
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    side = 8192 if args.device == "cuda" else 256
    square = torch.ones(side, side, dtype=torch.bfloat16, device=args.device)
    product = min(seconds(args.device, lambda: square @ square) for _ in range(5))
    figures["matmul_gflops"] = 2 * side**3 / product / 1e9
    with tempfile.TemporaryDirectory() as folder, repeatable(args.device):  # as a run computes
        for name, form in product_of(args.models, args.quantize):
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            model = build(name, Path(folder), "bfloat16", args.device, args.small, form)
            each = args.batch * args.steps
            examples, start = examples_for(model, args.clients * each, args.length), model.values()
            work = [np.arange(k * each, (k + 1) * each) for k in range(args.clients)]

            def run(cohorts: list[Any], model: Any = model, start: Any = start, examples: Any = examples) -> list[Any]:
                found = []
                for rows in cohorts:
                    clients = [ClientWork(own, np.random.default_rng(0)) for own in rows]
                    found += [one.tensors for one in train_cohort(model, start, examples, clients, training)]
                return found

            first, second = run([work[:2]]), run([work[:2]])
            same = all(torch.equal(a[n], b[n]) for a, b in zip(first, second, strict=True) for n in a)
            together, alone = [], []
            for _ in range(args.repeats):
                together.append(seconds(args.device, partial(run, [work])))
                alone.append(seconds(args.device, partial(run, [[rows] for rows in work])))
            targets = set(adaptable_layers(model.module, "all-linear"))
            parameters = sum(
                math.prod(widths(layer))
                for target, layer in model.module.named_modules()
                if target in targets and isinstance(layer, torch.nn.Linear)
            )
            if model.output is not None:
                parameters += model.output.weight.numel()
            work_gflop = 4 * parameters * int(examples.lengths.sum()) / 1e9
            times = {"cohort": float(np.median(together)), "one_by_one": float(np.median(alone))}
            name = name if form == "none" else f"{name} {form}"
            figures[name] = {
                "same_bits": same,
                **{f"{how}_seconds": taken for how, taken in times.items()},
                "ratio": times["one_by_one"] / times["cohort"],
                **{f"{how}_share_of_matmul": work_gflop / t / figures["matmul_gflops"] for how, t in times.items()},
                "real_tokens_per_second": int(examples.lengths.sum()) / times["cohort"],
            }
            if args.device == "cuda":
                figures[name]["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 2**30
            print(name, json.dumps(figures[name]))
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    script(main)
