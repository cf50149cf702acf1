"""Whether two checkouts leave the same bytes: small runs of everything a run can do, and what is in their folders.

    python benchmarks/same_bytes.py --save before.json
    python benchmarks/same_bytes.py --against before.json     (exit code 1 where something differs)

Every file of a run's folder is compared by what it says: tensors by name, shape, dtype and bytes; JSON value by value,
rows of Parquet likewise, other files as text. Left out are times, versions, paths and what is drawn anew in each run.
Both sides need the same machine and the same libraries.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import fedlotr
from fedlotr import Callbacks, RoundEvent, SimulationConfig, run_simulation
from fedlotr.reporting.escaping import markdown

Fields = dict[str, Any]
CHECKOUT = Path(fedlotr.__file__).resolve().parents[1]
BASE: Fields = {
    **{"clients": 5, "sample": 3, "rounds": 3, "max_examples": 8, "public_examples": 16, "eval_examples": 12},
    **{"batch_size": 4, "local_epochs": 1, "max_length": 24, "seed": 7, "engine": "local", "threads": 1},
    **{"dtype": "float32", "method": "lotr", "rank": 4, "model": "@bert", "data": "@animals"},
}
"""`@NAME` stands for a path in the folder of the work: a model, the data, or what another run left."""
LORA = {"method": "lora"}
CAUSAL = {"model": "@llama", "task": "causal-lm", "partition": "natural:client", "sample": 2}
CODED = {"codec": "int4", "broadcast_codec": "delta+int8"}
RANKS = {"client_rank": "4,2,1"}
PRIVATE = {"noise_multiplier": 1.0, "reproducible_noise": True, "partition": "iid"}
RUNS: dict[str, Fields] = {
    "fed-sb": {"method": "fed-sb", "lr_schedule": "linear"},
    "lotr": {"eval_every": 2, "weight_decay": 0.01, "clip_norm": 0.5},
    "lora-xs": {"method": "lora-xs", "partition": "iid", "weights": "uniform"},
    "lotr-sb": {"method": "lotr-sb", "partition": "natural:client"},
    "lotr-tucker": {"method": "lotr-tucker", "strategy": "fedyogi"},
    "ravan": {"method": "ravan", "strategy": "fedadam"},
    "loldu": {"method": "loldu", "strategy": "fedavgm", "optimizer": "sgd", "momentum": 0.5},
    "int-tune": {"method": "int-tune", "strategy": "median"},
    "tiny-lora": {"method": "tiny-lora", "strategy": "trimmed-mean", "strategy_arg": {"beta": 0.34}},
    "fedit": {**LORA, "local_epochs": None, "local_steps": 3},
    "ffa-lora": {"method": "ffa-lora"},
    "rolora": {"method": "rolora", "broadcast_codec": "delta+bfloat16"},
    "full": {"method": "full", "cohort": 1},
    "head": {"method": "head", "strategy": "fedadagrad"},
    "flora": {**LORA, "strategy": "flora"},
    "fedex-lora": {**LORA, **CODED, "strategy": "fedex-lora"},
    "fedprox": {"strategy": "fedprox", "targets": ".*(query|value)"},
    "scaffold": {"strategy": "scaffold", "client_eval": 0.3},
    "hetlora": {**LORA, **RANKS, "strategy": "hetlora", "rounds": 4},
    "flexlora": {**LORA, **RANKS, "strategy": "flexlora"},
    "ranks": {**RANKS, "codec": "int8"},
    "fedsa-lora": {**CODED, "method": "fedsa-lora", "client_adapters": True},
    "personal-core": {"method": "personal-core", "rounds": 4},
    "keep": {"optimizer_state": "keep", "rounds": 4},
    "mean-v": {**LORA, "optimizer_state": "mean-v", "rounds": 4},
    "codecs": {**CODED, "method": "fed-sb", "link": "4g,3g", "rounds": 4},
    "top-k": {**LORA, "codec": "top-k:0.2+zstd", "broadcast_codec": "delta+top-k:0.3", "rounds": 4},
    "sign": {"codec": "sign", "broadcast_codec": "delta+sign+zstd", "error_feedback": False},
    "dp-example": {**PRIVATE, "privacy": "example", "method": "fed-sb"},
    "dp-opacus": {**PRIVATE, "privacy": "example", "privacy_engine": "opacus", "codec": "int8"},
    "dp-client": {**PRIVATE, "privacy": "client", "clip_norm": 0.1, "public_eval": True},
    "dp-client-clip": {**PRIVATE, **LORA, "privacy": "client", "clip_norm": 0.1, "clip_quantile": 0.5},
    "fedavg": {"strategy": "flwr.serverapp.strategy:FedAvg"},
    "krum": {"strategy": "krum", "strategy_arg": {"f": 0}},
    "clipped": {"max_update_norm": 0.05},
    "refused": {**LORA, "max_update_norm": 0.48, "on_large_update": "refuse", "max_failed": 1.0, "sample": 5},
    "causal": {**CAUSAL, "method": "fed-sb"},
    "causal-lora": {**LORA, **CAUSAL, "gradient_checkpointing": True},
    "init-adapter": {"method": "fed-sb", "init_adapter": "@fedit"},
    "central": {"baseline": "central"},
    "local": {**LORA, "baseline": "local"},
    "resumed": {"method": "fed-sb", "rounds": 4},
    "resumed-state": {**CODED, "strategy": "scaffold", "optimizer_state": "mean-v", "rounds": 4},
    "resumed-keep": {"method": "fedsa-lora", "optimizer_state": "keep", "codec": "int8", "rounds": 4},
    "resumed-carry": {**LORA, "strategy": "flora", "rounds": 4},
    "ray": {"method": "fed-sb", "engine": "ray", "workers": 2, "codec": "int8", "strategy": "scaffold"},
    "flower": {"method": "fed-sb", "clients": 2, "sample": 2, "rounds": 2},
}
NEW = re.compile(r"(?<!simulated_)seconds|^(versions|examples_per_second|sha256|code|init_adapter_sha256)$")
"""Keys of JSON whose values differ from run to run; the last three are checksums of such values."""
KEYED = re.compile(r"[0-9a-f]{32}")
"""A checksum under a private run's own key."""
BUSY = "the machine is busy with other work"
"""The end of a warning of the clock's."""
PATIENT = "import flwr.cli.constant as them\nthem.LOCAL_SUPERLINK_STARTUP_TIMEOUT = 300.0\n"
"""Flower gives its own server 15 seconds, too few on a busy machine."""
UNREAD = ("log.txt", "report.html", "privacy.key")
"""Full of times, or drawn: that they are there is compared."""


class Enough(Callbacks):
    """Ends a run after its second round."""

    def on_round(self, event: RoundEvent) -> None:
        """Raise where it was the second."""
        if event.round == 2:
            raise StopIteration


def materials(work: Path) -> None:
    """A tiny BERT and a tiny Llama with random weights, a tokenizer of whole words, two classes of sentences."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    kinds = (["the cat sat", "a cat ran", "my cat ate and slept"], ["dogs bark", "one dog barked", "big dog"])
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = dict.fromkeys([*special, *" ".join(itertools.chain(*kinds)).split(), *map(str, range(10))])
    tokens = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    sizes: Fields = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"hidden_size": 32, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    torch.manual_seed(0)
    bert, llama = BertModel(BertConfig(**sizes)), LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
    for name, model in (("bert", bert), ("llama", llama)):
        model.save_pretrained(work / name)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **names)  # type: ignore[no-untyped-call]
        tokenizer.save_pretrained(work / name)
    (work / "animals").mkdir()
    draw = random.Random(0)
    for split, count, endings in (("train", 120, range(7)), ("test", 24, range(7, 10))):
        rows = [
            {"text": f"{draw.choice(kinds[i % 2])} {draw.choice(endings)}", "label": i % 2, "client": f"farm {i % 5}"}
            for i in range(count)
        ]
        (work / "animals" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run(name: str, work: Path) -> None:
    """Leave a run in work/NAME."""
    out = work / name
    asked = {**BASE, **RUNS[name]}
    fields: Fields = {key: str(work / v[1:]) if str(v).startswith("@") else v for key, v in asked.items()}
    if name == "flower":
        _on_flowers_engine(fields, work)
    elif name == "ray":  # by the command, with its head start
        given = [word for key, value in fields.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        _done([sys.executable, "-m", "fedlotr.simulate", *given, "--out", str(out)], work)
    else:
        config = SimulationConfig(**fields, out=out, quiet=True)
        if name.startswith("resumed"):
            with suppress(Exception):
                run_simulation(config, callbacks=Enough())
            config = config.model_copy(update={"resume": True})
        run_simulation(config)


def _on_flowers_engine(fields: Fields, work: Path) -> None:
    """By `flwr run`, with an installation of Flower's of its own, whose processes end with it."""
    import psutil

    bundle, bin_, home = (work / name for name in ("app", "bin", "home"))
    bundle.mkdir()
    bin_.mkdir()
    for script in distribution("flwr").entry_points.select(group="console_scripts"):  # of this Python
        call = f"import sys\nfrom {script.module} import {script.attr} as main\nsys.exit(main())\n"
        (bin_ / script.name).write_text(f"#!{sys.executable}\n{PATIENT if script.name == 'flwr' else ''}{call}")
        (bin_ / script.name).chmod(0o755)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(CHECKOUT / file, bundle)
    config = {key: value for key, value in fields.items() if key != "engine"}
    (work / "job.yaml").write_text(json.dumps(config))
    words = ["flwr", "run", str(bundle), "--stream", "--run-config"]
    words += [f"config='{work / 'job.yaml'}' out='{work / 'flower'}'", "--federation-config"]
    words += [f"num-supernodes={fields['clients']} client-resources-num-cpus=1 init-args-num-cpus=2"]
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        http, control = (str(free.getsockname()[1]) for free in (one, other))
    ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http, "FLWR_LOCAL_CONTROL_API_PORT": control}
    environment = {**os.environ, **ports, "FLWR_HOME": str(home), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    environment["PATH"] = f"{bin_}{os.pathsep}{os.environ['PATH']}"
    try:
        _done(words, work, env=environment)
    finally:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == str(home):
                    process.kill()


def _done(words: Sequence[str], work: Path, **options: Any) -> None:
    done = subprocess.run(words, cwd=work, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def read(folder: Path, work: Path) -> dict[str, Any]:
    """Every file of a run's folder: its path there -> what it says, as JSON."""
    import pyarrow.parquet as pq

    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".parquet": lambda path: pq.read_table(path).to_pylist(),
        ".safetensors": _tensors,
    }
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        reader = (lambda _: "there") if path.name in UNREAD else readers.get(path.suffix, lambda path: path.read_text())
        found[str(path.relative_to(folder))] = _lasting(reader(path), str(work))
    return found


def _tensors(path: Path) -> dict[str, str]:
    from safetensors.torch import load_file

    return {
        name: f"{value.dtype} {list(value.shape)} {hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]}"
        for name, value in load_file(path).items()
    }


def _lasting(value: Any, work: str) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {key: _lasting(item, work) for key, item in value.items() if not NEW.search(key)}
    if isinstance(value, list):
        return [_lasting(item, work) for item in value if not str(item).endswith(BUSY)]
    if isinstance(value, str):
        if KEYED.fullmatch(value):
            return "keyed"
        return value.replace(work, "~").replace(markdown(work), "~")  # as samples.md writes a folder's name
    return value


def differences(one: Any, other: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """Where two things of JSON differ, from the outside in: the place, and what is there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from differences(one.get(key, "(none)"), other.get(key, "(none)"), (*where, key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for at, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, (*where, str(at)))
    elif json.dumps(one) != json.dumps(other):
        yield " ".join(where), json.dumps(one), json.dumps(other)


def all_runs(names: Sequence[str]) -> dict[str, Any]:
    """What each of these runs leaves."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="same-") as folder:
        work = Path(folder).resolve()
        materials(work)
        for name in dict.fromkeys([*(["fedit"] if "init-adapter" in names else []), *names]):
            began = time.monotonic()
            try:
                run(name, work)
                found[name] = read(work / name, work)
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}".replace(str(work), "~")}
            said = found[name].get("failed", f"{len(found[name])} files")
            print(f"{name}: {said}, {time.monotonic() - began:.1f} s", file=sys.stderr)
    return {name: found[name] for name in names}


def main() -> int:
    """Exit code 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", "--json", type=Path, metavar="FILE", help="write what the runs leave here")
    what.add_argument("--against", type=Path, metavar="FILE", help="compare with what was saved there")
    parser.add_argument("--only", metavar="NAME,...", help=f"some of the runs: {', '.join(RUNS)}")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--only: no run is called {', '.join(unknown)}")
    other = {} if options.save else json.loads(options.against.read_text())
    found = json.loads(json.dumps(all_runs(names)))
    if options.save:
        options.save.write_text(json.dumps(found))
        print(f"{len(found)} runs in {options.save}")
        return 0
    unlike = 0
    for name in names:
        told = list(differences(other.get(name, "(not run)"), found[name]))
        unlike += bool(told)
        for place, before, after in told[:8]:
            print(f"{name:14} {place}: {before[:100]} -> {after[:100]}")
        if told[8:]:
            print(f"{name:14} and {len(told) - 8} more")
    print(f"{len(names) - unlike} of {len(names)} runs are equal")
    return int(unlike > 0)


if __name__ == "__main__":
    sys.exit(main())
