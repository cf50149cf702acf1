"""Our training on one thread of one process: its rate, and what it goes to. JOB METHOD RANK DTYPE SIZE.

A contestant that says all when it is ready. The clients train in the cohorts of a round, without an engine around them;
a product of SIZE³ is timed in turns with them.
"""

import sys
import time

import numpy as np
import torch
from kinds_of_work import kinds_of_work
from our_job import our_job
from side_by_side import answer, matmul_gflops, median

from fedlotr.training.cohort import ClientWork, train_cohort
from fedlotr.training.memory import keep_freed_memory

CLIENTS = 16
"""The first so many of a job are enough to measure by."""
REPEATS = 3


def main(path: str, method: str, rank: int, dtype: str, size: int) -> None:
    """Measure it."""
    keep_freed_memory()
    with our_job(path, method, rank, 1, "auto", dtype) as ours:
        model, examples, training = ours.prepared.model, ours.workplace.train, ours.prepared.checked.training
        base = str(next(model.module.parameters()).dtype).removeprefix("torch.")
        clients = list(ours.clients[:CLIENTS])
        start, cohorts = model.values(), ours.cohorts(clients)

        def work() -> None:
            for cohort in cohorts:
                works = [ClientWork(ours.workplace.rows(k), np.random.default_rng(k)) for k in cohort]
                train_cohort(model, start, examples, works, training)

        work()
        seconds, products = [], []
        for _ in range(REPEATS):
            products.append(matmul_gflops(base, 1, size, time.process_time))
            began = time.process_time()
            work()
            seconds.append(time.process_time() - began)
        taken, gflop = median(seconds), ours.gflop(clients)
        answer(
            packed=model.takes_ragged,
            dtype=base,
            tokens_per_second=ours.tokens(clients) / taken,
            gflops=gflop / taken,
            product_gflops=max(products),
            share_of_product=gflop / taken / max(products),
            work=kinds_of_work(work),
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
