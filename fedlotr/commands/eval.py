"""The door of `fedlotr eval RUN --tasks ...`: EleutherAI's harness on a run's language model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlotr.commands.door import fail, note, refuse, whole_number
from fedlotr.errors import FedlotrError, InputError


def parser() -> argparse.ArgumentParser:
    """Of the command's words."""
    found = argparse.ArgumentParser(
        prog="fedlotr eval",
        description="Score a run's language model by EleutherAI's lm-evaluation-harness (pip install 'fedlotr[eval]'). "
        "The scores are printed, and written into RUN/eval.",
    )
    found.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, such as runs/NAME")
    found.add_argument(
        "--tasks", metavar="T1,T2", required=True, help="tasks of the harness, by name or pattern; or files: mine.yaml"
    )
    found.add_argument("--include", metavar="FOLDER", type=Path, help="a folder with task files of your own")
    found.add_argument(
        "--round",
        metavar="N",
        type=whole_number(0),
        help="the model as it was after that round (0: the base, untrained)",
    )
    found.add_argument("--num-fewshot", metavar="N", type=whole_number(0), help="examples before each question")
    found.add_argument("--limit", metavar="N", type=whole_number(1), help="at most so many questions of each task")
    found.add_argument("--batch-size", metavar="N", type=whole_number(1), default=8, help="(default: 8)")
    found.add_argument("--apply-chat-template", action="store_true", help="ask through the tokenizer's chat template")
    found.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    found.add_argument("--model", metavar="PATH", help="where the base lies now, if it has moved")
    found.add_argument("--data", metavar="PATH", help="where the data lie now, if they have moved (with --round)")
    return found


def main(argv: Sequence[str]) -> int:
    """Score, print the table, and where its file is; exit code 0, 1 where that fails, or 2 for a mistake."""
    try:
        given = parser().parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    tasks = tuple(filter(None, map(str.strip, given.tasks.split(","))))
    if not tasks:
        return refuse(["--tasks: no task is named"])
    # Here, not above: it loads torch.
    from fedlotr.run.harness import Exam, aligned, examine, table
    from fedlotr.said import hearing

    exam = Exam(
        tasks=tasks,
        include=given.include,
        number=given.round,
        fewshot=given.num_fewshot,
        limit=given.limit,
        batch_size=given.batch_size,
        chat=given.apply_chat_template,
        dtype=given.dtype,
        model=given.model,
        data=given.data,
    )
    try:
        with hearing(note):
            told, path = examine(given.run, exam)
    except InputError as error:
        return refuse(error.problems)
    except (FedlotrError, OSError) as error:
        return fail(error)
    print(aligned(table(told)))
    print(path, file=sys.stderr)
    return 0
