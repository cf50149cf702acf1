"""A round above kept hidden states against the same round through the whole model, on an encoder of MiniLM's shape.

Both take turns: clients that train the head alone, or cores in the last blocks. `first` has the blocks below run, once
an example; `later` finds their hidden states kept. Random weights; imports nothing but `fedlotr.adapters` and
`fedlotr.training`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from side_by_side import figures_path
from transformers import BertConfig, BertModel

from fedlotr.adapters import CoreConfig
from fedlotr.errors import script
from fedlotr.models.loading import ModelSpec, adaptable_layers, load_base
from fedlotr.models.precision import measured_dtype
from fedlotr.training.cohort import ClientWork, LocalTraining, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.memory import keep_freed_memory
from fedlotr.training.model import TrainableModel

BLOCKS = 6


def build(folder: Path, dtype: str, rank: int, above: int) -> TrainableModel:
    """A mean-pooled encoder with cores in so many of its last blocks, and a head."""
    spec = ModelSpec(str(folder), "classification", 4, True, 0, dtype)
    base = load_base(spec)
    last = "|".join(str(block) for block in range(BLOCKS - above, BLOCKS))
    targets = adaptable_layers(base, rf".*layer\.({last})\..*") if above else []
    core = CoreConfig(method="fed-sb", basis="random", r=rank, target_modules=targets) if above else None
    return TrainableModel(base, spec, core)


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--clients", type=int, default=6)
    options.add_argument("--examples", type=int, default=32, help="of a client")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=48, help="tokens of every example")
    options.add_argument("--blocks", type=int, nargs="+", default=[0, 1, 3], help="with cores; 0: the head alone")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", type=figures_path)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    dtype, rng = measured_dtype(), np.random.default_rng(0)
    count = chosen.clients * chosen.examples
    tokens = rng.integers(1000, 30000, count * chosen.length).astype(np.int32)
    labels, training = rng.integers(0, 4, count), LocalTraining(batch_size=chosen.batch)
    edges = range(0, count, chosen.examples)
    work = [ClientWork(np.arange(at, at + chosen.examples), np.random.default_rng(at)) for at in edges]
    found = []
    with tempfile.TemporaryDirectory() as place:
        config = BertConfig(hidden_size=384, num_hidden_layers=BLOCKS, num_attention_heads=12, intermediate_size=1536)
        BertModel(config).save_pretrained(place)
        for above in chosen.blocks:
            model = build(Path(place), dtype, chosen.rank, above)
            start = model.values()
            seconds: dict[str, list[float]] = {"whole": [], "first": [], "later": []}
            for turn in range(chosen.repeats + 1):
                examples = Examples(
                    tokens, np.arange(0, len(tokens) + 1, chosen.length), labels
                )  # nothing of it is kept
                for side, taken in seconds.items():
                    with patch("fedlotr.training.frozen_prefix.KEPT_BYTES", 0 if side == "whole" else 2**28):
                        began = time.process_time()
                        train_cohort(model, start, examples, work, training)
                    if turn:  # the first warms up
                        taken.append(time.process_time() - began)
            ratios = {
                f"{side}_ratio": statistics.median(a / b for a, b in zip(seconds["whole"], seconds[side], strict=True))
                for side in ("first", "later")
            }
            found.append({"blocks": above, "whole": statistics.median(seconds["whole"]), **ratios})
            name = f"cores in the last {above} of {BLOCKS} blocks" if above else "the head alone"
            print(
                f"{name}, {dtype}: {found[-1]['whole']:.2f} s through the whole model; the first round "
                f"{ratios['first_ratio']:.2f} times as fast, later ones {ratios['later_ratio']:.1f} (process time)"
            )
    if chosen.json:
        chosen.json.write_text(json.dumps({"options": vars(chosen) | {"json": str(chosen.json)}, "blocks": found}))


if __name__ == "__main__":
    script(main)
