"""One run from its configuration to its directory: check, prepare, the rounds, the summary, the adapter."""

import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.tuner import bases_of, factored_layers
from fedlotr.baselines import Alone, over_clients, strategy_of, without_wire
from fedlotr.brought import NOTHING_BROUGHT, Brought
from fedlotr.callbacks import Audience, Callbacks
from fedlotr.communication import read_ledger, write_part
from fedlotr.communication.ledger import Entry
from fedlotr.configuration import SimulationConfig, dump_yaml, preflight_paths
from fedlotr.data import OwnData, OwnTask, Source, measure
from fedlotr.engines import CohortRule, LocalGrid
from fedlotr.engines.base import Engine
from fedlotr.engines.flower import FlowerGrid
from fedlotr.errors import InputError
from fedlotr.flower.carried import restored, saved
from fedlotr.flower.certificate import Layer
from fedlotr.flower.client_app import WORK, worker
from fedlotr.flower.loop import Federation, Round, State, blaming, evaluate, run_round
from fedlotr.flower.personal import evaluate_clients, personal
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.ranks import client_ranks
from fedlotr.flower.records import bases_record, derivable_record, to_record, to_tensors
from fedlotr.flower.state import load_clients, load_strategy_state, save_clients, save_strategy
from fedlotr.flower.workplace import Workplace
from fedlotr.handover import OwnBase, write_adapter
from fedlotr.own import PREFIX
from fedlotr.preparation import Checked, Prepared, check, prepare
from fedlotr.reporting.console import Console
from fedlotr.resumption import check_model, continue_from, fixed_values, saved_configuration
from fedlotr.run_directory import Checkpoint, RunDirectory
from fedlotr.run_log import log_to
from fedlotr.summary import facts, metrics_of, summarise
from fedlotr.training.cohort import cut_cohorts
from fedlotr.training.models import TrainableModel
from fedlotr.training.precision import measured_dtype

log = logging.getLogger("fedlotr")

CLIENT_APP = "fedlotr.flower.client_app:app"
DERIVABLE = ("random", "svd", "lora", "nystrom", "ldu", "tucker")
"""Bases that a client makes again from the seed or from W, and so costs a seed and a hash instead of the factors."""
NO_CLIENT_STATE = (
    "Flower does not show what its clients keep between rounds, so no checkpoint could hold it; choose ray or local"
)
SHARED_ALONE = (
    "It holds what the clients share; the factors that stay with each of them are here as before any training. "
    "`--client-adapters` writes one of every client."
)
LR_FACTORS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the run's rounds that are done -> what the learning rates are multiplied by."""


@dataclass(frozen=True)
class SimulationResult:
    """What a finished run came to: summary.json, the rows of metrics.jsonl, and where the rest lies."""

    summary: dict[str, Any]
    history: list[dict[str, Any]]
    run_dir: Path

    @property
    def accuracy(self) -> float | None:
        """On the held-out examples after the last round; None for a language model."""
        accuracy: float | None = self.summary["final"].get("accuracy")
        return accuracy

    @property
    def metric(self) -> float | None:
        """After the last round, by the task's own metric where it has one, else as accuracy or perplexity."""
        metric: float | None = self.summary["final"][self.summary["metric"]]
        return metric

    @property
    def loss(self) -> float:
        """On the held-out examples after the last round."""
        return float(self.summary["final"]["loss"])


EngineMaker = Callable[[SimulationConfig, Path], AbstractContextManager[Engine | FlowerGrid]]
"""From the resolved configuration and the workplace's folder to an engine, closed at the end of the run."""


def run_simulation(
    config: SimulationConfig,
    *,
    console: Console | None = None,
    engine: EngineMaker | None = None,
    start: str | None = None,
    data: OwnData | None = None,
    model: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    task: OwnTask | None = None,
    callbacks: Callbacks | Iterable[Callbacks] = (),
) -> SimulationResult:
    """Run a simulation and leave its run directory.

    data: a data set of one's own instead of what `config.data` names: a `datasets.DatasetDict`, or a mapping of splits
    ("train", and "test" or another of the usual names) to rows, each a mapping of column to value.
    model: a model object and its tokenizer, instead of what `config.model` names: a `PreTrainedModel`, as its
    class makes it of its configuration; the class is part of transformers or lies in a module that workers can import.
    task: what is learnt from the rows and how it is measured, instead of what `config.task` names.
    callbacks: one or more, told of every client, evaluation and round; one that raises ends the run (CallbackError).
    engine, start: where a ServerApp has been given Flower's grid, and the run's id there (default: an engine of ours).

    Raises InputError for a bad configuration or input, before anything heavy starts; FedlotrError where the run
    cannot go on; finished rounds stay on disk, also after a KeyboardInterrupt.
    """
    with console or Console(quiet=True) as display, _place_for(model) as place:
        started = time.monotonic()
        display.stage("checking the configuration, reading the data")
        audience = Audience(callbacks)
        own = Brought(data, model, task, place)
        problems = problems_at_the_door(config, brings_engine=engine is not None, brought=own.fields)
        if problems:
            raise InputError(problems)
        checked, strategy = check_all(resolve(config), brought=own)
        config = checked.config
        name = f"{config.method}-{checked.source.name}-{config.seed}".replace(PREFIX, "own-")
        directory = RunDirectory.create(config.out, name, start)
        with ExitStack() as stack:
            stack.enter_context(directory.explaining())
            stack.enter_context(log_to(directory.log))
            directory.remove_work()  # what a run that was killed has left
            stack.callback(directory.remove_work)
            checkpoint = None
            if config.resume:
                adapter = checked.start.sha256 if checked.start else None
                checkpoint = continue_from(directory, config, checked.source.sha256, adapter)
            if checkpoint is None:
                dump_yaml(config, directory.path / "config.yaml")
            finished = 0 if checkpoint is None else checkpoint.round
            display.begin(directory.path, finished)
            stack.enter_context(_threads(config.threads))
            grid = stack.enter_context((engine or _engine)(config, directory.work))
            display.stage("tokenising, fitting the head, making the bases")
            prepared = prepare(checked.in_place(directory.work.absolute()), directory.work.absolute())
            known = facts(prepared)
            directory.write_facts(known)
            display.start(config, known)
            run = _Run(config, prepared, directory, grid, display, started, audience)
            state = run.begin(strategy, checkpoint)
            dump_yaml(config, directory.path / "config.yaml")  # again: a run that goes on may have more rounds
            summary = run.rounds(strategy, state)
            _report(directory.path)
            display.finish(summary)
        return SimulationResult(summary, run.history, directory.path)


def _report(folder: Path) -> None:
    """Leave report.html; the run is done, and what goes wrong here is no reason to call it failed."""
    try:
        from fedlotr.reporting.report import write_report

        write_report(folder)
    except Exception as error:
        log.warning("report.html could not be made (%s); 'fedlotr report %s' tries again", error, folder, exc_info=True)


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
    return problems


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
                problems += [*_unmet(strategy, config), *unmet_controls(strategy, config)]
        except InputError as error:
            problems += error.problems
    if problems or checked is None or strategy is None:
        raise InputError(problems)
    return checked, strategy


def _unmet(strategy: FlowerStrategy, config: SimulationConfig) -> Iterator[str]:
    """What a strategy needs of every update and the method's clients do not send, each in one line."""
    if config.optimizer_state == "keep" and "ranks" in vars(strategy):
        yield (
            f"--optimizer-state keep with --strategy {config.strategy}: it changes clients' ranks, and what an "
            "optimizer holds has the old one; choose reset or mean-v"
        )
    needed: frozenset[str] = getattr(strategy, "needs", frozenset())
    row = METHODS[config.method]
    turns = row.turns or (row.train,)
    if any(needed - set(turn) for turn in turns):
        able = [name for name, other in METHODS.items() if not other.turns and needed <= set(other.train)]
        sent = " in turn ".join(" and ".join(turn) for turn in turns) or "the head alone"
        yield (
            f"--strategy {config.strategy} with --method {config.method}: it combines {' and '.join(sorted(needed))} "
            f"of every client, and clients of this method send {sent}; choose --method {' or '.join(able)}"
        )


def unmet_controls(strategy: FlowerStrategy, config: SimulationConfig) -> Iterator[str]:
    """Why clients cannot keep control variates as a strategy asks, each one line."""
    if not getattr(strategy, "controls", False):
        return
    name = f"--strategy {config.strategy or METHODS[config.method].strategy}"
    if METHODS[config.method].adapts and (config.core or METHODS[config.method].core) == "heads":
        yield (
            f"{name} with --core heads: the blocks' scales start again in every round, so there is no lasting gradient "
            "that a control variate could stand for; choose --core full"
        )
    if config.client_rank is not None:
        yield f"{name} with --client-rank: control variates are of the run's rank; leave --client-rank out"
    if config.engine == "flower":
        yield f"{name} with --engine flower: {NO_CLIENT_STATE}"


def resolve(config: SimulationConfig) -> SimulationConfig:
    """Put in what the method and this machine decide where the configuration leaves it open.

    A run that is continued keeps the number format and the threads that were measured and counted for it.
    """
    row = METHODS[config.method]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = saved_configuration(config.out) if config.resume and config.out is not None else None
    resolved: dict[str, Any] = {"strategy": None if config.baseline else config.strategy or row.strategy}
    resolved["lr"] = config.lr if config.lr is not None else row.lr
    resolved["client_eval"] = config.client_eval if config.client_eval is not None else 0.2 if row.personal else 0.0
    resolved["head_lr"] = config.head_lr if config.head_lr is not None else row.head_lr
    if "D" in row.train and config.cohort == "auto":
        resolved["cohort"] = 1  # each client of a cohort would have its own copy of the matrices for each example
    if row.factored:
        resolved |= {"basis": config.basis or row.basis, "tie": config.tie or row.tie, "core": config.core or row.core}
    if config.engine == "ray":
        resolved["workers"] = config.workers or cores
    if config.dtype == "auto":
        resolved["dtype"] = before.dtype if before is not None else measured_dtype()
    if config.threads is None:
        counted = cores if config.engine == "local" else 1
        resolved["threads"] = before.threads if before is not None else counted
    return config.model_copy(update=resolved)


class _Run:
    """The rounds of one run."""

    def __init__(
        self,
        config: SimulationConfig,
        prepared: Prepared,
        directory: RunDirectory,
        grid: Engine | FlowerGrid,
        display: Console,
        started: float,
        audience: Audience,
    ) -> None:
        self.config, self.prepared, self.directory = config, prepared, directory
        self.grid, self.display, self.started, self.audience = grid, display, started, audience
        self.history: list[dict[str, Any]] = []
        self.entries: list[Entry] = []
        self.ledger: list[str] = []
        self.left_out: set[str] = set()
        self.initial: dict[str, float | None] = {}
        self.federation = federation(config, prepared)

    def begin(self, strategy: FlowerStrategy, checkpoint: Checkpoint | None) -> State:
        """The state before the next round: from the start, or from a checkpoint. Raises InputError for other bases."""
        state = State(to_record(self.prepared.model.values()), carry=self.prepared.model.carried)
        log.info(
            "engine %s, %d workers of %s threads, %s; strategy %s",
            self.config.engine,
            self.grid.workers,
            self.config.threads,
            self.config.dtype,
            type(strategy).__name__,
        )
        self.directory.open_round_folders()
        if checkpoint is None:
            self.directory.go_back_to(None)  # a run that was killed in its first round has left something
            self.initial = self._evaluate(state)
            log.info("before the first round: %s", self.initial)
            self.audience.evaluated(0, self.initial)
            return state
        check_model(checkpoint, self.prepared.bases_sha256, state.arrays)
        with blaming(strategy, checkpoint.round, self.config.method, "load_state"):
            load_strategy_state(strategy, checkpoint.extra["strategy"], checkpoint.arrays)
        self.grid.client_states = load_clients(checkpoint.extra["clients"], checkpoint.arrays)
        self.directory.go_back_to(checkpoint)
        self.history, self.ledger = checkpoint.metrics, checkpoint.ledger
        self.entries = read_ledger(self.directory.ledger)
        self.initial = checkpoint.extra["initial"]
        self.started -= checkpoint.extra["seconds"]
        trained = {name: checkpoint.arrays[name] for name in state.arrays}
        log.info("resumed after round %d", checkpoint.round)
        if checkpoint.extra["rounds"] != self.config.rounds and self.config.lr_schedule != "constant":
            log.warning(
                "--rounds was %d: the %s schedule is now that of a run of %d rounds, which the first %d did not follow",
                checkpoint.extra["rounds"],
                self.config.lr_schedule,
                self.config.rounds,
                checkpoint.round,
            )
        carry, holds = state.carry, dict(checkpoint.extra.get("holds", []))
        if (about := checkpoint.extra.get("carry")) is not None:
            carry = restored(checkpoint.arrays, about)
            self.prepared.workplace.save_carry(carry)  # as it would still be on the clients' own disks
        moments = {name: np.array(pair) for name, pair in checkpoint.extra.get("moments", {}).items()}
        return State(to_record(trained), checkpoint.round, set(checkpoint.extra["known"]), carry, holds, moments)

    def rounds(self, strategy: FlowerStrategy, state: State) -> dict[str, Any]:
        """Run the rounds that are left; the summary."""
        config = self.config
        while state.round < config.rounds:
            done = run_round(self.grid, strategy, self.federation, state)
            if config.baseline is not None:
                done = without_wire(done)
            evaluation = None
            if state.round % config.eval_every == 0 or state.round == config.rounds:
                began = time.monotonic()
                evaluation = self._evaluate(state, strategy)
                done.metrics.update(evaluation)
                done.metrics["evaluate_seconds"] = time.monotonic() - began
            self._keep(done, state, strategy)
            self.audience.finished(done, evaluation, self.directory.path)
        if isinstance(strategy, Alone):
            state = replace(state, arrays=strategy.all(config.clients, state.arrays))
        else:
            self._write_adapters(state)
        loads = self.prepared.workplace.loads()
        log.info("the frozen base was loaded %d times, by %d processes", len(loads), len(set(loads)))
        summary = summarise(
            config, self.prepared, self.grid, self.history, self.entries, self.initial, state, self.started
        )
        self.directory.write_summary(summary)
        log.info("done: %s", summary["final"])
        return summary

    def _write_adapters(self, state: State) -> None:
        """The run's adapter; and, where that is wanted, one of every client with the factors that stayed with it."""
        config, model, shared = self.config, self.prepared.model, to_tensors(state.arrays)
        write = partial(
            write_adapter,
            model=model,
            base=self.prepared.checked.base_name,
            source=Path(self.prepared.checked.spec.path).resolve(),
            method=config.method,
            max_length=config.max_length,
            labels=self.prepared.checked.task.label_names,
            pair=len(self.prepared.checked.task.columns) == 2,
            own=self._own_base(),
        )
        model.carry(state.carry)
        model.assign(shared)
        write(self.directory.adapter, note=SHARED_ALONE if model.personal else "")
        if config.client_adapters:
            for client in range(config.clients):
                model.assign(shared | personal(self.grid.client_states.get(client, {})))
                write(self.directory.adapter_of(client), note=f"It is that of client {client}, whose factors differ.")

    def _own_base(self) -> OwnBase | None:
        own = self.prepared.checked.own_model
        segments = () if self.prepared.workplace.test.segments is None else ("token_type_ids",)
        return None if own is None else OwnBase(own.kind, ("input_ids", "attention_mask", *segments))

    def _evaluate(self, state: State, strategy: FlowerStrategy | None = None) -> dict[str, Any]:
        """Of the common model on the test split; of every client on its own rows, where some are held back.

        Where factors stay with the clients there is no common model, and what counts is the clients' mean. Where each
        client has a model of its own (strategy: a baseline's), all are tested on the test split: mean and spread.
        """
        if isinstance(strategy, Alone):
            models = (strategy.of(client, state.arrays) for client in range(self.config.clients))
            higher = [name for name, better in metrics_of(self.prepared).items() if better is max]
            means, spread = over_clients([evaluate(self.grid, self.federation, arrays) for arrays in models], higher)
            return {**means, "over_clients": spread}
        personal, causal = self.prepared.model.personal, self.federation.causal
        found: dict[str, Any] = {} if personal else evaluate(self.grid, self.federation, state.arrays, state.carry)
        held_back = [len(rows) for rows in self.prepared.checked.held_back]
        if any(held_back):
            clients = evaluate_clients(self.grid, state.arrays, held_back, state.carry, causal=causal)
            found = {"loss": clients["loss"], clients["metric"]: clients["mean"], **found, "client_evaluation": clients}
        return found

    def _keep(self, done: Round, state: State, strategy: FlowerStrategy) -> None:
        """Put a finished round on disk, then on the display: the checkpoint last, since it is what makes it count."""
        self.ledger.append(write_part(self.directory.ledger, state.round, done.entries))
        self.directory.append_metrics(done.metrics)
        self.history.append(done.metrics)
        self.entries += done.entries
        with blaming(strategy, state.round, self.config.method, "state"):
            packed, arrays, left_out = save_strategy(strategy)
        for name in left_out.keys() - self.left_out:
            self.left_out.add(name)
            log.warning(
                "%s.%s is not in the checkpoints (%s): a run that is resumed starts it anew",
                type(strategy).__name__,
                name,
                left_out[name],
            )
        clients, client_arrays = save_clients(self.grid.client_states)
        trained = {name: array.numpy() for name, array in state.arrays.items()}
        carried, about = saved(state.carry)
        start = self.prepared.checked.start
        extra = {
            "known": sorted(state.known),
            "strategy": packed,
            "clients": clients,
            **about,
            "moments": {name: pair.tolist() for name, pair in state.moments.items()},
            "holds": sorted(state.holds.items()),
            "initial": self.initial,
            "rounds": self.config.rounds,
            "seconds": time.monotonic() - self.started,
            "bases_sha256": self.prepared.bases_sha256,
            "data_sha256": self.prepared.checked.source.sha256,
            "init_adapter_sha256": None if start is None else start.sha256,
            "configuration": fixed_values(self.config),
        }
        self.directory.write_checkpoint(
            state.round, {**arrays, **client_arrays, **carried, **trained}, self.history, self.ledger, extra
        )
        log.info("round %d: %s", state.round, {k: v for k, v in done.metrics.items() if v is not None})
        self.display.round(done.metrics)


def federation(config: SimulationConfig, prepared: Prepared) -> Federation:
    """What the round loop needs to know of this run."""
    checked, model, own = prepared.checked, prepared.model, prepared.checked.own_task
    factor = LR_FACTORS[config.lr_schedule]
    bases = bases_of(model.module)
    basis: Any = None
    if bases and checked.core is not None:
        if checked.core.basis in DERIVABLE:
            basis = derivable_record(config.seed, prepared.bases_sha256)
        else:
            basis = bases_record(bases)
    return Federation(
        clients=len(checked.parts),
        sampled=config.clients_per_round,
        rounds=config.rounds,
        seed=config.seed,
        max_failed=config.max_failed,
        lr_factor=lambda server_round: factor((server_round - 1) / config.rounds),
        basis=basis,
        bases_sha256=prepared.bases_sha256,
        layers=certificate_layers(model),
        held_out=len(prepared.workplace.test),
        causal=checked.task.kind == "causal-lm",
        method=config.method,
        moving=lambda server_round: frozenset(model.published) & model.moving(server_round),
        measure=None if own is None or own.metric_name is None else partial(measure, own),
        ranks=ranks_of(config),
        rank=config.rank,
        mean_moments=config.optimizer_state == "mean-v",
    )


def ranks_of(config: SimulationConfig) -> list[int] | None:
    """The rank of each client, where they differ."""
    return None if config.client_rank is None else client_ranks(config.client_rank, config.clients, config.seed)


def certificate_layers(model: TrainableModel) -> list[Layer]:
    """The adapted layers as the certificate reads them; none where a part of each stays with the clients."""
    if model.personal:
        return []
    by_module: dict[str, dict[str, str]] = {}
    for tensor, (module, part) in model.trained.items():
        if module not in model.heads and part != "S":
            by_module.setdefault(module, {})[part] = tensor
    layers = factored_layers(model.module)

    def frozen(module: str, factor: str) -> Any:
        if factor in by_module[module]:
            return None
        tensor = layers[module].factor(factor, "default")
        return None if tensor is None else tensor.detach().numpy().astype(np.float64)

    def core(layer: FactoredLayer) -> Callable[[Any], Any]:
        basis = layer.basis("default")
        mixed = None if basis is None or basis.P is None else basis.P.double()
        return lambda theta: layer.core["default"].expand({"C": torch.from_numpy(theta)}, mixed).numpy()

    return [
        Layer(
            trained,
            frozen(module, "A"),
            frozen(module, "B"),
            layers[module].scaling["default"],
            core(layers[module]),
            module,
        )
        for module, trained in by_module.items()
    ]


@contextmanager
def _engine(config: SimulationConfig, work: Path) -> Iterator[Engine]:
    """Start the engine, whose workers load their libraries while the server prepares; close it whatever happens."""
    workplace = Workplace(work.absolute())
    size = None if config.cohort == "auto" else config.cohort

    def cohorts(clients: Sequence[int]) -> list[list[int]]:
        return [list(clients[piece]) for piece in cut_cohorts(workplace.step_tokens(clients), size)]

    rule: CohortRule = cohorts
    run_config: Any = {WORK: str(workplace.folder)}
    assert config.threads is not None
    if config.engine == "local":
        grid: Engine = LocalGrid(
            CLIENT_APP, config.clients, run_config=run_config, cohorts=rule, threads=config.threads
        )
    else:
        from fedlotr.engines import RayGrid

        assert config.workers is not None
        grid = RayGrid(
            CLIENT_APP,
            config.clients,
            run_config=run_config,
            cohorts=rule,
            workers=config.workers,
            threads=config.threads,
        )
    try:
        yield grid
    finally:
        grid.close()
        worker.cache_clear()  # the local engine's


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute in this process with so many threads: the server's own share of the work has a worker's bits too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
