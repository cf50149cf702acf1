"""The chain of links, built in one place: what happens to an update on its way, in order, on either side."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, TypeVar, cast

import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedlotr.errors import InputError
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Cohort, Draft, Job, Link, Refused, Reply, Turn
from fedlotr.flower.links.attacks import Attacks
from fedlotr.flower.links.bases import Bases
from fedlotr.flower.links.codec import Codec
from fedlotr.flower.links.draws import Draws
from fedlotr.flower.links.first_loss import FirstLoss
from fedlotr.flower.links.hidden import HiddenClients
from fedlotr.flower.links.moments import Moments
from fedlotr.flower.links.moving import Moving
from fedlotr.flower.links.objectives import Objectives
from fedlotr.flower.links.personal import Personal
from fedlotr.flower.links.ranks import Ranks
from fedlotr.flower.plugins import load_class
from fedlotr.flower.records import ASKS
from fedlotr.flower.serialize import pack, unpack
from fedlotr.flower.workplace import Workplace
from fedlotr.reporting.documents import OfLinks
from fedlotr.training.cohort import GradientTransform
from fedlotr.training.corrections import chain as one_after_the_other
from fedlotr.training.model import Tensors, TrainableModel

LINKS: tuple[type[Link], ...] = (
    *(Personal, FirstLoss, Objectives, Moments, Moving, Bases, Ranks, Draws, HiddenClients, Attacks, Codec),
)
"""In the order in which a side goes through them before it sends; what arrives meets them in the reverse."""
GROUP = "fedlotr.links"
"""Entry point group in which packages announce links."""
SAVED = "link"
"""What the names of a checkpoint's arrays begin with that are a link's."""

One = TypeVar("One", bound=Link)


def link_classes(added: Sequence[str]) -> list[type[Link]]:
    """Ours, with a user's where their traits say. added: module:Class, file.py:Class or entry points' names.

    Raises InputError for one that cannot be found, has no name of its own, or stands before no link of ours.
    """
    found, announced = list(LINKS), {point.name: point for point in entry_points(group=GROUP)} if added else {}
    for name in added:
        kind: type[Link] = load_class(name, "--add-link", "link", announced, Link, "fedlotr.flower.Link")
        names = [link.name for link in found]
        if not isinstance(own := getattr(kind, "name", None), str) or own in names:
            raise InputError(f"--add-link {name}: its name is {own!r}; expected one that is none of {names}")
        if kind.traits.before not in names:
            raise InputError(f"--add-link {name}: it stands before {kind.traits.before!r}; expected one of {names}")
        found.insert(names.index(kind.traits.before), kind)
    return found


class Chain(Sequence[Link]):
    """The links of one side of a run, in order."""

    def __init__(self, links: Iterable[Link | None]) -> None:
        self._links = [link for link in links if link is not None]

    @classmethod
    def at_server(cls, run: Federation) -> "Chain":
        """The server's."""
        return cls(kind.at_server(run) for kind in link_classes(run.links))

    @classmethod
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> "Chain":
        """A worker's."""
        return cls(kind.at_client(workplace, model) for kind in link_classes(workplace.recipe.links))

    def __getitem__(self, at: Any) -> Any:
        return self._links[at]

    def __len__(self) -> int:
        return len(self._links)

    def of(self, kind: type[One]) -> One | None:
        """The link of a kind, where the run has it."""
        return next((link for link in self._links if isinstance(link, kind)), None)

    def the(self, kind: type[One]) -> One:
        """The link of a kind that every run has."""
        found = self.of(kind)
        assert found is not None
        return found

    # On the server.

    def before(self, number: int, arrays: ArrayRecord) -> ArrayRecord:
        """The model's tensors as a round begins with them."""
        for link in self._links:
            arrays = link.before(number, arrays)
        return arrays

    def outgoing(self, turn: Turn, messages: Sequence[Message], nodes: Mapping[int, int]) -> list[Draft]:
        """A round begins: what each client is sent, by client. nodes: node id -> client."""
        for link in self._links:
            link.begin(turn)
        drafts = [
            Draft(client=nodes[message.metadata.dst_node_id], message=message, records=dict(message.content.items()))
            for message in messages
        ]
        for link in self._links:
            for draft in drafts:
                link.outgoing(draft)
        return sorted(drafts, key=lambda draft: draft.client)

    def again(self, draft: Draft, reply: Message | None) -> Message | None:
        """The message that a client is sent once more since its reply asks for it; None: it does not, or may not."""
        if reply is None or not reply.has_content() or ASKS not in reply.content:
            return None
        asked = cast(ConfigRecord, reply.content[ASKS])
        try:
            (link,) = (link for link in self._links if link.name == asked["link"])
            draft.records |= link.again(draft, asked)
        except (Refused, KeyError, TypeError, ValueError):
            return None  # it has not trained, and fails
        about = draft.message.metadata
        draft.message = Message(
            RecordDict(draft.records), dst_node_id=about.dst_node_id, message_type=about.message_type, ttl=about.ttl
        )
        return draft.message

    def arrived(self, client: int, records: dict[str, Any]) -> None:
        """Undo what the way up did to a reply's records. Raises Refused."""
        for link in reversed(self._links):
            link.arrived(client, records)

    def expects(self, client: int) -> dict[str, ArrayRecord]:
        """Records that a reply must have besides its trained tensors."""
        return {name: record for link in self._links for name, record in link.expects(client).items()}

    @property
    def says(self) -> frozenset[str]:
        """What a reply's record `client` may say besides who it is."""
        return frozenset[str]().union(*(link.says for link in self._links))

    def verify(self, reply: Reply) -> None:
        """Raises Refused for a reply that is well formed and yet wrong."""
        for link in self._links:
            link.verify(reply)

    def incoming(self, replies: list[Reply]) -> None:
        """Bring checked replies to what strategies see."""
        for link in reversed(self._links):
            for reply in replies:
                link.incoming(reply)

    def gather(self, replies: list[Reply]) -> list[Reply]:
        """What strategies see of all of them together."""
        for link in reversed(self._links):
            replies = link.gather(replies)
        return replies

    def commit(self, good: Sequence[Reply]) -> None:
        """The round counts."""
        for link in self._links:
            link.commit(good)

    def row(self) -> OfLinks:
        """What the links add to the round's row of metrics.jsonl."""
        return cast(OfLinks, {name: value for link in self._links for name, value in link.row().items()})

    def save(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """(JSON by link, arrays) of a checkpoint."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        return {link.name: pack(dict(link.state()), arrays, f"{SAVED}.{link.name}") for link in self._links}, arrays

    def load(
        self, saved: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]], memories: Mapping[int, Any]
    ) -> None:
        """Take back what `save` gave. memories: what the clients kept."""
        for link in self._links:
            if link.name in saved:
                link.load_state(unpack(saved[link.name], arrays))
            link.recall(memories)

    # On a client.

    @property
    def understands(self) -> frozenset[str]:
        """Keys of a train message's config that a link acts on."""
        return frozenset[str]().union(*(link.understands for link in self._links))

    def receive(self, job: Job, *, in_evaluation: bool = False) -> None:
        """Read a message; of one by which the model is scored, what concerns that."""
        for link in reversed(self._links):
            if link.traits.in_evaluation or not in_evaluation:
                link.receive(job)

    def alike(self, job: Job) -> tuple[Any, ...]:
        """What must agree where clients train together, besides tensors and config."""
        return tuple(link.alike(job) for link in self._links)

    def start(self, job: Job, values: Tensors) -> None:
        """A client is about to train from these values."""
        for link in self._links:
            link.start(job, values)

    def gradient(self, cohort: Cohort) -> GradientTransform | None:
        """What the links do to the gradients of a cohort, in order; None where that is nothing."""
        found = [link.gradient(cohort) for link in self._links]
        return one_after_the_other([transform for transform in found if transform is not None])

    def send(self, job: Job) -> None:
        """Put together what goes up."""
        for link in self._links:
            link.send(job)


def in_words(run: Federation, workplace: Workplace, model: TrainableModel) -> str:
    """The links of a run in order, on whichever side they stand: for its header."""
    kinds = link_classes(run.links)
    links = (kind.at_server(run) or kind.at_client(workplace, model) for kind in kinds)
    return ", ".join(filter(None, (link.in_words() for link in links if link is not None)))


def post(drafts: Iterable[Draft]) -> list[Message]:
    """The messages, with what the links made of them."""
    for draft in drafts:
        draft.message.content = RecordDict(draft.records)
    return [draft.message for draft in drafts]
