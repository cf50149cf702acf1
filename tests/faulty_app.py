"""The real client app, some of whose clients misbehave or keep a state: what a run is handed by `CLIENT_APP`.

FAULTS in the environment lists "client:what" or "client:what:ROUND" (from that round on); a what with an equals sign,
such as "times=1e6", "weight=nan" or "control=1e30", is a `poison`. With STATEFUL in it, each
client counts its rounds in `Context.state` and adds that to its head, so that a lost state changes the result.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord

from fedlotr.flower.client_app import CohortClientApp, Worker, evaluate_shard
from fedlotr.flower.link import Job
from fedlotr.flower.links.codec import coded_record

SENT: list[tuple[int, int, float, dict[str, Any]]] = []
"""(round, client, weight, tensors) of every reply made in this process."""


def fault_of(client: int, server_round: int) -> str:
    for item in os.environ.get("FAULTS", "").split():
        who, what, *since = item.split(":")
        if int(who) == client and server_round >= int(*since or [1]):
            return what
    return ""


def spoil(reply: Message, what: str) -> None:
    """Make one tensor, the fingerprint of the bases, or a coded message what it must not be."""
    content: Any = reply.content
    if what in ("truncated", "flipped"):
        message = content["arrays"]["coded"].data
        content["arrays"] = coded_record(message[:-1] if what == "truncated" else message[:-1] + b"?")
        return
    if what == "bases":
        content["client"] = ConfigRecord({**content["client"], "bases-sha256": "others"})
        return
    arrays = {name: array.numpy().copy() for name, array in content["arrays"].items()}
    name = next(iter(arrays))
    changed = {
        "nan": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, np.nan, a).astype(a.dtype),
        "shape": lambda a: a[:1],
        "dtype": lambda a: a.astype(np.float64),
    }[what](arrays[name])
    content["arrays"] = ArrayRecord({**content["arrays"], name: Array(changed)})


def poison(reply: Message, what: str) -> None:
    """Well-formed, and meant to harm: what is beside an update says what it must not."""
    content: Any = reply.content
    key, _, given = what.partition("=")
    if key in ("control", "moments"):
        number = np.float32(given)
        content[key] = ArrayRecord({n: Array(np.full_like(a.numpy(), number)) for n, a in content[key].items()})
    elif key == "rank":
        content["client"] = ConfigRecord({**content["client"], "rank": int(given)})
    elif key == "order":
        content["arrays"] = ArrayRecord({name: content["arrays"][name] for name in reversed(list(content["arrays"]))})
    elif key in ("weight", "num-examples", "loss"):  # past the checks of the record's own class
        words: dict[str, Any] = {"true": True, "text": "8", "list": [8.0]}
        values: Any = vars(content["metrics"])["_data"]
        values[key] = words[given] if given in words else int(given) if given.isdigit() else float(given)


def poisoned(tensors: dict[str, torch.Tensor], sent: Any, what: str) -> dict[str, torch.Tensor]:
    """An update so many times as long (a negative one is turned round), or one that is made of one number."""
    key, _, given = what.partition("=")
    if key == "all":
        return {name: torch.full_like(value, float(given)) for name, value in tensors.items()}
    if key != "times":
        return tensors
    start = {name: torch.from_numpy(sent[name].numpy().copy()) for name in tensors}
    return {name: start[name] + float(given) * (value - start[name]) for name, value in tensors.items()}


class FaultyApp(CohortClientApp):
    def run_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        rounds = [int(message.content["config"]["server-round"]) for message in messages]  # type: ignore[index, arg-type]
        clients = [int(context.node_config["partition-id"]) for context in contexts]
        faults = [fault_of(client, number) for client, number in zip(clients, rounds, strict=True)]
        if "raises" in faults:
            raise ArithmeticError(f"client {clients[faults.index('raises')]} is out of cheese")
        replies = super().run_cohort(messages, contexts)
        for reply, context, what, client, number in zip(replies, contexts, faults, clients, rounds, strict=True):
            content: Any = reply.content
            if "STATEFUL" in os.environ:
                count_rounds(content, context)
            if "=" in what:
                poison(reply, what)
            elif what:
                spoil(reply, what)
            if "coded" in content["arrays"]:
                continue
            tensors = {name: array.numpy() for name, array in content["arrays"].items()}
            SENT.append((number, client, float(content["metrics"]["weight"]), tensors))
        return replies


def spoiled(finish: Callable[[Worker, Job], None]) -> Callable[[Worker, Job], None]:
    """A worker's `finish` that gets what a client's own training is said to have come to."""

    @functools.wraps(finish)
    def finished(here: Worker, job: Job) -> None:
        tensors = poisoned(job.trained.tensors, job.records["arrays"], fault_of(job.client, job.round))
        job.result = replace(job.trained, tensors=tensors)
        finish(here, job)

    return finished


Worker.finish = spoiled(Worker.finish)  # type: ignore[method-assign]


def count_rounds(content: Any, context: Context) -> None:
    before: Any = context.state.get("memory", MetricRecord({"rounds": 0}))
    rounds = int(before["rounds"]) + 1
    context.state["memory"] = MetricRecord({"rounds": rounds})
    context.state["basis"] = ConfigRecord({"note": b"\x00\xff", "names": ["a", "b"]})
    arrays = {name: array.numpy() for name, array in content["arrays"].items()}
    context.state["factors"] = ArrayRecord({"own": Array(np.full((2, rounds), 0.1, np.float16))})
    content["arrays"] = ArrayRecord({name: Array(array + np.float32(rounds)) for name, array in arrays.items()})


app = FaultyApp()
app.evaluate()(evaluate_shard)


@app.train()
def train(message: Message, context: Context) -> Message:
    return app.run_cohort([message], [context])[0]
