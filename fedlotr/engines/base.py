"""What the engines share: addresses, jobs, how a process executes one, and the driver's half of Flower's `Grid`."""

import copy
import importlib
import itertools
import logging
import os
import sys
import time
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from flwr.app import Context, Error, Message, MessageType, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlotr.errors import InputError, harmless
from fedlotr.flower.lazy import REPLY_BYTES, Spill
from fedlotr.flower.private import CLIENT_RAISED, RUN_ID, Run, empty_run, identify_process, set_message_id

log = logging.getLogger("fedlotr.engines")

FIRST_NODE = 100  # smaller ids are left to servers: an id says on sight whose it is
COHORT_TYPE = MessageType.TRAIN  # only plain "train" messages are cut into cohorts
TRACEBACK_FRAMES = 3  # in an error reply: enough to find the line, short enough for a log
LONGEST_TEXT = 2000  # characters of what an exception says

CohortRule = Callable[[Sequence[int]], list[list[int]]]
"""Cuts the sorted partition ids of one push into cohorts: disjoint, covering, and decided by these ids alone."""


def each_alone(partitions: Sequence[int]) -> list[list[int]]:
    """The default cohort rule: every client by itself."""
    return [[partition] for partition in partitions]


def node_of(partition: int) -> int:
    """The node id of a partition."""
    return partition + FIRST_NODE


def partition_of(node: int) -> int:
    """The partition id of a node."""
    return node - FIRST_NODE


def load_client_app(reference: str) -> ClientApp:
    """Import "module:attribute"; raises InputError where that is no `flwr.clientapp.ClientApp`."""
    module, _, attribute = reference.partition(":")
    try:
        app = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"client app {reference!r} cannot be imported as 'module:attribute': {error}") from error
    if not isinstance(app, ClientApp):
        raise InputError(f"client app {reference!r} is a {type(app).__name__}, expected a flwr.clientapp.ClientApp")
    return app


def thread_environment(threads: int) -> dict[str, str]:
    """The variables from which numeric libraries, as they are loaded, learn how many threads to compute with."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))


def limit_threads(threads: int) -> None:
    """Compute with so many threads: in torch if it is loaded, and in whatever numeric library is loaded later."""
    os.environ.update(thread_environment(threads))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Job:
    """Messages that one call executes, in partition order: a cohort to train, or one message of any other type."""

    messages: tuple[Message, ...]
    deaths: int = 0  # workers that died over it

    @property
    def partitions(self) -> list[int]:
        """Whom the messages are for."""
        return [partition_of(message.metadata.dst_node_id) for message in self.messages]

    @property
    def message_ids(self) -> list[str]:
        """What the replies will refer to."""
        return [message.metadata.message_id for message in self.messages]

    def __str__(self) -> str:
        """For the log: 'train of clients 3, 5'."""
        plural = "s" if len(self.messages) > 1 else ""
        return f"{self.messages[0].metadata.message_type} of client{plural} {', '.join(map(str, self.partitions))}"


@dataclass(frozen=True)
class Outcome:
    """What a call leaves of one client: its reply, and its state (None: the one it had before)."""

    reply: Message
    state: RecordDict | None = None


def failure(message: Message, reason: str, code: int = CLIENT_RAISED) -> Outcome:
    """An error reply; the client's state stays as it was."""
    return Outcome(Message(Error(code, reason), reply_to=message))


def describe(error: BaseException) -> str:
    """One line 'TypeName: text', as far as it is a line, then the innermost frames of the traceback."""
    frames = traceback.format_tb(error.__traceback__)[-TRACEBACK_FRAMES:]
    try:
        text = str(error)
    except Exception:  # a client's own exception may be as broken as the client
        text = "(its text cannot be shown)"
    return f"{harmless(f'{type(error).__name__}: {text}', LONGEST_TEXT)}\n{''.join(frames)}".rstrip()


@dataclass(frozen=True)
class Clients:
    """The clients of a run in one process: nothing is kept of a client between two calls."""

    app: ClientApp
    num_clients: int
    run_config: UserConfig

    def execute(self, job: Job, states: Mapping[int, RecordDict]) -> tuple[list[Outcome], list[str]]:
        """Execute a job: an outcome for each message, in order, and warnings for the log.

        A client that raises gets an error reply. Where a cohort raises, its clients are tried one by one, so that only
        the culprit fails.
        """
        warnings = []
        if len(job.messages) > 1 and self._takes_cohorts(job.messages[0]):
            try:
                return self._call(job, states), []
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a client may raise what it likes
                warnings.append(f"{job} failed together, each client is tried alone: {describe(error)}")
        return [self._alone(Job((message,)), states) for message in job.messages], warnings

    def _alone(self, job: Job, states: Mapping[int, RecordDict]) -> Outcome:
        try:
            return self._call(job, states)[0]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return failure(job.messages[0], describe(error))

    def _call(self, job: Job, states: Mapping[int, RecordDict]) -> list[Outcome]:
        messages = [_own_copy(message) for message in job.messages]
        contexts = [self._context(partition, states.get(partition)) for partition in job.partitions]
        if self._takes_cohorts(messages[0]):
            replies = self.app.run_cohort(messages, contexts)  # type: ignore[attr-defined]
        else:
            replies = [self.app(messages[0], contexts[0])]
        if [_answered(reply) for reply in replies] != job.message_ids:
            raise TypeError(f"expected one reply to each of {len(messages)} messages, in order; the app gave others")
        return [Outcome(reply, context.state) for reply, context in zip(replies, contexts, strict=True)]

    def _takes_cohorts(self, message: Message) -> bool:
        return message.metadata.message_type == COHORT_TYPE and hasattr(self.app, "run_cohort")

    def _context(self, partition: int, state: RecordDict | None) -> Context:
        return Context(
            run_id=RUN_ID,
            node_id=node_of(partition),
            node_config={"partition-id": partition, "num-partitions": self.num_clients},
            state=_copy_records(state or RecordDict()),
            run_config=dict(self.run_config),
        )


def _answered(reply: object) -> str:
    """The id of the message that this is a reply to."""
    if not isinstance(reply, Message):
        raise TypeError(f"the client app returned a {type(reply).__name__}, expected a flwr.app.Message")
    return reply.metadata.reply_to_message_id


def _own_copy(message: Message) -> Message:
    """A message that a client may change at will: the messages of a round share one content."""
    own = copy.copy(message)
    own.content = _copy_records(message.content)
    return own


def _copy_records(records: RecordDict) -> RecordDict:
    """New records around the same arrays and values."""
    return RecordDict({name: record.copy() for name, record in records.items()})


class Engine(Grid):
    """The driver's half of a grid: messages in, jobs queued, replies out; a subclass gets the jobs done.

    Nodes are a plain range, and a client without a message costs nothing. `client_states` holds the `Context.state` of
    those clients that have one, by partition id. `restarts` counts replaced workers. Of a push's replies, about
    `reply_bytes` of arrays are held in memory; what is more is read from disk when it is asked for.
    """

    name: ClassVar[str]
    workers: int
    threads: int
    reply_bytes = REPLY_BYTES

    def __init__(self, num_clients: int, cohorts: CohortRule | None, spill: Path | None = None) -> None:
        """A grid of `num_clients` nodes whose train messages are cut into `cohorts` (default: each client alone).

        spill: where replies go that are too many for the memory; None: the system's temporary files.
        """
        identify_process()
        self.num_clients = num_clients
        self.client_states: dict[int, RecordDict] = {}
        self.restarts = 0
        self._cohorts = cohorts or each_alone
        self._run = empty_run()
        self._ids = itertools.count(1)
        self._queue: deque[Job] = deque()
        self._expected: set[str] = set()  # ids of the messages that may still be answered
        self._replies: dict[str, Message] = {}
        self._spill_folder = spill
        self._spill = Spill(spill, self.reply_bytes)

    @abstractmethod
    def close(self) -> None:
        """Drop what is queued and give back what the engine holds; at any moment, and more than once."""

    @abstractmethod
    def _advance(self) -> None:
        """Get on with the queue: finish a job, or wait a moment for one."""

    def __enter__(self) -> Self:
        """Closes itself at the end of a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def set_run(self, run: Run) -> None:
        """Set what `run` reports; nothing else depends on it."""
        self._run = run

    @property
    def run(self) -> Run:
        """What Flower knows of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message (deprecated by Flower in favour of `Message(...)`)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """All nodes, in partition order."""
        return range(node_of(0), node_of(self.num_clients))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their ids, in the order given, at once.

        Jobs are cut in partition order; neither the order given nor the number of workers matters. Raises ValueError
        for an unknown node, for two train messages to one client, and for a cohort rule that loses or repeats one.
        """
        pushed = list(messages)
        nodes = self.get_node_ids()
        for message in pushed:
            if message.metadata.dst_node_id not in nodes:
                raise ValueError(f"no node {message.metadata.dst_node_id}: expected {nodes.start} to {nodes.stop - 1}")
        ids = [str(next(self._ids)) for _ in pushed]
        for message, message_id in zip(pushed, ids, strict=True):
            set_message_id(message, message_id)
        self._queue.extend(_cut(pushed, self._cohorts))
        self._expected.update(ids)
        self._spill = Spill(self._spill_folder, self.reply_bytes)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready, each handed out once; where one is missing, some work is done first."""
        wanted = list(message_ids)
        if not self._replies.keys() >= set(wanted):
            self._advance()
        return [self._replies.pop(message_id) for message_id in wanted if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, and wait for the replies, sorted by node; those missing after `timeout` seconds are given up."""
        deadline = None if timeout is None else time.monotonic() + timeout
        missing = set(self.push_messages(messages))
        replies: list[Message] = []
        while missing and (deadline is None or time.monotonic() < deadline):
            ready = self.pull_messages(missing)
            missing -= {reply.metadata.reply_to_message_id for reply in ready}
            replies += ready
        if missing:
            self._give_up(missing)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def _states(self, job: Job) -> dict[int, RecordDict]:
        states = self.client_states
        return {partition: states[partition] for partition in job.partitions if partition in states}

    def _finish(self, job: Job, outcomes: Sequence[Outcome], warnings: Sequence[str] = ()) -> None:
        for warning in warnings:
            log.warning("%s", warning)
        for message_id, partition, outcome in zip(job.message_ids, job.partitions, outcomes, strict=True):
            if message_id not in self._expected:
                continue  # given up: as if it had never been sent
            self._expected.remove(message_id)
            set_message_id(outcome.reply, f"{message_id}-reply")
            self._spill.keep(outcome.reply)
            self._replies[message_id] = outcome.reply
            if outcome.state:
                self.client_states[partition] = outcome.state
            elif outcome.state is not None:
                self.client_states.pop(partition, None)

    def _is_expected(self, job: Job) -> bool:
        return not self._expected.isdisjoint(job.message_ids)

    def _give_up(self, message_ids: set[str]) -> None:
        self._expected -= message_ids
        self._queue = deque(job for job in self._queue if self._is_expected(job))


def _cut(messages: Iterable[Message], cohorts: CohortRule) -> list[Job]:
    """Jobs: first the cohorts, as the rule lists them, then the messages of other types, in partition order."""
    ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    train = [message for message in ordered if message.metadata.message_type == COHORT_TYPE]
    others = [message for message in ordered if message.metadata.message_type != COHORT_TYPE]
    by_partition = {partition_of(message.metadata.dst_node_id): message for message in train}
    if len(by_partition) < len(train):
        raise ValueError("a client got two train messages in one push: push them one after the other")
    cut = cohorts(list(by_partition)) if train else []
    if sorted(itertools.chain.from_iterable(cut)) != list(by_partition):
        raise ValueError(f"a cohort rule must place each of clients {list(by_partition)} exactly once, it gave {cut}")
    together = [Job(tuple(by_partition[partition] for partition in sorted(cohort))) for cohort in cut if cohort]
    return together + [Job((message,)) for message in others]
