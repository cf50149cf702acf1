"""The real client app, some of whose clients misbehave or keep a state: what a run is handed by `CLIENT_APP`.

FAULTS in the environment lists "client:what" or "client:what:ROUND" (from that round on). With STATEFUL in it, each
client counts its rounds in `Context.state` and adds that to its head, so that a lost state changes the result.
"""

import os
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord

from fedlotr.flower.client_app import CohortClientApp, evaluate_shard
from fedlotr.flower.coding import coded_record

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
            if what:
                spoil(reply, what)
            if "coded" in content["arrays"]:
                continue
            tensors = {name: array.numpy() for name, array in content["arrays"].items()}
            SENT.append((number, client, float(content["metrics"]["weight"]), tensors))
        return replies


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
