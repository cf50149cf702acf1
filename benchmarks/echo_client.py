"""A client that computes nothing: it sends back the arrays it was sent, with what a round of ours asks of a reply."""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


def answer(message: Message, context: Context) -> Message:
    """The message's arrays again."""
    content: Any = message.content
    metrics = MetricRecord({"num-examples": 1, "weight": 1.0, "loss": 0.0})
    client = ConfigRecord({"client": int(context.node_config["partition-id"]), "bases-sha256": "none"})
    arrays = ArrayRecord(dict(content["arrays"].items()))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics, "client": client}), reply_to=message)


class EchoApp(ClientApp):
    """Takes cohorts, as our own client does."""

    def run_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """One reply a message, in order."""
        return [answer(message, context) for message, context in zip(messages, contexts, strict=True)]


app = EchoApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Alone, as Flower calls it."""
    return answer(message, context)
