"""Contestant of the engine benchmark. ours|loop|flower REGISTERED SAMPLED BYTES WORKERS COHORT."""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import echo_client
import numpy as np
import processes
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from side_by_side import answer, turns

how = sys.argv[1]
registered, sampled, size, workers, cohort = map(int, sys.argv[2:7])


def arrays() -> ArrayRecord:
    """So many bytes, in 36 arrays, as MiniLM's cores come."""
    return ArrayRecord({f"core {n:02d}": Array(np.zeros(size // 4 // 36, np.float32)) for n in range(36)})


def peak_bytes() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worker_peak_bytes() -> int:
    """The most that any of our workers has held so far; 0 where the system does not tell."""
    return max(
        (processes.peak_bytes(each) for each in processes.descendants(os.getpid()) if processes.is_worker(each)),
        default=0,
    )


def whole_round(grid: Grid, nodes: Sequence[int]) -> None:
    """Broadcast and replies; Flower's reach us in any order."""
    content = RecordDict({"arrays": arrays(), "config": ConfigRecord({"server-round": 1})})
    messages = [Message(content, node, MessageType.TRAIN) for node in nodes]
    replies = list(grid.send_and_receive(messages))
    assert len(replies) == len(nodes) and not any(reply.has_error() for reply in replies)


def rounds(one: Callable[[], object]) -> None:
    """A round whenever it is called for."""
    answer()
    for _ in turns():
        began, busy = time.perf_counter(), time.process_time()
        one()
        answer(
            seconds=time.perf_counter() - began,
            driver_cpu_seconds=time.process_time() - busy,
            driver_peak_bytes=peak_bytes(),
            worker_peak_bytes=worker_peak_bytes(),
        )


def ours() -> None:
    """The engine alone, or with our round loop around it: sampling, ledger, checks, mean, certificate."""
    from fedlotr.engines import RayGrid
    from fedlotr.flower.plugins import load_strategy
    from fedlotr.flower.round import Federation, State, run_round

    def rule(clients: Sequence[int]) -> list[list[int]]:
        return [list(clients[at : at + cohort]) for at in range(0, len(clients), cohort)]

    with RayGrid("echo_client:app", registered, run_config={}, cohorts=rule, workers=workers) as grid:
        grid.warm_up()
        if how == "ours":
            rounds(lambda: whole_round(grid, grid.get_node_ids()[:sampled]))
            return
        told = Federation(
            clients=registered,
            sampled=sampled,
            rounds=1000,
            seed=0,
            max_failed=0.0,
            lr_factor=lambda _: 1.0,
            basis=None,
            bases_sha256="none",
            layers=[],
            held_out=1,
            task="classification",
            method="echo",
        )
        strategy, state = load_strategy("exact-average", {}, sampled), State(arrays())
        rounds(lambda: run_round(grid, strategy, told, state))


def flower() -> None:
    """Flower's simulation engine, by its public door."""
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < registered:
            time.sleep(0.1)
        rounds(lambda: whole_round(grid, nodes[:sampled]))

    backend: Any = {
        "init_args": {"num_cpus": workers, "log_to_driver": False, "logging_level": "ERROR"},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server, echo_client.app, num_supernodes=registered, backend_config=backend)


if __name__ == "__main__":
    flower() if how == "flower" else ours()
