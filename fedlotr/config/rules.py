"""Values that are each fine but do not go together: one table of rules, each with its message."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedlotr.adapters.kinds import BASES, CORES, bases_made_of, cores_that
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.moves import read_rebase
from fedlotr.communication.attacks import counts, read_attack
from fedlotr.communication.wire_form import read_form
from fedlotr.config.schema import Fields
from fedlotr.config.values import columns_of
from fedlotr.fleet.faults import read_faults
from fedlotr.models.kinds import METRICS


def _scored_of(what: str, score: str | None) -> bool:
    return any(METRICS[name].of == what for name in (score or "").split(",") if name)


TESTS: Mapping[str, Callable[[Any], object]] = {
    "any": lambda value: True,
    "absent": lambda value: value is None,
    "zero": lambda value: value == 0,
    "empty": lambda value: not value,
    "several": lambda least: isinstance(least, int) and least > 1,
    "url": lambda address: "://" in (address or ""),
    "label": lambda columns: "label" in (columns_of(columns) or {}) if columns else False,
    # of a score
    "unchosen": lambda score: not _scored_of("choices", score),
    "unsaid": lambda score: not _scored_of("answers", score),
    # of an attack
    "triggered": lambda words: bool(words) and any(a.poisons("trigger") is not None for a in read_attack(words)),
    "slow": lambda fault: fault is not None and read_faults(fault).takes_time,
    # of a codec
    "coded": lambda codec: codec is not None and read_form(codec).coded,
    "exact": lambda codec: codec is not None and not read_form(codec).lossy,
    "zstd": lambda codec: codec is not None and read_form(codec).zstd,
    "delta": lambda codec: codec is not None and read_form(codec).delta,
    # of a basis
    "gradient": lambda basis: BASES[basis].made_of == "gradient",
    "zero-B": lambda basis: BASES[basis].zero_b,
    "by-gradient": lambda rebase: rebase is not None and not read_rebase(rebase).move.derivable,
    "of-gradient": lambda basis: basis is not None and BASES[basis].made_of == "gradient",
    "by-product": lambda rebase: rebase is not None and read_rebase(rebase).move.made_of == "product",
    "wayless": lambda rebase: rebase is not None and ":" not in rebase,
    "by-start": lambda rebase: rebase is not None and read_rebase(rebase).move.made_of == "start",
    # of a core
    "unnested": lambda core: CORES[core].trained and not CORES[core].nested,
    "composed": lambda core: not CORES[core].plain,
    "constant": lambda core: CORES[core].constant is not None,
    "restarts": lambda core: CORES[core].restarts,
    # of a method
    "personal": lambda method: METHODS[method].personal,
    "shared": lambda method: not METHODS[method].personal,
    "bare": lambda method: not METHODS[method].adapts,
    "plain": lambda method: not METHODS[method].factored,
    "whole": lambda method: METHODS[method].adapts and not METHODS[method].factored,
    "factored": lambda method: METHODS[method].factored,
    "core": lambda method: METHODS[method].has_core,
    "adapting": lambda method: METHODS[method].adapts,
    "moving": lambda method: METHODS[method].factored and not (METHODS[method].freezes or METHODS[method].both),
    "frozen": lambda method: METHODS[method].freezes,
    "beyond-B": lambda method: METHODS[method].factored and set(METHODS[method].train) != {"B"},
    "residual": lambda method: METHODS[method].residual,
    "tied": lambda method: METHODS[method].may_tie and not METHODS[method].freezes,
    "untied": lambda method: METHODS[method].factored and not METHODS[method].may_tie,
    "core+B": lambda method: METHODS[method].factored and {"B", "C"} <= set(METHODS[method].train),
    "turning": lambda method: METHODS[method].rebase,
    "in-turn": lambda method: len(METHODS[method].sent) > 1,
    "no-B": lambda method: METHODS[method].factored and "B" not in METHODS[method].train,
}
"""What a rule may ask of a value besides what it is."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What does not go together, and why.

    at: the fields of a configuration that a message names, in its order, each with the values at which the rule holds:
    `field` (anything but none, false and 0), `field=a|b`, `field!=a|b`, `field>other`, or `field:test`, one of `TESTS`;
    in parentheses what must hold besides. Of a rule about strategies, their arguments and traits may stand there too.
    why: the message, with {c...} for what is of the configuration. when: what else must hold, of the configuration and
    the traits.
    """

    at: str
    why: str | Callable[..., str]
    when: Callable[..., object] = lambda *_: True

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """What a message names."""
        return tuple(name for name, _, _ in _terms(self.at.partition("(")[0]))

    @cached_property
    def terms(self) -> list[tuple[str, str, str]]:
        """All that must hold: (name, how it is compared, with what)."""
        return _terms(self.at)


def _terms(words: str) -> list[tuple[str, str, str]]:
    return re.findall(r"(\w+)(!?=|[:<>])?([^\s()]*)", words)


def broken(rules: Iterable[Rule], config: Fields, *traits: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The fields of each rule that does not hold, and why. traits: of the strategy, where the rules are about it."""
    for rule in rules:
        if all(_holds(*term, config, *traits) for term in rule.terms) and rule.when(config, *traits):
            yield rule.fields, rule.why.format(c=config) if isinstance(rule.why, str) else rule.why(config, *traits)


def value_of(name: str, config: Fields, *traits: Any) -> Any:
    """Of a field, a trait, or an argument of the strategy."""
    for owner in (config, *traits):
        if hasattr(owner, name):
            return getattr(owner, name)
    return config.strategy_arg.get(name)


def _holds(name: str, sign: str, wanted: str, *asked: Any) -> object:
    value = value_of(name, *asked)
    match sign:
        case ":":
            return TESTS[wanted](value)
        case ">" | "<":
            return value > value_of(wanted, *asked) if sign == ">" else value < value_of(wanted, *asked)
        case "=" | "!=":
            return (str(value).lower() in wanted.split("|")) == (sign == "=")
    return bool(value)


def rules_of(table: Mapping[str, str]) -> list[Rule]:
    """Of rows `at: why`, where `a, b c` is short for `a c` and `b c`."""
    rules = []
    for at, why in table.items():
        *others, last = at.split(", ")
        first, _, beside = last.partition(" ")
        rules += [Rule(at=f"{one} {beside}", why=why) for one in (*others, first)]
    return rules


NO_CLIENT_STATE = (
    "Flower does not show what its clients keep between rounds, so no checkpoint could hold it; choose ray or local"
)
GRADIENT = "the basis {c.chosen_basis!r} takes its gradient from public examples; give some"
NESTED = " or ".join(map(repr, cores_that(lambda kind: kind.nested)))
NO_BLOCK = f"the core {{c.chosen_core!r}} has no leading block; choose {NESTED}"
ALONE = "a baseline's clients keep no factors and are tested on the test split alone"
NO_COMMON = "each client has a model of its own, and there is no common one to ask; leave it out"
PLAIN = (
    "Opacus' hooks are for plain matrices: a method with the core "
    f"{' or '.join(cores_that(lambda kind: kind.plain))}, such as fed-sb or lora"
)
LARGEST_RANK = "the largest must be --rank; give --rank {c.largest_rank}, or one of {c.highest_rank}"
OTHER_MOMENTS = "what an optimizer holds is about the bases that it was computed between; choose reset"
WHOLE_ROUNDS = "what a promise costs is reckoned for whole rounds of clients; choose --mode sync"
NOT_STALE = "updates of older models cannot be told apart from it; choose {other}, or a --mode in which none come"
OF_FACTORS = "alpha, basis, tie, core, client_rank, rank_pattern, alpha_pattern, rslora, cap_rank, rebase"

TABLE = {
    "sample clients (sampled_clients>clients)": "more clients a round than there are",
    "deadline mode!=deadline": "it belongs to --mode deadline",
    "mode=deadline deadline=none": "after how many virtual seconds is a round over? give --deadline",
    "over_select mode!=over-select": "it belongs to --mode over-select",
    "buffer, mixing mode!=async": "it belongs to --mode async",
    "buffer sample (mode=async buffer>clients_per_round)": "no more updates can come than clients train at a time; "
    "give a larger --sample",
    "mixing buffer!=1 (mode=async)": "a client's model is mixed in by itself; give --buffer 1",
    "late mode=sync|async": "no update is late there; it belongs to --mode deadline or over-select",
    "staleness (stale=false)": "no update is older than its round: it belongs to --mode async, or --late use",
    "sampling!=uniform privacy!=none": "whom a round asks would tell of their rows or of who came before, and what a "
    "promise costs is reckoned for even draws; leave it out",
    "sampling!=uniform baseline": "a baseline has nobody to choose from: all clients train in each round; leave it out",
    "mode!=sync privacy!=none": WHOLE_ROUNDS,
    "fleet privacy=client": "who is there would decide who takes part, and no noise would cover it; leave it out",
    "mode!=sync, fleet baseline": "a baseline sends nothing, and waits for nobody; leave it out",
    "fault privacy=client": "what is missing of a round would show who was in it, and no noise would cover it; "
    "leave it out",
    "fault baseline": "a baseline sends nothing, and nothing of it can go wrong on its way; leave it out",
    "fault:slow (virtual=false)": "how long a client takes is virtual time, and there is none here; give --fleet or a "
    "--mode, or leave slow out",
    "client_rank stale": NOT_STALE.format(other="one rank"),
    "optimizer_state=mean-v stale": NOT_STALE.format(other="reset or keep"),
    "method:in-turn stale": "its clients train other factors from round to round, and an update of an older one has "
    "not those of this; choose another method, or a --mode in which none come",
    "local_epochs local_steps": "a client's work is given in epochs or in steps, not both",
    "local_epochs=none local_steps=none": "one of them must be a number",
    "momentum optimizer!=sgd": "momentum belongs to the optimizer 'sgd'",
    "optimizer_state=mean-v optimizer!=adamw": "second moments belong to the optimizer 'adamw'; choose reset or keep",
    "optimizer_state=keep momentum:zero (optimizer=sgd)": "sgd without momentum has nothing to keep; give it some, or "
    "reset",
    "optimizer_state=keep engine=flower": NO_CLIENT_STATE,
    "workers engine=local": "the engine 'local' works in this process; workers belong to 'ray'",
    "device=cuda engine=flower": "Flower hands out the GPUs of its own engine, and none here; choose ray or local",
    "device=cuda privacy_engine=opacus": "its noise is drawn on the CPU; choose cohort, or --device cpu",
    "workers_per_gpu engine!=ray": "the engine {c.engine!r} starts no workers; they belong to 'ray'",
    "workers_per_gpu device=cpu (engine=ray)": "the run computes on the CPU; give --device cuda, or leave it out",
    "ray_address engine!=ray": "the engine {c.engine!r} is not Ray's; choose ray, or leave it out",
    "ray_address:url": "a run is started on a machine of the cluster: give HOST:PORT, as 'ray start' prints",
    "strategy, strategy_arg baseline": "a baseline averages nothing, so it has no strategy",
    "baseline engine=flower": "a baseline runs on the engines ray and local",
    "codec:coded, broadcast_codec:coded, link baseline": "a baseline sends nothing",
    "error_feedback codec:exact": "this codec loses nothing that a client could make up for",
    "broadcast_codec:coded client_rank": "a client knows the shapes of the run's tensors, and not those of its blocks; "
    "only --codec goes with ranks",
    "error_feedback, broadcast_codec:delta engine=flower": NO_CLIENT_STATE,
    "codec:zstd privacy=client": "the size of a squeezed update tells of what is in it; leave +zstd out",
    "privacy_engine=opacus privacy!=example": "it belongs to --privacy example",
    "privacy_engine=opacus method:plain": PLAIN,
    "privacy_engine=opacus method:factored (chosen_core:composed)": PLAIN,
    "privacy_engine=opacus optimizer_state!=reset": "its optimizer begins anew in every round",
    "privacy_engine=opacus client_rank": "it knows one rank",
    "privacy_engine=opacus method:tied": "its hooks would see what layers share once in each of them; choose cohort",
    "privacy_engine=opacus gradient_checkpointing": "its hooks would see every block run twice",
    "epsilon, noise_multiplier, delta, clip_quantile, noise_cohort, reproducible_noise privacy=none": "there is no "
    "noise without --privacy example or --privacy client",
    "add_link privacy!=none": "what a link sends goes out as it is, without noise; leave it out",
    "public_eval privacy=none": "it belongs to --privacy: nothing is hidden without",
    "eval_data privacy!=none (public_eval=false)": "its rows are scored without noise: where they are nobody's secret, "
    "say so by --public-eval",
    "privacy!=none (epsilon=none noise_multiplier=none)": "how private is to be said: give --epsilon (8, or 1), or "
    "--noise-multiplier",
    "epsilon noise_multiplier (privacy!=none)": "each follows from the other; give one of them",
    "method:personal privacy!=none": "clients with factors of their own are scored on rows of their own, which no "
    "noise would cover; choose a method without such factors",
    "client_eval privacy!=none (method:shared)": "a score on a client's own rows tells of them, and no noise would "
    "cover it",
    "clip_quantile, noise_cohort privacy=example": "it belongs to --privacy client",
    "privacy=client (clip_norm=none)": "it needs --clip-norm, the largest norm of what one client's training changes; "
    "with --clip-quantile 0.5 that finds its size by itself, from wherever it starts",
    "weights=examples privacy=client": "clients that weigh differently are not hidden equally; leave it out, or "
    "uniform",
    "link privacy=client": "how long a round's messages take would tell who took part; leave it out",
    "optimizer_state=mean-v privacy=client": "the means of second moments would travel without noise; choose reset",
    "client_rank privacy=client": "which ranks take part would be seen; leave it out",
    "baseline privacy=client": "a baseline has no server that could hide clients; choose --privacy example",
    "max_length=auto privacy!=none": "the length of the longest of the hidden rows would be seen; give a number",
    "public_data public_examples:zero": "no row of it would be used; give some, or leave it out",
    "eval_data eval_split=held-out": "the latter is a tenth of --data's train; give one of them",
    "show_examples privacy!=none": "it would print rows that are hidden; leave it out",
    "format, columns text_column": "both say which columns are the texts; name them all by --columns, as text=NAME or "
    "prompt=NAME,answer=NAME",
    "columns:label label_column": "both say which column has the labels; give one of them",
    "label_names, join_labels task=causal-lm": "a language model has no labels",
    "label_names, join_labels task=regression": "its labels are numbers on a scale, and no classes; leave one out",
    "resume out:absent": "name the folder of the run to go on with",
    "resume_round resume=false": "it says where --resume goes on; give that too",
    "on_large_update max_update_norm=none": "no update is too large without a bound; give one",
    "max_update_norm baseline": "a baseline averages nothing, so no client can harm another",
    "max_update_norm privacy=client": "the server clips every update to --clip-norm; leave it out",
    "attack baseline": "a baseline averages nothing, so no client can harm another",
    "attack privacy=client": "the server bounds and noises every update, and what one client does is not to be seen; "
    "leave it out",
    "attack:triggered method:personal": "each client has a model of its own, and there is no common one in which a "
    "backdoor could be looked for; choose another attack, or a method that shares all it trains",
    "client_eval:zero method:personal": "clients with factors of their own can only be scored on rows of their own",
    "method:personal engine=flower": NO_CLIENT_STATE,
    "baseline method:personal": ALONE,
    "baseline=central client_eval (method:shared)": "its one client holds the rows of all, and nobody has rows of its "
    "own; leave it out, or choose --baseline local",
    "rebase method:moving": "this method trains its factors in turn, with a core, or apart, and no frozen ones are "
    "left to move; choose one that freezes them, such as fed-sb, lora-xs or ffa-lora, or lora",
    "rebase:wayless method:turning": "by itself that is {c.rebase_every}:gradient, and this method moves otherwise, "
    "{c.row.rebase}; say which way, T:HOW",
    "rebase:by-product method:beyond-B": "A is turned by what B learns alone; choose a method that trains B alone, "
    "such as ffa-lora",
    "rebase:by-start method:frozen": "what is folded would be learnt again between the same frozen factors; choose "
    "{c.rebase_every}:gradient, or lora",
    "basis:of-gradient method:residual": "whoever loads its adapter makes again what it began with, and of a gradient "
    "cannot; leave --basis out",
    "client_rank method:residual": "a block of the factors that it begins with is not what is taken off beside the "
    "weights; choose lora",
    "error_feedback method:any (rebase_every=1)": "bases move after every round, and what an update lost is of those "
    "that were",
    "rebase optimizer_state!=reset": OTHER_MOMENTS,
    "method:turning optimizer_state!=reset": OTHER_MOMENTS,
    "rebase baseline": "a baseline sends nothing, and its model has no update that is small; leave it out",
    "method:turning baseline": "its factors are turned by the server, and a baseline has none; choose ffa-lora or lora",
    "rebase:by-gradient public_examples:zero (privacy=none)": "it takes the gradient of public examples; give some, or "
    "choose {c.rebase_every}:svd",
    "rebase:by-gradient privacy!=none (public_data=none)": "it takes a gradient, and rows withheld from private data "
    "are private: give --public-data, or choose {c.rebase_every}:svd",
    "derive_bases (of_gradient=false)": "no basis here is made of a gradient, and those made "
    "of a seed or of W cost nothing to send; leave it out",
    "derive_bases privacy!=none (public_data=none)": "clients are sent the rows of which bases are "
    "made, and rows withheld from private data are private: give --public-data, or leave it out",
    "derive_bases baseline": "a baseline sends nothing; leave it out",
    "derive_bases init_adapter": "the first bases are made beside that adapter, or are those that hold it, which "
    "clients cannot know; leave one out",
    "client_rank method:personal": "factors that stay with the clients have the run's rank",
    "score, score_by method:personal": "clients with factors of their own are scored by the task's own metric, on "
    "rows of their own; leave it out",
    "score, score_by baseline=local": "clients that each have a model of their own are scored by the task's own "
    "metrics; leave it out",
    "choices score:unchosen": "it says what --score choice chooses from; give that too, or leave it out",
    "stop, temperature, extract!=all score:unsaid": "it is about answers that are generated and scored; give --score "
    "exact_match too, or leave it out",
    "samples method:personal": NO_COMMON,
    "samples baseline=local": NO_COMMON,
    "keep=best baseline=local": "each client has a model of its own, and there is no common adapter; leave it out",
    "keep=best method:personal": "what stays with the clients is kept of the last round alone; leave it out",
    "adapter_every baseline=local": "each client has a model of its own, and there is no common adapter; leave it out",
    "samples privacy!=none (public_eval=false public_data=none)": "a sample shows the text of a row, and no row is "
    "said to be nobody's secret; give --public-eval or --public-data, or leave it out",
    "client_adapters method:shared": "no factors stay with the clients: all have the one in adapter/",
    "targets!=all-linear method:bare": "this method adapts no layer",
    f"{OF_FACTORS} method:bare": "this method adapts no layer",
    f"{OF_FACTORS} method:whole": "this method trains whole matrices, without factors",
    "client_rank rank (method:factored largest_rank<highest_rank)": LARGEST_RANK,
    "client_rank rank (method:factored largest_rank>highest_rank)": LARGEST_RANK,
    "rslora method:factored (alpha=none alpha_pattern:empty method!=lotr-trained)": "it says what alpha is divided by; "
    "give --alpha",
    "client_rank core (chosen_core:unnested method:factored)": NO_BLOCK,
    "client_rank method:factored (core=none chosen_core:unnested)": NO_BLOCK,
    "tie=type|all method:untied": "this method trains B and A in every layer, so no layers can share them",
    "basis privacy!=none (chosen_basis:gradient public_data=none method:factored)": "it is made of a gradient, and "
    "rows withheld from private data are private: give --public-data, or a basis from a seed "
    f"({bases_made_of('seed')[0]}) or from W ({bases_made_of('weights')[0]})",
    "public_examples:zero basis (chosen_basis:gradient method:factored privacy=none)": GRADIENT,
    "public_examples:zero basis (chosen_basis:gradient method:factored public_data privacy!=none)": GRADIENT,
    "public_examples:zero method:factored (basis=none chosen_basis:gradient privacy=none)": GRADIENT,
    "public_examples:zero method:factored (basis=none chosen_basis:gradient public_data privacy!=none)": GRADIENT,
    "core:any method:moving (chosen_core:constant)": "the matrices of {c.chosen_core!r} belong to frozen factors, and "
    "this method trains B and A",
    "basis:any method:core+B (chosen_basis:zero-B)": "this basis starts with B at zero, as does the method's core: "
    "nothing would learn",
    "basis:any method:no-B (chosen_basis:zero-B)": "this basis starts with B at zero and the method never moves B: "
    "nothing would learn",
}
"""In the order in which a report names what is broken."""
RULES = [
    *rules_of(TABLE),
    Rule(
        at="sampling!=uniform sample",
        why="all clients are asked in each round, and there are none to choose from; give a smaller --sample",
        when=lambda c: c.asked >= c.clients,
    ),
    Rule(
        at="attack clients",
        why="a share of so few clients is nobody; give a larger one",
        when=lambda c: 0 in counts(c.attacks, c.clients),
    ),
]
