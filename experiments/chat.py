"""What fifty modules teach a chat model: perplexity, ROUGE-L of its answers, and the bytes that it took.

    pip install rouge-score
    python experiments/chat.py runs/chat --out experiments/chat.md

runs `chat.yaml` with three seeds (a run that is finished in RUNS/seed-N is only read), has the base and every exported
adapter answer the same questions of the test split by transformers' own `generate`, and writes a table. Answers are
greedy, in float32, of at most 64 tokens; ROUGE-L is the F-measure of google-research's `rouge_score`, with stemming.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlotr import run_simulation
from fedlotr.config.configuration import load
from fedlotr.data import Style, load_source
from fedlotr.data.templates import prompt_of
from fedlotr.errors import InputError, script
from fedlotr.models.source import resolve_model
from fedlotr.reporting.console import readable_bytes

RECIPE = Path(__file__).with_suffix(".yaml")
TOKENS, BATCH = 64, 16
BLOSSOMTUNE = 798.9
"""MB of both directions in BlossomTune's published run of this base: 2 clients, 20 rounds, LoRA."""


def answers(model: Any, prompts: list[list[int]], tokenizer: Any) -> list[str]:
    """What the model says to each prompt, greedily, in batches padded on the left."""
    said: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
        with torch.inference_mode():
            whole = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
        said += tokenizer.batch_decode(whole[:, width:], skip_special_tokens=True)
    return [text.strip() for text in said]


def finished(folder: Path, seed: int, model: str) -> dict[str, Any]:
    """The summary of a seed's run, which is made where it is not there."""
    out = folder / f"seed-{seed}"
    if not (out / "summary.json").is_file():
        run_simulation(load([str(RECIPE), "--model", model, "--seed", str(seed), "--out", str(out)]))
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, help="where the runs are, or will be")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--rows", type=int, default=64, help="questions that are asked")
    options.add_argument("--out", type=Path, required=True, help="the table to write")
    options.add_argument("--model", default="smollm2-135m", help="the base")
    given = options.parse_args()
    base = resolve_model(given.model)
    assert base is not None
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise InputError("rouge_score is not installed; pip install rouge-score") from None
    summaries = {seed: finished(given.runs, seed, given.model) for seed in given.seeds}

    test = load_source("pydoc-chat").test
    rows = np.sort(np.random.default_rng(0).choice(len(test), given.rows, replace=False))
    asked = [(str(test[int(row)]["prompt"]), str(test[int(row)]["answer"])) for row in rows]
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    prompts = [prompt_of([{"role": "user", "content": prompt}], tokenizer, Style()) for prompt, _ in asked]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def rouge(said: list[str]) -> float:
        pairs = zip(asked, said, strict=True)
        return fmean(scorer.score(answer, text)["rougeL"].fmeasure for (_, answer), text in pairs)

    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.eval()
    before = rouge(answers(plain, prompts, tokenizer))
    lines = [
        "| seed | perplexity before | after | ROUGE-L before | after | exported = merged | payload | wire | seconds |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for seed, summary in summaries.items():
        adapted: Any = PeftModel.from_pretrained(plain, given.runs / f"seed-{seed}" / "adapter")
        adapted.eval()
        said = answers(adapted, prompts, tokenizer)
        merged = adapted.merge_and_unload()
        alike = sum(a == b for a, b in zip(said, answers(merged, prompts, tokenizer), strict=True))
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        sent = summary["communication"]
        perplexities = [f"{summary[when]['perplexity']:.2f}" for when in ("initial", "final")]
        sizes = [readable_bytes(sent[f"total_{of}_bytes"]) for of in ("payload", "wire")]
        seconds = f"{summary['timing']['seconds_total']:.0f}"
        cells = [
            str(seed),
            *perplexities,
            f"{before:.3f}",
            f"{rouge(said):.3f}",
            f"{alike} of {len(said)}",
            *sizes,
            seconds,
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    message = fmean(s["communication"]["upload_payload_bytes_per_client_round"] for s in summaries.values())
    ours = readable_bytes(2 * 20 * 2 * message)
    lines += [
        "",
        f"Two clients and twenty rounds of these messages are {ours} both ways together; BlossomTune's published run "
        f"of this base, with as many, took {BLOSSOMTUNE:g} MB.",
    ]
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    script(main)
