"""The rounds of one run: from the start or a checkpoint to the summary, each safe on disk before it is told."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.communication.ledger import Totals, read_parts, write_part
from fedlotr.communication.links import read_links, round_time
from fedlotr.config.configuration import SimulationConfig
from fedlotr.engines.base import Engine
from fedlotr.engines.flower import FlowerGrid
from fedlotr.evaluation.spreads import summary_of
from fedlotr.files import finite
from fedlotr.fleet.draws import Known
from fedlotr.flower.blame import blaming
from fedlotr.flower.chain import Chain
from fedlotr.flower.faults import Faults
from fedlotr.flower.links.carry import CarriedTerm, carried_in
from fedlotr.flower.links.personal import personal
from fedlotr.flower.norms import Watch
from fedlotr.flower.records import to_record, to_tensors
from fedlotr.flower.round import BudgetSpentError, Round, State, can_pay, run_round
from fedlotr.flower.scoring import evaluate, evaluate_clients
from fedlotr.flower.serialize import pack, unpack
from fedlotr.flower.state import SavedClients, load_clients, load_strategy_state, save_strategy
from fedlotr.flower.timed import Clock, deserted
from fedlotr.machine import kept_waiting
from fedlotr.privacy.guard import NoGuard
from fedlotr.reporting.callbacks import TrainedEvent
from fedlotr.reporting.documents import ClientScore, Evaluation, MetricsRow, Summary
from fedlotr.run.baselines import Alone, over_clients, without_wire
from fedlotr.run.callbacks import Audience, evaluated, finished
from fedlotr.run.directory import Checkpoint, RunDirectory
from fedlotr.run.federation import federation
from fedlotr.run.preparation import Prepared
from fedlotr.run.resumption import ROWS, changed_defences, check_model, fixed_values
from fedlotr.run.samples import Model, Sampling
from fedlotr.run.summary import best_of, metrics_of, summarise
from fedlotr.run.writing import adapter_writer
from fedlotr.said import Heard, say

log = logging.getLogger("fedlotr")

CLOCK = "clock"
"""Of a checkpoint, where virtual time stands; the arrays that are under way have names that begin so."""
FAULTS = "faults"
"""The same of what faults on purpose bring again."""
KNOWN = "known"
"""The same of what decides whom the next round asks."""


class Rounds:
    """The rounds of one run."""

    def __init__(
        self,
        config: SimulationConfig,
        prepared: Prepared,
        directory: RunDirectory,
        grid: Engine | FlowerGrid,
        started: float,
        audience: Audience,
        guard: NoGuard,
        heard: Heard,
    ) -> None:
        self.config, self.prepared, self.directory = config, prepared, directory
        self.grid, self.started = grid, started
        self.audience, self.heard = audience, heard
        self.history: list[MetricsRow] = []
        self.totals = Totals()
        self.ledger: list[str] = []
        self.left_out: set[str] = set()
        self.saved_clients = SavedClients()
        self.busy = False
        self.initial: Evaluation
        self.first_scores: Sequence[ClientScore] = ()
        """Of each client by itself before the first round."""
        self.links = None if config.link is None else read_links(config.link, config.clients, config.seed)
        self.federation = federation(config, prepared, guard)
        self.contents = prepared.checked.contents
        self.sampling = Sampling(prepared, directory.path)

    def begin(self, strategy: FlowerStrategy, checkpoint: Checkpoint | None) -> State:
        """The state before the next round: from the start, or from a checkpoint. Raises InputError for other bases."""
        state = State(to_record(self.prepared.model.values()), chain=Chain.at_server(self.federation))
        log.info(
            "engine %s, %d workers of %s threads on %s, %s%s; strategy %s",
            self.config.engine,
            self.grid.workers,
            self.config.threads,
            self.config.device,
            self.config.dtype,
            "" if self.config.quantize == "none" else f" with linear layers in {self.config.quantize}",
            type(strategy).__name__,
        )
        self.directory.open_round_folders()
        base = to_tensors(state.arrays), self.prepared.model.carried
        if checkpoint is None:
            self.directory.go_back_to(None)  # a run that was killed in its first round has left something
            self.initial = self._evaluate(state)
            log.info("before the first round: %s", self.initial)
            self.audience.tell(evaluated(0, self.initial))
            self.sampling.begin(base)
            return state
        check_model(checkpoint, self.prepared.bases_sha256, state.arrays)
        with blaming(strategy, checkpoint.round, self.config.method, "load_state"):
            load_strategy_state(strategy, checkpoint.extra["strategy"], checkpoint.arrays)
        self.federation.guard.load_state(checkpoint.extra["privacy"])
        self.grid.client_states = load_clients(checkpoint.extra["clients"], checkpoint.arrays)
        latest = max(self.directory.rounds(), default=0)
        if latest > checkpoint.round and self.config.resume_round is not None:
            self.directory.drop_results()
        self.directory.go_back_to(checkpoint)
        self.history, self.ledger = checkpoint.metrics, checkpoint.ledger
        for part in read_parts(self.directory.ledger):
            self.totals.add(part)
        self.initial = checkpoint.extra["initial"]
        self.first_scores = self.directory.client_scores(0)
        self.started -= checkpoint.extra["seconds"]
        trained = {name: checkpoint.arrays[name] for name in state.arrays}
        self.heard.before(checkpoint.extra.get("warnings", []))
        log.info("resumed after round %d", checkpoint.round)
        if latest > checkpoint.round and self.config.resume_round is not None:
            say(f"went back to round {checkpoint.round}: what later rounds left, up to round {latest}, is dropped")
        for line in changed_defences(checkpoint, self.config):
            say(line)
        if checkpoint.extra["rounds"] != self.config.rounds and self.config.lr_schedule != "constant":
            say(
                f"--rounds was {checkpoint.extra['rounds']}: the {self.config.lr_schedule} schedule is now that of a "
                f"run of {self.config.rounds} rounds, which the first {checkpoint.round} did not follow"
            )
        state.chain.load(checkpoint.extra["links"], checkpoint.arrays, self.grid.client_states)
        if state.carry.version:
            self.prepared.workplace.save_carry(state.carry)  # as it would still be on the clients' own disks
        self.sampling.begin(base)
        watch = Watch.restored(checkpoint.extra.get("watch", {}))
        clock = Clock()
        if CLOCK in checkpoint.extra:
            clock = Clock.restored(unpack(checkpoint.extra[CLOCK], checkpoint.arrays))
        known = Known(**unpack(checkpoint.extra[KNOWN], checkpoint.arrays)) if KNOWN in checkpoint.extra else None
        return State(to_record(trained), checkpoint.round, state.chain, watch, clock, self._faults(checkpoint), known)

    def _faults(self, checkpoint: Checkpoint) -> Faults | None:
        """What those on purpose had come to, in a run that has some."""
        plan = self.federation.faults
        if plan is None:
            return None
        return Faults.of(plan, self.federation.seed, unpack(checkpoint.extra[FAULTS], checkpoint.arrays))

    def run(self, strategy: FlowerStrategy, state: State) -> Summary:
        """The rounds that are left, then adapter and summary; returns that."""
        config = self.config
        while state.round < config.rounds and not self._stuck(state) and not self._stalled():
            began, computed = time.monotonic(), time.process_time()
            done = run_round(self.grid, strategy, self.federation, state)
            self._look_at_the_clock(state.round, time.monotonic() - began, time.process_time() - computed)
            if config.baseline is not None:
                done = without_wire(done)
            self._simulate(done)
            evaluation = None
            last = state.round == config.rounds or self._stuck(state)
            if state.round % config.eval_every == 0 or last:
                began = time.monotonic()
                evaluation = self._evaluate(state, strategy)
                done.metrics.update(cast(MetricsRow, evaluation))
                if not math.isfinite(evaluation["loss"]) and state.watch.once("loss"):
                    say(f"round {state.round}: the model that it published has a loss that is not finite")
                done.metrics["evaluate_seconds"] = time.monotonic() - began
            if config.adapter_every is not None and state.round % config.adapter_every == 0:
                now = to_tensors(state.arrays), state.carry
                self._write_adapter(now, self.directory.adapter_after(state.round))  # before the round counts
            self._keep(done, state, strategy)
            self.audience.tell(*finished(done, evaluation, self.directory.path))
        if state.round < config.rounds:
            self._end_early(state)
        kept = state.round
        if isinstance(strategy, Alone):
            state = replace(state, arrays=strategy.all(config.clients, state.arrays))
        else:
            kept = self._write_adapters(state)
            self._sample(state)
        self.audience.tell(TrainedEvent(state.round))
        loads = self.prepared.workplace.loads()
        log.info("the frozen base was loaded %d times, by %d processes", len(loads), len(set(loads)))
        summary = summarise(
            self.prepared,
            grid=self.grid,
            history=self.history,
            totals=self.totals,
            initial=self.initial,
            state=state,
            started=self.started,
            privacy=self.federation.guard.summary(),
            warnings=self.heard.lines,
            checkpoints=self.directory.rounds(),
            adapter_round=kept,
            fleet=None if self.federation.virtual is None else self.federation.virtual.fleet.in_words(),
        )
        summary = cast(Summary, finite(summary))
        self.directory.write_summary(summary)
        log.info("done: %s", summary["final"])
        return summary

    def _look_at_the_clock(self, number: int, seconds: float, computed: float) -> None:
        """Say once that others use the cores, where this process does all the work and is kept from it."""
        if self.config.engine != "local" or self.busy or not kept_waiting(seconds, computed):
            return
        self.busy = True
        threads = self.config.threads or 1
        said = f"round {number} took {seconds:.1f} s, of which this process computed for {computed:.1f}: "
        if self.config.privacy == "client":  # how long a round takes tells how many came
            said = "a round took far longer than it computed: "
        if threads == 1:
            say(f"{said}the machine is busy with other work")
        else:
            say(
                f"{said}the machine is busy with other work, and {threads} threads wait for the slowest at each "
                "step; a new run with --threads 1 would wait for none (a run that is resumed keeps its threads, since "
                "their number decides the bits)"
            )

    def _simulate(self, done: Round) -> None:
        """Note how long a round's messages would take on the clients' links: reckoned, and never mixed with what was
        measured; nothing without `--link`, or where nobody was asked."""
        sent: dict[str, Counter[int]] = {"up": Counter(), "down": Counter()}
        for entry in done.entries:
            sent[entry.direction][entry.client] += entry.wire_bytes
        if self.links is not None and sent["down"] and self.federation.virtual is None:
            found = round_time(self.links, sent["up"], sent["down"])
            done.metrics["simulated_seconds"] = found.seconds
            done.metrics["simulated_seconds_median_client"] = found.median
            done.metrics["simulated_slowest_client"] = found.slowest

    def _stuck(self, state: State) -> bool:
        """Whether there can be no further round: nobody can pay for it, or nobody will be there."""
        return not can_pay(self.federation, state.round + 1) or (bool(state.round) and self._deserted(state))

    def _deserted(self, state: State) -> bool:
        virtual = self.federation.virtual
        return virtual is not None and deserted(virtual.fleet, state.clock)

    def _stalled(self) -> bool:
        """Whether the model has not got better for as many rounds as `--stop-after` says, as far as it was scored."""
        best = best_of(self.prepared, self.history)
        scored = [row["round"] for row in self.history if row["evaluate_seconds"] is not None]
        patience = self.config.stop_after
        return patience is not None and best is not None and scored[-1] - best["round"] >= patience

    def _end_early(self, state: State) -> None:
        """Say why: the model gets no better, nobody is there any more, or the privacy budget is spent.

        Raises BudgetSpentError where there is nothing to end with.
        """
        if self._stalled() and (best := best_of(self.prepared, self.history)) is not None:
            metric, since = next(iter(metrics_of(self.prepared))), state.round - best["round"]
            say(
                f"no better {metric} than round {best['round']}'s for {since} rounds: the run ends after round "
                f"{state.round} of {self.config.rounds} (--stop-after {self.config.stop_after})"
            )
            return
        if self._deserted(state):
            rounds = f"round {state.round} of {self.config.rounds}"
            say(f"no client is there any more after {state.clock.now:.0f} virtual seconds: the run ends after {rounds}")
            return
        spent = f"the privacy budget allows no round {state.round + 1} of {self.config.rounds}"
        if not any(row["evaluate_seconds"] is not None for row in self.history):
            raise BudgetSpentError(f"{spent}, and none before it was evaluated; start a new run with another --out")
        say(f"{spent}: the run ends here")

    def _write_adapters(self, state: State) -> int:
        """The run's adapter; and, where that is wanted, one of every client with the factors that stayed with it.

        Returns the round whose model it is.
        """
        config, model, shared = self.config, self.prepared.model, to_tensors(state.arrays)
        best = best_of(self.prepared, self.history) if config.keep == "best" else None
        kept = state.round if best is None else best["round"]
        found = self._model_of(kept, state)
        if found is None:
            say(f"--keep best: no whole checkpoint holds round {kept}; the adapter is the last round's")
            found, kept = (shared, state.carry), state.round
        self._write_adapter(found, self.directory.adapter)
        if config.client_adapters:
            write = adapter_writer(self.prepared)
            for client in range(config.clients):
                model.assign(shared | personal(self.grid.client_states.get(client, {})))
                write(self.directory.adapter_of(client), client=client)
        return kept

    def _write_adapter(self, model: Model, folder: Path) -> None:
        """The adapter of a common model."""
        self.prepared.model.carry(model[1])
        self.prepared.model.assign(model[0])
        adapter_writer(self.prepared)(folder)

    def _model_of(self, number: int, state: State) -> Model | None:
        """A round's model; None where no whole checkpoint holds it."""
        if number == state.round:
            return to_tensors(state.arrays), state.carry
        if (checkpoint := self.directory.whole_checkpoint(number)) is None:
            return None
        trained = {name: checkpoint.arrays[name] for name in state.arrays}
        return to_tensors(to_record(trained)), carried_in(
            checkpoint.extra["links"], checkpoint.arrays, self.federation.carried
        )

    def _sample(self, state: State) -> None:
        """Have the models of the best and of the last round answer the run's prompts."""
        best = best_of(self.prepared, self.history)
        number = state.round if best is None else best["round"]
        self.sampling.finish(state.round, number, lambda of: self._model_of(of, state))

    def _best_rounds(self) -> set[int]:
        """The rounds whose models may yet be asked or kept: the best one so far, and as of the round before this one.

        Of that too, since a run goes on from there where the newest checkpoint is damaged.
        """
        so_far = [self.history, self.history[:-1]] if self.sampling.wanted or self.config.keep == "best" else []
        return {best["round"] for rows in so_far if (best := best_of(self.prepared, rows)) is not None}

    def _evaluate(self, state: State, strategy: FlowerStrategy | None = None) -> Evaluation:
        """Of the common model on the test split; of every client on its own rows, where some are held back.

        Where factors stay with the clients there is no common model, and what counts is the clients' mean. Where each
        client has a model of its own (strategy: a baseline's), all are tested on the test split: mean and spread.
        """
        personal, beside = self.prepared.model.personal, state.chain.the(CarriedTerm).newest()
        models: ArrayRecord | Callable[[int], ArrayRecord] = state.arrays
        found: dict[str, Any] = {}
        if isinstance(strategy, Alone):
            models = partial(strategy.of, start=state.arrays)
            higher = [name for name, better in metrics_of(self.prepared).items() if better is max]
            each = [evaluate(self.grid, self.federation, models(client)) for client in range(self.config.clients)]
            means, spread = over_clients(each, higher)
            found = {**means, "over_clients": spread}
        elif not personal:
            found = evaluate(self.grid, self.federation, state.arrays, beside)
        held_back = [len(rows) for rows in self.prepared.checked.held_back]
        if any(held_back):
            task, number = self.federation.task, state.round
            scores = evaluate_clients(self.grid, models, held_back, beside, task=task, number=number)
            self.directory.append_client_scores(scores)
            if not state.round:
                self.first_scores = scores
            own = summary_of(scores, self.first_scores if state.round else ())
            found = {"loss": own["loss"], own["metric"]: own["mean"], **found, "client_evaluation": own}
        return cast(Evaluation, found)

    def _keep(self, done: Round, state: State, strategy: FlowerStrategy) -> None:
        """Put a finished round on disk: the checkpoint last, since it is what makes it count."""
        self.ledger.append(write_part(self.directory.ledger, state.round, done.entries))
        self.directory.append_metrics(done.metrics)
        self.directory.append_arrivals(done.arrivals)
        self.history.append(finite(done.metrics))  # as a run that is resumed here has it
        self.totals.add(done.entries)
        with blaming(strategy, state.round, self.config.method, "state"):
            packed, arrays, left_out = save_strategy(strategy)
        for name in left_out.keys() - self.left_out:
            self.left_out.add(name)
            say(
                f"{type(strategy).__name__}.{name} is not in the checkpoints ({left_out[name]}): a run that is resumed "
                "starts it anew"
            )
        clients, client_arrays = self.saved_clients.save(self.grid.client_states)
        trained = {name: array.numpy() for name, array in state.arrays.items()}
        links, link_arrays = state.chain.save()
        start, rows = self.prepared.checked.start, self.prepared.checked.source.sha256
        extra = {
            "strategy": packed,
            "clients": clients,
            "links": links,
            "initial": self.initial,
            "rounds": self.config.rounds,
            "seconds": time.monotonic() - self.started,
            "bases_sha256": self.prepared.bases_sha256,
            "data_sha256": self.federation.guard.keyed(rows),
            "init_adapter_sha256": None if start is None else start.sha256,
            "contents": {name: kept for name, kept in self.contents.items() if name not in (*ROWS, "init_adapter")},
            "configuration": fixed_values(self.config),
            "privacy": self.federation.guard.state(),
            "warnings": self.heard.lines,
            "watch": state.watch.state(),
        }
        every = {**arrays, **client_arrays, **link_arrays, **trained}
        if self.federation.virtual is not None:
            extra[CLOCK] = pack(state.clock.state(), every, CLOCK)
        if state.faults is not None:
            extra[FAULTS] = pack(state.faults.state(), every, FAULTS)
        if state.known is not None and self.federation.sampler.remembers:
            extra[KNOWN] = pack(state.known.state(), every, KNOWN)
        before_harm = set() if state.watch.first is None else {state.watch.first - 1}
        keep = before_harm | self._best_rounds()
        self.directory.write_checkpoint(state.round, every, self.history, self.ledger, extra, keep)
        log.info("round %d: %s", state.round, {k: v for k, v in done.metrics.items() if v is not None})
