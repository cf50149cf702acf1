"""A client app that says which GPUs its process may use."""

import os

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The GPU that is visible here, and in which process; -1 where there are none or several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    metrics = MetricRecord({"gpu": int(visible) if visible.isdecimal() else -1, "pid": os.getpid()})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
