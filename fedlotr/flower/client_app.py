"""The ClientApp: what a client does with a train or evaluate message, alone or in a cohort.

It needs the message's content and its own `node_config`, and finds its data in the folder that `run_config` names.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlotr.adapters.bases import sha256
from fedlotr.adapters.tuner import bases_sha256
from fedlotr.flower.carried import STATE, parts_of
from fedlotr.flower.records import arrays_sha256, bases_from_record, by_layer, to_record, to_tensors
from fedlotr.flower.workplace import Workplace, install_bases, work_folder
from fedlotr.streams import generator
from fedlotr.training.cohort import ClientResult, ClientWork, GradientTransform, train_cohort
from fedlotr.training.evaluation import evaluate
from fedlotr.training.memory import keep_freed_memory
from fedlotr.training.models import Tensors
from fedlotr.training.penalties import tail_penalty
from fedlotr.training.results import Results

WORK = "fedlotr.work"
"""Key of `run_config` in which our engines tell the absolute path of the workplace."""
OUT = "out"
"""Key of `run_config` with the folder of the run, under Flower's own engine, whose clients cannot be told more."""

UNDERSTOOD = {"server-round", "lr-factor", "tail-penalty", "tail-share"}
"""What a train message's config may say. Anything else (FedProx's proximal term, say) would be silently ignored."""


class Worker:
    """What one process keeps for the whole run: the frozen base, loaded once, and its data, memory-mapped."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        keep_freed_memory()
        torch.set_num_threads(workplace.recipe.threads)  # Flower's engine would give its own number
        self.model = workplace.build_model()
        self.bases_sha256 = bases_sha256(self.model.module)
        self.carry_sha256 = ""

    def follow(self, content: Any) -> None:
        """Bring the carried term to the version of a message; what it brings is used as far as it is not here yet.

        Raises RuntimeError where it is missing parts that this client never had.
        """
        if STATE not in content:
            return
        state, here = content[STATE], self.model.carried
        version, since = int(state["version"]), int(state["since"])
        if here.version != version:
            if not since <= here.version < version or self.workplace.has_carry(version):
                found = self.workplace.load_carry(since, version)
                if found is None:
                    raise RuntimeError(f"the carried term of version {since}, which this message goes on from, is lost")
                here = found
            if here.version < version:
                here = here.caught_up(version, parts_of(content))
            self.model.carry(here)
            self.carry_sha256 = here.sha256
            self.workplace.save_carry(here)

    def adopt(self, record: Any) -> None:
        """Use the bases a message brings, if they are not those in use; those made here come as a hash alone."""
        if not isinstance(record, ArrayRecord):
            return
        brought = bases_from_record(record)
        if sha256(list(brought.items())) != self.bases_sha256:  # type: ignore[arg-type]
            install_bases(self.model, brought)
            self.bases_sha256 = bases_sha256(self.model.module)

    def identity(self, client: int) -> ConfigRecord:
        """Who replies, and with what frozen parts it has computed."""
        carried = {"carry-sha256": self.carry_sha256} if self.carry_sha256 else {}
        return ConfigRecord({"client": client, "bases-sha256": self.bases_sha256, **carried})

    def train(self, messages: Sequence[Message], clients: Sequence[int]) -> list[ClientResult]:
        """Train clients, each from what its own message says.

        Those train together whose messages agree in all but the tensors that move in this round.
        """
        alike: dict[tuple[Any, ...], list[int]] = {}
        for at, message in enumerate(messages):
            content: Any = message.content
            config = dict(content["config"])
            unknown = sorted(set(config) - UNDERSTOOD)
            if unknown:
                raise ValueError(f"the strategy sends {', '.join(unknown)}, which this client does not act on")
            if "basis" in content:
                self.adopt(content["basis"])
            self.follow(content)
            arrays, moving = content["arrays"], self.model.moving(int(config["server-round"]))
            still = ArrayRecord({name: array for name, array in arrays.items() if name not in moving})
            shapes = tuple((name, tuple(array.shape)) for name, array in arrays.items() if name in moving)
            alike.setdefault((arrays_sha256(still), shapes, *sorted(config.items())), []).append(at)
        results: dict[int, ClientResult] = {}
        for group in alike.values():
            trained = self._train_alike([messages[at].content for at in group], [clients[at] for at in group])
            results |= dict(zip(group, trained, strict=True))
        return [results[at] for at in range(len(messages))]

    def _train_alike(self, contents: Sequence[Any], clients: Sequence[int]) -> list[ClientResult]:
        recipe, config = self.workplace.recipe, contents[0]["config"]
        one = len({arrays_sha256(content["arrays"]) for content in contents}) == 1
        starts = [to_tensors(content["arrays"]) for content in (contents[:1] if one else contents)]
        factor, server_round = float(config.get("lr-factor", 1.0)), int(config["server-round"])
        training = replace(recipe.training, lr=recipe.training.lr * factor, head_lr=recipe.training.head_lr * factor)
        work = [
            ClientWork(self.workplace.rows(client), generator(recipe.seed, "shuffle", server_round, client))
            for client in clients
        ]
        start = starts[0] if one else starts
        transform = _penalty(config, starts[0])
        return train_cohort(self.model, start, self.workplace.train, work, training, transform, server_round)


def _penalty(config: Mapping[str, Any], start: Tensors) -> GradientTransform | None:
    """HetLoRA's penalty on the last rows and columns of a client's factors, where a message asks for it."""
    if "tail-penalty" not in config:
        return None
    layers = by_layer(start)
    rank = max(len(start[names["A"]]) for names in layers.values())
    return tail_penalty(layers, float(config["tail-penalty"]), int(float(config["tail-share"]) * rank))


def workplace_folder(context: Context) -> str:
    """Where this run's clients find their data: told by our engines, else in the run's folder under Flower's run id."""
    if WORK in context.run_config:
        return str(context.run_config[WORK])
    return str(work_folder(Path(str(context.run_config[OUT])), str(context.run_id)))


@functools.lru_cache(maxsize=1)
def worker(folder: str) -> Worker:
    """This process' worker. Always called with the folder as its only positional argument, which is the cache's key.

    The folder's name is a run's own; an engine in the server's process drops the worker when the run ends.
    """
    return Worker(Workplace(Path(folder)))


class CohortClientApp(ClientApp):
    """A ClientApp that can also train several clients in one call, where an engine offers them together."""

    def run_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """One reply a message, in order."""
        clients = [int(context.node_config["partition-id"]) for context in contexts]
        here = worker(workplace_folder(contexts[0]))
        results = here.train(messages, clients)
        weighs_examples = here.workplace.recipe.weights == "examples"
        return [
            Message(
                RecordDict(
                    {
                        "arrays": to_record(result.tensors),
                        "metrics": MetricRecord(
                            {
                                "num-examples": result.examples,
                                "weight": float(result.examples) if weighs_examples else 1.0,
                                "loss": result.loss,
                            }
                        ),
                        "client": here.identity(client),
                    }
                ),
                reply_to=message,
            )
            for message, client, result in zip(messages, clients, results, strict=True)
        ]


app = CohortClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A cohort of one."""
    return app.run_cohort([message], [context])[0]


@app.evaluate()
def evaluate_shard(message: Message, context: Context) -> Message:
    """Score the server's model on the held-out rows from `start` to `stop`: sums, which add up over shards.

    Where `rows` is asked for, also what came of each row.
    """
    here = worker(workplace_folder(context))
    content: Any = message.content
    config = content["config"]
    here.follow(content)
    here.model.assign(to_tensors(content["arrays"]))
    rows = np.arange(int(config["start"]), int(config["stop"]))
    found = Results.empty(len(rows)) if config.get("rows") else None
    scores = evaluate(here.model, here.workplace.test, rows, found)
    metrics = MetricRecord(
        {"loss": scores.loss, "units": scores.units, "correct": scores.correct, "num-examples": len(rows)}
    )
    each = {} if found is None else {"rows": to_record(found.arrays())}
    return Message(RecordDict({"metrics": metrics, **each}), reply_to=message)
