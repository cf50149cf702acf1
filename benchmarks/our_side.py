"""Contestant: our engine, round loop and cohort trainer. JOB METHOD RANK WORKERS COHORT DTYPE."""

import itertools
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import answer, turns

from fedlotr.config.configuration import SimulationConfig
from fedlotr.engines import RayGrid
from fedlotr.flower.client_app import WORK
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import to_record
from fedlotr.flower.round import State, run_round
from fedlotr.flower.scoring import evaluate
from fedlotr.run.brought import Brought
from fedlotr.run.checking import check
from fedlotr.run.federation import federation
from fedlotr.run.preparation import prepare
from fedlotr.run.simulation import CLIENT_APP, limited_threads, resolve
from fedlotr.training.cohort import cut_cohorts


def main(path: str, method: str, rank: int, workers: int, cohort: str, dtype: str) -> None:
    """A round of all clients whenever it is called for."""
    import json

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    parts: list[list[dict[str, Any]]] = job["parts"]
    rows = [row for part in [*parts, job["public"]] for row in part]
    words: dict[str, Any] = {"model": job["model_name"], "clients": len(parts), "sample": len(parts), "method": method}
    words |= {"rank": rank, "local_epochs": 1, "batch_size": job["batch_size"], "max_length": job["max_length"]}
    words |= {"public_examples": len(job["public"]), "partition": "iid", "workers": workers, "dtype": dtype}
    words |= {"cohort": cohort if cohort == "auto" else int(cohort), "rounds": 1000, "eval_examples": 0}
    words |= {"max_examples": max(map(len, parts))}
    if method == "lora":  # the same rate on both sides
        words |= {"lr": job["lr"], "head_lr": job["lr"]}
    config = resolve(SimulationConfig(**words))
    checked = check(config, brought=Brought(data={"train": rows, "test": job["test"]}))
    edges = np.cumsum([0, *map(len, parts)])
    checked = replace(
        checked,
        parts=[np.arange(a, b) for a, b in itertools.pairwise(edges)],
        public=np.arange(edges[-1], len(rows)),
    )
    with tempfile.TemporaryDirectory() as folder, limited_threads(1):
        prepared = prepare(checked, Path(folder).absolute())
        workplace = prepared.workplace
        size = None if config.cohort == "auto" else config.cohort

        def rule(clients: Any) -> list[list[int]]:
            return [list(clients[piece]) for piece in cut_cohorts(workplace.step_tokens(clients), size)]

        strategy = load_strategy(str(config.strategy), {}, len(parts))
        told = federation(config, prepared)
        state = State(to_record(prepared.model.values()))
        numbers = sum(int(np.prod(array.shape)) for array in state.arrays.values())
        run_config: Any = {WORK: str(workplace.folder)}
        with RayGrid(CLIENT_APP, len(parts), run_config=run_config, cohorts=rule, workers=workers, threads=1) as grid:
            grid.warm_up()
            tokens = int(sum(workplace.train.lengths[workplace.rows(client)].sum() for client in range(len(parts))))
            answer(upload_bytes=4 * numbers, tokens=tokens, dtype=config.dtype)
            for _ in turns():
                began = time.perf_counter()
                done = run_round(grid, strategy, told, state)
                facts: dict[str, Any] = {"seconds": time.perf_counter() - began, "loss": done.metrics["train_loss"]}
                if job["accuracy"]:
                    facts["accuracy"] = evaluate(grid, told, state.arrays)["accuracy"]
                answer(**facts)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6])
