"""Contestant: Flower's simulation engine with PEFT LoRA clients. JOB RANK WORKERS cached|reloaded."""

import sys
import time
from typing import Any

import numpy as np
import peft_client
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from side_by_side import answer, turns

path, rank, workers, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
job = peft_client.read_job(path)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """A round whenever it is called for, by Flower's own FedAvg."""
    model = peft_client.build(job, rank)
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    clients = len(job["parts"])
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    trained = sum(int(np.prod(array.shape)) for array in arrays.values())
    answer(upload_bytes=4 * trained)
    for number in turns():
        began = time.perf_counter()
        config = ConfigRecord({"job": path, "rank": rank, "cached": how == "cached"})
        messages = list(strategy.configure_train(number, arrays, config, grid))
        replies = list(grid.send_and_receive(messages))
        failed = [reply for reply in replies if reply.has_error()]
        if failed or len(replies) < clients:
            raise RuntimeError(f"{len(failed)} of {clients} clients failed: {failed[0].error.reason if failed else ''}")
        aggregated, metrics = strategy.aggregate_train(number, replies)
        assert aggregated is not None and metrics is not None
        arrays = aggregated
        facts: dict[str, Any] = {"seconds": time.perf_counter() - began, "loss": float(str(metrics["loss"]))}
        if job["accuracy"]:
            facts["accuracy"] = accuracy(model, arrays)
        answer(**facts)


def accuracy(model: Any, arrays: ArrayRecord) -> float:
    """On the held-out rows, by the server."""
    import torch

    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    tokens = peft_client.tokenizer(path)
    right = 0
    with torch.inference_mode():
        for at in range(0, len(job["test"]), 32):
            rows = job["test"][at : at + 32]
            batch = tokens(
                [row["text"] for row in rows],
                truncation=True,
                max_length=job["max_length"],
                padding=True,
                return_tensors="pt",
            )
            found = model(batch["input_ids"], batch["attention_mask"]).argmax(-1)
            right += int((found == torch.tensor([row["label"] for row in rows])).sum())
    return right / len(job["test"])


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
