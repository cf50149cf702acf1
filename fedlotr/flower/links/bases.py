"""The frozen factors: whole, or the seed that they are made from again, to every client once."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from flwr.app import ArrayRecord, ConfigRecord
from typing_extensions import override

from fedlotr.adapters.bases import sha256
from fedlotr.adapters.tuner import bases_sha256
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Draft, Job, Link, Refused, Reply
from fedlotr.flower.records import bases_from_record
from fedlotr.flower.workplace import Workplace, install_bases
from fedlotr.training.model import TrainableModel

BASIS = "basis"
"""The record."""
SAYS = "bases-sha256"
"""By which a client says with what it has computed."""


class Bases(Link):
    """Who has received them, on the server; on the client whether what it has is what it was sent."""

    name = "bases"
    says = frozenset({SAYS})

    def __init__(self, basis: ArrayRecord | ConfigRecord | None, digest: str, model: TrainableModel | None) -> None:
        """basis: what newcomers are sent. digest: SHA-256 of the bases; on a client, of those in use."""
        self._basis, self.sha256, self._model = basis, digest, model
        self.known: set[int] = set()
        """Clients that have received the bases."""

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self:
        return cls(run.basis, run.bases_sha256, None)

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self:
        return cls(None, bases_sha256(model.module), model)

    @override
    def outgoing(self, draft: Draft) -> None:
        if self._basis is not None and draft.client not in self.known:
            draft.records[BASIS] = self._basis

    @override
    def verify(self, reply: Reply) -> None:
        found = str(reply.identity.get(SAYS))
        if found != self.sha256:
            raise Refused(
                "other bases",
                f"it trained between other bases (SHA-256 {found[:12]}…, expected {self.sha256[:12]}…)",
            )

    @override
    def commit(self, good: Sequence[Reply]) -> None:
        if self._basis is not None:  # a client that failed is sent them again
            self.known |= {reply.client for reply in good}

    @override
    def state(self) -> Mapping[str, Any]:
        return {"known": sorted(self.known)}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        self.known = set(state["known"])

    @override
    def receive(self, job: Job) -> None:
        """Use the bases that a message brings, if they are not those in use; those made here come as a hash alone."""
        brought = job.records.get(BASIS)
        if isinstance(brought, ArrayRecord) and self._model is not None:
            bases = bases_from_record(brought)
            if sha256(list(bases.items())) != self.sha256:  # type: ignore[arg-type]
                install_bases(self._model, bases)
                self.sha256 = bases_sha256(self._model.module)

    @override
    def send(self, job: Job) -> None:
        job.identity[SAYS] = self.sha256
