"""The ClientApp: what a client does with a train or evaluate message, alone or in a cohort.

It needs the message's content and its own `node_config`, and finds its data in the folder that `run_config` names.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from transformers import PreTrainedTokenizerBase

from fedlotr.communication.codecs import CodecError
from fedlotr.evaluation.generation import generate
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scores import evaluate
from fedlotr.flower.chain import Chain
from fedlotr.flower.link import Asks, Cohort, Job
from fedlotr.flower.links.derived import asking
from fedlotr.flower.links.personal import OWN_ROWS
from fedlotr.flower.private import CLIENT_RAISED
from fedlotr.flower.records import (
    ARRAYS,
    ASKS,
    CLIENT,
    CONFIG,
    METRICS,
    OF,
    STOP_TEXT,
    STOPS,
    TEMPERATURE,
    TOKENS,
    arrays_sha256,
    to_record,
    to_tensors,
)
from fedlotr.flower.workplace import Workplace, work_folder
from fedlotr.models.source import load_tokenizer
from fedlotr.privacy.dp_sgd import DPSGD, client_stream
from fedlotr.streams import generator
from fedlotr.training.cohort import ClientWork, train_cohort, training_order
from fedlotr.training.memory import keep_freed_memory

WORK = "fedlotr.work"
"""Key of `run_config` in which our engines tell the absolute path of the workplace."""
OUT = "out"
"""Key of `run_config` with the folder of the run, under Flower's own engine, whose clients cannot be told more."""

UNDERSTOOD = frozenset({"server-round", "lr-factor"})
"""What a train message's config may say, besides what links act on. Anything else would be silently ignored."""


class Worker:
    """What one process keeps for the whole run: the frozen base, loaded once, and its data, memory-mapped."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        keep_freed_memory()
        torch.set_num_threads(workplace.recipe.threads)  # Flower's engine would give its own number
        if workplace.recipe.model.device != "cpu":  # equal bits each time, as far as torch has algorithms for it
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.model = workplace.build_model()
        self.chain = Chain.at_client(workplace, self.model)

    def holding(self, text: str) -> Callable[[list[int]], bool] | None:
        """What says whether an answer's tokens hold the text; None where there is none."""
        if not text:
            return None
        return lambda answer: text in str(self._tokenizer.decode(answer, skip_special_tokens=True))

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        path = self.workplace.recipe.model.path
        return load_tokenizer(Path(path), path)

    def train(self, jobs: Sequence[Job]) -> None:
        """Train clients, each from what its own message says; what each keeps is changed in place.

        Those train together whose messages agree in all but the tensors that move in this round.
        """
        alike: dict[tuple[Any, ...], list[Job]] = {}
        for job in jobs:
            config = dict(job.records[CONFIG])
            if unknown := sorted(set(config) - UNDERSTOOD - self.chain.understands):
                raise ValueError(f"the strategy sends {', '.join(unknown)}, which this client does not act on")
            kept = dict(job.memory.items())
            try:
                self.chain.receive(job)
            except Asks as asks:
                job.asks = asks
                for name in list(job.memory):
                    del job.memory[name]
                job.memory.update(kept)  # it will read this message once more
                continue
            arrays, moving = job.records[ARRAYS], self.model.moving(job.round)
            still = ArrayRecord({name: array for name, array in arrays.items() if name not in moving})
            shapes = tuple((name, tuple(array.shape)) for name, array in arrays.items() if name in moving)
            key = (arrays_sha256(still), shapes, self.chain.alike(job), *sorted(config.items()))
            alike.setdefault(key, []).append(job)
        for group in alike.values():
            self._train_alike(group)

    def _train_alike(self, jobs: Sequence[Job]) -> None:
        recipe, config, number = self.workplace.recipe, jobs[0].records[CONFIG], jobs[0].round
        one = not self.model.personal and len({arrays_sha256(job.records[ARRAYS]) for job in jobs}) == 1
        starts = [to_tensors(job.records[ARRAYS]) | job.own for job in jobs[: 1 if one else None]]
        factor = float(config.get("lr-factor", 1.0))
        training = replace(recipe.training, lr=recipe.training.lr * factor, head_lr=recipe.training.head_lr * factor)
        moving = self.model.moving(number)
        values = {name: value for name, value in self.model.start(starts[0]).items() if name in moving}
        for job in jobs:
            self.chain.start(job, values)
        work = [
            ClientWork(
                self.workplace.rows(job.client),
                generator(recipe.seed, "shuffle", number, job.client),
                job.optimizer,
            )
            for job in jobs
        ]
        order = training_order(work, training)
        for row, at in enumerate(order):
            jobs[at].row = row
        begun = [self.model.start(values) for values in (starts if one else [starts[at] for at in order])]
        shared = moving.difference(self.model.personal)
        stacked = {name: torch.stack([values[name] for values in begun]).float() for name in begun[0] if name in shared}
        transform = self.chain.gradient(Cohort(jobs[0].records, [jobs[at].memory for at in order], stacked))
        clients = [job.client for job in jobs]
        if recipe.noise is not None and recipe.noise.engine == "opacus":
            from fedlotr.privacy.opacus_engine import train_by_opacus

            keys = [f"{recipe.seed}/opacus/{number}/{client}" for client in clients]
            own = starts * len(work) if one else starts
            data = self.workplace.train
            results = train_by_opacus(self.model, own, data, work, training, recipe.noise, keys, number)
        else:
            mechanism = None
            if recipe.noise is not None:
                streams = [client_stream(recipe.noise.reproducible, recipe.seed, number, client) for client in clients]
                mechanism = DPSGD(recipe.noise, streams)
            start, data = starts[0] if one else starts, self.workplace.train
            results = train_cohort(self.model, start, data, work, training, transform, number, mechanism)
        for job, result in zip(jobs, results, strict=True):
            job.result = result
            self.finish(job)

    def finish(self, job: Job) -> None:
        """What goes up of a job; where a codec cannot have it, this client alone fails."""
        try:
            self.chain.send(job)
        except CodecError as error:
            job.failure = f"{type(error).__name__}: {error}"
        else:
            job.arrays = job.arrays or to_record(job.trained.tensors)


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
        here = worker(workplace_folder(contexts[0]))
        jobs = [
            Job(client=client_of(context), records=dict(message.content.items()), memory=context.state)
            for message, context in zip(messages, contexts, strict=True)
        ]
        try:
            here.train(jobs)
        except Exception as error:
            if here.workplace.recipe.noise is None:
                raise
            raise HiddenError(f"{type(error).__name__}; what it said may tell of the examples") from None
        uniform = here.workplace.recipe.weights == "uniform"
        return [_reply(message, job, uniform=uniform) for message, job in zip(messages, jobs, strict=True)]


def client_of(context: Context) -> int:
    """Which client this is."""
    return int(context.node_config["partition-id"])


def _reply(message: Message, job: Job, *, uniform: bool) -> Message:
    if job.failure is not None:  # its cohort need not train again
        return Message(Error(CLIENT_RAISED, job.failure), reply_to=message)
    if job.asks is not None:
        return Message(RecordDict({ASKS: asking(job.asks)}), reply_to=message)
    trained = job.trained
    metrics: dict[str, Any] = {
        "num-examples": trained.examples,
        "weight": 1.0 if uniform else float(trained.examples),
        **({} if trained.loss is None else {"loss": trained.loss}),
    }
    identity = ConfigRecord({"client": job.client, **job.identity})
    records = {ARRAYS: job.arrays, METRICS: MetricRecord(metrics), CLIENT: identity, **job.beside}
    return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]


app = CohortClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A cohort of one."""
    return app.run_cohort([message], [context])[0]


@app.evaluate()
def evaluate_shard(message: Message, context: Context) -> Message:
    """Score the server's model on the held-out rows from `start` to `stop`: sums, which add up over shards.

    Where `rows` is asked for, also what came of each row; of `choices` instead of rows, the same; of `prompts`, what
    the model says to them. Or, asked for its own rows: this client's model, with what stays with it, on what is held
    back of its own.
    """
    here = worker(workplace_folder(context))
    job = Job(client=client_of(context), records=dict(message.content.items()), memory=context.state)
    here.chain.receive(job, in_evaluation=True)
    arrays, config = to_tensors(job.records[ARRAYS]), job.records[CONFIG]
    if OWN_ROWS in config:
        here.model.assign(arrays | job.own)
        examples, rows = here.workplace.train, here.workplace.held_back(job.client)
    else:
        here.model.assign(arrays)
        examples = getattr(here.workplace, str(config.get(OF, "test")))
        rows = np.arange(int(config["start"]), int(config["stop"]))
    if TOKENS in config:
        prompts = [examples.tokens[examples.offsets[row] : examples.offsets[row + 1]].tolist() for row in rows]
        draws = int(generator(here.workplace.recipe.seed, "answers", int(rows[0])).integers(2**62))
        how = int(config[TOKENS]), config[STOPS], float(config[TEMPERATURE])
        answers = generate(here.model, prompts, *how, draws, here.holding(str(config[STOP_TEXT])))
        said = {"tokens": np.array([*chain(*answers)], np.int64), "counts": np.array([*map(len, answers)])}
        return Message(RecordDict({"rows": to_record(said)}), reply_to=message)
    found = Results.empty(len(rows), scale=here.model.spec.scale) if config.get("rows") else None
    scores = evaluate(here.model, examples, rows, found)
    metrics = MetricRecord(
        {
            "loss": scores.loss,
            "units": scores.units,
            "correct": scores.correct,
            "moments": list(scores.moments),
            "num-examples": len(rows),
        }
    )
    each = {} if found is None else {"rows": to_record(found.arrays())}
    return Message(RecordDict({"metrics": metrics, **each}), reply_to=message)
