"""A link: something that happens to an update on its way, with the server's side and the client's in one class.

The server runs the chain of links forth over what each client is sent (`outgoing`), back over what comes from it
(`arrived`, then `verify` and `incoming` around the check of replies), and lets links keep what they learnt once the
round counts (`commit`). A client runs it back over its message (`receive`), and forth over what goes up (`send`).
Each side has an object of its own for the whole run; what a class does not override does nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedlotr.flower.federation import Federation
from fedlotr.flower.workplace import Workplace
from fedlotr.training.cohort import ClientResult, GradientTransform
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.optimizers import State as OptimizerState


class Refused(Exception):  # noqa: N818 (it is what becomes of a reply, and no error of the program)
    """A reply that cannot be averaged. kind: a few words, for tables. reason: for the log."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Asks(Exception):  # noqa: N818 (nor is this an error: it is what a client says)
    """A client cannot begin without more. link: whose message it needs again; version, ties: of what."""

    def __init__(self, link: str, version: int, ties: Sequence[int]) -> None:
        super().__init__(f"it needs {len(ties)} pairs of bases {version}")
        self.link, self.version, self.ties = link, version, list(ties)


@dataclass(frozen=True, kw_only=True)
class LinkTraits:
    """keeps_client_state: whether a client keeps something for it between rounds, in its `memory`.

    before: the name of the link of ours that one of a user's stands before.
    in_evaluation: whether `receive` also reads the messages by which a model is scored.
    """

    keeps_client_state: bool = False
    before: str = "codec"
    in_evaluation: bool = False


@dataclass(kw_only=True)
class Turn:
    """A round as the links see it, on the server.

    moved: the tensors that clients send in it, in the run's shapes. fewer: client -> the rank that the strategy leaves
    it. controls: whether the strategy has control variates. asks: what it asks of clients besides training. part:
    (record, client) -> the client's part of it, as the link of the ranks cuts it.
    """

    number: int
    moved: ArrayRecord
    fewer: Mapping[int, int] = field(default_factory=dict)
    controls: bool = False
    asks: Mapping[str, float | bool] = field(default_factory=dict)
    part: Callable[[ArrayRecord, int], ArrayRecord] = lambda record, client: record

    def expected(self, client: int) -> ArrayRecord:
        """The tensors that a client is to send, in its own shapes."""
        return self.part(self.moved, client)


@dataclass(kw_only=True)
class Draft:
    """What one client is about to be sent: the strategy's message, whose records the links add to and replace.

    meant: the tensors, where what stands for them in the records is coded.
    """

    client: int
    message: Message
    records: dict[str, Any]
    meant: ArrayRecord | None = None


@dataclass(kw_only=True)
class Reply:
    """What one client came back with, checked.

    arrays: its trained tensors, decoded when they are asked for. weight: p_i before division. examples: it trained on.
    loss: its mean training loss; None where that would tell of examples. rank: of the leading block that it trained,
    where ranks differ. records: by name what else it sent, such as its change of control variates. staleness: server
    steps since the model that it was trained on.
    """

    client: int
    arrays: ArrayRecord
    weight: float
    examples: int
    loss: float | None = None
    rank: int | None = None
    staleness: int = 0
    records: dict[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    origin: Message | None = None


@dataclass(kw_only=True)
class Job:
    """A client's work in one round, on its side.

    records: its message's. memory: what it keeps between rounds (`Context.state`), to be changed in place. own: tensors
    that stay with it. optimizer: what its optimizer goes on from. row: its place in its `Cohort`. result: of its
    training. arrays: what goes up of that (default: the tensors as they are); beside: further records; identity: what
    it says of itself. failure: why nothing can go up; asks: what it needs first.
    """

    client: int
    records: dict[str, Any]
    memory: Any
    own: Tensors = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)
    row: int = 0
    result: ClientResult | None = None
    arrays: ArrayRecord | None = None
    beside: dict[str, ArrayRecord] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    asks: Asks | None = None

    @property
    def round(self) -> int:
        """Its number, from 1."""
        return int(self.records["config"]["server-round"])

    @property
    def trained(self) -> ClientResult:
        """Its result, once there is one."""
        assert self.result is not None
        return self.result


@dataclass(frozen=True)
class Cohort:
    """Clients that train together, in the order of their training: row j of what is stacked is client j's.

    content: of their train messages, which agree. states: what each keeps, to be changed in place. start: of what is
    the federation's the tensors that move in this round, (K, ...), or (1, ...) where all start alike; personal factors
    are no part of it.
    """

    content: Any
    states: Sequence[Any]
    start: Mapping[str, torch.Tensor]


class Link:
    """One link, on one side; see the module. A class whose `at_server` gives an object stands in the run's chain."""

    name: ClassVar[str]
    traits: ClassVar[LinkTraits] = LinkTraits()
    says: ClassVar[frozenset[str]] = frozenset()
    """What of a reply's record `client` is this link's to write."""
    understands: ClassVar[frozenset[str]] = frozenset()
    """Keys of a train message's config that it acts on."""
    turn: Turn

    @classmethod
    def at_server(cls, run: Federation) -> "Link | None":
        """The server's object for a run; None where the run has no use for it."""
        return cls()

    @classmethod
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> "Link | None":
        """A worker's object, which serves all the clients that it simulates; what is one client's is in its memory."""
        return cls()

    def in_words(self) -> str:
        """For the header of a run."""
        return self.name

    # The server's side.

    def before(self, number: int, arrays: ArrayRecord) -> ArrayRecord:
        """The model's tensors as a round begins with them, of those that the last one left."""
        return arrays

    def begin(self, turn: Turn) -> None:
        """A round begins; what an unfinished one left is forgotten."""
        self.turn = turn

    def outgoing(self, draft: Draft) -> None:
        """Add to what a client is sent, or replace it."""

    def again(self, draft: Draft, asked: ConfigRecord) -> dict[str, Any]:
        """What a client's message gets besides, or other than before, since it asked this link. Raises Refused."""
        raise Refused("records", f"it asks the link {self.name} for what that never sends")

    def arrived(self, client: int, records: dict[str, Any]) -> None:
        """Undo what the way up did to a reply's records, before they are checked. Raises Refused."""

    def expects(self, client: int) -> Mapping[str, ArrayRecord]:
        """Records that its reply must have for this link: of each the names, shapes and dtypes."""
        return {}

    def verify(self, reply: Reply) -> None:
        """Raises Refused for a reply that is well formed and yet wrong."""

    def incoming(self, reply: Reply) -> None:
        """Bring a checked reply to what strategies see."""

    def gather(self, replies: list[Reply]) -> list[Reply]:
        """What strategies see of all replies together."""
        return replies

    def commit(self, good: Sequence[Reply]) -> None:
        """The round counts: what was learnt in it becomes state of the run."""

    def row(self) -> dict[str, Any]:
        """What it adds to the round's row of metrics.jsonl."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint keeps: arrays and plain values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave, as a run is resumed."""

    def recall(self, memories: Mapping[int, Any]) -> None:
        """As a run is resumed: what of its clients' memories the server held too."""

    # The client's side.

    def receive(self, job: Job) -> None:
        """Read a message. Raises what makes this client fail, or `Asks` for what it lacks."""

    def alike(self, job: Job) -> Any:
        """What must agree, besides tensors and config, where clients train together; hashable."""
        return None

    def start(self, job: Job, values: Tensors) -> None:
        """The client is about to train, from these values."""

    def gradient(self, cohort: Cohort) -> GradientTransform | None:
        """What it does to the gradients of clients that train together."""
        return None

    def send(self, job: Job) -> None:
        """Put what goes up into the job. Raises what makes this client fail."""
