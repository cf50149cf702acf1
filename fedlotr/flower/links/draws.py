"""Factors that clients draw by themselves, and so are not sent: FLoRA's A, each client's own in every round.

Wang et al. 2024 (arXiv:2409.05976): updates that are stacked add up to rank Σ r_i only where their A differ. A is drawn
from the run's seed, the round and the client, as LoRA draws it, and B begins at zero: the server knows them too.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord
from typing_extensions import override

from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Draft, Job, Link
from fedlotr.flower.records import ARRAYS, CONFIG, by_layer, to_record
from fedlotr.flower.workplace import Workplace
from fedlotr.streams import generator
from fedlotr.training.model import TrainableModel

OWN_FACTORS = "own-factors"
"""The key by which a strategy asks for it; in the message that crosses its value is the client's rank."""


def drawn(
    shapes: Mapping[str, tuple[int, ...]], seed: int, server_round: int, client: int
) -> dict[str, npt.NDArray[np.float32]]:
    """A ~ U(-1/√d_in, 1/√d_in) and B = 0 of a client, by tensor. shapes: (r, d_in) and (d_out, r), by tensor."""
    made: dict[str, npt.NDArray[np.float32]] = {}
    for layer, names in by_layer(shapes).items():
        shape = shapes[names["A"]]
        bound = shape[1] ** -0.5
        stream = generator(seed, "own factors", server_round, client, layer)
        made[names["A"]] = stream.uniform(-bound, bound, shape).astype(np.float32)
        made[names["B"]] = np.zeros(shapes[names["B"]], np.float32)
    return made


class Draws(Link):
    """A and B, left out of what is sent and drawn where it arrives, where the strategy asks for that."""

    name = "draws"
    understands = frozenset({OWN_FACTORS})

    def __init__(self, seed: int, model: TrainableModel | None = None) -> None:
        self._seed, self._model = seed, model

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self:
        return cls(run.seed)

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self:
        return cls(workplace.recipe.seed, model)

    @override
    def in_words(self) -> str:
        return ""  # whether there are any is the strategy's affair

    @override
    def outgoing(self, draft: Draft) -> None:
        config, arrays = draft.records.get(CONFIG), draft.records.get(ARRAYS)
        if not isinstance(config, ConfigRecord) or OWN_FACTORS not in config or not isinstance(arrays, ArrayRecord):
            return
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        own = drawn(shapes, self._seed, self.turn.number, draft.client)
        draft.meant = ArrayRecord({**arrays, **to_record(own)})
        draft.records[ARRAYS] = ArrayRecord({name: array for name, array in arrays.items() if name not in own})
        rank = min(shape[0] for name, shape in shapes.items() if name.endswith("core_A"))
        draft.records[CONFIG] = ConfigRecord({**config, OWN_FACTORS: rank})

    @override
    def receive(self, job: Job) -> None:
        rank: Any = job.records[CONFIG].get(OWN_FACTORS)
        if rank is None:
            return
        assert self._model is not None
        run = {name: tuple(tensor.shape) for name, tensor in self._model.values().items()}
        shapes = {
            names[side]: (rank, run[names[side]][1]) if side == "A" else (run[names[side]][0], rank)
            for names in by_layer(run).values()
            for side in "AB"
        }
        own = drawn(shapes, self._seed, job.round, job.client)
        job.records[ARRAYS] = ArrayRecord({**job.records[ARRAYS], **to_record(own)})
