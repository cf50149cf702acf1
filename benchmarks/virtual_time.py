"""What virtual time costs: rounds of a fleet by day and night beside as many rounds without a clock, in turns.

Each run is whole, from its directory to its checkpoints; a round's seconds are from the end of the one before, with
all that is written. Clients hold sentences of Python's documentation, and train a language model on them.
"""

import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from language_job import folder_of
from side_by_side import HERE, machine, parser, write

from fedlotr import Callbacks, SimulationConfig, run_simulation
from fedlotr.data import load_source
from fedlotr.errors import script

STORIES = HERE.parents[1] / "shared" / "models" / "stories260k"
"""A Llama of 260,000 parameters, where it is at hand."""
SIDES: dict[str, dict[str, Any]] = {"no clock": {}, "phones": {"fleet": "phones"}}
"""Phones are there at night, by their time zones, and one job in twenty is broken off."""


class Watch(Callbacks):
    """The seconds of each round but the first, in which models are loaded."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_round(self, event: Any) -> None:
        """One more is on disk."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def sentences(count: int) -> list[dict[str, str]]:
    """So many rows, again from the first where there are fewer."""
    texts = [str(text) for text in load_source("pydoc").train["text"]]
    found = [part for text in texts for part in re.split(r"(?<=[.!?])\s+", text) if len(part) > 20]
    return [{"text": found[at % len(found)]} for at in range(count)]


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--clients", type=int, default=10_000)
    options.add_argument("--sample", type=int, default=100)
    options.add_argument("--rounds", type=int, default=101, help="of each run; the first is not timed")
    options.add_argument("--repeats", type=int, default=2, help="runs of each side, in turns there and back")
    options.add_argument("--mode", nargs="*", default=[], help="further sides, such as async")
    args = options.parse_args()
    sides = SIDES | {mode: {"fleet": "phones", "mode": mode} for mode in args.mode}
    report: dict[str, Any] = {"machine": machine(), "clients": args.clients, "sides": {}}
    with tempfile.TemporaryDirectory() as place:
        model = STORIES if STORIES.is_dir() else folder_of("tiny", Path(place))
        rows = sentences(4 * args.clients + 64)
        data = {"train": rows[:-32], "test": rows[-32:]}
        seen: dict[str, list[float]] = {name: [] for name in sides}
        virtual: dict[str, float] = {}
        for repeat in range(args.repeats):
            for name in list(sides)[:: -1 if repeat % 2 else 1]:
                watch, out = Watch(), Path(place) / f"{name}-{repeat}"
                config = SimulationConfig(
                    model=str(model),
                    clients=args.clients,
                    sample=args.sample,
                    rounds=args.rounds,
                    partition="iid",
                    max_examples=4,
                    public_examples=16,
                    max_length=64,
                    local_epochs=1,
                    rank=8,
                    lr_schedule="constant",
                    eval_every=args.rounds,
                    samples=0,
                    engine="local",
                    threads=1,
                    out=out,
                    **sides[name],
                )
                done = run_simulation(config, data=data, callbacks=watch, quiet=True)
                seen[name] += watch.seconds
                if (told := done.summary["virtual"]) is not None:
                    virtual[name] = told["seconds_total"]
        first = statistics.median(seen["no clock"])
        for name, seconds in seen.items():
            found: dict[str, Any] = {"seconds": statistics.median(seconds), "rounds": len(seconds)}
            found |= {"times": found["seconds"] / first, "virtual_seconds": virtual.get(name)}
            report["sides"][name] = found
            print(f"{name:10s} {found['seconds']:.4f} s a round, {found['times']:.3f} times, of {len(seconds)}")
    write(args.json, report)


if __name__ == "__main__":
    script(main)
