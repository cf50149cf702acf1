"""What a strategy may ask of its clients besides plain training, and what a client keeps for that between rounds.

A strategy asks by a key in the train message's config; `TERMS` says what the client then does. A term sees the cohort
as stacked tensors, gives a gradient transform, and when training is over what goes up beside the update; what it keeps
of a client goes into the client's own records, `Context.state`, which the engine stores and every checkpoint holds. The
server drops what a client kept in a round in which its reply was refused: its store is what averages were made of.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord
from typing_extensions import override

from fedlotr.flower.link import Cohort, Job, Link, LinkTraits
from fedlotr.flower.records import arrays_sha256, by_layer, to_record, to_tensors
from fedlotr.training.cohort import GradientTransform
from fedlotr.training.corrections import ControlVariates, chain, proximal
from fedlotr.training.model import Tensors
from fedlotr.training.penalties import tail_penalty

CONTROL = "control"
"""The record of control variates: c in a message, c_i in a client's state, its change in a reply."""


Report = Callable[[int], dict[str, ArrayRecord]]
"""Row -> records that go up beside that client's update; called once for each client after training."""


@dataclass(frozen=True)
class Term:
    """What one key asks, for one cohort."""

    transform: GradientTransform
    report: Report = lambda row: {}


def _proximal(cohort: Cohort) -> Term:
    """FedProx's, under the key that Flower's own FedProx sends."""
    return Term(proximal(float(cohort.content["config"][PROXIMAL]), cohort.start))


def _control_variates(cohort: Cohort) -> Term:
    """SCAFFOLD's: c comes with the message, c_i is kept; a tensor without one has zero."""
    shapes = {name: value[0] for name, value in cohort.start.items()}
    server = _filled(cohort.content[CONTROL], shapes)
    own = [_filled(state[CONTROL], shapes) if CONTROL in state else _filled({}, shapes) for state in cohort.states]
    control = ControlVariates(
        {name: value[None] for name, value in server.items()},
        {name: torch.stack([values[name] for values in own]) for name in shapes},
    )

    def report(row: int) -> dict[str, ArrayRecord]:
        state, new = cohort.states[row], control.means(row)
        before = dict(state[CONTROL].items()) if CONTROL in state else {}
        # What did not move in this round keeps the variate that it has.
        state[CONTROL] = ArrayRecord({**before, **to_record(new)})
        return {CONTROL: to_record({name: value - own[row][name] for name, value in new.items()})}

    return Term(control, report)


def _tail_penalty(cohort: Cohort) -> Term:
    """HetLoRA's, on the last rows and columns of a client's factors; `tail-share` says where they begin."""
    config, layers = cohort.content["config"], by_layer(cohort.start)
    rank = max(cohort.start[names["A"]].shape[-2] for names in layers.values())
    return Term(tail_penalty(layers, float(config[TAIL_PENALTY]), int(float(config[TAIL_SHARE]) * rank)))


def _filled(record: Any, like: Tensors) -> Tensors:
    found = to_tensors(ArrayRecord({name: array for name, array in record.items() if name in like}))
    return {name: found.get(name, torch.zeros_like(value)) for name, value in like.items()}


PROXIMAL, CONTROL_VARIATES, TAIL_PENALTY = "proximal-mu", "control-variates", "tail-penalty"
TERMS: dict[str, Callable[[Cohort], Term]] = {
    PROXIMAL: _proximal,
    CONTROL_VARIATES: _control_variates,
    TAIL_PENALTY: _tail_penalty,
}
"""Key of a train message's config -> what a client does about it."""
TAIL_SHARE = "tail-share"
"""The key that goes with the penalty's."""


def terms(cohort: Cohort) -> list[Term]:
    """What the cohort's messages ask, in the order of the table."""
    return [make(cohort) for key, make in TERMS.items() if key in cohort.content["config"]]


class Objectives(Link):
    """What the strategy's messages ask beyond plain training; the strategy itself puts it into them."""

    name = "objectives"
    traits = LinkTraits(keeps_client_state=True)
    understands = frozenset({TAIL_SHARE, *TERMS})

    def __init__(self) -> None:
        self._asked: list[Term] = []
        self._left = 0
        """Clients of the cohort that have not sent yet; after them its stacks are let go."""

    @override
    def in_words(self) -> str:
        return ""  # whether there are any is the strategy's affair

    @override
    def expects(self, client: int) -> Mapping[str, ArrayRecord]:
        """Of a client's change of control variates the run's shapes: ranks and such do not go together."""
        return {CONTROL: self.turn.moved} if self.turn.controls else {}

    @override
    def alike(self, job: Job) -> str:
        return arrays_sha256(job.records[CONTROL]) if CONTROL in job.records else ""

    @override
    def gradient(self, cohort: Cohort) -> GradientTransform | None:
        self._asked, self._left = terms(cohort), len(cohort.states)
        return chain([term.transform for term in self._asked])

    @override
    def send(self, job: Job) -> None:
        for term in self._asked:
            job.beside |= term.report(job.row)
        self._left -= 1
        if not self._left:
            self._asked = []
