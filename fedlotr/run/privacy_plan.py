"""What a configuration promises of privacy: its noise, reckoned once from the whole plan, and who keeps to it."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlotr.adapters.methods import METHODS
from fedlotr.config.configuration import SimulationConfig
from fedlotr.errors import InputError
from fedlotr.flower.round import draw_clients
from fedlotr.privacy.accounting import calibrate
from fedlotr.privacy.dp_sgd import ExampleNoise, sampling_rate
from fedlotr.privacy.guard import Adaptive, ClientGuard, Guard, NoGuard
from fedlotr.privacy.ledger import BRING_BACK, KEY, NAME, Ledger, Promise
from fedlotr.reporting.documents import PrivacyInWords
from fedlotr.run.checking import Checked
from fedlotr.run.public_rows import scored_on

log = logging.getLogger("fedlotr")

EXAMPLE_BOUND = 0.1
"""Of an example's gradient, where --clip-norm does not say: small, so that nearly all are clipped and AdamW, whose
steps do not depend on the size of gradients, sees a mean of directions (Bu et al. 2023, arXiv:2206.07136)."""
MADE_OF = {"seed": "the seed", "weights": "the base model", "gradient": "a gradient on the public data"}
"""Where a basis is from, in words."""
DELTA_SHARE = 0.1
"""Of 1/n, where --delta does not say."""

SETTINGS = (
    *("rounds", "clients", "seed", "batch_size", "local_epochs", "local_steps", "clip_norm", "clip_quantile"),
    *("noise_cohort", "weights", "privacy_engine"),
)
"""Of the configuration: what a promise rests on besides its plan and the data; more rounds may be asked for later."""
TRACES = ("facts.json", "metrics.jsonl", "ledger", "checkpoints")
"""What a run leaves in its folder after the ledger was begun."""

SEES = {
    "example": "every message of every client: the server too; not its raw data, nor what only this run's directory "
    "holds (checkpoints, log.txt, the data's hash)",
    "client": "the model of every round and what is measured of it; not the server, which is trusted, nor what only "
    "its directory holds (checkpoints, ledger and log.txt name the clients of each round), nor how long a round takes",
}

PUBLIC = {
    "example": "how many examples each client holds (n), and with it its sampling rate, its number of steps and its "
    "weight: the removal of an example does not change them",
    "client": "how many clients there are, and with it the sampling rate: the removal of a client does not change it",
}
"""What adjacent data have in common."""
REMOVED = {
    "example": "in each step of its client the sum of clipped gradients, with the probability of the sampling rate, "
    "by a norm of at most clip_norm; the noise on that sum has the deviation noise_multiplier * clip_norm",
    "client": "in each round the sum of clipped updates, with the probability of the sampling rate, by a norm of at "
    "most clip_norm; the noise on that sum has the deviation noise_multiplier * clip_norm",
}
"""What the removal of one unit changes."""


def guard_of(checked: Checked, folder: Path, mark: Mapping[str, Any] | None, tell: Callable[[str], None]) -> NoGuard:
    """The guard of a run in a folder, with a ledger that is new or goes on; one that promises nothing without privacy.

    mark: what the checkpoint that a run goes on with knows of the ledger. tell: called before what takes a while.
    Raises InputError for a budget that no noise can keep, and as `paid_before`.
    """
    config = checked.config
    if config.privacy == "none":
        return NoGuard()
    ledger = paid_before(checked, folder, mark) if config.resume else None
    if ledger is None:
        settings = _settings(config)
        ledger = Ledger.begin(folder / NAME, promise_of(checked, tell), settings, _dealt(checked))
    promise = ledger.promise
    log.info(
        "privacy %s: noise multiplier %.4g, epsilon at most %s at delta %.3g",
        promise.unit,
        promise.sigma,
        promise.target,
        promise.delta,
    )
    if config.privacy == "client":
        assert config.clip_norm is not None
        adaptive = None if config.clip_quantile is None else Adaptive(config.clip_quantile)
        return ClientGuard(
            ledger, _facts(checked), config.clients, config.clip_norm, config.seed, adaptive, config.noise_cohort
        )
    return Guard(ledger, _facts(checked))


def example_noise(config: SimulationConfig, guard: NoGuard) -> ExampleNoise | None:
    """What clients are told that hide their examples themselves."""
    if not isinstance(guard, Guard) or guard.hides_clients:
        return None
    assert config.clip_norm is not None
    return ExampleNoise(guard.ledger.promise.sigma, config.clip_norm, config.reproducible_noise, config.privacy_engine)


def paid_before(checked: Checked, folder: Path, mark: Mapping[str, Any] | None) -> Ledger | None:
    """The ledger that a resumed run goes on with; None where nothing has gone out yet, so that it may begin anew.

    Raises InputError where it has vanished, has lost or changed lines, or has paid for anything else than what the run
    would use now: another plan, other settings, other examples.
    """
    config, path = checked.config, folder / NAME
    ledger = Ledger.open(path)
    if ledger is None or not ledger.paid:
        # The key lies there before the ledger does, and both do before the other files.
        traces = [name for name in TRACES if (folder / name).exists()] if not (folder / KEY).exists() else []
        if mark is not None or traces:
            raise InputError(f"--resume: {path} has vanished, so nobody knows what is spent; {BRING_BACK}")
        return None
    if mark is not None:
        ledger.check(mark)
    now, settings = asdict(_plan(checked, ledger.settings["rounds"])), _settings(config)
    before, now["sigma"] = asdict(ledger.promise), config.noise_multiplier or ledger.promise.sigma
    differing = [
        f"{name}: {_short(before[name])}, now {_short(now[name])}" for name in before if before[name] != now[name]
    ]
    differing += [
        f"{name}: {ledger.settings.get(name)}, now {settings[name]}"
        for name in settings
        if name != "rounds" and ledger.settings.get(name) != settings[name]
    ]
    if not ledger.is_about(_dealt(checked)):
        differing.append("the examples that the clients hold")
    if differing:
        raise InputError(
            f"--resume: {path} has paid for something else than what this run would use ({'; '.join(differing)}), so "
            "what it says of privacy would not hold; go on with what the run was begun with, or start a new run with "
            "another --out"
        )
    return ledger


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _settings(config: SimulationConfig) -> dict[str, Any]:
    """What a promise rests on besides its plan."""
    return {"clients_per_round": config.clients_per_round} | {name: getattr(config, name) for name in SETTINGS}


def _dealt(checked: Checked) -> bytes:
    """A hash of what each client trains on, whatever files it came from; never to be written anywhere as it is."""
    train, digest = checked.source.train, hashlib.sha256()
    columns = {name: list(train[name]) for name in sorted(train.column_names)}
    for part in checked.parts:
        rows = {name: [values[int(row)] for row in part] for name, values in columns.items()}
        digest.update(json.dumps(rows, default=str).encode() + b"\n")
    return digest.digest()


def promise_of(checked: Checked, tell: Callable[[str], None]) -> Promise:
    """What a run that begins now promises, with its noise. Raises InputError for a budget that no noise can keep."""
    config, plan = checked.config, _plan(checked, checked.config.rounds)
    if config.noise_multiplier is not None:
        return replace(plan, sigma=config.noise_multiplier)
    assert config.epsilon is not None
    accounts = list(zip(plan.rates, plan.planned, strict=True))
    kinds = len(set(accounts))
    tell(
        f"reckoning the noise for epsilon {config.epsilon:g} at delta {plan.delta:.3g}, of "
        f"{'one plan' if kinds == 1 else f'{kinds} plans'} of up to {max(plan.planned):,} steps"
    )
    try:
        sigma = calibrate(config.epsilon, plan.delta, accounts)
    except ValueError as error:
        raise InputError(f"--epsilon {config.epsilon:g}: {error}; give a larger one, or fewer --rounds") from error
    return replace(plan, sigma=sigma or 1.0)


def _plan(checked: Checked, rounds: int) -> Promise:
    """A promise whose noise is still to be reckoned. rounds: that it is to be reckoned for."""
    config, training, parts = checked.config, checked.training, checked.parts
    if config.privacy == "client":
        rates, steps = [config.sampled_clients / config.clients], [1]
        planned = [rounds]
    else:
        rates = [sampling_rate(training.batch_size, len(part)) for part in parts]
        steps = [training.steps_of(len(part)) for part in parts]
        # Who takes part is drawn from the seed, which hides nothing: every client pays for all the rounds it is in.
        taken = np.zeros(len(parts), np.int64)
        for server_round in range(1, rounds + 1):
            taken[list(draw_clients(len(parts), config.clients_per_round, config.seed, server_round))] += 1
        planned = [int(count) * own for count, own in zip(taken, steps, strict=True)]
    return Promise(
        "client" if config.privacy == "client" else "example",
        config.epsilon,
        config.delta or DELTA_SHARE / _units(checked),
        0.0,
        rates,
        steps,
        planned if config.epsilon is not None else [],
        config.reproducible_noise,
    )


def _units(checked: Checked) -> int:
    """How many a unit is hidden among: the largest client's examples, or the clients."""
    config = checked.config
    if config.privacy == "example":
        return max(map(len, checked.parts))
    if config.noise_cohort is None:
        return config.clients
    return round(config.clients * config.noise_cohort / config.sampled_clients)


def check_delta(checked: Checked) -> Iterator[str]:
    """What is wrong with the delta that was given, as one line."""
    config = checked.config
    if config.privacy == "none" or config.delta is None:
        return
    units, of = _units(checked), "examples of the largest client" if config.privacy == "example" else "clients"
    if config.delta >= 1 / units:
        yield (
            f"--delta {config.delta:g}: expected less than 1/{units} ({1 / units:.3g}), one over the {of}: with more, "
            "publishing one of them outright would pass for private"
        )


def _not_hidden(checked: Checked) -> str:
    """What this run tells of its data all the same."""
    config, source = checked.config, checked.source
    told = [f"metrics on {scored_on(config, source)} (of a row of train that stands there too, they tell)"]
    if config.privacy == "example":
        told.insert(0, "how many examples each client holds, and which clients take part")
    if checked.task.label_names and config.labels is None and checked.own_task is None and source.label_names is None:
        told.append("which labels occur in the data (--label-names would settle them without looking)")
    if checked.task.scale and config.task == "auto":
        told.append("that labels are numbers on a scale (--task regression would settle it without looking)")
    if config.init_adapter is not None:
        told.append("what the adapter of --init-adapter was trained on")
    return "; ".join(told)


def _facts(checked: Checked) -> PrivacyInWords:
    """What summary.json says of a promise beside its numbers."""
    config = checked.config
    made = MADE_OF[METHODS[config.method].basis_kind(config.basis).made_of]
    found: PrivacyInWords = {
        "clip_norm": config.clip_norm,
        "adversary_sees": SEES[config.privacy],
        "not_hidden": _not_hidden(checked),
        "removal_changes": REMOVED[config.privacy],
        "taken_as_public": PUBLIC[config.privacy],
        "scored_on": scored_on(config, checked.source),
        "other_runs": "the budget of every other run over the same data adds to this one's",
        "bases_from": made if METHODS[config.method].freezes else "nothing frozen that was learnt",
        "public_data": config.public_data,
        "init_adapter": config.init_adapter,
    }
    if config.privacy_engine == "opacus" and not config.reproducible_noise:
        found["noise"] = "torch's generator, seeded by the operating system: not cryptographic"
    return found
