"""What moving bases cost: a round beside what was folded so far against one without, and a move against a round.

One process, CPU time, in turns: the same round with nothing folded, with the folds of a few moves as factors, and with
a full matrix a layer. Then one move of each kind: what everybody does, but for the gradient, which is the server's.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_job import MODELS, lacks, language_job
from our_job import OurJob, our_job
from side_by_side import machine, parser, write

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.moves import MOVES, Rebase
from fedlotr.adapters.tuner import factored_layers
from fedlotr.errors import InputError, script
from fedlotr.flower.links.moving import Mover
from fedlotr.training.cohort import ClientWork, train_cohort
from fedlotr.training.memory import keep_freed_memory


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--model", choices=MODELS, default="30m")
    options.add_argument("--clients", type=int, default=10)
    options.add_argument("--examples", type=int, default=16, help="of a client")
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--moves", type=int, nargs="+", default=[1, 8], help="folds that are carried as factors")
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    if (why := lacks(args.model)) is not None:
        raise InputError(why)
    report: dict[str, Any] = {"machine": machine()}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    with tempfile.TemporaryDirectory() as place:
        shape = {"clients": args.clients, "examples": args.examples, "test": 8, "length": args.length}
        job = language_job(args.model, Path(place), **shape) | {"batch_size": 8, "lr": 1e-3}
        path = Path(place) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        with our_job(str(path), "fed-sb", args.rank, 1, "auto", "auto") as ours:
            report["rounds"] = rounds(ours, args)
            report["moves"] = moves(ours, args, report["rounds"]["nothing"])
    write(args.json, report)


def rounds(ours: OurJob, args: Any) -> dict[str, float]:
    """Seconds of a round beside each carried term, medians."""
    model = ours.prepared.model
    sides: dict[str, Carry] = {"nothing": Carry()}
    for count in args.moves:
        carry = Carry()
        for version in range(count):
            carry = carry.grown(_pairs(model, args.rank, version))
        sides[f"{count} folds"] = carry
    sides["a matrix"] = Carry().grown(_pairs(model, 0, 0))
    seconds = _in_turns({name: _round(ours, carry) for name, carry in sides.items()}, args.repeats)
    for name, taken in seconds.items():
        print(f"a round with {name} folded: {taken:.2f} s, {taken / seconds['nothing']:.2f} times that with nothing")
    return seconds


def moves(ours: OurJob, args: Any, of_a_round: float) -> dict[str, float]:
    """Seconds of one move of each kind that folds, on the server."""
    config, model = ours.config, ours.prepared.model
    public = ours.prepared.checked.examples.train.examples, ours.prepared.checked.public
    start = {name: torch.randn_like(value) * 0.01 for name, value in model.values().items()}
    bases = dict(Mover(model, Rebase(1, "random"), config.coding, 0).model.carried.bases)

    def move(how: str) -> Callable[[], None]:
        def carried_out() -> None:
            model.carry(Carry(bases=bases))
            Mover(model, Rebase(1, how), config.coding, 0, lambda: public).fold(start)

        return carried_out

    seconds = _in_turns({how: move(how) for how, kind in MOVES.items() if kind.makes_bases}, args.repeats)
    for how, taken in seconds.items():
        rows = f" on {len(public[1])} public rows" if how == "gradient" else ""
        print(f"a move to {how}{rows}: {taken:.2f} s, {taken / of_a_round:.2f} rounds")
    return seconds


def _round(ours: OurJob, carry: Carry) -> Callable[[], None]:
    def one() -> None:
        model, place = ours.prepared.model, ours.workplace
        model.carry(carry)
        for cohort in ours.cohorts(ours.clients):
            work = [ClientWork(place.rows(client), np.random.default_rng(client)) for client in cohort]
            train_cohort(model, model.values(), place.train, work, place.recipe.training)

    return one


def _pairs(model: Any, rank: int, version: int) -> dict[str, Factors]:
    """What a move might fold; rank 0: a pair so wide that the layer's term is a matrix."""
    stream = torch.Generator().manual_seed(version)
    found = {}
    for name, layer in factored_layers(model.module).items():
        k = rank or min(layer.in_features, layer.out_features) + 1
        v, u = torch.randn(k, layer.in_features, generator=stream), torch.randn(layer.out_features, k, generator=stream)
        found[name] = Factors(v * 1e-3, u * 1e-3)
    return found


def _in_turns(sides: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, one in sides.items():
            began = time.process_time()
            one()
            if turn:  # the first warms up
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    script(main)
