"""Language models on real texts: Flower with PEFT, a plain PEFT loop, and ours with lora and with cores, in turns.

On a decoder of 31 M parameters, built from a configuration (random weights, a tokenizer made of the texts), and on
SmolLM2-135M where its package is installed; in batches of 8 and of 1. All linear layers of the blocks, AdamW, one local
epoch, answers alone are learnt. Texts are gsm8k's, `../shared/data`; where it is missing, the chat demo's. Real tokens
are counted, and the loss of held-out rows is measured after each round, outside the timing. What the others compute in,
`sides.py` says.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import sides
from language_job import MODELS, lacks, language_job
from side_by_side import write
from sides import OURS, compare, show

from fedlotr.errors import InputError, script


def main() -> None:
    """Run it."""
    options = sides.options(__doc__, clients=16, examples=16, length=256, usual=("flower+peft", "peft loop", *OURS))
    options.add_argument("--models", nargs="+", choices=MODELS, default=["30m", "smollm2-135m"])
    options.add_argument("--batches", nargs="+", type=int, default=[8, 1], help="examples in an optimizer step")
    options.add_argument("--test", type=int, default=32, help="held-out rows")
    args = options.parse_args()
    report: dict[str, Any] = {"machine": sides.header(args), "jobs": {}, "skipped": {}}
    with tempfile.TemporaryDirectory() as place:
        for model in args.models:
            if (why := lacks(model)) is not None:
                print(f"\n{why}")
                report["skipped"][model] = why
                continue
            shape = {"clients": args.clients, "examples": args.examples, "test": args.test, "length": args.length}
            job = language_job(model, Path(place), **shape)
            for batch in args.batches:
                name = f"{model}, batch {batch}"
                report["jobs"][name] = one_job(name, {**job, "batch_size": batch, "lr": args.lr}, args, Path(place))
    if not report["jobs"]:
        raise InputError(f"--models {' '.join(args.models)}: none of them is here, so nothing was measured")
    write(args.json, report)


def one_job(name: str, job: dict[str, Any], args: Any, folder: Path) -> dict[str, Any]:
    """Measure it, and show what was found."""
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    rows = [row for part in job["parts"] for row in part]
    tokens = sum(len(row["ids"]) for row in rows)
    print(f"\n{name}: {job['data']}, {len(job['parts'])} clients, {len(rows)} examples of {tokens} tokens", flush=True)
    found = compare(path, args, folder, len(rows))
    for side in OURS:
        counted = found["sides"].get(side, {}).get("tokens", tokens)
        if counted != tokens:
            raise InputError(f"{side} trained on {counted} tokens a round, the others on {tokens}")
    show(found)
    return {"data": job["data"], "examples": len(rows), "tokens": tokens, **found}


if __name__ == "__main__":
    script(main)
