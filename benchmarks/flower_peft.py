"""Examples a second against Flower's simulation engine with PEFT LoRA clients, on the same cores, taking turns.

The job: MiniLM, 50 clients with 32 rows each of agnews (the first 1,600 of train, in order), batch 8, one local
epoch, all linear layers of the encoder, AdamW, sequences cut at 128 and padded to the longest of their batch, no
evaluation. Both sides: worker processes of one thread, as many as there are cores.
"""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import HERE, Contestant, contestants, interleave, machine, matmul_gflops, median, parser, write

from fedlotr.errors import InputError, script

AGNEWS = HERE.parents[1] / "shared" / "data" / "agnews"
PUBLIC = 256
FLOP_A_TOKEN = 4
"""Times the parameters of the encoder's linear layers: forward, and backward to the inputs; no weight gradient."""


def agnews(count: int, split: str) -> list[dict[str, Any]]:
    """The first rows of a split, in order."""
    with gzip.open(AGNEWS / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return [{"text": row["text"], "label": int(row["label"])} for row in rows]


def pydoc(count: int, split: str) -> list[dict[str, Any]]:
    """Rows of the data every machine has."""
    from fedlotr.data import Names, load_source

    source = load_source("pydoc", seed=0, eval_split=None, names=Names())
    part = source.train if split == "train" else source.test
    rows = part.select(range(min(count, len(part)))).to_list()
    names = sorted({row["label"] for row in rows})
    return [{"text": row["text"], "label": names.index(row["label"])} for row in rows]


def lengthened(rows: list[dict[str, Any]], words: int) -> list[dict[str, Any]]:
    """Every text followed by those after it until it has so many words: sequences that fill a length."""
    found = []
    for at, row in enumerate(rows):
        text, following = row["text"], at
        while len(text.split()) < words:
            following += 1
            text += " " + rows[following % len(rows)]["text"]
        found.append({**row, "text": text})
    return found


def write_job(path: Path, args: Any, *, clients: int, batch: int, length: int, fill: bool) -> dict[str, Any]:
    """Lay the job out where both sides find it."""
    from fedlotr.models.source import DEMO_MODEL, resolve_model

    read = agnews if AGNEWS.is_dir() else pydoc
    count = clients * args.examples
    rows, test = read(count + PUBLIC, "train"), read(args.test if args.accuracy else 16, "test")
    if len(rows) < count + PUBLIC:
        raise InputError(
            f"--clients {clients}: {count + PUBLIC} rows are needed, the data have {len(rows)}; choose at most "
            f"{(len(rows) - PUBLIC) // args.examples}"
        )
    if fill:
        rows = lengthened(rows, length)
    job = {
        "data": read.__name__,
        "model_name": DEMO_MODEL,
        "model": str(resolve_model(DEMO_MODEL)),
        "labels": len({row["label"] for row in [*rows, *test]}),
        "parts": [rows[at : at + args.examples] for at in range(0, count, args.examples)],
        "public": rows[count:],
        "test": test,
        "batch_size": batch,
        "max_length": length,
        "lr": args.lr,
        "accuracy": args.accuracy,
    }
    path.write_text(json.dumps(job), encoding="utf-8")
    return job


def compare(args: Any, folder: Path, **shape: Any) -> dict[str, Any]:
    """One job, every contestant; medians and ratios."""
    path = folder / "job.json"
    job = write_job(path, args, **shape)
    sides: dict[str, tuple[Any, ...]] = {
        "flower+peft cached": ("peft_side.py", path, args.lora_rank, args.workers, "cached"),
        "flower+peft reloaded": ("peft_side.py", path, args.lora_rank, args.workers, "reloaded"),
        "fed-sb": ("our_side.py", path, "fed-sb", args.rank, args.workers, "auto", args.dtype),
        "lora": ("our_side.py", path, "lora", args.lora_rank, args.workers, "auto", args.dtype),
    }
    examples = shape["clients"] * args.examples
    print(f"{job['data']}, {shape}, {examples} examples a round", flush=True)
    with contestants() as field:
        for name in args.sides:
            log = folder / f"{name.replace(' ', '-')}.log"
            field.append(Contestant(name, sides[name][0], *sides[name][1:], log=log))
        first = {each.name: each.round() for each in field}
        for name, done in first.items():
            print(f"  first {name:24s} {done['seconds']:8.3f} s", flush=True)
        seen = interleave(field, args.rounds)
        ready = {each.name: each.ready for each in field}
    figures: dict[str, Any] = {"job": {**shape, "examples": examples, "data": job["data"]}, "sides": {}}
    for name, rounds in seen.items():
        seconds = median([done["seconds"] for done in rounds])
        figures["sides"][name] = {
            "first_round_seconds": first[name]["seconds"],
            "round_seconds": seconds,
            "examples_per_second": examples / seconds,
            "rounds": [done["seconds"] for done in rounds],
            "losses": [first[name]["loss"], *(done["loss"] for done in rounds)],
            **ready[name],
        }
        if args.accuracy:
            figures["sides"][name]["accuracy"] = [first[name]["accuracy"], *(done["accuracy"] for done in rounds)]
    theirs = figures["sides"].get("flower+peft cached")
    if theirs:
        figures["ratios"] = {
            name: side["examples_per_second"] / theirs["examples_per_second"] for name, side in figures["sides"].items()
        }
    return figures


def utilisation(figures: dict[str, Any], args: Any) -> None:
    """What share of the machine's best matrix product each of our sides reaches on real tokens."""
    parameters = 6 * (4 * 384**2 + 2 * 384 * 1536)  # MiniLM's encoder
    formats = "float32", "bfloat16"
    figures["matmul_gflops"] = {dtype: matmul_gflops(dtype, args.workers, args.matmul) for dtype in formats}
    best = max(figures["matmul_gflops"].values())
    for side in figures["sides"].values():
        if "tokens" in side:
            side["gflops"] = FLOP_A_TOKEN * parameters * side["tokens"] / side["round_seconds"] / 1e9
            side["share_of_matmul"] = side["gflops"] / best


def show(figures: dict[str, Any]) -> None:
    """The table."""
    print(f"{'':24s} {'first':>8s} {'round':>8s} {'ex/s':>8s} {'ratio':>7s} {'of matmul':>10s} {'upload':>10s}")
    for name, side in figures["sides"].items():
        ratio = figures.get("ratios", {}).get(name, float("nan"))
        share = f"{side['share_of_matmul']:.0%}" if "share_of_matmul" in side else ""
        print(
            f"{name:24s} {side['first_round_seconds']:8.2f} {side['round_seconds']:8.2f} "
            f"{side['examples_per_second']:8.1f} {ratio:7.2f} {share:>10s} {side['upload_bytes']:10,d}"
        )


SIDES = ("flower+peft cached", "flower+peft reloaded", "fed-sb", "lora")
SWEEP: dict[str, dict[str, Any]] = {
    "length 16": {"length": 16, "fill": True},
    "length 64": {"length": 64, "fill": True},
    "length 256": {"length": 256, "fill": True},
    "batch 1": {"batch": 1},
    "batch 32": {"batch": 32},
    "5 clients": {"clients": 5},
}


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--examples", type=int, default=32, help="of a client")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=128, help="sequences are cut there")
    options.add_argument("--fill", action="store_true", help="texts strung together until they fill --length")
    options.add_argument("--rank", type=int, default=16, help="of fed-sb")
    options.add_argument("--lora-rank", type=int, default=8)
    options.add_argument("--lr", type=float, default=1e-3, help="of LoRA, on both sides")
    options.add_argument("--rounds", type=int, default=2, help="timed, after the first")
    options.add_argument("--dtype", default="auto", help="of our frozen base")
    options.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options.add_argument("--accuracy", action="store_true", help="evaluate after each round, outside the timing")
    options.add_argument("--test", type=int, default=1024, help="rows to evaluate on")
    options.add_argument("--matmul", type=int, default=2048, help="side of the products that sides are held against")
    options.add_argument("--sweep", action="store_true", help="also other lengths, batches and numbers of clients")
    args = options.parse_args()
    report: dict[str, Any] = {"machine": machine(), "jobs": {}}
    if not AGNEWS.is_dir():
        print(f"{AGNEWS} is missing: the rows are pydoc's, so the figures are of another job")
    plain = {"clients": args.clients, "batch": args.batch, "length": args.length, "fill": args.fill}
    jobs = {"the job": plain} | ({name: plain | change for name, change in SWEEP.items()} if args.sweep else {})
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in jobs.items():
            print(f"\n{name}")
            report["jobs"][name] = compare(args, Path(folder), **shape)
            utilisation(report["jobs"][name], args)
            show(report["jobs"][name])
    ours = [
        (figures["ratios"][side], f"{side}, {name}")
        for name, figures in report["jobs"].items()
        for side in ("fed-sb", "lora")
        if side in figures.get("ratios", {})
    ]
    if ours:
        report["worst"] = min(ours)
        print(f"\nthe worst of our ratios: {min(ours)[0]:.2f} ({min(ours)[1]})")
    write(args.json, report)


if __name__ == "__main__":
    script(main)
