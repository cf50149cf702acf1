"""Jobs, and how a process that has loaded the client app executes one."""

import copy
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Context, Error, Message, MessageType, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from fedlotr.errors import InputError, harmless
from fedlotr.flower.private import CLIENT_RAISED, RUN_ID

log = logging.getLogger("fedlotr.engines")

FIRST_NODE = 100  # smaller ids are left to servers: an id says on sight whose it is
COHORT_TYPE = MessageType.TRAIN  # only plain "train" messages are cut into cohorts
TRACEBACK_FRAMES = 3  # in an error reply: enough to find the line, short enough for a log
LONGEST_TEXT = 2000  # characters of what an exception says


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
        messages = [own_copy(message) for message in job.messages]
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


def own_copy(message: Message) -> Message:
    """A message that a client may change at will: the messages of a round share one content."""
    own = copy.copy(message)
    own.content = _copy_records(message.content)
    return own


def _copy_records(records: RecordDict) -> RecordDict:
    """New records around the same arrays and values."""
    return RecordDict({name: record.copy() for name, record in records.items()})
