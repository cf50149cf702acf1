"""What a round costs beside the clients' work: an echo client with 100 kB updates, our engine and Flower's in turn.

Also our whole round loop with few and with very many clients registered, and the peak memory of driver and workers with
few and with many sampled; `--only memory` does that part alone.
"""

import tempfile
from pathlib import Path
from typing import Any

from side_by_side import Contestant, contestants, interleave, machine, median, parser, write

from fedlotr.errors import script


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=1000, help="sampled a round")
    options.add_argument("--registered", type=int, default=1_000_000, help="clients that mostly sleep")
    options.add_argument("--bytes", type=int, default=100_000, help="of an update")
    options.add_argument("--cohort", type=int, default=10, help="clients that our engine hands out together")
    options.add_argument("--few", type=int, default=50, help="clients sampled, against --many, for the peak memory")
    options.add_argument("--many", type=int, default=5000)
    options.add_argument("--rounds", type=int, default=3, help="timed, after the first")
    options.add_argument("--no-flower", action="store_true")
    options.add_argument("--only", choices=("speed", "registered", "memory"), help="one part of it")
    args = options.parse_args()
    rest = (args.bytes, args.workers, args.cohort)
    parts: dict[str, dict[str, tuple[object, ...]]] = {
        "speed": {
            "ours": ("ours", args.clients, args.clients, *rest),
            "ours, one by one": ("ours", args.clients, args.clients, args.bytes, args.workers, 1),
            "flower": ("flower", args.clients, args.clients, *rest),
        },
        "registered": {
            "round loop": ("loop", args.clients, args.clients, *rest),
            "round loop, many asleep": ("loop", args.registered, args.clients, *rest),
        },
        "memory": {
            "few sampled": ("loop", args.few, args.few, *rest),
            "many sampled": ("loop", args.many, args.many, *rest),
        },
    }
    sides = {name: words for part in parts if args.only in (None, part) for name, words in parts[part].items()}
    if args.no_flower:
        sides.pop("flower", None)
    figures: dict[str, Any] = {"machine": machine(), "options": {k: str(v) for k, v in vars(args).items()}}
    with tempfile.TemporaryDirectory() as folder, contestants() as field:
        for name, words in sides.items():
            log = Path(folder) / f"{name.replace(' ', '-')}.log"
            field.append(Contestant(name, "engine_side.py", *words, log=log))
        for each in field:
            each.round()
        seen = interleave(field, args.rounds)
    figures["sides"] = {
        name: {
            "seconds": median([done["seconds"] for done in rounds]),
            "driver_cpu_seconds": median([done["driver_cpu_seconds"] for done in rounds]),
            "driver_peak_megabytes": max(done["driver_peak_bytes"] for done in rounds) / 2**20,
            "worker_peak_megabytes": max(done["worker_peak_bytes"] for done in rounds) / 2**20,
        }
        for name, rounds in seen.items()
    }
    print(f"\n{'':26s} {'s/round':>8s} {'driver s':>9s} {'peak MB':>8s} {'a worker':>9s}")
    for name, side in figures["sides"].items():
        print(
            f"{name:26s} {side['seconds']:8.3f} {side['driver_cpu_seconds']:9.3f} {side['driver_peak_megabytes']:8.0f} "
            f"{side['worker_peak_megabytes']:9.0f}"
        )
    found, ratios = figures["sides"], {}
    if "round loop" in found:
        plain, asleep = found["round loop"], found["round loop, many asleep"]
        ratios["many registered, seconds"] = asleep["seconds"] / plain["seconds"]
        ratios["many registered, megabytes more"] = asleep["driver_peak_megabytes"] - plain["driver_peak_megabytes"]
    if "few sampled" in found:
        for who in ("driver", "worker"):
            few, many = (found[name][f"{who}_peak_megabytes"] for name in ("few sampled", "many sampled"))
            ratios[f"many sampled, megabytes more of a {who}"] = many - few
            ratios[f"many sampled, peak of a {who} by that of few"] = many / few if few else float("nan")
    if "flower" in found:
        ratios["flower / ours"] = found["flower"]["seconds"] / found["ours"]["seconds"]
    figures["ratios"] = ratios
    for name, ratio in figures["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    write(args.json, figures)


if __name__ == "__main__":
    script(main)
