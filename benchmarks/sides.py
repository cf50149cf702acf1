"""The sides of `flower_peft.py` and `decoder.py`, and what is measured of them: one job, all in turns.

Theirs compute as their users have it: the base in bfloat16 and under autocast where the processor multiplies bfloat16
faster, as ours does, in float32 elsewhere; transformers' default attention (sdpa; `eager` is faster on some
processors), batches padded to their longest, no cache, AdamW as torch has it by default.
Flower's clients and our workers are processes of one thread, as many as `--workers`; the plain loop is one process of
as many threads.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from side_by_side import Contestant, contest, contestants, machine, matmul_gflops, median, parser

from fedlotr.models.precision import measured_dtype

FLOWER = {
    "flower+peft": ("cached", "auto", "sdpa"),
    "flower+peft eager": ("cached", "auto", "eager"),
    "flower+peft float32": ("cached", "float32", "sdpa"),
    "flower+peft reloaded": ("reloaded", "auto", "sdpa"),
}
"""Whether the base stays in the actor or is loaded with every message, what it computes in (`auto`: bfloat16 where that
is faster), and its attention."""
LOOPS = {
    "peft loop": ("auto", "sdpa"),
    "peft loop eager": ("auto", "eager"),
    "peft loop float32": ("float32", "sdpa"),
}
OURS = "fed-sb", "lora"
SIDES = (*FLOWER, *LOOPS, *OURS)


def options(what: str | None, *, clients: int, examples: int, length: int, usual: Sequence[str]) -> ArgumentParser:
    """What can be chosen of a job and of its sides."""
    made = parser(what or "")
    made.add_argument("--clients", type=int, default=clients)
    made.add_argument("--examples", type=int, default=examples, help="of a client")
    made.add_argument("--length", type=int, default=length, help="sequences are cut there")
    made.add_argument("--rank", type=int, default=16, help="of fed-sb")
    made.add_argument("--lora-rank", type=int, default=8)
    made.add_argument("--lr", type=float, default=1e-3, help="of LoRA, on both sides")
    made.add_argument("--rounds", type=int, default=2, help="timed, after the first")
    made.add_argument("--dtype", default="auto", help="of our frozen base")
    made.add_argument("--sides", nargs="+", choices=SIDES, default=list(usual))
    made.add_argument("--matmul", type=int, default=2048, help="side of the products that sides are held against")
    return made


def header(args: Namespace) -> dict[str, Any]:
    """What is measured on, which is shown, with how each of theirs computes."""
    found = machine()
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    for name in args.sides:
        if name not in OURS:
            *base, dtype, attention = form_of(name)
            threads = f"processes of one thread: {args.workers}, base {base[0]}" if base else f"threads: {args.workers}"
            autocast = " under autocast" if dtype == "bfloat16" else ""
            print(f"{name}: {dtype}{autocast}, {attention}, padded to the longest, {threads}")
    return found


def words(name: str, path: Path, args: Namespace) -> tuple[object, ...]:
    """The script of a side and what it is told."""
    if name in FLOWER:
        return ("peft_side.py", path, args.lora_rank, args.workers, *form_of(name))
    if name in LOOPS:
        return ("loop_side.py", path, args.lora_rank, args.workers, *form_of(name))
    return ("our_side.py", path, name, rank_of(name, args), args.workers, "auto", args.dtype)


def form_of(name: str) -> tuple[str, ...]:
    """Of a side of theirs, with what it computes in here."""
    return tuple(measured_dtype() if word == "auto" else word for word in {**FLOWER, **LOOPS}[name])


def rank_of(name: str, args: Namespace) -> int:
    """Of a side of ours."""
    rank: int = args.lora_rank if name == "lora" else args.rank
    return rank


def compare(path: Path, args: Namespace, folder: Path, examples: int) -> dict[str, Any]:
    """One job, every side; medians, ratios to each of theirs, and what one thread of ours does."""
    seen = contest({name: words(name, path, args) for name in args.sides}, folder, args.rounds)
    figures: dict[str, Any] = {"sides": {name: _figures(found, examples) for name, found in seen.items()}}
    figures["ratios"] = _ratios(figures["sides"], "round_seconds")
    figures["cpu_ratios"] = _ratios(figures["sides"], "round_cpu_seconds")
    utilisation(figures, args)
    figures["one_thread"] = {name: _one_thread(name, path, args, folder) for name in args.sides if name in OURS}
    return figures


def _ratios(found: Mapping[str, Any], what: str) -> dict[str, dict[str, float]]:
    """How many times as much of something each of theirs takes as every other side; NaN where it was not told."""
    return {
        theirs: {
            name: found[theirs][what] / side[what] if side[what] else float("nan")
            for name, side in found.items()
            if name != theirs
        }
        for theirs in found
        if theirs not in OURS
    }


def _figures(found: Mapping[str, Any], examples: int) -> dict[str, Any]:
    ready, rounds = dict(found["ready"]), [found["first"], *found["rounds"]]
    before, seconds = ready.pop("before"), median([done["seconds"] for done in found["rounds"]])
    scores = {name: [before[name], *(done[name] for done in rounds)] for name in before}
    return {
        "first_round_seconds": rounds[0]["seconds"],
        "round_seconds": seconds,
        "examples_per_second": examples / seconds,
        "round_cpu_seconds": median([done["cpu_seconds"] for done in found["rounds"]]),
        "rounds": [done["seconds"] for done in found["rounds"]],
        "losses": [done["loss"] for done in rounds],
        **scores,
        **{name: found[name] for name in ("peak_megabytes", "largest_megabytes")},
        **ready,
    }


def _one_thread(name: str, path: Path, args: Namespace, folder: Path) -> dict[str, Any]:
    words = path, name, rank_of(name, args), args.dtype, args.matmul
    with contestants() as field:
        field.append(Contestant(name, "one_thread.py", *words, log=folder / "one-thread.log"))
        return field[0].ready


def utilisation(figures: dict[str, Any], args: Namespace) -> None:
    """Real tokens a second of each side, and its share of the best product of as many threads as there are workers."""
    formats = {"float32", measured_dtype()}  # a product of a format that is not multiplied takes for ever
    figures["matmul_gflops"] = {dtype: matmul_gflops(dtype, args.workers, args.matmul) for dtype in sorted(formats)}
    best = max(figures["matmul_gflops"].values())
    counted = [side for side in figures["sides"].values() if "gflop" in side]
    for side in figures["sides"].values() if counted else ():  # ours count what the job takes, whoever does it
        work = side if "gflop" in side else counted[0]
        for what in ("tokens", "targets"):
            side[f"{what}_per_second"] = work[what] / side["round_seconds"]
        side["share_of_matmul"] = work["gflop"] / side["round_seconds"] / best


def show(figures: Mapping[str, Any]) -> None:
    """The tables."""
    heads = "first s", "round s", "cpu s", "ex/s", "tokens/s", "targets/s", "of matmul", "MB", "largest", "upload"
    print(f"{'':22s}" + "".join(f"{head:>11s}" for head in heads) + "  scores")
    for name, side in figures["sides"].items():
        share = f"{side['share_of_matmul']:.0%}" if "share_of_matmul" in side else ""
        rates = [f"{side[key]:,.0f}" if key in side else "" for key in ("tokens_per_second", "targets_per_second")]
        times = [f"{side[f'{key}_seconds']:.2f}" for key in ("first_round", "round", "round_cpu")]
        times += [f"{side['examples_per_second']:.1f}"]
        sizes = [f"{side[key]:,.0f}" for key in ("peak_megabytes", "largest_megabytes", "upload_bytes")]
        scores = side.get("accuracy") or side.get("held_out_loss") or side["losses"]
        cells = "".join(f"{cell:>11s}" for cell in [*times, *rates, share, *sizes])
        print(f"{name:22s}{cells}  {' '.join(f'{score:.3f}' for score in scores)}")
    for theirs in figures["ratios"]:
        for of, ratios in (("second", figures["ratios"][theirs]), ("CPU second", figures["cpu_ratios"][theirs])):
            ours = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name in OURS)
            if ours:
                print(f"times as many examples a {of} as {theirs}: {ours}")
    for name, found in figures["one_thread"].items():
        print(
            f"one thread of {name}, {'packed' if found['packed'] else 'padded'}, {found['dtype']}: "
            f"{found['tokens_per_second']:,.0f} tokens/s, {found['gflops']:.0f} GFLOP/s, "
            f"{found['share_of_product']:.2f} of the {found['product_gflops']:.0f} of such a product; "
            + ", ".join(f"{kind} {share:.0%}" for kind, share in found["work"].items())
        )
