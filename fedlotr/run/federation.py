"""What the round loop is told of a run: clients, rates, bases, and how the certificate reads the trained tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flwr.app import ArrayRecord
from torch import nn

from fedlotr.adapters.carry import Carry
from fedlotr.adapters.tuner import bases_of, highest_rank
from fedlotr.communication.basis_coding import shapes_of
from fedlotr.communication.links import read_links
from fedlotr.config.configuration import SimulationConfig
from fedlotr.errors import InputError
from fedlotr.evaluation.generation import stop_ids
from fedlotr.fleet.draws import Sampler
from fedlotr.fleet.faults import read_faults
from fedlotr.fleet.fleet import Fleet, read_fleet
from fedlotr.fleet.modes import DEFAULT_STALENESS, Staleness, read_staleness
from fedlotr.fleet.sampling import read_sampling
from fedlotr.fleet.virtual_time import VirtualTime
from fedlotr.flower.certificate import layers_of
from fedlotr.flower.federation import Federation, Weights
from fedlotr.flower.links.codec import coded_record
from fedlotr.flower.links.derived import Derived, Offer, public_record
from fedlotr.flower.links.moving import Mover
from fedlotr.flower.links.ranks import client_ranks
from fedlotr.flower.plugins import load_function
from fedlotr.flower.records import (
    STOP_TEXT,
    STOPS,
    TEMPERATURE,
    TOKENS,
    Arrays,
    bases_record,
    derivable_record,
    to_arrays,
    to_record,
    to_tensors,
)
from fedlotr.models.loading import count_parameters
from fedlotr.privacy.guard import NoGuard
from fedlotr.run.checking import Checked
from fedlotr.run.preparation import Prepared
from fedlotr.run.sheet import measurer
from fedlotr.streams import generator
from fedlotr.training.cohort import ClientWork, train_cohort
from fedlotr.training.examples import Examples
from fedlotr.training.moving import head_of
from fedlotr.training.packing import Rows

OPERATIONS = 4
"""Of a frozen weight and a token: a product and a sum forward, and as many backward; attention comes on top."""
LR_FACTORS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the run's rounds that are done -> what the learning rates are multiplied by."""


def federation(config: SimulationConfig, prepared: Prepared, guard: NoGuard | None = None) -> Federation:
    """What the round loop needs to know of this run. guard: of its privacy (default: nothing is promised)."""
    checked, model, own = prepared.checked, prepared.model, prepared.checked.own_task
    factor = LR_FACTORS[config.lr_schedule]
    bases = bases_of(model.module)
    basis: Any = None
    derived = offers(config, prepared)
    if derived is not None and derived.first is not None:
        basis = to_record(derived.first.arrays())
    elif bases and checked.core is not None:
        if checked.core.basis_kind.derivable:
            basis = derivable_record(config.seed, prepared.bases_sha256)
        else:
            message = prepared.bases_message
            basis = bases_record(bases) if message is None else coded_record(message)
    answers: dict[str, Any] = {}
    if checked.sheet.prompts is not None:
        stops = list(stop_ids(model.module, checked.tokenizer))
        answers = {TOKENS: config.generate_tokens, STOPS: stops, TEMPERATURE: config.temperature}
        answers[STOP_TEXT] = config.stop or ""
    return Federation(
        clients=len(checked.parts),
        sampled=config.clients_per_round,
        rounds=config.rounds,
        seed=config.seed,
        max_failed=config.max_failed,
        lr_factor=lambda server_round: factor((server_round - 1) / config.rounds),
        basis=basis,
        bases_sha256=prepared.bases_sha256,
        layers=layers_of(model),
        held_out=len(prepared.workplace.test),
        task=checked.task.kind,
        method=config.method,
        moving=lambda server_round: frozenset(model.published) & model.moving(server_round),
        measure=measurer(config, checked.sheet, own, checked.tokenizer),
        further={name: len(examples) for name, examples in checked.sheet.further.items()},
        answers=answers,
        ranks=ranks_of(config),
        rank=highest_rank(model.module) or config.rank,
        mean_moments=config.optimizer_state == "mean-v",
        derived=derived,
        mover=mover(config, prepared),  # before what the model carries, which it lets know of its bases
        carried=model.carried,
        guard=guard or NoGuard(),
        coding=config.coding,
        links=config.links,
        weights=Weights(config.max_weight, config.weights == "uniform"),
        max_update_norm=config.max_update_norm,
        refuse_large=config.on_large_update == "refuse",
        root=root_of(config, prepared),
        watched=config.baseline is None,
        virtual=virtual_time(config, prepared),
        faults=None if config.fault is None else read_faults(config.fault),
        sampler=sampler_of(config, checked.parts),
    )


def sampler_of(config: SimulationConfig, parts: Sequence[Rows]) -> Sampler:
    """How clients are drawn. parts: the rows of each."""
    return Sampler(sampling=read_sampling(config.sampling), sizes=[len(part) for part in parts])


def virtual_time(config: SimulationConfig, prepared: Prepared) -> VirtualTime | None:
    """How rounds go in virtual time, where time is virtual."""
    if not config.virtual:
        return None
    workplace, training = prepared.workplace, prepared.checked.training
    lengths = workplace.train.lengths
    tokens = [
        training.examples_of(len(rows)) * float(lengths[rows].mean()) if len(rows) else 0.0
        for rows in map(workplace.rows, range(config.clients))
    ]
    numbers = count_parameters(prepared.model.module) - embedded(prepared.model.module)
    return VirtualTime(
        mode=config.mode,
        fleet=fleet_of(config),
        operations=[OPERATIONS * numbers * count for count in tokens],
        asked=config.asked,
        wanted=config.updates_per_round,
        deadline=config.deadline or math.inf,
        keep_late=config.late == "use",
        staleness=staleness_of(config),
        discount=config.staleness or DEFAULT_STALENESS,
        mixing=config.mixing,
    )


def embedded(model: nn.Module) -> int:
    """Numbers of a model that are looked up and not multiplied."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Embedding))


def fleet_of(config: SimulationConfig) -> Fleet:
    """The clients of a run in virtual time. Raises InputError."""
    links = None if config.link is None else read_links(config.link, config.clients, config.seed)
    if links is not None and any(link.server is not None for link in links):
        raise InputError(
            f"--link {config.link}: in virtual time messages meet at no line of the server's; leave server= out"
        )
    return read_fleet(config.fleet or "even", config.clients, config.seed, links)


def staleness_of(config: SimulationConfig) -> Staleness:
    """What late updates count. Raises InputError."""
    load = partial(load_function, option="--staleness", what="function")
    return read_staleness(config.staleness or DEFAULT_STALENESS, load)


def root_of(config: SimulationConfig, prepared: Prepared) -> Callable[[int, ArrayRecord, Carry], Arrays] | None:
    """How the server trains on the public rows by itself, as a client does on its own."""
    examples, rows = public_of(prepared.checked)
    model, training, factor = prepared.model, prepared.checked.training, LR_FACTORS[config.lr_schedule]

    def train(number: int, arrays: ArrayRecord, carry: Carry) -> Arrays:
        model.carry(carry)  # it may have had another round's
        rate = factor((number - 1) / config.rounds)
        own = replace(training, lr=training.lr * rate, head_lr=training.head_lr * rate)
        work = [ClientWork(rows, generator(config.seed, "root", number), {})]
        (found,) = train_cohort(model, to_tensors(arrays), examples, work, own, None, number)
        return to_arrays(to_record(found.tensors))

    return train if len(rows) else None


def mover(config: SimulationConfig, prepared: Prepared) -> Mover | None:
    """What moves the bases, where they move."""
    if config.moves is None:
        return None
    public, threads = public_of(prepared.checked), prepared.workplace.recipe.threads
    offered = threads if config.derive_bases else None
    return Mover(prepared.model, config.moves, config.coding, config.seed, lambda: public, offers=offered)


def offers(config: SimulationConfig, prepared: Prepared) -> Derived | None:
    """What clients are told that make bases by themselves, where they do."""
    if not config.derive_bases:
        return None
    first, model = None, prepared.model
    if prepared.bases_message is not None:
        first = Offer.of(bases_of(model.module), head_of(model), prepared.bases_message)
    rows, shapes = public_record(*public_of(prepared.checked)), shapes_of(bases_of(model.module))
    return Derived(rows=rows, form=config.coding.basis, shapes=shapes, first=first)


def public_of(checked: Checked) -> tuple[Examples, Rows]:
    """The public rows, and of which examples."""
    examples = checked.examples
    return (examples.train if examples.shown is None else examples.shown).examples, checked.public


def ranks_of(config: SimulationConfig) -> list[int] | None:
    """The rank of each client, where they differ."""
    return None if config.client_rank is None else client_ranks(config.client_rank, config.clients, config.seed)
