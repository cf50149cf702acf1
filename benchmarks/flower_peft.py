"""Examples a second against Flower's simulation engine with PEFT LoRA clients, on the same cores, taking turns.

The job: MiniLM, 50 clients with 32 rows each of agnews (the first 1,600 of train, in order), batch 8, one local
epoch, all linear layers of the encoder, AdamW, sequences cut at 128, no evaluation. Both sides: worker processes of one
thread, as many as there are cores; what the others compute in, `sides.py` says. Then one thread of ours: its rate, and
what it goes to.
"""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import sides
from side_by_side import HERE, write
from sides import OURS, compare, show

from fedlotr.errors import InputError, script

AGNEWS = HERE.parents[1] / "shared" / "data" / "agnews"
PUBLIC = 256


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
        "task": "classification",
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
        "evaluate": args.accuracy,
    }
    path.write_text(json.dumps(job), encoding="utf-8")
    return job


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
    usual = "flower+peft", "flower+peft eager", *OURS
    options = sides.options(__doc__, clients=50, examples=32, length=128, usual=usual)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--fill", action="store_true", help="texts strung together until they fill --length")
    options.add_argument("--accuracy", action="store_true", help="evaluate after each round, outside the timing")
    options.add_argument("--test", type=int, default=1024, help="rows to evaluate on")
    options.add_argument("--sweep", action="store_true", help="also other lengths, batches and numbers of clients")
    args = options.parse_args()
    report: dict[str, Any] = {"machine": sides.header(args), "jobs": {}}
    if not AGNEWS.is_dir():
        print(f"{AGNEWS} is missing: the rows are pydoc's, so the figures are of another job")
    plain = {"clients": args.clients, "batch": args.batch, "length": args.length, "fill": args.fill}
    jobs = {"the job": plain} | ({name: plain | change for name, change in SWEEP.items()} if args.sweep else {})
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in jobs.items():
            print(f"\n{name}")
            path = Path(folder) / "job.json"
            data, examples = write_job(path, args, **shape)["data"], shape["clients"] * args.examples
            print(f"{data}, {shape}, {examples} examples a round", flush=True)
            found = compare(path, args, Path(folder), examples)
            report["jobs"][name] = {"job": {**shape, "examples": examples, "data": data}, **found}
            show(found)
    worst = {
        theirs: min(
            (figures["ratios"][theirs][side], f"{side}, {name}")
            for name, figures in report["jobs"].items()
            for side in OURS
            if side in args.sides
        )
        for theirs in report["jobs"]["the job"]["ratios"]
        if {*OURS} & {*args.sides}
    }
    for theirs, (ratio, where) in worst.items():
        print(f"the worst of our ratios to {theirs}: {ratio:.2f} ({where})")
    report["worst"] = worst
    write(args.json, report)


if __name__ == "__main__":
    script(main)
