"""What a strategy needs of its clients and a configuration does not give; what clients hide is in `promise.py`."""

from collections.abc import Iterator

from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.adapters.kinds import cores_that
from fedlotr.adapters.methods import METHODS
from fedlotr.config.configuration import SimulationConfig
from fedlotr.config.rules import NO_CLIENT_STATE
from fedlotr.flower.traits import traits_of


def unmet_updates(strategy: FlowerStrategy, config: SimulationConfig) -> Iterator[str]:
    """What a strategy needs of every update and the method's clients do not send, each in one line."""
    if config.optimizer_state == "keep" and traits_of(strategy).ranks is not None:
        yield (
            f"--optimizer-state keep with --strategy {config.strategy}: it changes clients' ranks, and what an "
            "optimizer holds has the old one; choose reset or mean-v"
        )
    traits = traits_of(strategy)
    needed = frozenset(traits.needs)
    row = METHODS[config.method]
    if any(needed - set(turn) for turn in row.sent):
        able = [name for name, other in METHODS.items() if all(needed <= set(turn) for turn in other.sent)]
        sent = " in turn ".join(" and ".join(turn) for turn in row.sent) or "the head alone"
        yield (
            f"--strategy {config.strategy} with --method {config.method}: it combines {' and '.join(sorted(needed))} "
            f"of every client, and clients of this method send {sent}; choose --method {' or '.join(able)}"
        )
    elif row.has_core and traits.merges([1, 1]):
        yield (
            f"--strategy {config.strategy} with --method {config.method}: what it merges is B A, without the core "
            "between them; choose --method lora"
        )


def unmet_controls(strategy: FlowerStrategy, config: SimulationConfig) -> Iterator[str]:
    """Why clients cannot keep control variates as a strategy asks, each one line."""
    if not traits_of(strategy).controls:
        return
    name = f"--strategy {config.strategy or METHODS[config.method].strategy}"
    row = METHODS[config.method]
    if row.adapts and row.core_kind(config.core).restarts:
        able = cores_that(lambda kind: kind.trained and not kind.restarts)
        yield (
            f"{name} with --core {config.core or row.core}: the blocks' scales start again in every round, so there is "
            f"no lasting gradient that a control variate could stand for; choose --core {able[0]}"
        )
    if config.client_rank is not None:
        yield f"{name} with --client-rank: control variates are of the run's rank; leave --client-rank out"
    if config.engine == "flower":
        yield f"{name} with --engine flower: {NO_CLIENT_STATE}"


def unmet_clients(strategy: FlowerStrategy, config: SimulationConfig) -> Iterator[str]:
    """Why the rounds that are planned have too few clients for a strategy, or clients that it cannot compare."""
    needed = traits_of(strategy).fewest()
    if needed is None:
        return
    name = f"--strategy {config.strategy or METHODS[config.method].strategy}"
    # Of hidden clients a strategy sees one mean, however many come: `promise` refuses what cannot do with that.
    if config.privacy != "client" and config.clients_per_round < needed.clients:
        yield (
            f"{name} with {config.clients_per_round} clients a round: it needs {needed.clients} ({needed.why}); give a "
            "larger --sample, other --strategy-arg, or another strategy"
        )
    if config.client_rank is not None:
        yield (
            f"{name} with --client-rank: what a client of a lower rank lacks is zero, and would be taken for what it "
            "learnt; leave --client-rank out, or choose a strategy that averages"
        )


def feedback(strategy: FlowerStrategy, config: SimulationConfig) -> bool | None:
    """Whether clients make up for what a codec lost of their last update, where the configuration leaves it open.

    It stays open where nothing is lost, as in the configurations of runs that are older than codecs.
    """
    if config.error_feedback is not None or not config.coding.update.lossy:
        return config.error_feedback
    return config.engine != "flower" and traits_of(strategy).factors_last


def unmet_codec(strategy: FlowerStrategy, config: SimulationConfig) -> Iterator[str]:
    """Why a codec does not go with a strategy, each one line."""
    name = f"--strategy {config.strategy or METHODS[config.method].strategy}"
    if config.error_feedback and not traits_of(strategy).factors_last:
        yield (
            f"--error-feedback with {name}: the factors of a round are not those of the next, so what was lost of them "
            "cannot be made up for; choose --no-error-feedback"
        )
    if config.coding.broadcast.coded and traits_of(strategy).ranks is not None:
        yield f"--broadcast-codec {config.broadcast_codec} with {name}: it changes clients' ranks; only --codec goes"
