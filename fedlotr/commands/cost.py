"""`fedlotr cost --model NAME [options]`: the bill of a model before any run, for every method and strategy."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.moves import read_rebase
from fedlotr.commands.door import refuse
from fedlotr.communication.links import CUSTOM, PROFILES, read_link
from fedlotr.communication.wire_form import Coding, check_basis_codec, check_broadcast_codec, check_codec
from fedlotr.config.values import read_patterns
from fedlotr.errors import InputError, nearest, shorten
from fedlotr.models.kinds import TASK_KINDS

DONE = 0


def main(argv: Sequence[str]) -> int:
    """Print the table, JSON or CSV; exit code 0, or 2 for what the user can mend."""
    try:
        given = _parser().parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    try:
        _print(given)
    except InputError as error:
        return refuse(error.problems)
    return DONE


def _print(given: argparse.Namespace) -> None:
    methods = given.methods.split(",") if given.methods else list(METHODS)
    problems = [f"--methods {name}: no such method{nearest(name, METHODS)}" for name in methods if name not in METHODS]
    numbers = {"rank": given.rank, "lora-rank": given.lora_rank, "clients": given.clients, "rounds": given.rounds}
    numbers |= {"labels": given.labels}
    problems += [
        f"--{name} {value}: expected 1 or more" for name, value in numbers.items() if value is not None and value < 1
    ]
    for option, check in (
        ("codec", check_codec),
        ("broadcast-codec", check_broadcast_codec),
        ("basis-codec", check_basis_codec),
    ):
        try:
            check(vars(given)[option.replace("-", "_")])
        except ValueError as error:
            problems.append(f"--{option} {vars(given)[option.replace('-', '_')]}: {error}")
    patterns: dict[str, int] = {}
    for words in given.rank_pattern:
        try:
            read = read_patterns(words)
        except ValueError as error:
            problems.append(f"--rank-pattern {shorten(words)}: {error}")
            continue
        whole = {name: int(rank) for name, rank in read.items() if str(rank).isdecimal() and int(rank)}
        problems += [f"--rank-pattern {shorten(words)}: expected a whole number of 1 or more"] * (not whole)
        patterns |= whole
    moves = None
    if given.rebase is not None:
        try:
            moves = read_rebase(given.rebase)
        except ValueError as error:
            problems.append(f"--rebase {shorten(given.rebase)}: {error}")
    if given.derive_bases is not None and given.derive_bases < 1:
        problems.append(f"--derive-bases {given.derive_bases}: expected the bytes of the public rows, 1 or more")
    try:
        link = read_link(given.link)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    # Here, not above: they load torch and transformers.
    from fedlotr.cost.architectures import read_architecture
    from fedlotr.cost.billing import Row, bills, fedit, rank_of, ranked
    from fedlotr.cost.formulas import Shapes
    from fedlotr.reporting.bill import WIDTH, Quote, as_csv, as_json, as_table
    from fedlotr.reporting.fitting import columns_of

    kind: Any = None if given.task == "auto" else given.task
    labels = 1 if kind is not None and TASK_KINDS[kind].scale else given.labels
    architecture = read_architecture(given.model, kind, labels, given.targets)
    ranks = (given.rank, given.lora_rank or given.rank)
    coding = Coding(given.codec, given.broadcast_codec, basis_codec=given.basis_codec)
    shapes: Sequence[Shapes] = [architecture, architecture]
    if patterns or given.cap_rank:
        shapes = [ranked(architecture, rank, patterns, cap=given.cap_rank) for rank in ranks]
    of_methods = {name: shapes[ranks.index(rank_of(METHODS[name], ranks))] for name in methods}
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for made in dict.fromkeys(of_methods.values()):
        alike = [name for name in methods if of_methods[name] is made]
        more, left = bills(
            *(made, alike, ranks, given.clients, given.rounds, coding), rebase=moves, public=given.derive_bases
        )
        rows, left_out = rows + more, left_out | left
    against = fedit(shapes[1], ranks[1], given.clients, given.rounds)
    quote = Quote(given.model, architecture, rows, left_out, against, link, coding, given.rebase, given.derive_bases)
    form = as_json if given.json else as_csv if given.csv else None
    print(as_table(quote, columns_of(sys.stdout, WIDTH)) if form is None else form(quote), end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedlotr cost",
        description="The bill of a model before any run, without its weights: numbers trained and bytes sent by every "
        "method and strategy. Bytes are payload, numbers times 4 or as coded; clients take part in every round.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=110),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|PATH|ID", help="mistral-7b and other public models whose dimensions "
        "come along; a folder with config.json; a GGUF file; or a hub id, whose config.json alone is read")  # fmt: skip
    add("--task", choices=("auto", *TASK_KINDS), default="auto", help="what the model is for "
        "(default: what its configuration says)")  # fmt: skip
    add("--labels", type=int, default=2, help="classes of a classifier (default: 2)")
    add(
        "--targets",
        default="all-linear",
        metavar="all-linear|NAME,NAME|REGEX",
        help="layers to adapt (default: all-linear)",
    )
    add("--methods", metavar="NAME,NAME", help="only these methods (default: all)")
    add("--rank", type=int, default=16, help="of cores (default: 16)")
    add("--lora-rank", type=int, help="of methods that train A or B (default: that of --rank)")
    add("--rank-pattern", action="append", default=[], metavar="REGEX=RANK", help="rank of the layers whose names end "
        "so, as in a run; may be repeated")  # fmt: skip
    add("--cap-rank", action="store_true", help="give narrow layers the largest rank that they have room for")
    add("--clients", type=int, default=10, help="clients a round (default: 10)")
    add("--rounds", type=int, default=10, help="rounds (default: 10)")
    add("--codec", default="float32", metavar="KIND[:DENSITY][+zstd]", help="of updates, as in a run "
        "(default: float32)")  # fmt: skip
    add("--broadcast-codec", default="float32", metavar="[delta+]KIND[:DENSITY][+zstd]", help="of broadcasts, as in a "
        "run (default: float32)")  # fmt: skip
    add("--basis-codec", default="int2", metavar="KIND[+zstd]", help="of bases that are sent, as in a run "
        "(default: int2)")  # fmt: skip
    add("--rebase", metavar="T[:HOW]", help="how bases move, as in a run, of methods that can (default: they stay, but "
        "for methods that always move)")  # fmt: skip
    add("--derive-bases", type=int, metavar="BYTES", help="clients make bases of gradients by themselves, of public "
        "rows of so many bytes (two a token, and a few a row; doctor knows a run's)")  # fmt: skip
    add("--link", default="broadband", metavar="NAME|RATES", help=f"{', '.join(PROFILES)}, or {CUSTOM} "
        "(default: broadband)")  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--csv", action="store_true", help="a line a row")
    return parser
