"""A run's language model scored by EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The model is the base with the run's adapter merged into it, in this process, so tasks are scored as the harness scores
any model of transformers; tasks are the harness's own, or YAML files, which need no network where their data are local.
"""

import logging
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlotr.errors import FedlotrError, InputError, closest, shorten
from fedlotr.files import as_json, write_atomically
from fedlotr.models.source import first_line
from fedlotr.reporting.run_record import read_run
from fedlotr.run.merged import Merged, merge
from fedlotr.run.rebuilt import adapter_of, configuration_of, round_of

EXTRA = "EleutherAI's harness is not installed: pip install 'fedlotr[eval]'"
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The harness's own."""
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Exam:
    """What is asked of a run's model.

    tasks: names, patterns of names, or YAML files. include: a folder of such files. number: the round (None: the last,
    0: the base as it is). fewshot: examples before each question (None: as each task says). limit: questions a task.
    chat: whether questions go through the tokenizer's chat template. dtype: of the weights. model, data: where these
    lie now.
    """

    tasks: tuple[str, ...]
    include: Path | None = None
    number: int | None = None
    fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    chat: bool = False
    dtype: str = "float32"
    model: str | None = None
    data: str | None = None


def examine(run: Path, exam: Exam) -> tuple[dict[str, Any], Path]:
    """Score a run's model; what came of it, and the file in the run's folder that holds it.

    Raises InputError for what is no run of a language model, an unknown task, or without the harness; FedlotrError
    where a task's data cannot be fetched.
    """
    try:
        import lm_eval.evaluator
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise InputError(EXTRA) from error
    config, record = configuration_of(run, exam.model, exam.data), read_run(run)
    if record.facts.get("task") != "causal-lm":
        raise InputError(f"{shorten(run)}: the harness asks language models, and this run's is none")
    number = round_of(record, exam.number)
    for module, seed in ((random, SEEDS["random"]), (np.random, SEEDS["numpy"])):
        module.seed(seed)
    torch.manual_seed(SEEDS["torch"])
    for noisy in ("lm_eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    tasks = load_tasks(exam)
    with tempfile.TemporaryDirectory(prefix="fedlotr-", ignore_cleanup_errors=True) as place:
        adapter = None if exam.number == 0 else adapter_of(run, config, exam.number, Path(place))
        found = merge(adapter, config.model, "causal-lm", config.quantize)
    if exam.chat and found.tokenizer.chat_template is None:
        raise InputError("--apply-chat-template: the model's tokenizer has no chat template; leave it out")
    scores = lm_eval.evaluator.evaluate(
        lm=_asked(found, exam),
        task_dict=tasks,
        limit=exam.limit,
        apply_chat_template=exam.chat,
        fewshot_as_multiturn=exam.chat,
        log_samples=False,
    )
    told = {
        "round": number,
        "method": config.method,
        "settings": {
            "num_fewshot": exam.fewshot,
            "limit": exam.limit,
            "apply_chat_template": exam.chat,
            "dtype": exam.dtype,
            "seeds": SEEDS,
        },
        **{key: scores[key] for key in ("results", "n-samples", "n-shot", "versions", "higher_is_better")},
        "lm_eval": version("lm_eval"),
    }
    path = run / "eval" / f"{_file_name(exam.tasks)}-round-{number}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, as_json(told, indent=1, default=str) + "\n")
    return told, path


def _asked(found: Merged, exam: Exam) -> Any:
    from lm_eval.models.huggingface import HFLM

    model = found.model.to(getattr(torch, exam.dtype))
    return HFLM(pretrained=model, tokenizer=found.tokenizer, backend="causal", batch_size=exam.batch_size)


def load_tasks(exam: Exam) -> Any:
    """The harness's own objects. Raises InputError or FedlotrError as `examine` does."""
    from lm_eval.tasks import TaskManager

    if exam.include is not None and not exam.include.is_dir():
        raise InputError(f"--include {shorten(exam.include)}: there is no such folder")
    include = None if exam.include is None else str(exam.include)
    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(task.endswith(YAML) or manager.match_tasks([task]) for task in exam.tasks):
        manager = TaskManager(include_path=include)  # reads thousands of files
    names, problems = [], []
    for task in exam.tasks:
        if task.endswith(YAML):
            names.append(task)
            problems += [] if Path(task).is_file() else [f"--tasks {shorten(task)}: there is no such file"]
        elif matching := manager.match_tasks([task]):
            names += matching
        else:
            near = closest(task, manager.all_tasks)
            hint = f"did you mean '{near}'?" if near else "'lm-eval ls tasks' lists them"
            problems.append(f"--tasks {shorten(task)}: the harness knows no such task; {hint}")
    if problems:
        raise InputError(problems)
    asked = f"--tasks {shorten(','.join(exam.tasks))}"
    try:
        loaded = manager.load(names)
    except ConnectionError as error:
        raise FedlotrError(
            f"{asked}: its data cannot be fetched ({first_line(error)}); tasks from files (task.yaml, whose data_files "
            "lie here) need no network"
        ) from error
    except Exception as error:  # whatever a task's file, its code or its data raise
        raise InputError(f"{asked}: cannot be loaded ({first_line(error)})") from error
    for task in loaded["tasks"].values():
        usual = task.get_config("num_fewshot")
        if usual is None or (exam.fewshot is not None and usual != 0):  # a task of none by its own file stays so
            task.set_config(key="num_fewshot", value=exam.fewshot or 0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    return loaded


def table(told: Mapping[str, Any]) -> list[list[str]]:
    """Rows for people: task, metric, value, its standard error, questions; a head first."""
    rows = [["task", "metric", "value", "± standard error", "questions"]]
    for task, scores in told["results"].items():
        count = str((told["n-samples"].get(task) or {}).get("effective", ""))
        for key, value in scores.items():
            name, comma, kept = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{name}_stderr,{kept}")
            metric = name if kept == "none" else f"{name} ({kept})"
            rows.append([str(task), metric, f"{value:.4f}", _number(error), count])
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """As lines, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(error: object) -> str:
    return f"{error:.4f}" if isinstance(error, int | float) else "–"


def _file_name(tasks: Sequence[str]) -> str:
    """What a file of these tasks' results is called: their names, or the first of many."""
    names = [re.sub(r"[^\w.-]+", "_", Path(task).stem if task.endswith(YAML) else task) for task in tasks]
    name = "+".join(names)
    return name if len(name) <= 80 else f"{names[0][:60]}+{len(names) - 1}-more"
