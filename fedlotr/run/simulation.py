"""One run from its configuration to its directory: check, prepare, the rounds, the summary, the adapter."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from threadpoolctl import threadpool_limits
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedlotr.adapters.kinds import bases_made_of
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.quantised import check_quantiser
from fedlotr.communication.links import read_links
from fedlotr.config.configuration import SimulationConfig, dump_yaml, preflight_paths
from fedlotr.config.own import PREFIX
from fedlotr.data import OwnData, OwnTask, Source
from fedlotr.engines import CohortRule, LocalGrid
from fedlotr.engines.base import Engine
from fedlotr.engines.endings import held_back
from fedlotr.engines.flower import FlowerGrid
from fedlotr.errors import InputError, shorten
from fedlotr.flower.chain import in_words
from fedlotr.flower.client_app import WORK, worker
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.workplace import Workplace
from fedlotr.models.precision import measured_dtype, repeatable
from fedlotr.reporting.callbacks import Callbacks, FinishEvent, StartEvent
from fedlotr.reporting.console import FORMS, Console, readable_bytes
from fedlotr.reporting.documents import MetricsRow, Summary
from fedlotr.reporting.loggers import missing_packages, open_loggers, unusable
from fedlotr.run.baselines import strategy_of
from fedlotr.run.brought import NOTHING_BROUGHT, Brought
from fedlotr.run.callbacks import Audience
from fedlotr.run.checking import Checked, check
from fedlotr.run.devices import device_of, device_problems, gpus, workers_on
from fedlotr.run.directory import RunDirectory
from fedlotr.run.federation import fleet_of, staleness_of
from fedlotr.run.log import log_to
from fedlotr.run.preparation import prepare
from fedlotr.run.privacy_plan import EXAMPLE_BOUND, check_delta, example_noise, guard_of
from fedlotr.run.processes import CLIENT_APP, threads_of
from fedlotr.run.resumption import continue_from, saved_configuration
from fedlotr.run.rounds import Rounds
from fedlotr.run.shown import shown_examples
from fedlotr.run.summary import facts
from fedlotr.run.unmet import USUAL, feedback, unmet, unmet_links, usual_codecs
from fedlotr.run.world import leaving_no_trace
from fedlotr.said import hearing, keeping, say
from fedlotr.training.cohort import cut_cohorts

if TYPE_CHECKING:
    from fedlotr.engines.head_start import HeadStart

log = logging.getLogger("fedlotr")


@dataclass(frozen=True)
class SimulationResult:
    """What a finished run came to: summary.json, the rows of metrics.jsonl, and where the rest lies."""

    summary: Summary
    history: list[MetricsRow]
    run_dir: Path

    def __repr__(self) -> str:
        told, metric = self.summary, self.summary["metric"]
        value = "none" if self.metric is None else FORMS.get(metric, FORMS["accuracy"]).format(self.metric)
        sent = told["communication"]["total_wire_bytes"]  # not told where whole clients are hidden
        wire = "" if sent is None else f", {readable_bytes(sent)} on the wire"
        return (
            f"SimulationResult({told['method']} on {shorten(told['data'])}, {told['rounds']} rounds: {metric} {value}"
            f"{wire}, in {shorten(self.run_dir)})"
        )

    @property
    def accuracy(self) -> float | None:
        """On the held-out examples after the last round; None where labels are no classes."""
        accuracy: float | None = self.summary["final"].get("accuracy")
        return accuracy

    @property
    def metric(self) -> float | None:
        """After the last round, by the task's own metric where it has one, else by that of its kind."""
        metric: float | None = self.summary["final"][self.summary["metric"]]
        return metric

    @property
    def loss(self) -> float:
        """On the held-out examples after the last round; NaN where it is not finite."""
        found = self.summary["final"]["loss"]
        return float("nan") if found is None else float(found)


EngineMaker = Callable[[SimulationConfig, Path], AbstractContextManager[Engine | FlowerGrid]]
"""From the resolved configuration and the workplace's folder to an engine, closed at the end of the run."""


@leaving_no_trace
def run_simulation(
    config: SimulationConfig,
    *,
    quiet: bool = False,
    console: Console | None = None,
    engine: EngineMaker | None = None,
    start: str | None = None,
    head_start: "HeadStart | None" = None,
    data: OwnData | str | PathLike[str] | None = None,
    model: tuple[PreTrainedModel, PreTrainedTokenizerBase] | PathLike[str] | None = None,
    task: OwnTask | None = None,
    callbacks: Callbacks | Iterable[Callbacks] = (),
) -> SimulationResult:
    """Run a simulation and leave its run directory.

    data: a data set of one's own instead of what `config.data` names: a `datasets.DatasetDict`, or a mapping of splits
    ("train", and "test" or another of the usual names) to rows, each a mapping of column to value; or to tables of
    pandas or pyarrow, or columns by name. A name or a path stands in for `config.data`.
    model: a path in place of `config.model`, or a model object and its tokenizer, instead of what `config.model` names:
    a `PreTrainedModel`, as its class makes it of its configuration; the class is part of transformers or lies in a
    module that workers can import.
    task: what is learnt from the rows and how it is measured, instead of what `config.task` names.
    quiet: show nothing, as with `config.quiet`; otherwise a run shows what it does, on standard error or in the
    notebook's cell.
    console: a display of one's own making instead.
    callbacks: one or more, told of every client, evaluation and round; one that raises ends the run (CallbackError).
    engine, start: where a ServerApp has been given Flower's grid, and the run's id there (default: an engine of ours).
    head_start: workers that are starting already, for an engine of ours.

    Raises InputError for a bad configuration or input, before anything heavy starts; FedlotrError where the run
    cannot go on; finished rounds stay on disk, also after a KeyboardInterrupt, which SIGTERM and SIGHUP raise too.
    Generators, environment, handlers and what else a process has are afterwards as they were (`fedlotr.run.world`).
    """
    config, own_data, own_model = _named(config, data, model)
    with console or Console(quiet=quiet or config.quiet) as display, _place_for(own_model) as place:
        started = time.monotonic()
        display.stage("checking the configuration, reading the data")
        audience = Audience([display], callbacks)
        own = Brought(own_data, own_model, task, place)
        problems = problems_at_the_door(config, brings_engine=engine is not None, brought=own.fields)
        if problems:
            raise InputError(problems)
        with keeping() as said:
            checked, strategy = check_all(resolve(config), brought=own)
        name = f"{config.method}-{checked.source.name}-{config.seed}".replace(PREFIX, "own-")
        directory = RunDirectory.create(checked.config.out, name, start)
        make = engine or partial(_engine, head_start=head_start)
        return _run_in(directory, checked, said, strategy, make, audience, display, started)


def _named(config: SimulationConfig, data: Any, model: Any) -> tuple[SimulationConfig, Any, Any]:
    """With what names data or a model in the configuration, and no more among what the caller brings."""
    if isinstance(data, str | PathLike):
        config, data = config.model_copy(update={"data": str(data)}), None
    if isinstance(model, PathLike):
        config, model = config.model_copy(update={"model": str(model)}), None
    return config, data, model


def _run_in(
    directory: RunDirectory,
    checked: Checked,
    said: Sequence[str],
    strategy: FlowerStrategy,
    make: EngineMaker,
    audience: Audience,
    display: Console,
    started: float,
) -> SimulationResult:
    """A run whose configuration is checked, in its directory. said: what the user must know of what was checked."""
    config = checked.config
    with ExitStack() as stack:
        stack.enter_context(directory.explaining())
        stack.enter_context(log_to(directory.log))
        heard = stack.enter_context(hearing(display.warn))
        directory.remove_work()  # what a run that was killed has left
        stack.callback(held_back()(directory.remove_work))
        checkpoint = None
        if config.resume:
            checkpoint = continue_from(directory, config, checked.contents)
        else:
            dump_yaml(config, directory.path / "config.yaml")
        finished = 0 if checkpoint is None else checkpoint.round
        display.begin(directory.path, finished)
        for line in said:
            say(line)
        for line in shown_examples(checked, config.show_examples):
            display.show(line)
        mark = None if checkpoint is None else checkpoint.extra.get("privacy")
        guard = guard_of(checked, directory.path, mark, display.stage)
        stack.enter_context(limited_threads(config.threads))
        stack.enter_context(repeatable(config.device))
        grid = stack.enter_context(make(config, directory.work))
        display.stage("tokenising, fitting the head, making the bases")
        prepared = prepare(
            checked.in_place(directory.work.absolute()), directory.work.absolute(), example_noise(config, guard)
        )
        known = facts(prepared, guard.in_words())
        directory.write_facts(known)
        run = Rounds(config, prepared, directory, grid, started, audience, guard, heard)
        chain = in_words(run.federation, prepared.workplace, prepared.model)
        audience.tell(StartEvent(finished, config, {**known, "chain": chain}))
        state = run.begin(strategy, checkpoint)
        loggers = open_loggers(config.loggers, directory.path, config.reported(), run.history)
        audience.own.append(stack.enter_context(loggers))
        dump_yaml(config, directory.path / "config.yaml")  # again: a run that goes on may have more rounds
        summary = run.run(strategy, state)
        _report(directory.path)
        audience.tell(FinishEvent(state.round, summary))
    return SimulationResult(summary, run.history, directory.path)


def _report(folder: Path) -> None:
    """Leave report.html; the run is done, and what goes wrong here is no reason to call it failed."""
    try:
        from fedlotr.reporting.report import write_report

        write_report(folder)
    except Exception as error:
        log.info("report.html", exc_info=True)
        say(f"report.html could not be made ({error}); 'fedlotr report {folder}' tries again")


@contextmanager
def _place_for(model: object) -> Iterator[Path]:
    """Where a caller's own model is kept until the run has a folder: nowhere, where there is none."""
    if model is None:
        yield Path()
    else:
        with TemporaryDirectory(prefix="fedlotr-", ignore_cleanup_errors=True) as folder:
            yield Path(folder) / "model"


def problems_at_the_door(
    config: SimulationConfig, *, brings_engine: bool = False, brought: Collection[str] = ()
) -> list[str]:
    """What keeps a valid configuration from being run here, before anything is loaded; each one line.

    brought: fields for which the caller has something of their own.
    """
    problems = preflight_paths(config, brought)
    if config.engine == "flower" and not brings_engine:
        problems.append("--engine flower: Flower starts that engine, by 'flwr run .'; choose ray or local")
    problems += [*missing_packages(config.loggers), *unusable(config.loggers, config.out), *device_problems(config)]
    if config.quantize != "none":
        try:
            check_quantiser(config.quantize, device_of(config) if gpus() else "cpu")
        except ValueError as error:
            problems.append(
                f"--quantize {config.quantize}: {error}; install it (pip install 'fedlotr[quantized]'), or leave it out"
            )
    return problems


@leaving_no_trace
def check_all(
    config: SimulationConfig,
    wrong: Collection[str] = (),
    brought: Brought = NOTHING_BROUGHT,
    *,
    source: Source | None = None,
) -> tuple[Checked, FlowerStrategy]:
    """The data, the model and the strategy that a configuration names; nothing heavy has happened yet.

    wrong, data, source: as for `check`. Raises InputError with all mistakes.
    """
    problems: list[str] = []
    checked = None
    strategy: FlowerStrategy | None = None
    try:
        checked = check(config, wrong, brought, source=source)
    except InputError as error:
        problems += error.problems
    if not {"strategy", "strategy_arg", "strategy" if config.strategy else "method"}.intersection(wrong):
        name = config.strategy or METHODS[config.method].strategy
        try:
            if config.baseline is not None:
                strategy = strategy_of(config.baseline)
            else:
                strategy = load_strategy(
                    name, config.strategy_arg, config.clients_per_round, config.seed, clients=config.clients
                )
                problems += unmet(strategy, config)
        except InputError as error:
            problems += error.problems
    if "add_link" not in wrong:
        problems += unmet_links(config)
    if config.link is not None and "link" not in wrong:
        try:
            read_links(config.link, config.clients, config.seed)
        except InputError as error:
            problems += error.problems
    if config.virtual and not {"link", "fleet", "staleness"}.intersection(wrong):
        for read in (fleet_of, staleness_of):
            try:
                read(config)
            except InputError as error:
                problems += [problem for problem in error.problems if problem not in problems]
    if checked is not None:
        problems += check_delta(checked)
    if problems or checked is None or strategy is None:
        raise InputError(problems)
    known = checked.config.model_copy(update=usual_codecs(strategy, config))
    if config.error_feedback and not known.coding.update.lossy:
        raise InputError(f"--error-feedback: updates travel as {known.codec} here, which loses nothing; give --codec")
    return replace(checked, config=known.model_copy(update={"error_feedback": feedback(strategy, known)})), strategy


def resolve(config: SimulationConfig) -> SimulationConfig:
    """Put in what the method and this machine decide where the configuration leaves it open.

    A run that is continued keeps the device, the number format and the threads that were found for it.
    """
    row = METHODS[config.method]
    before = saved_configuration(config.out) if config.resume and config.out is not None else None
    resolved: dict[str, Any] = {"strategy": None if config.baseline else config.strategy or row.strategy}
    resolved["lr"] = config.lr if config.lr is not None else row.lr
    resolved["weights"] = config.weights or ("uniform" if config.privacy == "client" else "examples")
    if config.privacy == "example":
        resolved["clip_norm"] = config.clip_norm or EXAMPLE_BOUND
    resolved["client_eval"] = config.client_eval if config.client_eval is not None else 0.2 if row.personal else 0.0
    resolved["head_lr"] = config.head_lr if config.head_lr is not None else row.head_lr
    if "D" in row.train and config.cohort == "auto":
        resolved["cohort"] = 1  # each client of a cohort would have its own copy of the matrices for each example
    resolved["rebase"] = config.rebase or row.rebase
    if before is not None:
        resolved |= {name: getattr(config, name) or getattr(before, name) for name in USUAL}
    if row.factored:
        resolved |= {"basis": config.basis or row.basis, "tie": config.tie or row.tie, "core": config.core or row.core}
        of_gradient = config.basis is None and row.basis_kind().made_of == "gradient"
        if of_gradient and config.privacy != "none" and config.public_data is None:
            resolved["basis"] = bases_made_of("weights")[0]  # of private data no gradient is to be had
    if config.device == "auto" and before is not None:
        config = config.model_copy(update={"device": before.device})
        if config.device == "cuda" and not gpus():
            raise InputError(
                f"--resume: the run in {config.out} was begun on a GPU, and torch sees none here; go on where there is "
                "one, or start a new run with another --out"
            )
    device = resolved["device"] = device_of(config)
    if config.engine == "ray":
        resolved["workers"] = workers_on(config, device)
    if config.dtype == "auto":
        resolved["dtype"] = before.dtype if before is not None else measured_dtype(device)
    if config.threads is None:
        resolved["threads"] = before.threads if before is not None else threads_of(config)
    return config.model_copy(update=resolved)


@contextmanager
def _engine(config: SimulationConfig, work: Path, head_start: "HeadStart | None" = None) -> Iterator[Engine]:
    """Start the engine, whose workers load their libraries while the server prepares; close it whatever happens."""
    workplace = Workplace(work.absolute())
    size = None if config.cohort == "auto" else config.cohort

    def cohorts(clients: Sequence[int]) -> list[list[int]]:
        return [list(clients[piece]) for piece in cut_cohorts(workplace.step_tokens(clients), size)]

    rule: CohortRule = cohorts
    run_config: Any = {WORK: str(workplace.folder)}
    assert config.threads is not None
    common: dict[str, Any] = {
        "run_config": run_config,
        "cohorts": rule,
        "threads": config.threads,
        "spill": workplace.folder,
    }
    if config.engine == "local":
        grid: Engine = LocalGrid(CLIENT_APP, config.clients, **common)
    else:
        from fedlotr.engines import RayGrid

        assert config.workers is not None
        share = (config.workers_per_gpu or 1) if config.device == "cuda" else None
        common |= {"workers": config.workers, "workers_per_gpu": share, "address": config.ray_address}
        grid = RayGrid(CLIENT_APP, config.clients, head_start=head_start, **common)
    try:
        yield grid
    finally:
        grid.close()
        worker.cache_clear()  # the local engine's


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Compute in this process with so many threads: the server's own share of the work has a worker's bits too.

    numpy's products of small matrices get one: beside other work its threads wait for each other, and a decomposition
    of the certificate took 40 times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
