"""The door of `fedlotr export RUN --to peft|merged|card|hub`: a run's model, for others."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedlotr.commands.door import fail, note, refuse, whole_number
from fedlotr.errors import FedlotrError, InputError

KINDS = ("peft", "merged", "card", "hub")


def parser() -> argparse.ArgumentParser:
    """Of the command's words."""
    found = argparse.ArgumentParser(
        prog="fedlotr export",
        description="Hand a run's model on, with a model card, and without any path of this machine: the adapter, "
        "weights that it is merged into, the card alone, or the adapter as a repository on the Hugging Face hub.",
    )
    found.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, such as runs/NAME")
    found.add_argument("--to", required=True, choices=KINDS, help="what it is handed on as")
    found.add_argument("--out", metavar="FOLDER", type=Path, help="a new folder (default: RUN/export/KIND)")
    found.add_argument(
        "--round",
        metavar="N",
        type=whole_number(1),
        help="as it was after that round: of a checkpoint, or of --adapter-every",
    )
    found.add_argument(
        "--rank",
        metavar="R",
        type=whole_number(1),
        help="at most that rank in each layer, by singular values; the error is said",
    )
    found.add_argument(
        "--uniform-rank",
        action="store_true",
        help="one rank for all layers (zeros), for converters that know no others",
    )
    found.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of merged weights (default: float32, which gives the run's logits)",
    )
    found.add_argument("--base", metavar="ID", help="what the base is called elsewhere, such as its id on the hub")
    found.add_argument("--repo", metavar="ORG/NAME", help="with --to hub: the repository, made where there is none")
    found.add_argument("--public", action="store_true", help="with --to hub: make it a public one (default: private)")
    found.add_argument("--model", metavar="PATH", help="where the base lies now, if it has moved")
    found.add_argument("--data", metavar="PATH", help="where the data lie now, if they have moved (with --round)")
    return found


def main(argv: Sequence[str]) -> int:
    """Write the folder, or push it, and print where it is; exit code 0, 1 where that fails, or 2 for a mistake."""
    try:
        given = parser().parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    if problems := _problems(given):
        return refuse(problems)
    # Here, not above: it loads torch.
    from fedlotr.run.handover import Wanted, handed_over, keep
    from fedlotr.run.hub import push
    from fedlotr.said import hearing

    ending = "" if given.round is None else f"-round-{given.round}"
    out = given.out or given.run / "export" / f"{given.to}{ending}"
    beside = Path(tempfile.gettempdir()) if given.to == "hub" else out.parent
    wanted = Wanted(
        run=given.run,
        to=given.to,
        number=given.round,
        rank=given.rank,
        uniform=given.uniform_rank,
        dtype=given.dtype or "float32",
        base=given.base,
        model=given.model,
        data=given.data,
    )
    try:
        with hearing(note), handed_over(wanted, beside) as (folder, notes):
            for line in notes:
                note(line)
            if given.to == "hub":
                print(push(folder, given.repo, private=not given.public))
            else:
                keep(folder, out)
                print(out)
    except InputError as error:
        return refuse(error.problems)
    except (FedlotrError, OSError) as error:
        return fail(error)
    return 0


def _problems(given: argparse.Namespace) -> list[str]:
    """Words that do not go together."""
    found = []
    if given.to == "hub" and given.repo is None:
        found.append("--to hub: name the repository, by --repo ORG/NAME")
    if given.to == "hub" and given.out is not None:
        found.append("--out: nothing stays here with --to hub; leave it out")
    if given.to != "hub" and (given.repo is not None or given.public):
        found.append("--repo, --public: they are for --to hub")
    if given.to != "merged" and given.dtype is not None:
        found.append("--dtype: it is of merged weights; give --to merged")
    if given.to == "merged" and given.uniform_rank:
        found.append("--uniform-rank: merged weights have no rank; leave it out")
    if (
        given.to != "hub"
        and given.out is not None
        and given.out.exists()
        and (not given.out.is_dir() or any(given.out.iterdir()))
    ):
        found.append(f"--out {given.out}: there is something already; remove it, or give another folder")
    return found
