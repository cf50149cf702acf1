"""The frozen factors, to every client once: whole, or what they are made from again, a seed or the public rows."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from flwr.app import ArrayRecord, ConfigRecord
from typing_extensions import override

from fedlotr.adapters.bases import Factors, sha256
from fedlotr.adapters.tuner import bases_of, bases_sha256
from fedlotr.communication.basis_coding import decoded, shapes_of
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Draft, Job, Link, Refused, Reply
from fedlotr.flower.links.codec import coded_message
from fedlotr.flower.links.derived import PUBLIC, Derived, Offered, asked_for, public_rows
from fedlotr.flower.records import bases_from_record, to_record
from fedlotr.flower.workplace import Workplace, install_bases
from fedlotr.training.model import TrainableModel
from fedlotr.training.moving import begin

BASIS = "basis"
"""The record."""
SAYS = "bases-sha256"
"""By which a client says with what it has computed."""


class Bases(Link):
    """Who has received them, on the server; on the client whether what it has is what it was sent."""

    name = "bases"
    says = frozenset({SAYS})

    def __init__(
        self,
        basis: ArrayRecord | ConfigRecord | None,
        digest: str,
        derived: Derived | None = None,
        model: TrainableModel | None = None,
        workplace: Workplace | None = None,
    ) -> None:
        """basis: what newcomers are sent. digest: SHA-256 of the bases; on a client, of those in use."""
        self._basis, self.sha256, self._derived = basis, digest, derived
        self._model, self._workplace, self._made = model, workplace, False
        self._read: tuple[bytes | None, str] = None, ""
        """The message that was read last, and the bases that are in use since."""
        self.known: set[int] = set()
        """Clients that have received the bases."""

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self:
        return cls(run.basis, run.bases_sha256, run.derived)

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self:
        return cls(None, bases_sha256(model.module), None, model, workplace)

    @override
    def outgoing(self, draft: Draft) -> None:
        if draft.client in self.known:
            return
        if self._basis is not None:
            draft.records[BASIS] = self._basis
        if self._derived is not None:
            draft.records[PUBLIC] = self._derived.rows

    @override
    def again(self, draft: Draft, asked: ConfigRecord) -> dict[str, Any]:
        if self._derived is None or self._derived.first is None or BASIS not in draft.records:
            return super().again(draft, asked)
        draft.records.pop(PUBLIC, None)
        _, ties = asked_for(asked, 0, 0, len(self._derived.shapes))
        return {BASIS: to_record(self._derived.again(ties))}

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
        if self._basis is not None or self._derived is not None:  # a client that failed is sent them again
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
        brought, model, here = job.records.get(BASIS), self._model, self._workplace
        if model is None or here is None:
            return
        if PUBLIC in job.records:
            here.keep_public(public_rows(job.records[PUBLIC], causal=model.spec.kind == "causal-lm"))
        moves = bool(model.carried.bases)
        if not isinstance(brought, ArrayRecord) or (moves and model.carried.version):
            return
        message, coding = coded_message(brought), here.recipe.coding
        if message is not None and (message, self.sha256) == self._read:
            return  # what another client was sent
        if offer := Offered(brought):
            if self._made:
                return
            made = offer.settled(
                coding.basis, here.first_bases(offer.head), seed=here.recipe.seed, version=0, link=self.name
            )
            bases, self._made = {**made}, True
        elif message is None:
            bases = {name: Factors(*pair) for name, pair in bases_from_record(brought).items()}
        else:
            bases = {**decoded(coding.basis, message, shapes_of(bases_of(model.module)))}
        if sha256(list(bases.items())) != self.sha256:
            install_bases(model, bases)
            self.sha256 = bases_sha256(model.module)
            if moves:
                begin(model)
        self._read = message, self.sha256

    @override
    def send(self, job: Job) -> None:
        job.identity[SAYS] = self.sha256
