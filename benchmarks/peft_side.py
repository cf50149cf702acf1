"""Contestant: Flower's simulation engine with PEFT LoRA clients. JOB RANK WORKERS cached|reloaded DTYPE ATTENTION."""

import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import peft_client
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from side_by_side import answer, timed, turns

rank, workers, how = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
setting = peft_client.Setting(sys.argv[1], rank, sys.argv[5], sys.argv[6])
job = peft_client.read_job(setting.job)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """A round whenever it is called for, by Flower's own FedAvg."""
    model = peft_client.build(setting)
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    clients = len(job["parts"])
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    trained = sum(int(np.prod(array.shape)) for array in arrays.values())
    answer(upload_bytes=4 * trained, before=peft_client.score(model, setting) if job["evaluate"] else {})
    for number in turns():
        with timed() as taken:
            config = ConfigRecord({**asdict(setting), "cached": how == "cached"})
            messages = list(strategy.configure_train(number, arrays, config, grid))
            replies = list(grid.send_and_receive(messages))
            failed = [reply.error.reason for reply in replies if reply.has_error()]
            if failed or len(replies) < clients:
                raise RuntimeError(f"{len(failed)} of {clients} clients failed: {failed[0] if failed else ''}")
            aggregated, metrics = strategy.aggregate_train(number, replies)
            assert aggregated is not None and metrics is not None
            arrays = aggregated
        facts: dict[str, Any] = {**taken, "loss": float(str(metrics["loss"]))}
        if job["evaluate"]:
            set_peft_model_state_dict(model, arrays.to_torch_state_dict())
            facts |= peft_client.score(model, setting)
        answer(**facts)


if __name__ == "__main__":
    run_simulation(
        server,
        peft_client.app,
        num_supernodes=len(job["parts"]),
        backend_config={
            "init_args": {"num_cpus": workers, "log_to_driver": False, "logging_level": "ERROR"},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
