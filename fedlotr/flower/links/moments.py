"""What becomes of a client's optimizer between rounds: `--optimizer-state reset|keep|mean-v`.

keep: the client's own moments, and how many steps they are averages of, stay in its state. mean-v: of every trained
tensor one number travels, the mean of AdamW's second moments, and all entries start the next round from the mean of
those; Liu et al. 2025, "FedAdamW" (arXiv:2510.27486), of which this is the part that concerns the moments.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from typing_extensions import override

from fedlotr.flower.federation import Federation
from fedlotr.flower.link import Draft, Job, Link, LinkTraits, Refused, Reply, Turn
from fedlotr.flower.reading import value
from fedlotr.flower.records import Arrays, to_arrays, to_record, to_tensors
from fedlotr.flower.workplace import Workplace
from fedlotr.training.model import Tensors, TrainableModel
from fedlotr.training.optimizers import State

MOMENTS = "moments"
"""The record: in a client's state all that its optimizer holds, in messages and replies (2,) a tensor: the mean of v,
and the weight that AdamW corrects it by."""
KEPT_APART = "/"
"""Between the kind of a moment and the name of its tensor, in a client's state."""


class Moments(Link):
    """The means of v on the server; on the client what its optimizer goes on from."""

    name = "moments"
    traits = LinkTraits(keeps_client_state=True)

    def __init__(self, choice: str) -> None:
        self.choice = choice
        self.means: Arrays = {}
        """By tensor the mean of AdamW's second moments, and the weight it is corrected by."""

    @classmethod
    @override
    def at_server(cls, run: Federation) -> Self | None:
        return cls("mean-v") if run.mean_moments else None

    @classmethod
    @override
    def at_client(cls, workplace: Workplace, model: TrainableModel) -> Self | None:
        choice = workplace.recipe.training.optimizer_state
        return None if choice == "reset" else cls(choice)

    @override
    def begin(self, turn: Turn) -> None:
        super().begin(turn)
        self._record = to_record({name: pair.astype(np.float32) for name, pair in self.means.items()})
        self._expected = ArrayRecord({name: Array(np.zeros(2, np.float32)) for name in turn.moved})

    @override
    def outgoing(self, draft: Draft) -> None:
        if self.means:
            draft.records[MOMENTS] = self._record

    @override
    def expects(self, client: int) -> Mapping[str, ArrayRecord]:
        return {MOMENTS: self._expected}

    @override
    def verify(self, reply: Reply) -> None:
        """No square is negative, and weights sum to at most 1."""
        for name, array in reply.records[MOMENTS].items():
            square, weight = value(array).tolist()
            if square < 0 or not 0 < weight <= 1:
                wanted = "a number of 0 or more and a weight above 0, at most 1"
                raise Refused("moments", f"its moments of {name} are {square:g} and {weight:g}, expected {wanted}")

    @override
    def commit(self, good: Sequence[Reply]) -> None:
        """Σ p_i of what the replies have, weighted as their updates; what did not move stays."""
        weights = np.array([reply.weight for reply in good])
        pairs: list[Mapping[str, Any]] = [to_arrays(reply.records[MOMENTS]) for reply in good]
        means = {name: np.average([one[name] for one in pairs], axis=0, weights=weights) for name in pairs[0]}
        self.means = {**self.means, **means}

    @override
    def state(self) -> Mapping[str, Any]:
        return {"means": dict(self.means)}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        self.means = dict(state["means"])

    @override
    def start(self, job: Job, values: Tensors) -> None:
        if self.choice == "keep" and MOMENTS in job.memory:
            found: State = {}
            for key, kept in to_tensors(job.memory[MOMENTS]).items():
                kind, _, name = key.partition(KEPT_APART)
                found.setdefault(kind, {})[name] = kept
            job.optimizer = found
        if self.choice == "mean-v" and MOMENTS in job.records:
            means = {name: pair for name, pair in to_tensors(job.records[MOMENTS]).items() if name in values}
            job.optimizer = {
                "square": {name: torch.full_like(values[name], float(pair[0])) for name, pair in means.items()},
                "weight": {
                    name: torch.tensor([0.0, float(pair[1])], dtype=torch.float64) for name, pair in means.items()
                },
            }

    @override
    def send(self, job: Job) -> None:
        held = job.trained.optimizer
        if self.choice == "keep":
            flat = {
                f"{kind}{KEPT_APART}{name}": kept for kind, by_name in held.items() for name, kept in by_name.items()
            }
            before = dict(job.memory[MOMENTS].items()) if MOMENTS in job.memory else {}
            # Of a factor that did not move in this round, the moments stay.
            job.memory[MOMENTS] = ArrayRecord({**before, **to_record(flat)})
        if self.choice == "mean-v":
            square, weight = held["square"], held["weight"]
            pairs = {
                name: torch.stack([square[name].double().mean(), weight[name][1]]).float()
                for name in job.trained.tensors
            }
            job.beside[MOMENTS] = to_record(pairs)
