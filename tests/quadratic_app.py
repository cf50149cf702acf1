"""A ClientApp with a loss that can be minimised by hand: client k has a_k/2 (x - b_k)², and takes K plain steps.

What a strategy asks of it, it does by the real client's own terms; its state is the engine's store.
"""

from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlotr.flower.link import Cohort
from fedlotr.flower.links.objectives import terms
from fedlotr.flower.records import to_record, to_tensors

STEPS, RATE = 10, 0.05
CURVATURE, CENTRE, WEIGHT = (1.0, 8.0, 2.0, 4.0), (0.0, 1.0, -3.0, 2.0), (1.0, 3.0, 2.0, 1.0)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    content: Any = message.content
    x = {name: value[None] for name, value in to_tensors(content["arrays"]).items()}
    asked = terms(Cohort(content, [context.state], {name: value.clone() for name, value in x.items()}))
    for _ in range(STEPS):
        gradients = {name: CURVATURE[client] * (value - CENTRE[client]) for name, value in x.items()}
        for term in asked:
            gradients = term.transform(gradients, x)
        x = {name: value - RATE * gradients[name] for name, value in x.items()}
    beside = {name: record for term in asked for name, record in term.report(0).items()}
    sent = {name: value[0] for name, value in x.items()}
    if int(content["config"]["server-round"]) in context.run_config.get(f"nan-{client}", []):  # type: ignore[operator]
        sent = {name: value * torch.nan for name, value in sent.items()}
    records = {
        "arrays": to_record(sent),
        "metrics": MetricRecord({"num-examples": 1, "weight": WEIGHT[client], "loss": 0.0}),
        "client": ConfigRecord({"client": client, "bases-sha256": "bases"}),
        **beside,
    }
    return Message(RecordDict(records), reply_to=message)
