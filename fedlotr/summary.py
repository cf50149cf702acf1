"""What is said of a run: the facts in the display's header, and summary.json."""

import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

import fedlotr
from fedlotr.adapters.methods import METHODS
from fedlotr.communication import Entry, communication_summary
from fedlotr.configuration import SimulationConfig
from fedlotr.data import client_names, describe
from fedlotr.engines.base import Engine
from fedlotr.engines.flower import FlowerGrid
from fedlotr.flower.loop import State
from fedlotr.flower.records import arrays_sha256
from fedlotr.preparation import Prepared

PACKAGES = ("torch", "flwr", "ray", "transformers", "peft", "numpy", "datasets", "flwr-datasets")
"""Whose versions a result may depend on."""


def facts(prepared: Prepared) -> dict[str, Any]:
    """What the display's header shows besides the configuration."""
    checked, model = prepared.checked, prepared.model
    sizes = model.sizes()
    head = sum(sizes[name] for name in model.head_names)
    names = checked.task.label_names
    config = checked.config
    clients = client_names(config.partition, checked.source.train, checked.parts)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        "trained_adapter": sum(sizes.values()) - head,
        "trained_head": head,
        "train_examples": sum(map(len, checked.parts)),
        "test_examples": len(checked.test_rows),
        "task": checked.task.kind,
        "labels": names,
        "partition": [
            {
                "client": clients[held.client] if clients else held.client,
                "examples": held.examples,
                "labels": held.labels,
            }
            for held in describe(checked.parts, checked.labels, names)
        ],
    }
    if names:
        counts = np.bincount(prepared.workplace.test.labels, minlength=len(names))
        found["largest_class"] = float(counts.max() / counts.sum())
    return found


def summarise(
    config: SimulationConfig,
    prepared: Prepared,
    grid: Engine | FlowerGrid,
    history: Sequence[dict[str, Any]],
    entries: Sequence[Entry],
    initial: dict[str, float],
    state: State,
    started: float,
) -> dict[str, Any]:
    """summary.json of a finished run. history: the rows of metrics.jsonl; started: by `time.monotonic`."""
    checked = prepared.checked
    evaluated = [row for row in history if row["loss"] is not None]
    metric, better = ("perplexity", min) if checked.task.kind == "causal-lm" else ("accuracy", max)
    best = better(evaluated, key=lambda row: row[metric])
    errors = [row["aggregation_error"] for row in history if row["aggregation_error"] is not None]
    seconds = sum(row["train_seconds"] for row in history)
    examples = sum(
        examples_worked(config, len(checked.parts[entry.client])) for entry in entries if entry.kind == "update"
    )
    return {
        "method": config.method,
        "strategy": config.strategy,
        "model": checked.base_name,
        "data": checked.source.name,
        "data_sha256": checked.source.sha256,
        "test_split": checked.source.test_split,
        "clients": config.clients,
        "rounds": state.round,
        "seed": config.seed,
        "initial": initial,
        "final": {metric: evaluated[-1][metric], "loss": evaluated[-1]["loss"]},
        "client_evaluation": evaluated[-1].get("client_evaluation"),
        "best": {"round": best["round"], metric: best[metric], "loss": best["loss"]},
        "failed_clients": sum(row["failed"] for row in history),
        "failures": _failures(history),
        "communication": communication_summary(entries),
        "aggregation_error_max": max(errors) if errors else None,
        "aggregation_error_reason": None if errors else why_not_certified(config.method),
        "privacy": None,
        "timing": {
            "seconds_total": time.monotonic() - started,
            "train_seconds_per_round_median": statistics.median(row["train_seconds"] for row in history),
            "evaluate_seconds_per_round_median": statistics.median(row["evaluate_seconds"] for row in evaluated),
            "examples_per_second": examples / seconds,
            "base_model_loads": len(prepared.workplace.loads()),
            "workers": grid.workers,
            "worker_restarts": grid.restarts,
            "threads": config.threads,
            "cohort": config.cohort,
            "dtype": config.dtype,
        },
        "bases_sha256": prepared.bases_sha256,
        "trained_sha256": arrays_sha256(state.arrays),
        "versions": {
            "fedlotr": fedlotr.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def why_not_certified(method: str) -> str:
    """Why no round has an aggregation error."""
    row = METHODS[method]
    if row.personal:
        own = " and ".join(sorted(row.personal))
        return f"{own} of every client stays with it, so there is no common model whose update could be their mean"
    if not row.adapts:
        return "no layer is adapted, and the head's mean is exact"
    return "the strategy does not say that it averages, or no layer has moved"


def _failures(history: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What went wrong -> client -> in how many rounds."""
    found: dict[str, dict[str, int]] = {}
    for row in history:
        for client, kind in row["failures"].items():
            clients = found.setdefault(kind, {})
            clients[client] = clients.get(client, 0) + 1
    return found


def examples_worked(config: SimulationConfig, held: int) -> int:
    """Examples that a client which holds so many works through in a round."""
    if config.local_steps is None:
        return held * (config.local_epochs or 0)
    epochs, rest = divmod(config.local_steps, -(-held // config.batch_size))
    return epochs * held + min(rest * config.batch_size, held)
