"""Contestant: a plain loop over PEFT LoRA clients, all in one process. JOB RANK THREADS DTYPE ATTENTION.

What a user writes who needs no engine: one client after the other, no messages, and the mean of what they end with.
"""

import sys
from typing import Any

import peft_client
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from side_by_side import answer, timed, turns


def main(setting: peft_client.Setting, threads: int) -> None:
    """A round of all clients whenever it is called for."""
    torch.set_num_threads(threads)
    job, model = peft_client.read_job(setting.job), peft_client.build(setting)
    clients = range(len(job["parts"]))
    weights = [len(peft_client.examples(setting.job, client)) / sum(map(len, job["parts"])) for client in clients]
    server = state(model)
    upload = 4 * sum(tensor.numel() for tensor in server.values())
    answer(upload_bytes=upload, before=peft_client.score(model, setting) if job["evaluate"] else {})
    for _ in turns():
        with timed() as taken:
            total, loss = {name: torch.zeros_like(tensor) for name, tensor in server.items()}, 0.0
            for client, weight in zip(clients, weights, strict=True):
                set_peft_model_state_dict(model, server)
                loss += weight * peft_client.train_client(model, setting, client)
                for name, tensor in state(model).items():
                    total[name] += weight * tensor
            server = total
        facts: dict[str, Any] = {**taken, "loss": loss}
        if job["evaluate"]:
            set_peft_model_state_dict(model, server)
            facts |= peft_client.score(model, setting)
        answer(**facts)


def state(model: Any) -> dict[str, torch.Tensor]:
    """What is trained, as it is now."""
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


if __name__ == "__main__":
    main(peft_client.Setting(sys.argv[1], int(sys.argv[2]), sys.argv[4], sys.argv[5]), int(sys.argv[3]))
