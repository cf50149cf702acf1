"""Many small rounds in one run: whether memory, open files, processes and folders stay as they are.

A federation of clients that come and go, late ones among them, on a model that is built here. Of the driver and of the
workers the memory that nobody else shares is read as rounds go by; its slope is that of a line through the second half.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from language_job import folder_of
from side_by_side import machine, parser, write
from virtual_time import sentences

from fedlotr import Callbacks, SimulationConfig, run_simulation
from fedlotr.errors import script


class Readings(Callbacks):
    """Megabytes of the driver and of all that it has started, and open files of the driver, every so many rounds."""

    def __init__(self, every: int) -> None:
        self.every, self.rounds = every, list[int]()
        self.seen: dict[str, list[float]] = {"driver": [], "workers": [], "files": []}
        self._me = psutil.Process()

    def on_round(self, event: Any) -> None:
        """Look, where it is time to."""
        if event.round % self.every:
            return
        workers = self._me.children(recursive=True)
        self.rounds.append(event.round)
        self.seen["driver"].append(self._me.memory_full_info().uss / 2**20)
        self.seen["workers"].append(sum(one.memory_full_info().uss for one in workers) / 2**20)
        self.seen["files"].append(self._me.num_fds())

    def slope(self, of: str) -> float:
        """A thousand rounds' change, over the second half."""
        half = len(self.rounds) // 2
        return float(np.polyfit(self.rounds[half:], self.seen[of][half:], 1)[0] * 1000)


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--clients", type=int, default=200)
    options.add_argument("--sample", type=int, default=10)
    options.add_argument("--rounds", type=int, default=2000)
    options.add_argument("--every", type=int, default=20)
    options.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="further ones of the run")
    args = options.parse_args()
    given: dict[str, Any] = {
        "fleet": "edge",
        "mode": "deadline",
        "deadline": 5.0,
        "late": "use",
        "workers": args.workers,
    }
    given |= dict(option.split("=", 1) for option in args.options)
    report: dict[str, Any] = {"machine": machine()}
    me = psutil.Process()
    with tempfile.TemporaryDirectory() as place:
        model, rows = folder_of("tiny", Path(place)), sentences(3 * args.clients + 64)
        data = {"train": rows[:-32], "test": rows[-32:]}

        def run(rounds: int, name: str, *callbacks: Callbacks) -> Any:
            config = SimulationConfig(
                model=str(model),
                clients=args.clients,
                sample=args.sample,
                rounds=rounds,
                partition="iid",
                max_examples=3,
                public_examples=16,
                max_length=48,
                local_epochs=1,
                rank=4,
                eval_every=max(1, rounds // 4),
                samples=0,
                threads=1,
                out=Path(place) / name,
                **given,
            )
            return run_simulation(config, data=data, callbacks=callbacks, quiet=True)

        def there() -> tuple[int, int, set[str]]:
            return me.num_fds(), len(me.children(recursive=True)), set(os.listdir(tempfile.gettempdir()))

        run(2, "first")  # what libraries open once stays open
        before, readings = there(), Readings(args.every)
        done = run(args.rounds, "run", readings)
        after = there()
    left = {"files": after[0] - before[0], "processes": after[1] - before[1], "folders": sorted(after[2] - before[2])}
    slopes = {name: readings.slope(name) for name in readings.seen} if len(readings.rounds) > 3 else {}
    report |= {
        "rounds": done.summary["rounds"],
        "seconds": done.summary["timing"]["seconds_total"],
        "failures": {kind: sum(clients.values()) for kind, clients in done.summary["failures"].items()},
        "a_thousand_rounds": slopes,
        "readings": {"rounds": readings.rounds, **readings.seen},
        "left_over": left,
    }
    for name, seen in readings.seen.items():
        told = f"{seen[0]:.0f} -> {seen[-1]:.0f}" if seen else "not read"
        print(f"{name:8s} {told}{f', {slopes[name]:+.2f} a thousand rounds' if slopes else ''}")
    print(f"left over: {left}")
    write(args.json, report)


if __name__ == "__main__":
    script(main)
