"""The carried term between server and clients: what a strategy adds to it, and the records by which clients follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from typing_extensions import override

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.flower.certificate import Layer, Matrix, Product
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Draft, Job, Link, LinkTraits, Refused, Reply, Turn
from fedlotr.flower.records import Arrays, arrays_sha256, to_record, to_tensors
from fedlotr.flower.serialize import unpack
from fedlotr.flower.workplace import Workplace
from fedlotr.training.model import TrainableModel

PARTS, STATE = "carry", "carry-state"
"""Records of a message: the parts that a client missed, and what it must then have."""
SAYS = "carry-sha256"
"""By which a client says beside what it has computed."""


class CarriedTerm(Link):
    """What the server has merged into the model, and which client has which version of it."""

    name = "carry"
    traits = LinkTraits(in_evaluation=True)
    says = frozenset({SAYS})

    def __init__(self, carry: Carry, workplace: Workplace | None = None, model: TrainableModel | None = None) -> None:
        self.carry = carry
        self._workplace, self._model, self._sha256 = workplace, model, ""
        self.holds: dict[int, int] = {}
        """Client -> the version that it has; a client that is not named has version 0."""

    @classmethod
    @override
    def at_server(cls, run: Federation) -> "CarriedTerm":
        return CarriedTerm(run.carried)

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> "CarriedTerm":
        return CarriedTerm(model.carried, workplace, model)

    @override
    def begin(self, turn: Turn) -> None:
        super().begin(turn)
        self._after, self._records = self.carry, dict[int, dict[str, Any]]()

    @override
    def outgoing(self, draft: Draft) -> None:
        since = self.holds.get(draft.client, 0)
        if since not in self._records:
            self._records[since] = self.records(since)
        draft.records.update(self._records[since])

    def records(self, since: int) -> dict[str, Any]:
        """For one who has version `since`; none where nothing has been added yet."""
        return carry_records(self.carry, since)

    def newest(self) -> dict[str, Any]:
        """For whoever has the version before this one, as all workers have."""
        return self.records(max(self.carry.version - 1, 0))

    @override
    def verify(self, reply: Reply) -> None:
        expected = self.carry.sha256 if self.carry.version else ""
        found = str(reply.identity.get(SAYS, ""))
        if found != expected:
            raise Refused(
                "another carried term",
                f"it trained beside another carried term (SHA-256 {found[:12] or 'none'}, expected {expected[:12]})",
            )

    def merge(self, added: Mapping[str, Product]) -> Carry:
        """What the model carries once the round counts. Raises ValueError where float32 has no room for it."""
        self._after = merged(self.carry, added)
        return self._after

    @override
    def commit(self, good: Sequence[Reply]) -> None:
        self.holds |= {reply.client: self.carry.version for reply in good}
        self.carry = self._after

    @override
    def state(self) -> Mapping[str, Any]:
        """Nothing of version 0, which the adapter that the run starts from has."""
        if not self.carry.version:
            return {}
        tensors, about = self.carry.saved()
        parts = {name: tensor.numpy() for name, tensor in tensors.items()}
        return {"about": about, "parts": parts, "holds": self.holds}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        if state:
            parts = {name: torch.from_numpy(array) for name, array in state["parts"].items()}
            self.carry, self.holds = Carry.restored(parts, state["about"]), dict(state["holds"])

    @override
    def receive(self, job: Job) -> None:
        """Bring the carried term to the version of a message; what it brings is used as far as it is not here yet.

        Raises RuntimeError where it is missing parts that this client never had.
        """
        if STATE not in job.records or self._workplace is None or self._model is None:
            return
        state, here = job.records[STATE], self._model.carried
        version, since = int(state["version"]), int(state["since"])
        if here.version != version:
            if not since <= here.version < version or self._workplace.has_carry(version):
                found = self._workplace.load_carry(since, version)
                if found is None:
                    raise RuntimeError(f"the carried term of version {since}, which this message goes on from, is lost")
                here = found
            if here.version < version:
                here = here.caught_up(version, parts_of(job.records))
            self._model.carry(here)
            self._sha256 = here.sha256
            self._workplace.save_carry(here)

    @override
    def send(self, job: Job) -> None:
        if self._sha256:
            job.identity[SAYS] = self._sha256


def carried_in(links: Mapping[str, Any], arrays: Mapping[str, Any], start: Carry) -> Carry:
    """The carried term in a checkpoint's links and arrays. start: version 0, which no checkpoint holds."""
    link = CarriedTerm(start)
    link.load_state(unpack(links.get(link.name, {}), arrays))
    return link.carry


def additions(carry: Mapping[str, Product], layers: Sequence[Layer], start: Arrays) -> dict[str, Product]:
    """What a strategy adds to the carried term in this round, scaled, in float64.

    Raises ValueError for what cannot be added: another layer, another shape, numbers that are not finite.
    """
    by_name = {layer.name: layer for layer in layers}
    found: dict[str, Product] = {}
    for name, (left, right) in carry.items():
        if name not in by_name:
            raise ValueError(f"it carries {name}, expected an adapted layer such as {next(iter(by_name), '(none)')}")
        d_out, d_in = _shape(by_name[name], start)
        k = left.shape[-1]
        if left.shape != (d_out, k) or right.shape != (k, d_in):
            raise ValueError(f"it carries {left.shape} times {right.shape} in {name}, expected {(d_out, d_in)} in all")
        if not np.isfinite(left).all() or not np.isfinite(right).all():
            raise ValueError(f"it carries values in {name} that are not finite")
        if k:
            found[name] = Product(by_name[name].scale * left.astype(np.float64), right.astype(np.float64))
    return found


def _shape(layer: Layer, arrays: Arrays) -> tuple[int, int]:
    """(d_out, d_in)."""
    if "D" in layer.trained:
        d_out, d_in = arrays[layer.trained["D"]].shape
        return d_out, d_in
    a = layer.A if layer.A is not None else arrays[layer.trained["A"]]
    b = layer.B if layer.B is not None else arrays[layer.trained["B"]]
    return len(b), a.shape[1]


def merged(carry: Carry, added: Mapping[str, Product]) -> Carry:
    """The carried term with the additions, in float32. Raises ValueError where that has no room for them."""
    if not added:
        return carry
    with np.errstate(over="ignore"):
        pairs = {name: Factors(_float32(right), _float32(left)) for name, (left, right) in sorted(added.items())}
    after = carry.grown(pairs)
    for name in added:
        if not all(torch.isfinite(tensor).all() for tensor in after.terms[name].tensors()):
            raise ValueError(f"what it carries in {name} is past what float32 has room for")
    return after


def lost(before: Carry, after: Carry, added: Mapping[str, Product], layer: str) -> Product | Matrix | None:
    """How far the carried term's change in a layer is from what was to be added: as a product, or as a matrix."""
    if layer not in added:
        return None
    left, right = added[layer]
    if (term := after.terms[layer]).dense is None:
        v, u = (factor.double().numpy() for factor in term.parts[-1].pair)
        return Product(np.concatenate([u, -left], axis=1), np.concatenate([v, right], axis=0))
    change = term.matrix() - (before.terms[layer].matrix() if layer in before.terms else 0)
    return np.asarray(change.numpy() - left @ right)


def _float32(matrix: Matrix) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix, np.float32))


def carry_records(carry: Carry, since: int) -> dict[str, Any]:
    """The records for one who has version `since`; none where nothing has been added yet."""
    if not carry.version:
        return {}
    state: dict[str, Any] = {"version": carry.version, "since": since, "sha256": bytes.fromhex(carry.sha256)}
    records: dict[str, Any] = {STATE: ConfigRecord(state)}
    if missed := carry.missed(since):
        records[PARTS] = to_record(missed)
    return records


def parts_of(content: Any) -> dict[str, torch.Tensor]:
    """The parts that a message brings."""
    return to_tensors(content[PARTS]) if PARTS in content else {}


def model_sha256(arrays: ArrayRecord, carry: Carry) -> str:
    """Fingerprint of a trained model: of its tensors in key order, with the carried term's where there is one."""
    if not carry.version:
        return arrays_sha256(arrays)
    matrices = {
        f"{PARTS}.{name}.{side}": factor
        for name, term in carry.terms.items()
        for side, factor in zip("W" if term.dense is not None else "VU", term.tensors(), strict=True)
    }
    return arrays_sha256(ArrayRecord({**arrays, **to_record(matrices)}))
