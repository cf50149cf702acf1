"""From what has been checked to what a run needs: tokens, head, bases, and the place where workers find them."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedlotr.adapters.bases import Factors, threads
from fedlotr.adapters.carry import Carry
from fedlotr.adapters.export import PREFIX
from fedlotr.adapters.going_on import holds, take_over
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.start import carrying
from fedlotr.adapters.tuner import CoreConfig, bases_of, bases_sha256, factored_layers, highest_rank
from fedlotr.communication.basis_coding import coded, decoded, shapes_of
from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import Encoded
from fedlotr.errors import InputError
from fedlotr.flower.links.attacks import hostile_clients
from fedlotr.flower.links.derived import public_record, public_rows
from fedlotr.flower.links.draws import OWN_FACTORS
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.traits import traits_of
from fedlotr.flower.workplace import Recipe, Workplace
from fedlotr.models.loading import head_layers, load_base, unbatched_layers
from fedlotr.privacy.dp_sgd import ExampleNoise
from fedlotr.reporting.documents import TextsSeen
from fedlotr.run.checking import Checked
from fedlotr.run.examples import Tokenised
from fedlotr.run.export import in_units
from fedlotr.run.fitting_texts import unseen, what_is_seen
from fedlotr.run.skeleton import try_longest, try_out
from fedlotr.said import say
from fedlotr.training.examples import Examples
from fedlotr.training.head import fit_head
from fedlotr.training.model import TrainableModel
from fedlotr.training.moving import gradient_bases
from fedlotr.training.packing import Rows

log = logging.getLogger("fedlotr")


@dataclass(frozen=True)
class Prepared:
    """The server's side of a run, ready for round one.

    bases_message: of the frozen factors, where they are sent coded. seen: of the texts, as `what_is_seen` has it.
    """

    checked: Checked
    model: TrainableModel
    workplace: Workplace
    bases_sha256: str
    bases_message: bytes | None
    seen: TextsSeen


def prepare(checked: Checked, folder: Path, noise: ExampleNoise | None = None) -> Prepared:
    """Tokenise once, fit the head and make the bases on the public examples, and lay out the workers' folder.

    noise: where clients hide their single examples.
    """
    config, examples = checked.config, checked.examples
    seen = what_is_seen(config, examples.train, checked.parts, examples.test)
    for line in unseen(seen):
        say(line)
    if config.moves is not None and config.rebase != config.row.rebase and not config.moves.versions(config.rounds - 1):
        say(f"--rebase {config.rebase} with --rounds {config.rounds}: the run ends before the bases move")
    try:
        base = load_base(checked.spec)
    except ValueError as error:
        raise InputError(f"--model {config.model}: {error}") from error
    if checked.spec.scale:
        checked = _in_steps(checked, base)
    examples = checked.examples
    train, test = examples.train.examples, examples.test.examples
    shown = train if examples.shown is None else examples.shown.examples
    core, public = checked.core, checked.public
    if not len(public) and config.privacy != "none":
        log.info("there is no --public-data, so the head begins as it was drawn or loaded")
    if config.targets != "all-linear" and (left_out := unbatched_layers(base, config.targets)):
        say(
            f"--targets {config.targets} also matches {len(left_out)} layers that are not adapted, since they also "
            f"meet an input without a batch axis: {', '.join(left_out)}"
        )
    # The head before the basis: a head of zeros passes no gradient on to the layers.
    bare = TrainableModel(base, checked.spec, None)
    if checked.spec.code is not None:
        try_out(bare, train)
    for texts in filter(len, (train, test)):
        try_longest(bare, texts, config.model, config.longest)
    carry = {} if checked.start is None else checked.start.layers
    lasts = bool(carry) and _factors_last(config)
    gradient = core is not None and core.basis_kind.made_of == "gradient"
    message = None
    made = _bases_of_before(checked, bare, shown, public) if lasts and gradient else None
    with carrying(base, carry):
        _begin_head(checked, bare, shown, public)
        if core is not None and gradient:
            made = made or _with_bases(checked, core, bare, shown, public)
            core, message = made.core, made.message
    model = TrainableModel(base, checked.spec, core, carry)
    if checked.start is not None:
        (log.info if checked.start.other_labels is None else say)(checked.start.in_words(has_head=bool(bare.heads)))
    if lasts and core is not None:
        carry = _go_on(model, core, carry)
    # A client makes the others again by itself.
    bases = bases_of(model.module) if core is not None and not core.basis_kind.derivable else {}
    recipe = Recipe(
        model=checked.spec,
        core=None if core is None else core.to_dict(),
        training=checked.training,
        weights=config.weights or "examples",
        seed=config.seed,
        threads=_threads(config),
        noise=noise,
        coding=config.coding,
        links=config.links,
        rebase=None if config.moves is None else asdict(config.moves),
        factors=_factors(config),
    )
    shared = public_rows(public_record(shown, public), causal=shown.causal) if config.derive_bases else None
    workplace = Workplace.write(
        *(folder, recipe, train, test, checked.parts, bases, carry),
        held_back=checked.held_back,
        further=checked.sheet.further,
        public=shared,
    )
    workplace.record_load()
    if config.privacy == "none" and core is not None and core.row.factored and config.baseline is None:
        _warn_of_small_steps(workplace.step_tokens(range(len(checked.parts))), highest_rank(model.module))
    return Prepared(checked, model, workplace, bases_sha256(model.module), message, seen)


def _factors(config: SimulationConfig) -> dict[str, float]:
    """Client -> what it multiplies its updates by, where that changes them."""
    hostile = hostile_clients(config.attacks, config.clients, config.seed)
    factors = {str(client): attack.factor(config.updates_per_round) for client, attack in hostile.items()}
    return {client: factor for client, factor in factors.items() if factor != 1}


def _threads(config: SimulationConfig) -> int:
    """To compute with, in a worker."""
    return config.threads or torch.get_num_threads()


def _in_steps(checked: Checked, base: nn.Module) -> Checked:
    """With the labels of all examples as (label - mean) / deviation of the public rows, which the model then learns.

    So a learning rate fits whatever the labels' unit. Without public rows, or where these are all alike, labels stay as
    they are; where the head has no bias that could give the mean back, it is 0.
    """
    examples = checked.examples
    labels = (examples.train if examples.shown is None else examples.shown).examples.labels[checked.public]
    spec, last = checked.spec, list(head_layers(base).values())[-1]
    if not len(labels):
        say(
            "no public rows tell how large labels are, so the model learns them as they are: rates fit where they lie "
            "about as far apart as 1; --public-data gives some"
            + (", or --public-examples" if checked.config.privacy == "none" else "")
        )
    elif labels.std() > 0:
        shift = 0.0 if last.bias is None else float(labels.mean())
        spec = replace(spec, shift=shift, step=float(np.sqrt(np.square(labels - shift).mean())))

    def told(encoded: Encoded) -> Encoded:
        labels = ((encoded.examples.labels - spec.shift) / spec.step).astype(np.float32)
        return encoded._replace(examples=replace(encoded.examples, labels=labels))

    found = Tokenised(told(examples.train), told(examples.test), examples.shown and told(examples.shown))
    return replace(checked, spec=spec, examples=found)


def _begin_head(checked: Checked, bare: TrainableModel, shown: Examples, public: Rows) -> None:
    """The head of the adapter that the run starts from, of the model's files, or one that is fitted to public rows."""
    spec = checked.spec
    if checked.start is not None and checked.start.head:
        last = [f"{PREFIX}{name}" for name in bare.heads[-1:]]
        bare.assign(in_units(checked.start.head, last, -spec.shift / spec.step, 1 / spec.step))
    elif spec.head_rows:
        log.info("the head is that of the model's files, by the names of its labels")
    else:
        fit_head(bare, shown, public)


@dataclass(frozen=True)
class _Made:
    """A configuration with bases of the gradient, and the message of them where they are coded."""

    core: CoreConfig
    message: bytes | None


def _with_bases(checked: Checked, core: CoreConfig, bare: TrainableModel, shown: Examples, public: Rows) -> _Made:
    """With bases made of the gradient on public rows, as clients will decode them, or make them."""
    derived = checked.config.derive_bases
    try:
        with threads(_threads(checked.config) if derived else torch.get_num_threads()):
            found = gradient_bases(bare, core, shown, public)
    except ValueError as error:
        raise InputError(f"--basis {core.basis}: {error}; or leave that layer out by --targets") from error
    form, bases = checked.config.coding.basis, found.bases or {}
    if not (form.coded or derived) or not core.basis_kind.unit:
        return _Made(found, None)
    message = coded(form, bases, checked.config.seed)
    found.bases = decoded(form, message, shapes_of(bases))
    return _Made(found, message)


def _factors_last(config: SimulationConfig) -> bool:
    """Whether what a factor begins with lasts: not so where a strategy merges factors, or has clients draw them."""
    if config.baseline is not None:
        return True
    if config.moves is not None and METHODS[config.method].both:
        return False
    traits = traits_of(
        load_strategy(config.chosen_strategy, config.strategy_arg, config.clients_per_round, config.seed)
    )
    return not traits.merges([1, 1]) and OWN_FACTORS not in traits.asks


def _bases_of_before(checked: Checked, bare: TrainableModel, shown: Examples, public: Rows) -> _Made | None:
    """With the bases that a run without an adapter to start from makes of the gradient, where these hold the adapter.

    None where they do not, or there are none; the head is then as it was.
    """
    core, start, head = checked.core, checked.start, bare.values()
    assert core is not None and start is not None
    _begin_head(replace(checked, start=None), bare, shown, public)
    found: _Made | None = None
    with contextlib.suppress(InputError):  # beside the adapter there may be a gradient
        found = _with_bases(checked, core, bare, shown, public)
    bare.assign(head)
    if found is None:
        return None

    def tag(name: str) -> str:
        return core.tag(name, bare.module.get_submodule(name))

    made = {tag(name): pair for name, pair in (found.core.bases or {}).items()}
    held = (holds(pair, made[tag(name)]) for name, pair in start.layers.items())
    return found if all(held) else None


def _go_on(model: TrainableModel, core: CoreConfig, carry: Mapping[str, Factors]) -> dict[str, Factors]:
    """Take over into the run's factors what they can hold of an adapter; what is left of it is carried."""
    left = take_over(factored_layers(model.module), core.row, carry)
    model.carry(Carry.start(left))
    whole = sum(name not in left for name in carry)
    parts = sum(name in left and len(left[name].A) < len(pair.A) for name, pair in carry.items())
    if whole or parts:
        beside = f", and of {parts} with a part of it" if parts else ""
        log.info("the run's factors go on with the adapter in %s of %s layers%s", whole, len(carry), beside)
    return left


def _warn_of_small_steps(tokens: Sequence[int], rank: int) -> None:
    """Say that updates may tell what is in them. tokens: of one optimizer step of each client."""
    if few := [count for count in tokens if count < rank]:
        say(
            f"{len(few)} of {len(tokens)} clients take steps of fewer tokens (from {min(few)} on) than the rank "
            f"{rank}: one such gradient names its tokens (experiments/attack.py does it); a lower --rank or a "
            "larger --batch-size makes it blind, but only --privacy hides what a client holds"
        )
