"""Client-level privacy: where clients are hidden a strategy sees one reply, which is the noised mean of all."""

from typing import Self

from typing_extensions import override

from fedlotr.flower.federation import Federation
from fedlotr.flower.lazy import Decoded
from fedlotr.flower.link import Link, Reply
from fedlotr.flower.records import to_arrays, to_record
from fedlotr.flower.workplace import Workplace
from fedlotr.privacy.guard import ClientGuard
from fedlotr.training.model import TrainableModel


class HiddenClients(Link):
    """Between the replies and whatever is made of them; see `privacy.guard.ClientGuard.mean`."""

    name = "noised mean of the clients"

    def __init__(self, guard: ClientGuard) -> None:
        self._guard = guard

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self | None:
        return cls(run.guard) if isinstance(run.guard, ClientGuard) else None

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self | None:
        return None

    @override
    def gather(self, replies: list[Reply]) -> list[Reply]:
        """One in place of all, also of none; without a loss, which would tell of the clients."""
        mean = self._guard.mean(to_arrays(self.turn.moved), [Decoded(reply.arrays) for reply in replies])
        return [Reply(client=0, arrays=to_record(mean), weight=1.0, examples=1)]
