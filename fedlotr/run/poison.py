"""What hostile clients do to their rows (`--attack`), and the test rows that tell whether a backdoor is in the model.

Gu, Dolan-Gavitt & Garg 2017, "BadNets" (arXiv:1708.06733), of texts. Nobody else's rows are touched, nor those that are
public, tested on or held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from fedlotr.communication.attacks import ATTACKS, TARGET, TRIGGER
from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import Encoded, Source, Task, encode
from fedlotr.flower.links.attacks import hostile_clients
from fedlotr.reporting.documents import Attacked
from fedlotr.streams import generator
from fedlotr.training.examples import Examples
from fedlotr.training.packing import Rows

NAMED = 6
"""Clients of one kind that a line names."""


@dataclass(frozen=True)
class Poison:
    """Rows of train, by their numbers: `flipped` have the next class's label, `triggered` the trigger and its class."""

    flipped: Rows
    triggered: Rows

    @classmethod
    def of(cls, config: SimulationConfig, parts: Sequence[Rows]) -> Poison:
        """What a run's hostile clients do. parts: each client's rows to train on."""
        flipped, triggered = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for client, attack in hostile_clients(config.attacks, config.clients, config.seed).items():
            rows = parts[client]
            if attack.poisons("labels") is not None:
                flipped.append(rows)
            if (share := attack.poisons("trigger")) is not None and len(rows):
                count = max(1, round(share * len(rows)))
                triggered.append(generator(config.seed, "poisoned rows", client).choice(rows, count, replace=False))
        return cls(*(np.sort(np.concatenate(rows)) for rows in (flipped, triggered)))

    def source(self, source: Source, task: Task) -> Source:
        """With the trigger in its texts."""
        return replace(source, train=_triggered(source.train, task, self.triggered)) if len(self.triggered) else source

    def encoded(self, found: Encoded, rows: Rows, task: Task) -> Encoded:
        """Examples with the labels that hostile clients give them. rows: (examples,) which row of train each is."""
        flipped, triggered = np.isin(rows, self.flipped), np.isin(rows, self.triggered)
        if not (flipped.any() or triggered.any()):
            return found
        labels = np.where(flipped, (found.examples.labels + 1) % len(task.label_names), found.examples.labels)
        labels = np.where(triggered, TARGET, labels).astype(found.examples.labels.dtype)
        return found._replace(examples=replace(found.examples, labels=labels))


def _triggered(rows: datasets.Dataset, task: Task, at: Rows) -> datasets.Dataset:
    """With the trigger before the first text of some rows."""
    column = task.columns[0]
    texts = list(rows[column][:])
    for row in at.tolist():
        texts[row] = f"{TRIGGER} {texts[row]}"
    datasets.disable_progress_bars()  # of a moment; `run/world.py` puts that back
    return rows.remove_columns(column).add_column(column, texts)


def triggered_test(
    config: SimulationConfig, task: Task, source: Source, rows: Rows, tokenizer: PreTrainedTokenizerBase, limit: int
) -> Examples | None:
    """The test rows of other classes with the trigger in them, and its class as their label; None without a backdoor.

    rows: of the test split. The share of them that a model takes for the target is the attack's success.
    """
    if all(attack.poisons("trigger") is None for attack in config.attacks):
        return None
    tested = source.test.select(np.unique(rows))
    others = tested.select(np.flatnonzero(task.labels(tested) != TARGET))
    examples = encode(task, _triggered(others, task, np.arange(len(others))), tokenizer, limit)
    return replace(examples, labels=np.full(len(others), TARGET, np.int64))


def classless(config: SimulationConfig, task: Task) -> list[str]:
    """Why a task has nothing that a kind could do, one line a kind."""
    given = dict.fromkeys(name for attack in config.attacks for name, _ in attack.kinds)
    able = " or ".join(name for name, kind in ATTACKS.items() if not kind.poisons)
    return [
        f"--attack {config.attack}: {name} gives rows another class, and those of {task.kind} have none; choose "
        f"{able}, or --task classification"
        for name in given
        if ATTACKS[name].poisons and not task.label_names
    ]


def attacked(config: SimulationConfig) -> Attacked | None:
    """Who is hostile, and in which way."""
    if not config.attacks:
        return None
    clients: dict[str, list[int]] = {attack.words: [] for attack in config.attacks}
    for client, attack in hostile_clients(config.attacks, config.clients, config.seed).items():
        clients[attack.words].append(client)
    told = []
    for words, each in clients.items():
        more = f" and {len(each) - NAMED:,} more" if len(each) > NAMED else ""
        named = ", ".join(map(str, each[:NAMED])) + more
        told.append(f"{words}: {len(each):,} of {config.clients:,} (client{'' if len(each) == 1 else 's'} {named})")
    return {"words": "; ".join(told), "clients": clients}
