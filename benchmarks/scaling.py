"""How our round's rate changes with workers, cohort, rank and clients; each set takes turns, the first is its measure.

`--cohort 1` is the plain sequential loop: one client after the other.
"""

import tempfile
from pathlib import Path
from typing import Any

from flower_peft import write_job
from side_by_side import Contestant, contestants, cores, interleave, machine, median, parser, write
from sides import utilisation

from fedlotr.errors import script

PLAIN: dict[str, Any] = {"workers": cores(), "cohort": "auto", "rank": 16, "clients": 50}


def sets(workers: int, clients: int) -> dict[str, list[dict[str, Any]]]:
    """By what changes: one contestant for each value."""
    return {
        "workers": [{"workers": n} for n in (1, 2, 4, 8, 16) if n <= max(2, workers)],
        "cohort": [{"cohort": n} for n in (1, 8, 64)],
        "rank": [{"rank": n} for n in (4, 16, 64)],
        "clients": [{"clients": n} for n in (max(1, clients // 10), clients)],
    }


def compare(args: Any, folder: Path, variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One set of contestants in turn."""
    with contestants() as field:
        shapes = []
        for at, change in enumerate(variants):
            shape = {**PLAIN, "clients": args.clients, "workers": args.workers, **change}
            path = folder / f"job-{at}.json"
            write_job(path, args, clients=shape["clients"], batch=args.batch, length=args.length, fill=False)
            name = ", ".join(f"{key} {value}" for key, value in change.items())
            words = (path, args.method, shape["rank"], shape["workers"], shape["cohort"], args.dtype)
            log = folder / f"{at}.log"
            field.append(Contestant(name, "our_side.py", *words, log=log))
            shapes.append(shape)
        for each in field:
            each.round()
        seen = interleave(field, args.rounds)
        found = []
        for each, shape in zip(field, shapes, strict=True):
            seconds = median([done["seconds"] for done in seen[each.name]])
            rate = shape["clients"] * args.examples / seconds
            found.append(
                {**shape, "name": each.name, "round_seconds": seconds, "examples_per_second": rate, **each.ready}
            )
    for each_found in found:
        each_found["ratio"] = each_found["examples_per_second"] / found[0]["examples_per_second"]
        print(f"{each_found['name']:20s} {each_found['examples_per_second']:8.1f} ex/s {each_found['ratio']:6.2f}")
    return found


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--examples", type=int, default=32, help="of a client")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--method", default="fed-sb")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--rounds", type=int, default=3, help="timed, after the first")
    options.add_argument("--matmul", type=int, default=2048, help="side of the product that is measured too")
    options.add_argument("--only", nargs="+", choices=list(sets(1, 1)), default=list(sets(1, 1)))
    args = options.parse_args()
    args.lr, args.accuracy = 1e-3, False
    figures: dict[str, Any] = {"machine": machine(), "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, variants in sets(args.workers, args.clients).items():
            if name in args.only:
                print(f"\n{name}", flush=True)
                figures["sets"][name] = compare(args, Path(folder), variants)
    plain: dict[str, Any] = {"sides": {side["name"]: side for side in figures["sets"].get("clients", [])}}
    utilisation(plain, args)
    figures["matmul_gflops"] = plain["matmul_gflops"]
    write(args.json, figures)


if __name__ == "__main__":
    script(main)
