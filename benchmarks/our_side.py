"""Contestant: our engine, round loop and cohort trainer. JOB METHOD RANK WORKERS COHORT DTYPE."""

import sys
from typing import Any

import numpy as np
from our_job import our_job
from side_by_side import answer, timed, turns

from fedlotr.engines import RayGrid
from fedlotr.flower.client_app import WORK
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import to_record
from fedlotr.flower.round import State, run_round
from fedlotr.flower.scoring import evaluate
from fedlotr.run.federation import federation
from fedlotr.run.simulation import CLIENT_APP


def main(path: str, method: str, rank: int, workers: int, cohort: str, dtype: str) -> None:
    """A round of all clients whenever it is called for."""
    with our_job(path, method, rank, workers, cohort, dtype) as ours:
        clients, prepared = len(ours.clients), ours.prepared
        strategy = load_strategy(str(ours.config.strategy), {}, clients)
        told = federation(ours.config, prepared)
        state = State(to_record(prepared.model.values()))
        numbers = sum(int(np.prod(array.shape)) for array in state.arrays.values())
        run_config: Any = {WORK: str(ours.workplace.folder)}
        with RayGrid(
            CLIENT_APP, clients, run_config=run_config, cohorts=ours.cohorts, workers=workers, threads=1
        ) as grid:

            def score() -> dict[str, float | None]:
                if not ours.evaluate:
                    return {}
                found = evaluate(grid, told, state.arrays)
                return {"accuracy": found["accuracy"]} if "accuracy" in found else {"held_out_loss": found["loss"]}

            grid.warm_up()
            everyone = list(ours.clients)
            answer(
                upload_bytes=4 * numbers,
                tokens=ours.tokens(everyone),
                targets=ours.targets(everyone),
                gflop=ours.gflop(everyone),
                cohorts=len(ours.cohorts(everyone)),
                dtype=ours.config.dtype,
                before=score(),
            )
            for _ in turns():
                with timed() as taken:
                    done = run_round(grid, strategy, told, state)
                answer(**taken, loss=done.metrics["train_loss"], **score())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6])
