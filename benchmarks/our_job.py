"""A benchmark's job as a run of ours, ready for round one; what the contestants of our side begin with."""

import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlotr.adapters.layer import widths
from fedlotr.adapters.tuner import factored_layers
from fedlotr.config.configuration import SimulationConfig
from fedlotr.flower.workplace import Workplace
from fedlotr.run.brought import Brought
from fedlotr.run.checking import check
from fedlotr.run.preparation import Prepared, prepare
from fedlotr.run.simulation import limited_threads, resolve
from fedlotr.training.cohort import cut_cohorts
from fedlotr.training.examples import IGNORED

COLUMNS = "text", "label", "prompt", "answer"


@dataclass(frozen=True)
class OurJob:
    """cohort: clients in one, or None where that is ours to choose. evaluate: whether rounds are scored."""

    config: SimulationConfig
    prepared: Prepared
    cohort: int | None
    evaluate: bool

    @property
    def workplace(self) -> Workplace:
        """Where clients find their data."""
        return self.prepared.workplace

    @property
    def clients(self) -> range:
        """All of them."""
        return range(len(self.prepared.checked.parts))

    def tokens(self, clients: Sequence[int]) -> int:
        """Real tokens that these clients train on in a round."""
        return int(sum(self.workplace.train.lengths[self.workplace.rows(client)].sum() for client in clients))

    def targets(self, clients: Sequence[int]) -> int:
        """How many of them are targets of a language model."""
        train = self.workplace.train
        rows = [row for client in clients for row in self.workplace.rows(client)]
        return int((train.batch(rows).labels != IGNORED).sum()) if train.causal else 0

    def gflop(self, clients: Sequence[int]) -> float:
        """What their products with the base's weights take: forward, and backward without a weight gradient.

        Each real token meets every adapted layer, and what precedes a target the vocabulary.
        """
        model = self.prepared.model
        adapted = sum(math.prod(widths(layer)) for layer in factored_layers(model.module).values())
        output = 0 if model.output is None else model.output.weight.numel()
        return 4 * (adapted * self.tokens(clients) + output * self.targets(clients)) / 1e9

    def cohorts(self, clients: Sequence[int]) -> list[list[int]]:
        """The clients as they are handed out."""
        pieces = cut_cohorts(self.workplace.step_tokens(clients), self.cohort)
        return [list(clients[piece]) for piece in pieces]


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as we are given them: texts, no tokens."""
    return [{name: row[name] for name in COLUMNS if name in row} for row in rows]


@contextmanager
def our_job(path: str, method: str, rank: int, workers: int, cohort: str, dtype: str) -> Iterator[OurJob]:
    """A job that a benchmark has written, on one thread a process."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    held, public, test = [shown(part) for part in job["parts"]], shown(job["public"]), shown(job["test"])
    rows = list(itertools.chain(*held, public))
    words: dict[str, Any] = {"model": job["model_name"], "clients": len(held), "sample": len(held), "method": method}
    words |= {"rank": rank, "local_epochs": 1, "batch_size": job["batch_size"], "max_length": job["max_length"]}
    words |= {"public_examples": len(public), "partition": "iid", "workers": workers, "dtype": dtype}
    words |= {"cohort": cohort if cohort == "auto" else int(cohort), "rounds": 1000, "eval_examples": 0}
    words |= {"max_examples": max(map(len, held)), "task": job["task"]}
    if method == "lora":  # the same rate and scale on both sides
        words |= {"lr": job["lr"], "head_lr": job["lr"], "alpha": 2 * rank}
    config = resolve(SimulationConfig(**words))
    checked = check(config, brought=Brought(data={"train": rows, "test": test}))
    edges = np.cumsum([0, *map(len, held)])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
    checked = replace(checked, parts=parts, public=np.arange(edges[-1], len(rows)))
    with tempfile.TemporaryDirectory() as folder, limited_threads(1):
        prepared = prepare(checked, Path(folder).absolute())
        yield OurJob(config, prepared, None if config.cohort == "auto" else config.cohort, job["evaluate"])
