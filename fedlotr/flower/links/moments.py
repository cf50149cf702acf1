"""What becomes of a client's optimizer between rounds: `--optimizer-state reset|keep|mean-v`.

keep: the client's own moments, and how many steps they are averages of, stay in its state. mean-v: of every trained
tensor one number travels, the mean of AdamW's second moments, and all entries start the next round from the mean of
those; Liu et al. 2025, "FedAdamW" (arXiv:2510.27486), of which this is the part that concerns the moments.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedlotr.flower.records import Arrays, to_arrays, to_record, to_tensors
from fedlotr.training.model import Tensors
from fedlotr.training.optimizers import State

MOMENTS = "moments"
"""The record: in a client's state all that its optimizer holds, in messages and replies (2,) a tensor: the mean of v,
and the weight that AdamW corrects it by."""
KEPT_APART = "/"
"""Between the kind of a moment and the name of its tensor, in a client's state."""


def begin(choice: str, content: Any, state: Any, start: Tensors) -> State:
    """What a client's optimizer goes on from. start: the tensors that it will move, for their shapes."""
    if choice == "keep" and MOMENTS in state:
        found: State = {}
        for key, value in to_tensors(state[MOMENTS]).items():
            kind, _, name = key.partition(KEPT_APART)
            found.setdefault(kind, {})[name] = value
        return found
    if choice == "mean-v" and MOMENTS in content:
        means = {name: value for name, value in to_tensors(content[MOMENTS]).items() if name in start}
        return {
            "square": {name: torch.full_like(start[name], float(value[0])) for name, value in means.items()},
            "weight": {
                name: torch.tensor([0.0, float(value[1])], dtype=torch.float64) for name, value in means.items()
            },
        }
    return {}


def end(choice: str, held: State, state: Any, sent: Iterable[str]) -> dict[str, ArrayRecord]:
    """Keep what is to be kept in the client's state; what goes up beside its update, of the tensors that are sent."""
    if choice == "keep":
        flat = {f"{kind}{KEPT_APART}{name}": value for kind, values in held.items() for name, value in values.items()}
        before = dict(state[MOMENTS].items()) if MOMENTS in state else {}
        # Of a factor that did not move in this round, the moments stay.
        state[MOMENTS] = ArrayRecord({**before, **to_record(flat)})
    if choice == "mean-v":
        square, weight = held["square"], held["weight"]
        pairs = {name: torch.stack([square[name].double().mean(), weight[name][1]]).float() for name in sent}
        return {MOMENTS: to_record(pairs)}
    return {}


def add_moments(messages: Iterable[Message], moments: Arrays) -> None:
    """Put the mean of v of every tensor into the messages."""
    if moments:
        record = to_record({name: value.astype(np.float32) for name, value in moments.items()})
        for message in messages:
            message.content = RecordDict({**message.content, MOMENTS: record})


def expected_moments(names: Iterable[str]) -> ArrayRecord:
    """What replies must have."""
    return ArrayRecord({name: Array(np.zeros(2, np.float32)) for name in names})


def mean_moments(good: Sequence[Message], before: Arrays) -> Arrays:
    """Σ p_i of what the replies have, weighted as their updates; what did not move stays."""
    contents: list[Any] = [message.content for message in good]
    weights = np.array([float(content["metrics"]["weight"]) for content in contents])
    replies: list[Mapping[str, Any]] = [to_arrays(content[MOMENTS]) for content in contents]
    means = {n: np.average([reply[n] for reply in replies], axis=0, weights=weights) for n in replies[0]}
    return {**before, **means}
