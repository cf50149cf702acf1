"""Every command of `fedlotr` once, small, in the present folder.

In one process: importing torch takes longer than all that they do here. The one word that follows is the version that
has to be there; code comes from this environment's own folder, or it ends.
"""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fedlotr
import fedlotr.strategies
from fedlotr import cli

GRID = """
base: {model: tiny, data: talk, partition: iid, engine: local, clients: 2, sample: 2, rounds: 1, samples: 0,
       public_examples: 0, max_length: 16}
rows: [{method: lora-xs, rank: 2}]
seeds: [0]
"""
TASK = """
task: seen
dataset_path: json
dataset_kwargs: {data_files: {test: talk/test.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["one", "two"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
SMALL = ["--model=tiny", "--data=talk", "--partition=iid", "--engine=local", "--clients=2", "--sample=2", "--rounds=1"]
SMALL += ["--samples=0", "--method=lora-xs", "--rank=2", "--public-examples=0", "--max-length=16"]
LINES = [
    ["doctor", *SMALL],
    ["simulate", *SMALL, "--out=talked"],
    ["grid", "grid.yaml", "--in-process", "--out=grid"],
    ["report", "talked", "--out=talked.html"],
    ["compare", "grid", "talked", "--out=compared.html"],
    ["cost", "--model=mistral-7b", "--methods=lora-xs"],
    ["export", "talked", "--to=peft", "--out=handed"],
    ["eval", "talked", "--tasks=seen.yaml", "--limit=2"],
    *(["ls", what] for what in ("methods", "strategies", "formats", "metrics", "fleets", "devices")),
]
LEFT = ("talked.html", "compared.html", "grid/table.md", "handed/README.md", "talked/eval")
"""What must be there in the end."""


def begin() -> None:
    """Write a decoder of a few words, and prompts with answers."""
    words = ["<e>", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "and", "more"]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<e>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", pad_token="<e>")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, **ids)).save_pretrained(
        "tiny"
    )
    Path("talk").mkdir()
    for split, last in (("train", words[1:9]), ("test", words[9:11])):
        rows = [{"prompt": f"{word} and {other}", "answer": "more"} for word in last for other in words[1:9]]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path("talk", f"{split}.jsonl").write_text(lines, encoding="utf-8")
    Path("grid.yaml").write_text(GRID, encoding="utf-8")
    Path("seen.yaml").write_text(TASK, encoding="utf-8")


def watch() -> None:
    """The page of a run, which is shown until it is interrupted."""
    words = [sys.executable, "-c", "import sys; from fedlotr.cli import main; sys.exit(main(['watch', 'talked']))"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with urllib.request.urlopen(address, timeout=60) as page:
            assert "Finished: 1 of 1 rounds." in page.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def main() -> None:
    """Run them."""
    assert fedlotr.__version__ == sys.argv[1], fedlotr.__version__
    for package in (fedlotr, fedlotr.strategies):
        assert Path(str(package.__file__)).is_relative_to(sys.prefix), package.__file__
    assert {line[0] for line in LINES} | {"watch"} == set(cli.COMMANDS), "a command that is not tried"
    begin()
    for line in LINES:
        print("$ fedlotr", *line, flush=True)
        code = cli.main(line)
        assert code == 0, f"{line}: exit code {code}"
    watch()
    assert all(Path(name).exists() for name in LEFT), "a command left nothing"


if __name__ == "__main__":
    main()
