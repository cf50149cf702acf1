"""Generating and scoring by likelihood with an adapted decoder: ours against transformers' `generate` and lm-eval.

Theirs have the adapter merged into the base, ours has it beside. All take turns in one process, and process time is
measured. Generating: greedy, all prompts in one batch, no stop token, so that everybody makes as many tokens. Scoring:
the log-likelihood of each answer after its prompt, and by ours and lm-eval's harness, where that is installed, also
whether it is the likeliest; beside them a plain loop over padded batches, sorted by length.

With `--answers 200` ours and `generate` also answer so many questions, each in a process of its own, in equal batches:
its CPU seconds and the most memory that it held, loading the model included.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_job import MODELS, lacks, language_job
from peft import PeftModel, TaskType
from side_by_side import figures_path, machine, processor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlotr.adapters import CoreConfig
from fedlotr.adapters.export import export_lora
from fedlotr.adapters.tuner import factored_layers
from fedlotr.errors import InputError, script
from fedlotr.evaluation.generation import generate
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import evaluate
from fedlotr.flower.scoring import PROMPT_SHARD
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.models.precision import measured_dtype
from fedlotr.models.source import pad_id
from fedlotr.training.examples import Examples
from fedlotr.training.memory import keep_freed_memory
from fedlotr.training.model import TrainableModel

RANKS = {"fed-sb": 16, "lora": 8}
BATCH = 16
"""Texts that the others score together."""


def adapted(folder: str, method: str, dtype: str, pad: int) -> TrainableModel:
    """The model with an adapter that changes what it says: its trained tensors are drawn."""
    spec = ModelSpec(folder, "causal-lm", 0, False, pad, dtype)
    base = load_base(spec)
    targets = adaptable_layers(base, "all-linear")
    core = CoreConfig(method=method, basis="random", r=RANKS[method], target_modules=targets)
    model, generator = TrainableModel(base, spec, core), torch.Generator().manual_seed(0)
    drawn = {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in model.values().items()}
    model.assign(drawn)
    return model


def merged(model: TrainableModel, place: Path) -> Any:
    """The same as a plain model of transformers, by the adapter that a run exports."""
    export_lora(place, factored_layers(model.module), base=model.spec.path, task=TaskType.CAUSAL_LM)
    dtype = getattr(torch, model.spec.dtype)
    base = AutoModelForCausalLM.from_pretrained(model.spec.path, dtype=dtype, local_files_only=True)
    found = PeftModel.from_pretrained(base, str(place)).merge_and_unload().eval()
    found.generation_config.eos_token_id = None  # nobody stops
    return found


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask."""
    width = max(map(len, rows))
    fills = [[pad] * (width - len(row)) for row in rows]
    ids = [[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, fills, strict=True)]
    real = [
        [0] * len(fill) + [1] * len(row) if left else [1] * len(row) + [0] * len(fill)
        for row, fill in zip(rows, fills, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(real)


def by_generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int, pad: int) -> list[list[int]]:
    """What transformers' `generate` says."""
    ids, mask = padded(prompts, pad, left=True)
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    found: list[list[int]] = whole[:, ids.shape[1] :].tolist()
    return found


def by_loop(model: Any, rows: Sequence[Sequence[int]], first: Sequence[int], pad: int) -> list[float]:
    """The log-likelihood of each row from its token `first` on."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    found = [0.0] * len(rows)
    with torch.inference_mode():
        for at in range(0, len(order), BATCH):
            chosen = order[at : at + BATCH]
            ids, mask = padded([rows[row] for row in chosen], pad, left=False)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            each = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            for row, own in zip(chosen, each, strict=True):
                found[row] = float(own[first[row] - 1 : len(rows[row]) - 1].sum())
    return found


def by_lm_eval(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], first: Sequence[int]) -> Callable[[], Any]:
    """lm-eval's scores of the same tokens. Raises ImportError where it is not installed."""
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, import-untyped, unused-ignore]

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device="cpu")
    asked = [(("", ""), list(row[:at]), list(row[at:])) for row, at in zip(rows, first, strict=True)]
    return lambda: [score for score, _ in harness._loglikelihood_tokens(asked, disable_tqdm=True)]


def ours(model: TrainableModel, examples: Examples) -> list[float]:
    """Our scores: of packed sequences, where the model takes them."""
    found = Results.empty(len(examples))
    evaluate(model, examples, np.arange(len(examples)), found)
    arrays = found.arrays()
    return [-float(one) for one in arrays["losses"]]


def in_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each side, process time, and what it gave."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    gave: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            began = time.process_time()
            gave[name] = side()
            if turn:  # the first warms up
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}, gave


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--models", nargs="+", choices=MODELS, default=["30m", "smollm2-135m"])
    options.add_argument("--methods", nargs="+", choices=list(RANKS), default=list(RANKS))
    options.add_argument("--prompts", type=int, default=16, help="answered together")
    options.add_argument("--new-tokens", type=int, default=64, help="of each answer")
    options.add_argument("--texts", type=int, default=64, help="that are scored")
    options.add_argument("--length", type=int, default=256, help="texts are cut there")
    options.add_argument("--answers", type=int, default=0, help="also made by each side in a process of its own")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", type=figures_path)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    figures: dict[str, Any] = {"machine": machine(), "models": {}}
    print(f"{processor()}, {args.threads} thread{'s' * (args.threads > 1)}, {measured_dtype()}")
    with tempfile.TemporaryDirectory() as place:
        for name in args.models:
            if (why := lacks(name)) is not None:
                print(why)
                continue
            count = max(args.texts, args.prompts, args.answers)
            job = language_job(name, Path(place), clients=1, examples=1, test=count, length=args.length)
            for method in args.methods:
                figures["models"][f"{name}, {method}"] = compare(f"{name}, {method}", job, method, Path(place), args)
    if not figures["models"]:
        raise InputError(f"--models {' '.join(args.models)}: none of them is here, so nothing was measured")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def compare(name: str, job: dict[str, Any], method: str, place: Path, args: Any) -> dict[str, Any]:
    """One model with one kind of adapter: tokens a second of every side, and how far they agree."""
    tokenizer: Any = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    model = adapted(job["model"], method, measured_dtype(), pad_id(tokenizer))
    plain = merged(model, place / f"adapter {method}")
    rows = [row["ids"] for row in job["test"]]
    first = [row["targets"].index(True) for row in job["test"]]
    prompts = [row[:at] for row, at in zip(rows[: args.prompts], first, strict=False)]
    found: dict[str, Any] = {"packed": model.takes_ragged}
    found["generating"] = generating(model, plain, prompts, args)
    found["scoring"] = scoring(model, plain, tokenizer, rows[: args.texts], first[: args.texts], args)
    if args.answers:
        prompts = [row[:at] for row, at in zip(rows[: args.answers], first, strict=False)]
        found["answering"] = answering(job["model"], method, plain, place / f"merged {method}", prompts, args)
    for what in [what for what in ("generating", "scoring", "answering") if what in found]:
        told = ", ".join(f"{key} {value:,.4g}" for key, value in found[what].items())
        print(f"{name}, {what}{', tokens/s' * (what != 'answering')}: {told}", flush=True)
    return found


def generating(model: TrainableModel, plain: Any, prompts: list[list[int]], args: Any) -> dict[str, float]:
    """New tokens a second; how many times as many ours makes, and which share of them is the same."""
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: generate(model, prompts, args.new_tokens, ()),
        "generate": lambda: by_generate(plain, prompts, args.new_tokens, model.spec.pad_id),
    }
    seconds, said = in_turns(sides, args.repeats)
    same = np.mean(np.equal(said["ours"], said["generate"]))
    rates = {side: len(prompts) * args.new_tokens / taken for side, taken in seconds.items()}
    return {**rates, "ratio": rates["ours"] / rates["generate"], "same_tokens": float(same)}


def answering(
    folder: str, method: str, plain: Any, merged_folder: Path, prompts: list[list[int]], args: Any
) -> dict[str, float]:
    """CPU seconds and MB of each side; how many times as much ours takes."""
    plain.save_pretrained(merged_folder)
    found: dict[str, float] = {}
    said = {}
    for side, (place, of) in {"ours": (folder, method), "generate": (str(merged_folder), None)}.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            given = (place, of, plain.dtype, plain.config.pad_token_id, prompts, args.new_tokens, args.threads)
            seconds, memory, said[side] = process.submit(alone, *given).result()
        found |= {f"{side}_seconds": seconds, f"{side}_mb": memory}
    times = {f"times_{what}": found[f"ours_{what}"] / found[f"generate_{what}"] for what in ("seconds", "mb")}
    return {**found, **times, "same_tokens": float(np.mean(np.equal(said["ours"], said["generate"])))}


def alone(
    folder: str, method: str | None, dtype: torch.dtype, pad: int, prompts: list[list[int]], tokens: int, threads: int
) -> tuple[float, float, list[list[int]]]:
    """The answers of a side (method: ours; None: `generate`), what they took, and the peak memory of this process."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if method is None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        model.generation_config.eos_token_id = None
    else:
        model = adapted(folder, method, str(dtype).removeprefix("torch."), pad)
    began, said = time.process_time(), list[list[int]]()
    for at in range(0, len(prompts), PROMPT_SHARD):
        some = prompts[at : at + PROMPT_SHARD]
        said += by_generate(model, some, tokens, pad) if method is None else generate(model, some, tokens, ())
    return time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, said


def scoring(
    model: TrainableModel, plain: Any, tokenizer: Any, rows: list[list[int]], first: list[int], args: Any
) -> dict[str, float]:
    """Tokens a second; how many times as many ours scores, and how far apart the scores are, over their sum."""
    flat, edges = np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])
    examples = Examples(flat, edges, np.array(first), causal=True)
    sides = {"ours": lambda: ours(model, examples), "loop": lambda: by_loop(plain, rows, first, model.spec.pad_id)}
    try:
        sides["lm-eval"] = by_lm_eval(plain, tokenizer, rows, first)
    except ImportError:
        print("lm-eval is not installed (pip install lm-eval): scored by the plain loop alone")
    seconds, scores = in_turns(sides, args.repeats)
    found = {side: len(flat) / taken for side, taken in seconds.items()}
    for side in sides.keys() - {"ours"}:
        apart = np.abs(np.subtract(scores[side], scores["ours"])).sum() / np.abs(scores["ours"]).sum()
        found |= {f"{side}_ratio": found["ours"] / found[side], f"{side}_apart": float(apart)}
    return dict(sorted(found.items(), key=lambda one: "_" in one[0]))


if __name__ == "__main__":
    script(main)
