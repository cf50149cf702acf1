"""What the engines share: addresses, jobs, how a process executes one, and the driver's half of Flower's `Grid`."""

import itertools
import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Self
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlotr.engines.clients import COHORT_TYPE, Job, Outcome, node_of, partition_of
from fedlotr.flower.lazy import REPLY_BYTES, Spill
from fedlotr.flower.private import Run, empty_run, identify_process, set_message_id

log = logging.getLogger("fedlotr.engines")


CohortRule = Callable[[Sequence[int]], list[list[int]]]
"""Cuts the sorted partition ids of one push into cohorts: disjoint, covering, and decided by these ids alone."""


def each_alone(partitions: Sequence[int]) -> list[list[int]]:
    """The default cohort rule: every client by itself."""
    return [[partition] for partition in partitions]


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
        ids = [str(uuid4()) for _ in pushed]  # of no other start of the run either
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
