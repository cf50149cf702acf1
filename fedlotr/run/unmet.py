"""What a strategy needs and a configuration does not give, or hides from it: the rules about strategies."""

from collections.abc import Iterator

from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.adapters.kinds import cores_that
from fedlotr.adapters.methods import METHODS
from fedlotr.config.configuration import SimulationConfig
from fedlotr.config.rules import NO_CLIENT_STATE, Rule, broken, value_of
from fedlotr.config.rules import RULES as OF_CONFIGURATION
from fedlotr.errors import InputError
from fedlotr.flower.chain import LINKS, link_classes
from fedlotr.flower.links.draws import OWN_FACTORS
from fedlotr.flower.plugins import MINIMA
from fedlotr.flower.traits import StrategyTraits, traits_of


def _combines(config: SimulationConfig, traits: StrategyTraits) -> str:
    if traits.gets(config.row):
        verb = "merges" if traits.merges([1, 1]) else "combines"
        return f"what it {verb} is B A, without the core between them; choose --method lora"
    able = [name for name, row in METHODS.items() if traits.combines(row)]
    sent = " in turn ".join(" and ".join(turn) for turn in config.row.sent) or "the head alone"
    return (
        f"it combines {' and '.join(sorted(traits.needs))} of every client, and clients of this method send {sent}; "
        f"choose --method {' or '.join(able)}"
    )


def _too_few(config: SimulationConfig, traits: StrategyTraits) -> bool:
    needed = traits.fewest()
    return needed is not None and config.updates_per_round < needed.clients


def _needs(config: SimulationConfig, traits: StrategyTraits) -> str:
    needed = traits.fewest()
    assert needed is not None
    more = "--buffer" if config.mode == "async" else "--sample"
    return f"it needs {needed.clients} ({needed.why}); give a larger {more}, other --strategy-arg, or another strategy"


OTHER_FACTORS = (
    "it goes on from factors of rounds before, or changes what they are, and these are of other bases once they have "
    "moved; choose one that combines each round by itself, such as exact-average"
)


def _moves_as_its_method(config: SimulationConfig) -> bool:
    return config.row.rebase is not None and config.rebase in (None, config.row.rebase)


RULES = (
    Rule(
        at="optimizer_state=keep strategy:any (ranks!=none)",
        why="it changes clients' ranks, and what an optimizer holds has the old one; choose reset or mean-v",
    ),
    Rule(at="strategy:any method:any", why=_combines, when=lambda c, traits: not traits.combines(c.row)),
    Rule(
        at="strategy:any method:core",
        why="what it merges is B A, without the core between them; choose --method lora",
        when=lambda c, traits: traits.combines(c.row) and traits.merges([1, 1]),
    ),
    # Of hidden clients a strategy sees one mean, however many come; what cannot do with that is refused below.
    Rule(at="strategy:any sample:any (privacy!=client)", why=_needs, when=_too_few),
    Rule(
        at="strategy:any client_rank",
        why="what a client of a lower rank lacks is zero, and would be taken for what it learnt; leave --client-rank "
        "out, or choose a strategy that averages",
        when=lambda c, traits: traits.fewest() is not None,
    ),
    Rule(
        at="error_feedback strategy:any (factors_last=false)",
        why="the factors of a round are not those of the next, so what was lost of them cannot be made up for; choose "
        "--no-error-feedback",
    ),
    Rule(
        at="strategy:any rebase",
        why=OTHER_FACTORS,
        when=lambda c, traits: traits.remembers_factors and not _moves_as_its_method(c),
    ),
    Rule(
        at="strategy:any method:turning",
        why=OTHER_FACTORS,
        when=lambda c, traits: traits.remembers_factors and _moves_as_its_method(c),
    ),
    Rule(
        at="strategy:any method:residual (ranks!=none)",
        why="it changes clients' ranks, and a block of the factors that this method begins with is not what is taken "
        "off beside the weights",
    ),
    Rule(at="broadcast_codec:coded strategy:any (ranks!=none)", why="it changes clients' ranks; only --codec goes"),
    *(
        Rule(
            at=f"{codec}:coded strategy:any",
            why="its clients draw A and B by themselves, and a codec's messages are of what a client was sent; leave "
            "the codec out, or choose --strategy-arg restart=fresh",
            when=lambda c, traits: OWN_FACTORS in traits.asks,
        )
        for codec in ("codec", "broadcast_codec")
    ),
    Rule(
        at="strategy:any chosen_core:restarts (controls method:adapting)",
        why="the blocks' scales start again in every round, so there is no lasting gradient that a control variate "
        f"could stand for; choose --core {cores_that(lambda kind: kind.trained and not kind.restarts)[0]}",
    ),
    Rule(
        at="strategy:any client_rank (controls)",
        why="control variates are of the run's rank; leave --client-rank out",
    ),
    *(
        Rule(
            at=f"strategy:any {without} (rooted)",
            why="the server trains on public rows in every round, and has none; give {how}".replace("{how}", how),
        )
        for without, how in (
            ("public_examples:zero", "some"),
            ("privacy=example public_data:absent", "--public-data: rows withheld from private data are private"),
        )
    ),
    Rule(at="strategy:any engine=flower (controls)", why=NO_CLIENT_STATE),
    *(
        Rule(
            at=at,
            why="what its clients send is of this round's model alone, and late updates are of older ones; choose one "
            "that averages, such as exact-average, or a --mode in which none come",
            when=lambda c, traits: c.stale and (traits.controls or not traits.factors_last or traits.merges([1, 1])),
        )
        for at in ("strategy:any mode=async", "strategy:any late")
    ),
    *(
        Rule(
            at=f"{least}:several privacy!=none",
            why="a round goes on with whoever is there, as clients spend their budgets or cohorts are drawn; leave it "
            "out",
        )
        for least in MINIMA
    ),
    Rule(
        at="strategy:any privacy!=none (losses)",
        why="it weighs clients by their training losses, which privacy leaves untold; choose another, such as "
        "exact-average",
    ),
    Rule(
        at="privacy_engine=opacus strategy:any (privacy!=none)",
        why="Opacus trains plainly; leave the engine out",
        when=lambda c, traits: traits.controls or traits.asks,
    ),
    Rule(
        at="strategy:any privacy=client (several)",
        why="it combines three updates or more, and is shown the noised mean alone; choose exact-average",
    ),
    Rule(
        at="strategy:any privacy=client",
        why="it needs more of every client than what the noised mean tells; choose one that averages, such as "
        "exact-average, fedit or fedadam",
        when=lambda c, traits: traits.controls or traits.merges([1, 1]) or traits.averages is False,
    ),
)
"""In the order in which a report names what is broken."""


USUAL = {"codec": "int8", "broadcast_codec": "delta+int8"}
"""Codecs of trained tensors, by option."""


def unmet(strategy: FlowerStrategy, config: SimulationConfig) -> Iterator[str]:
    """Why a strategy does not go with a configuration, each one line."""
    for fields, why in broken(RULES, config, traits_of(strategy)):
        yield f"{' with '.join(_option(field, config) for field in fields)}: {why}"


def _option(field: str, config: SimulationConfig) -> str:
    """As it is given on the command line."""
    match field:
        case "strategy":
            return f"--strategy {config.chosen_strategy}"
        case "sample":
            return f"{config.updates_per_round} {'updates' if config.mode == 'async' else 'clients'} a round"
        case "error_feedback" | "client_rank":
            return f"--{field.replace('_', '-')}"
        case _ if field in MINIMA:
            return f"--strategy-arg {field}={value_of(field, config)}"
        case _:
            return f"--{field.removeprefix('chosen_').replace('_', '-')} {value_of(field, config)}"


def usual_codecs(strategy: FlowerStrategy, config: SimulationConfig) -> dict[str, str]:
    """How trained tensors travel where the configuration leaves it open.

    In a byte a number, which costs no accuracy that was seen (experiments/README.md), where what a message loses is
    made up for by the next one, no rule forbids it, and no promise is made of what messages tell; else as they are.
    """
    found: dict[str, str] = {}
    quiet = config.baseline is None and config.engine != "flower"
    quiet = quiet and (config.privacy == "none" or bool(config.error_feedback))
    for name, words in USUAL.items():
        if getattr(config, name) is not None:
            continue
        tried = config.model_copy(update={**found, name: words})
        goes = quiet and feedback(strategy, tried) and not any(broken(OF_CONFIGURATION, tried))
        found[name] = words if goes and not any(unmet(strategy, tried)) else "float32"
    return found


def feedback(strategy: FlowerStrategy, config: SimulationConfig) -> bool | None:
    """Whether clients make up for what a codec lost of their last update, where the configuration leaves it open.

    It stays open where nothing is lost, as in the configurations of runs that are older than codecs.
    """
    if config.error_feedback is not None or not config.coding.update.lossy:
        return config.error_feedback
    return config.engine != "flower" and traits_of(strategy).factors_last and config.rebase_every != 1


def unmet_links(config: SimulationConfig) -> Iterator[str]:
    """Why a user's links cannot stand in the chain, each one line."""
    good: list[str] = []
    taken = {link.name for link in LINKS}
    for name in config.links:
        try:
            (kind,) = (kind for kind in link_classes([*good, name]) if kind.name not in taken)
        except InputError as error:
            yield from error.problems
            continue
        good.append(name)
        taken.add(kind.name)
        if kind.traits.keeps_client_state and config.engine == "flower":
            yield f"--add-link {name} with --engine flower: {NO_CLIENT_STATE}"
