"""What hostile clients do to their updates (`--attack`), and who they are; the server has no part in it.

A client's change is multiplied by a factor before it is coded, so that what goes up, and is counted, clipped and
averaged, is the hostile update: -1 turns it round; with the number of a round's clients it takes the mean's place, as
far as the others stay where they are (Bagdasaryan et al. 2020, arXiv:1807.00459, equation 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from typing_extensions import override

from fedlotr.communication.attacks import Attack, counts
from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Job, Link
from fedlotr.flower.records import ARRAYS, to_tensors
from fedlotr.flower.workplace import Workplace
from fedlotr.streams import generator
from fedlotr.training.model import TrainableModel


def hostile_clients(attacks: Sequence[Attack], clients: int, seed: int) -> dict[int, Attack]:
    """Client -> what it does, of those that are hostile, in the order of their numbers."""
    order = generator(seed, "hostile clients").permutation(clients).tolist()
    each = [attack for attack, count in zip(attacks, counts(attacks, clients), strict=True) for _ in range(count)]
    return dict(sorted(zip(order, each, strict=False)))


def multiplied(
    tensors: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], factor: float
) -> dict[str, torch.Tensor]:
    """start + factor (trained - start), in float64 and rounded to the tensors' own numbers."""
    found = {}
    for name, trained in tensors.items():
        begun = start[name].double()
        found[name] = (begun + factor * (trained.double() - begun)).to(trained.dtype)
    return found


class Attacks(Link):
    """factors: of hostile clients, what their changes are multiplied by."""

    name = "attacks"

    def __init__(self, factors: Mapping[int, float]) -> None:
        self._factors = factors

    @classmethod
    @override
    def at_server(cls, run: Federation) -> None:
        return None  # a hostile update is to it one as any other

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self | None:
        factors = workplace.recipe.factors
        return cls({int(client): factor for client, factor in factors.items()}) if factors else None

    @override
    def send(self, job: Job) -> None:
        factor = self._factors.get(job.client)
        if factor is not None:
            start = to_tensors(job.records[ARRAYS])
            job.result = replace(job.trained, tensors=multiplied(job.trained.tensors, start, factor))
