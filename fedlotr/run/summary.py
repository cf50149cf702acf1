"""What is said of a run: the facts in the display's header, and summary.json."""

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.tuner import factored_layers, highest_rank
from fedlotr.communication.ledger import Totals, payload_bytes
from fedlotr.config.configuration import SimulationConfig
from fedlotr.cost.architectures import shapes_of
from fedlotr.cost.formulas import Bill, bill
from fedlotr.data import client_names, describe
from fedlotr.engines.base import Engine
from fedlotr.engines.flower import FlowerGrid
from fedlotr.flower.faults import summary_of
from fedlotr.flower.links.carry import model_sha256
from fedlotr.flower.links.derived import public_record
from fedlotr.flower.links.draws import OWN_FACTORS
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.round import State
from fedlotr.flower.traits import traits_of
from fedlotr.models.kinds import ATTACK_SUCCESS, TASK_KINDS
from fedlotr.models.loading import adaptable_layers, count_parameters
from fedlotr.models.supported import form_of_weights
from fedlotr.reporting.documents import (
    AdaptedLayers,
    Codec,
    Communication,
    Evaluation,
    Facts,
    FactsOfSome,
    Fingerprint,
    Held,
    MetricsRow,
    Pace,
    Privacy,
    Simulated,
    Summary,
    Texts,
    Timing,
    VirtualSummary,
    under,
)
from fedlotr.run.checking import Checked
from fedlotr.run.federation import federation, public_of, ranks_of, virtual_time
from fedlotr.run.fitting_texts import seen_in_words
from fedlotr.run.poison import attacked
from fedlotr.run.preparation import Prepared
from fedlotr.run.prompts import in_words
from fedlotr.run.public_rows import scored_on
from fedlotr.training.model import TrainableModel

PACKAGES = ("torch", "flwr", "ray", "transformers", "peft", "numpy", "datasets", "flwr-datasets")
"""Whose versions a result may depend on."""


def facts(prepared: Prepared, promise: str | None = None) -> Facts:
    """For the display's header and facts.json. promise: of privacy, in a line."""
    checked, model = prepared.checked, prepared.model
    sizes = model.sizes()
    head = sum(sizes[name] for name in model.head_names)
    config = checked.config
    metric, better = next(iter(metrics_of(prepared).items()))
    hides_clients = config.privacy == "client"
    shapes = shapes_of(
        model.module, list(factored_layers(model.module)) or adaptable_layers(model.module, config.targets)
    )
    return {
        "versions": versions(checked),
        **_fingerprint(checked),
        "parameters": count_parameters(model.module),
        "trained_adapter": sum(sizes.values()) - head,
        "trained_head": head,
        "train_examples": None if hides_clients else sum(map(len, checked.parts)),
        "test_examples": len(checked.test_rows),
        "task": checked.task.kind,
        "splits": checked.source.splits,
        "steps": None if hides_clients else checked.training.steps_of(len(checked.parts[0])),
        "batch_size": checked.training.batch_size,
        "labels": checked.task.label_names,
        "metric": metric,
        "higher_is_better": better is max,
        "losses": losses_in_words(prepared),
        "texts": texts_in_words(prepared),
        "adapted": adapted_in_words(checked),
        "clients_per_round": config.clients_per_round,
        "shapes": {"layers": list(shapes.layers), "heads": shapes.heads},  # what bills are made of
        "partition": [] if hides_clients else _partition(checked),
        **_facts_of_some(prepared, promise),
    }


def _facts_of_some(prepared: Prepared, promise: str | None) -> FactsOfSome:
    packs = prepared.model.takes_ragged
    found: FactsOfSome = {
        "sequences": "packed, without padding" if packs else "padded: this model was not seen to keep packed ones apart"
    }
    checked = prepared.checked
    if checked.config.privacy != "none":
        found["scored_on"] = scored_on(checked.config, checked.source)
    if (asked := in_words(checked)) is not None:
        found["samples"] = asked
    if names := checked.task.label_names:
        counts = np.bincount(prepared.workplace.test.labels, minlength=len(names))
        found["largest_class"] = float(counts.max() / counts.sum())
    if checked.task.scale:
        scored = checked.task.labels(checked.source.test)[checked.test_rows]
        found["scale"] = f"labels {scored.min():.4g} to {scored.max():.4g}, deviation {scored.std():.4g}"
    if checked.groups is not None and checked.config.privacy == "none":
        found |= {"grouped_by": checked.groups.by, "groups": checked.groups.names}
    if (virtual := virtual_time(checked.config, prepared)) is not None:
        found |= {"virtual_time": virtual.in_words(), "fleet": virtual.fleet.in_words()}
    if promise is not None:
        found["privacy"] = promise
    if (hostile := attacked(checked.config)) is not None:
        found["attack"] = hostile
    if (public := _public_rows_bytes(checked)) is not None:
        found["public_rows_bytes"] = public
    return found


def _public_rows_bytes(checked: Checked) -> int | None:
    return payload_bytes(public_record(*public_of(checked))) if checked.config.derive_bases else None


def _fingerprint(checked: Checked) -> Fingerprint:
    """The data's hash; not of data that the run hides, since it would confirm a guess at them."""
    return {"data_sha256": checked.source.sha256} if checked.config.privacy == "none" else {}


def _partition(checked: Checked) -> list[Held]:
    """What each client holds; of examples that are hidden their number alone."""
    config, clients = checked.config, None
    if config.baseline != "central":  # whose only part is of all clients
        clients = client_names(str(config.partition), checked.source.train, checked.parts)
    found: list[Held] = []
    for one in describe(checked.parts, checked.labels, checked.task.label_names, checked.groups):
        found.append({"client": clients[one.client] if clients else one.client, "examples": one.examples})
        if config.privacy == "none":
            found[-1]["labels"] = one.labels
            if checked.groups is not None:
                found[-1]["groups"] = one.groups
    return found


def owed(checked: Checked, model: TrainableModel, rounds: Sequence[Sequence[int]], *, controls: bool = False) -> Bill:
    """The bill of a run, if these clients take part in its rounds.

    controls: whether control variates are counted in, which summary.json has in its totals and not in a client's
    round. What a strategy decides as it goes is not foreseen: where it lowers ranks (HetLoRA), less will cross.
    """
    config, core = checked.config, checked.core
    row, shapes = METHODS[config.method], shapes_of(model.module, factored_layers(model.module))
    rank = highest_rank(model.module) or config.rank
    ranks = ranks_of(config) or [rank] * len(checked.parts)
    if core is not None and row.factored:
        row = replace(row, basis=str(core.basis), tie=str(core.tie), core=str(core.core))
    strategy = load_strategy(str(config.strategy), config.strategy_arg, config.clients_per_round, config.seed)
    traits = traits_of(strategy)
    merged = {
        own: [traits.merges([min(ranks[client], own or rank) for client in clients]) for clients in rounds]
        for own in {layer.rank for layer in shapes.layers}
    }
    started = {} if checked.start is None else {name: len(pair.A) for name, pair in checked.start.layers.items()}
    asked = row, shapes.layers, shapes.heads, ranks, rounds, config.coding
    drawn = OWN_FACTORS in traits.asks
    return bill(
        *asked,
        merged=merged,
        started=started,
        rank=rank,
        controls=controls and traits.controls,
        drawn=drawn,
        rebase=config.moves,
        public=_public_rows_bytes(checked),
    )


def _reckoned(prepared: Prepared) -> Communication:
    """What a client and round cost where clients are hidden: in closed form, since a sum would tell who came."""
    config = prepared.checked.config
    reckoned = owed(prepared.checked, prepared.model, [range(config.clients_per_round)] * config.rounds)
    told = federation(config, prepared)
    first = [record for record in (told.basis, told.derived and told.derived.rows) if record is not None]
    return {
        "upload_payload_bytes_per_client_round": reckoned.round_up,
        "download_payload_bytes_per_client_round": reckoned.round_down,
        "upload_wire_bytes_per_client_round": None,
        "download_wire_bytes_per_client_round": None,
        "one_off_bytes_per_client": sum(map(payload_bytes, first)),
        "total_payload_bytes": None,
        "total_wire_bytes": None,
    }


def summarise(
    prepared: Prepared,
    *,
    grid: Engine | FlowerGrid,
    history: Sequence[MetricsRow],
    totals: Totals,
    initial: Evaluation,
    state: State,
    started: float,
    privacy: Privacy | None,
    warnings: Sequence[str],
    checkpoints: list[int],
    adapter_round: int,
    fleet: str | None = None,
) -> Summary:
    """summary.json of a finished run.

    history: the rows of metrics.jsonl. totals: of the ledger. started: by `time.monotonic`. warnings: what the user was
    told. adapter_round: the round whose model the adapter is. fleet: in words, where time is virtual.
    """
    checked, config = prepared.checked, prepared.checked.config
    evaluated = [row for row in history if row["evaluate_seconds"] is not None]
    last = evaluated[-1]
    metrics = metrics_of(prepared)
    metric, best = next(iter(metrics)), best_of(prepared, history)
    assert best is not None
    errors = [row["aggregation_error"] for row in history if row["aggregation_error"] is not None]
    hides_clients = config.privacy == "client"
    return {
        "method": config.method,
        "strategy": config.strategy,
        "baseline": config.baseline,
        "model": checked.base_name,
        "data": checked.source.name,
        **_fingerprint(checked),
        "test_split": checked.source.test_split,
        "splits": checked.source.splits,
        "clients": config.clients,
        "rounds": state.round,
        "seed": config.seed,
        "trained_numbers": sum(prepared.model.sizes().values()),
        "initial": initial,
        "metric": metric,
        "over_clients": last.get("over_clients"),
        "standard_errors": last.get("standard_errors"),
        "score_by": last.get("score_by"),
        "over_groups": last.get("over_groups"),
        "losses": losses_in_words(prepared),
        "texts": texts_in_words(prepared),
        "adapted": adapted_in_words(checked),
        "final": {**{name: under(last, name) for name in metrics}, "loss": last["loss"]},
        "client_evaluation": last.get("client_evaluation"),
        "best": {"round": best["round"], metric: under(best, metric), "loss": best["loss"]},
        "failed_clients": None if hides_clients else sum(row["failed"] or 0 for row in history),
        "failures": _failures(history),
        "communication": _reckoned(prepared) if hides_clients else totals.summary(),
        "aggregation_error_max": max(errors) if errors else None,
        "aggregation_error_reason": None if errors else _no_certificate(config),
        "codec": _codec(config, history),
        "simulated": _simulated(config, history),
        "virtual": _virtual(config, history, fleet, best["round"]),
        "attack": attacked(config),
        **summary_of(state.faults),
        "privacy": privacy,
        "warnings": list(warnings),
        "timing": _timing(prepared, grid, evaluated, _pace(checked, history, totals, started)),
        "bases_sha256": prepared.bases_sha256,
        "trained_sha256": model_sha256(state.arrays, state.carry),
        "versions": versions(prepared.checked),
        "checkpoints": checkpoints,
        "adapter_round": adapter_round,
    }


def _timing(prepared: Prepared, grid: Engine | FlowerGrid, evaluated: Sequence[MetricsRow], pace: Pace) -> Timing:
    config = prepared.checked.config
    return {
        **pace,
        "evaluate_seconds_per_round_median": statistics.median(row["evaluate_seconds"] or 0.0 for row in evaluated),
        "base_model_loads": len(prepared.workplace.loads()),
        "workers": grid.workers,
        "worker_restarts": None if config.privacy == "client" else grid.restarts,
        "threads": config.threads,
        "cohort": config.cohort,
        "device": config.device,
        "dtype": config.dtype,
        "quantize": config.quantize,
    }


def _pace(checked: Checked, history: Sequence[MetricsRow], totals: Totals, started: float) -> Pace:
    config = checked.config
    if config.privacy == "client":
        return {"seconds_total": None, "train_seconds_per_round_median": None, "examples_per_second": None}
    seconds = [row["train_seconds"] or 0.0 for row in history]
    trained = totals.updates
    if config.baseline is not None:  # it sends nothing, and all that there are train in every round
        trained = Counter(k for row in history for k in range(len(checked.parts)) if str(k) not in row["failures"])
    examples = sum(
        times * checked.training.examples_of(len(checked.parts[client])) for client, times in trained.items()
    )
    return {
        "seconds_total": time.monotonic() - started,
        "train_seconds_per_round_median": statistics.median(seconds),
        "examples_per_second": examples / sum(seconds),
    }


def metrics_of(prepared: Prepared) -> dict[str, Callable[..., Any]]:
    """What a round's model is judged by, the decisive metric first, each with the better of two values."""
    own, kind = prepared.checked.own_task, TASK_KINDS[prepared.checked.task.kind]
    usual: dict[str, Callable[..., Any]] = {
        name: max if metric.higher_is_better else min for name, metric in kind.metrics.items()
    }
    scores = prepared.checked.sheet.metrics
    usual = {name: max if metric.higher_is_better else min for name, metric in scores.items()} | usual
    if prepared.checked.sheet.triggered is not None:
        usual[ATTACK_SUCCESS] = min
    if own is None or own.metric_name is None:
        return usual
    return {own.metric_name: max if own.higher_is_better else min, **usual}


def best_of(prepared: Prepared, history: Sequence[MetricsRow]) -> MetricsRow | None:
    """The first row with the best value of the decisive metric; where none has a value, the last that was evaluated."""
    metric, better = next(iter(metrics_of(prepared).items()))
    known = [row for row in history if under(row, metric) is not None]
    evaluated = [row for row in history if row["evaluate_seconds"] is not None]
    best: MetricsRow | None = better(known or evaluated[-1:], key=lambda row: under(row, metric), default=None)
    return best


def texts_in_words(prepared: Prepared) -> Texts:
    """How much of the texts the model sees: the shares, and all in words."""
    return {**prepared.seen, "words": seen_in_words(prepared.seen)}


def adapted_in_words(checked: Checked) -> AdaptedLayers:
    """Which layers are adapted, which are not and why: their types, and all in words."""
    adapted = checked.adapted
    return {"words": adapted.in_words(), "layers": adapted.layers, "types": adapted.types, "left_out": adapted.left_out}


def losses_in_words(prepared: Prepared) -> dict[str, str]:
    """What the two losses of a round are: of the model that is tested, and of the clients as they train.

    They are means of different kinds where sequences have different numbers of target tokens: a test is of the model,
    as its perplexity is, and a client trains on examples, which weigh the same whatever their length.
    """
    config, over = prepared.checked.config, TASK_KINDS[prepared.checked.task.kind].over
    tested = f"of the model after the round: mean over the test split's {over}"
    if prepared.model.personal:
        tested = (
            f"of each client's own model after the round: mean over the {over} it holds back, then over the clients"
        )
    elif config.baseline == "local":
        tested = f"of each client's own model after the round: mean over the test split's {over}, then over the clients"
    trained = "of each client's model while it trains: mean over the examples it sees, as it sees them"
    trained += f" (of each example, the mean over its {over})" if over != "examples" else ""
    trained += ", then over the clients as their updates weigh"
    if config.privacy != "none":
        trained = "not told: it would tell of the clients' examples"
    return {"loss": tested, "train_loss": trained}


@cache
def _version(package: str) -> str:
    return version(package)  # which reads and parses a file each time


def versions(checked: Checked) -> dict[str, str]:
    """Of this program and of what a run stands on."""
    quantised = checked.config.quantize != "none" or form_of_weights(Path(checked.spec.path)) != "none"
    clustered = checked.groups is not None and checked.groups.by == "cluster"
    some = [*(["bitsandbytes"] if quantised else []), *(["scikit-learn"] if clustered else [])]
    packages = {name: _version(name) for name in (*PACKAGES, *some)}
    return {"fedlotr": _version("fedlotr"), "python": platform.python_version(), **packages}


def _no_certificate(config: SimulationConfig) -> str:
    """Why no round has an aggregation error."""
    if config.baseline is not None:
        return f"baseline {config.baseline}: no updates are averaged"
    if personal := METHODS[config.method].personal:
        own = " and ".join(sorted(personal))
        return f"{own} of every client stays with it, so there is no common model whose update could be their mean"
    if config.privacy == "client":
        return "privacy client: how far the published mean is from the clients' own would tell of them"
    if not METHODS[config.method].adapts:
        return f"method {config.method} adapts no layer"
    return f"strategy {config.strategy} does not say that it averages"


def _codec(config: SimulationConfig, history: Sequence[MetricsRow]) -> Codec | None:
    if not config.coding.at_work:
        return None

    def median(key: str) -> float | None:
        found = [known for row in history if (known := under(row, key)) is not None]
        return statistics.median(found) if found else None

    return {
        "update": config.coding.codec,
        "broadcast": config.coding.broadcast_codec,
        "error_feedback": bool(config.error_feedback),
        "transport_error_median": median("transport_error"),
        "broadcast_error_median": median("broadcast_error"),
    }


def _simulated(config: SimulationConfig, history: Sequence[MetricsRow]) -> Simulated | None:
    rows = [row for row in history if "simulated_seconds" in row]
    if config.link is None or not rows:
        return None
    seconds = [row["simulated_seconds"] for row in rows]
    return {
        "link": config.link,
        "seconds_total": sum(seconds),
        "seconds_per_round_median": statistics.median(seconds),
        "median_client_seconds_median": statistics.median(row["simulated_seconds_median_client"] for row in rows),
        "slowest_clients": {
            str(k): n for k, n in Counter(row["simulated_slowest_client"] for row in rows).most_common()
        },
    }


def _virtual(
    config: SimulationConfig, history: Sequence[MetricsRow], fleet: str | None, best: int
) -> VirtualSummary | None:
    if fleet is None:
        return None
    ends = [row["virtual_seconds"] for row in history]
    used = sum(row["used"] for row in history)
    stale = sum(row["used"] * (row["staleness_mean"] or 0.0) for row in history)
    return {
        "mode": config.mode,
        "fleet": fleet,
        "seconds_total": ends[-1],
        "seconds_per_round_median": statistics.median(after - before for before, after in pairwise([0.0, *ends])),
        "seconds_to_best": next(row["virtual_seconds"] for row in history if row["round"] == best),
        "used": used,
        "staleness_mean": stale / used if used else None,
        "bytes_in_vain": sum(row["bytes_in_vain"] for row in history),
        "under_way": history[-1]["under_way"],
    }


def _failures(history: Sequence[MetricsRow]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for row in history:
        for client, kind in row["failures"].items():
            clients = found.setdefault(kind, {})
            clients[client] = clients.get(client, 0) + 1
    return found
