"""A ClientApp without a model: each client adds a number to what it was sent, so that every mean can be done by hand.

Client k has k + 1 examples and adds k + 1. `context.run_config["trouble"]` lists "client:what" of those that fail.
"""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    trouble = dict(item.split(":") for item in str(context.run_config.get("trouble", "")).split())
    what = trouble.get(str(client), "")
    arrays = {name: array.numpy() + np.float32(client + 1) for name, array in message.content["arrays"].items()}
    if what == "raises":
        raise RuntimeError("out of cheese")
    if what == "nan":
        arrays["C"][0, 0] = np.nan
    if what == "shape":
        arrays["C"] = arrays["C"][:1]
    if what == "dtype":
        arrays["C"] = arrays["C"].astype(np.float64)
    if what == "missing":
        del arrays["head"]
    metrics = MetricRecord(
        {"num-examples": client + 1, "weight": -1.0 if what == "weight" else client + 1.0, "loss": 0.5}
    )
    bases = "others" if what == "bases" else "bases"
    records = {
        "arrays": ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()}),
        "metrics": metrics,
        "client": ConfigRecord({"client": client, "bases-sha256": bases}),
    }
    if what == "records":
        del records["metrics"]
    return Message(RecordDict(records), reply_to=message)
