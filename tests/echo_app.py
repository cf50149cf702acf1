"""A client app that echoes what it gets, plus its partition id, and misbehaves where the message asks for it."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


def answer(message: Message, context: Context, cohort: int) -> Message:
    """A reply: the message's array plus the partition id; `context.state` counts the calls of odd partitions."""
    partition = int(context.node_config["partition-id"])
    config = message.content["config"]
    assert isinstance(config, ConfigRecord)
    misbehave(partition, config)
    config["touched"] = True  # must be seen by nobody else
    if partition % 2:
        calls = context.state.metric_records.get("calls", MetricRecord({"calls": 0}))
        context.state["calls"] = MetricRecord({"calls": int(str(calls["calls"])) + 1})
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    echo = ArrayRecord({name: Array(array.numpy() + np.float32(partition)) for name, array in arrays.items()})
    metrics = MetricRecord({"cohort": cohort, "pid": os.getpid()})
    return Message(RecordDict({"arrays": echo, "metrics": metrics}), reply_to=message)


def misbehave(partition: int, config: ConfigRecord) -> None:
    """Raise, exit, die, or sleep, as the config says for this partition."""
    if config.get("touched"):
        raise AssertionError("another client's change to the shared content is visible here")
    if partition == config.get("fail"):
        raise ValueError(f"client {partition} is unwell")
    if partition == config.get("exit"):
        raise SystemExit(3)
    if partition == config.get("sleep"):
        time.sleep(60)
    if partition == config.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if partition == config.get("die_once"):
        flag = Path(str(config["flag"]))
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class EchoApp(ClientApp):
    """Answers train messages in cohorts; a cohort fails as a whole."""

    def run_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """One reply a message, in order."""
        return [answer(m, c, len(messages)) for m, c in zip(messages, contexts, strict=True)]


app = EchoApp()
plain = ClientApp()  # without cohorts: what any Flower user has
not_an_app = 7


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Echo, outside any cohort."""
    return answer(message, context, 0)


@app.query()
def pools(message: Message, context: Context) -> Message:
    """How many threads each numeric library loaded in this process computes with."""
    from threadpoolctl import threadpool_info

    counts = {str(pool["internal_api"]): int(pool["num_threads"]) for pool in threadpool_info()}
    return Message(RecordDict({"pools": ConfigRecord(dict(counts))}), reply_to=message)


@plain.train()
def train(message: Message, context: Context) -> Message:
    """Echo, alone."""
    return answer(message, context, 1)
