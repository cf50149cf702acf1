"""The ClientApp: what a client does with a train or evaluate message, alone or in a cohort.

It needs the message's content and its own `node_config`, and finds its data in the folder that `run_config` names.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlotr.adapters.bases import sha256
from fedlotr.adapters.tuner import bases_sha256
from fedlotr.communication.codecs import CodecError
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import evaluate
from fedlotr.flower.links import moments
from fedlotr.flower.links.carry import STATE, parts_of
from fedlotr.flower.links.codec import coded_update, received
from fedlotr.flower.links.objectives import CONTROL, TAIL_SHARE, TERMS, Cohort, terms
from fedlotr.flower.links.personal import OWN_ROWS, keep_personal, personal
from fedlotr.flower.private import CLIENT_RAISED
from fedlotr.flower.records import arrays_sha256, bases_from_record, to_record, to_tensors
from fedlotr.flower.workplace import Workplace, install_bases, work_folder
from fedlotr.privacy.dp_sgd import DPSGD, ExampleNoise, client_stream
from fedlotr.streams import generator
from fedlotr.training.cohort import ClientResult, ClientWork, LocalTraining, train_cohort, training_order
from fedlotr.training.corrections import chain
from fedlotr.training.memory import keep_freed_memory

WORK = "fedlotr.work"
"""Key of `run_config` in which our engines tell the absolute path of the workplace."""
OUT = "out"
"""Key of `run_config` with the folder of the run, under Flower's own engine, whose clients cannot be told more."""

UNDERSTOOD = {"server-round", "lr-factor", TAIL_SHARE, *TERMS}
"""What a train message's config may say. Anything else would be silently ignored."""


@dataclass(frozen=True)
class Trained:
    """What one client comes back with: its result, and the records that go up beside it."""

    result: ClientResult
    beside: dict[str, ArrayRecord]


class Worker:
    """What one process keeps for the whole run: the frozen base, loaded once, and its data, memory-mapped."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        keep_freed_memory()
        torch.set_num_threads(workplace.recipe.threads)  # Flower's engine would give its own number
        if workplace.recipe.model.device != "cpu":  # equal bits each time, as far as torch has algorithms for it
            torch.use_deterministic_algorithms(True, warn_only=True)
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

    def decode(self, message: Message, state: RecordDict) -> None:
        """Put tensors into a train message whose broadcast is coded. Raises CodecError."""
        coding, content = self.workplace.recipe.coding, message.content
        if coding.broadcast.coded:
            message.content = RecordDict({**content, "arrays": received(content, state, coding, self.shapes)})

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that travel."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.values().items()}

    def update(self, trained: Trained, message: Message, client: int, state: RecordDict) -> ArrayRecord:
        """A client's tensors as they go up. Raises CodecError where they are not finite, and are to be coded."""
        recipe, content = self.workplace.recipe, message.content
        if not recipe.coding.update.coded:
            return to_record(trained.result.tensors)
        config, sent = content["config"], content["arrays"]
        stream = generator(recipe.seed, "codec", int(config["server-round"]), client)  # type: ignore[arg-type]
        return coded_update(trained.result.tensors, sent, state, recipe.coding, stream)  # type: ignore[arg-type]

    def train(self, messages: Sequence[Message], clients: Sequence[int], states: Sequence[RecordDict]) -> list[Trained]:
        """Train clients, each from what its own message says; what a client keeps is changed in place in `states`.

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
            control = arrays_sha256(content[CONTROL]) if CONTROL in content else ""
            alike.setdefault((arrays_sha256(still), shapes, control, *sorted(config.items())), []).append(at)
        results: dict[int, Trained] = {}
        for group in alike.values():
            contents, own = [messages[at].content for at in group], [states[at] for at in group]
            trained = self._train_alike(contents, [clients[at] for at in group], own)
            results |= dict(zip(group, trained, strict=True))
        return [results[at] for at in range(len(messages))]

    def _train_alike(
        self, contents: Sequence[Any], clients: Sequence[int], states: Sequence[RecordDict]
    ) -> list[Trained]:
        recipe, config = self.workplace.recipe, contents[0]["config"]
        one = not self.model.personal and len({arrays_sha256(content["arrays"]) for content in contents}) == 1
        pairs = list(zip(contents, states, strict=True))[: 1 if one else None]
        starts = [to_tensors(content["arrays"]) | personal(state) for content, state in pairs]
        factor, server_round = float(config.get("lr-factor", 1.0)), int(config["server-round"])
        training = replace(recipe.training, lr=recipe.training.lr * factor, head_lr=recipe.training.head_lr * factor)
        moving, kept = self.model.moving(server_round), training.optimizer_state
        shapes = {name: value for name, value in self.model.start(starts[0]).items() if name in moving}
        work = [
            ClientWork(
                self.workplace.rows(client),
                generator(recipe.seed, "shuffle", server_round, client),
                moments.begin(kept, content, state, shapes),
            )
            for client, content, state in zip(clients, contents, states, strict=True)
        ]
        order = training_order(work, training)
        begun = [self.model.start(values) for values in (starts if one else [starts[at] for at in order])]
        shared = moving.difference(self.model.personal)
        stacked = {name: torch.stack([values[name] for values in begun]).float() for name in begun[0] if name in shared}
        asked = terms(Cohort(contents[0], [states[at] for at in order], stacked))
        transform = chain([term.transform for term in asked])
        mechanism = None
        if recipe.noise is not None and recipe.noise.engine == "opacus":
            return self._train_by_opacus(recipe.noise, starts, work, clients, training, server_round)
        if recipe.noise is not None:
            hidden = recipe.noise.reproducible
            streams = [client_stream(hidden, recipe.seed, server_round, client) for client in clients]
            mechanism = DPSGD(recipe.noise, streams)
        start, data = starts[0] if one else starts, self.workplace.train
        results = train_cohort(self.model, start, data, work, training, transform, server_round, mechanism)
        beside = {
            at: moments.end(kept, result.optimizer, states[at], result.tensors) for at, result in enumerate(results)
        }
        for state, result in zip(states, results, strict=True):
            keep_personal(state, result.personal)
        for row, at in enumerate(order):
            for term in asked:
                beside[at] |= term.report(row)
        return [Trained(result, beside[at]) for at, result in enumerate(results)]

    def _train_by_opacus(
        self,
        noise: ExampleNoise,
        starts: Sequence[dict[str, torch.Tensor]],
        work: Sequence[ClientWork],
        clients: Sequence[int],
        training: LocalTraining,
        server_round: int,
    ) -> list[Trained]:
        from fedlotr.privacy.opacus_engine import train_by_opacus

        keys = [f"{self.workplace.recipe.seed}/opacus/{server_round}/{client}" for client in clients]
        own = list(starts) if len(starts) == len(work) else [starts[0]] * len(work)
        results = train_by_opacus(self.model, own, self.workplace.train, work, training, noise, keys, server_round)
        return [Trained(result, {}) for result in results]


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


class HiddenError(Exception):
    """What a client says that failed and hides its examples: of which kind the error was, and nothing that it held."""


class CohortClientApp(ClientApp):
    """A ClientApp that can also train several clients in one call, where an engine offers them together."""

    def run_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """One reply a message, in order."""
        clients = [int(context.node_config["partition-id"]) for context in contexts]
        here = worker(workplace_folder(contexts[0]))
        states = [context.state for context in contexts]
        for message, state in zip(messages, states, strict=True):
            here.decode(message, state)
        try:
            trained = here.train(messages, clients, states)
        except Exception as error:
            if here.workplace.recipe.noise is None:
                raise
            raise HiddenError(f"{type(error).__name__}; what it said may tell of the examples") from None
        return [self._reply(here, *of_one) for of_one in zip(messages, clients, states, trained, strict=True)]

    def _reply(self, here: Worker, message: Message, client: int, state: RecordDict, one: Trained) -> Message:
        try:
            arrays = here.update(one, message, client, state)
        except CodecError as error:  # this client alone has failed, and its cohort need not train again
            return Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        weighs_examples = here.workplace.recipe.weights == "examples"
        metrics: dict[str, Any] = {
            "num-examples": one.result.examples,
            "weight": float(one.result.examples) if weighs_examples else 1.0,
            **({} if one.result.loss is None else {"loss": one.result.loss}),
        }
        return Message(
            RecordDict(
                {
                    "arrays": arrays,
                    "metrics": MetricRecord(metrics),
                    "client": here.identity(client),
                    **one.beside,
                }
            ),
            reply_to=message,
        )


app = CohortClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A cohort of one."""
    return app.run_cohort([message], [context])[0]


@app.evaluate()
def evaluate_shard(message: Message, context: Context) -> Message:
    """Score the server's model on the held-out rows from `start` to `stop`: sums, which add up over shards.

    Where `rows` is asked for, also what came of each row. Or, asked for its own rows: this client's model, with what
    stays with it, on what is held back of its own.
    """
    here = worker(workplace_folder(context))
    content: Any = message.content
    config = content["config"]
    here.follow(content)
    if OWN_ROWS in config:
        here.model.assign(to_tensors(content["arrays"]) | personal(context.state))
        examples, rows = here.workplace.train, here.workplace.held_back(int(context.node_config["partition-id"]))
    else:
        here.model.assign(to_tensors(content["arrays"]))
        examples, rows = here.workplace.test, np.arange(int(config["start"]), int(config["stop"]))
    found = Results.empty(len(rows)) if config.get("rows") else None
    scores = evaluate(here.model, examples, rows, found)
    metrics = MetricRecord(
        {"loss": scores.loss, "units": scores.units, "correct": scores.correct, "num-examples": len(rows)}
    )
    each = {} if found is None else {"rows": to_record(found.arrays())}
    return Message(RecordDict({"metrics": metrics, **each}), reply_to=message)
