"""The page of refusals: what does not go together and why, each under an anchor of its own."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from docs_text import FLAGS, GENERATED, code, markdown, sentence

from fedlotr.adapters.kinds import BASES, CORES
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.moves import MOVES
from fedlotr.communication.attacks import ATTACKS
from fedlotr.communication.wire_form import KINDS
from fedlotr.config.command_line import flag_of
from fedlotr.config.configuration import OF_OTHERS, SECTIONS, SimulationConfig
from fedlotr.config.rules import RULES, TESTS, Rule
from fedlotr.fleet.faults import FAULTS
from fedlotr.run.unmet import RULES as OF_STRATEGIES

_OPENING = """# Refusals

What cannot be done is refused before anything is loaded, all of it in one report, with exit code 2. A message repeats
what was given, says what was expected and names the option or key to change:

```text
error: --deadline 60.0 with --mode sync: it belongs to --mode deadline
```

This page is the table that the program itself checks by: what does not go together, and why. Where a message needs
looking up, search for its words, or for the options that it names. What goes wrong later than that, on a machine, is in
[Troubleshooting](../troubleshooting.md).
"""
_STRATEGIES = """## Strategies

A strategy says what it needs of clients and of a run (its traits; [Strategies](strategies.md) shows them). These are
looked at once the strategy has been loaded, its own or a user's.
"""
_OTHERS = """## Options of other programs { #options-of-other-programs }

These names are known, and answered.
"""

Over = tuple[Iterable[str], Callable[[str], str]]
_VALUES: Mapping[str, Over] = {
    "method": (METHODS, str),
    "chosen_basis": (BASES, str),
    "basis": (BASES, str),
    "chosen_core": (CORES, str),
    "rebase": (MOVES, lambda name: f"1:{name}"),
    "attack": (ATTACKS, lambda name: f"{name}:0.5"),
    "fault": (FAULTS, lambda name: f"{name}:0.5"),
    "codec": (KINDS, lambda name: "top-k:0.5" if name == "top-k" else name),
}
"""Options whose values are names: these, and how one is written, so that a test of values can be asked of each."""
_TESTED = {
    "absent": "none is given",
    "zero": "is 0",
    "empty": "none is given",
    "several": "is more than 1",
    "url": "has `://`",
    "label": "names the column of labels",
    "unchosen": "names no metric of choices",
    "unsaid": "names no metric of answers",
    "wayless": "says no way to move",
    "zstd": "ends with `+zstd`",
    "delta": "begins with `delta+`",
    "coded": "codes",
}
"""What a test of other values asks, in words."""
_DERIVED = {
    "virtual=false": "time is not virtual",
    "stale": "updates of older models may come in",
    "stale=false": "no updates of older models come in",
    "of_gradient=false": "no basis is made of a gradient",
    "rebase_every=1": "bases move after every round",
    "sampled_clients>clients": "the sample is larger than the federation",
    "buffer>clients_per_round": "`--buffer` is larger than the sample",
    "largest_rank<highest_rank": "no client has the full rank",
    "largest_rank>highest_rank": "a client's rank is larger than the factors'",
    "ranks!=none": "the strategy changes clients' ranks",
    "factors_last=false": "the strategy draws or turns factors anew in each round",
    "controls": "the strategy has control variates",
    "rooted": "the server trains too",
    "losses": "the strategy reads training losses",
    "several": "the strategy fails on a single update",
}
"""Terms that are no options."""
_ASKED = {
    "_combines": "it combines factors that clients of this method do not send, or B A without the core between them; "
    "the message names which, and the methods that go",
    "_needs": "it needs more clients in a round than there are to be; the message says how many, and why",
}
"""Messages that are put together from strategy and method, by the function that does so."""


def slug(rule: Rule) -> str:
    """Its anchor: the terms of its row, so that it stays as long as the rule does."""
    words = rule.at
    for sign, word in {"!=": "not", "=": "", ":": "", ">": "over", "<": "under", "|": "or"}.items():
        words = words.replace(sign, f" {word} ")
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def refusals_page() -> str:
    """As Markdown."""
    parts = [GENERATED, _OPENING]
    grouped: dict[str, list[Rule]] = {title: [] for title in SECTIONS.values()}
    for rule in RULES:
        grouped[_section(rule)].append(rule)
    for title, rules in grouped.items():
        if rules:
            parts += [f"## {title[0].upper()}{title[1:]}\n", *map(_entry, rules)]
    parts += [_STRATEGIES, *map(_entry, OF_STRATEGIES), _OTHERS]
    parts += [f"- {code(flag_of(name))}: {markdown(sentence(text))}" for name, text in OF_OTHERS.items()]
    return "\n".join(parts) + "\n"


def _section(rule: Rule) -> str:
    found = next(iter(SECTIONS.values()))
    field = rule.fields[0].removeprefix("chosen_")
    for name in SimulationConfig.model_fields:
        found = SECTIONS.get(name, found)
        if name == field:
            return found
    raise KeyError(f"{rule.at}: no option is called {field}")


def _entry(rule: Rule) -> str:
    title = " with ".join(code(_option(name)) for name in dict.fromkeys(rule.fields))
    conditions = [
        words for term in rule.terms if (term[1] or term[0] not in rule.fields) and (words := in_words(*term))
    ]
    holds = f"Where {', and '.join(conditions)}.\n\n" if conditions else ""
    return f"### {title} {{ #{slug(rule)} }}\n\n{holds}{markdown(sentence(why(rule)))}\n"


def why(rule: Rule) -> str:
    """The message, with ‹what is of the configuration› in place of it."""
    if not isinstance(rule.why, str):
        return _ASKED[rule.why.__name__]
    return re.sub(r"\{c\.(?:row\.)?(\w+?)(!r)?\}", lambda found: f"‹{found[1].removeprefix('chosen_')}›", rule.why)


def _option(name: str) -> str:
    flag = flag_of(name.removeprefix("chosen_"))
    return flag if flag in FLAGS else f"--strategy-arg {name}"


def in_words(name: str, sign: str, wanted: str) -> str:
    """A term of a rule; nothing where it says no more than that the option is named."""
    if (given := f"{name}{sign}{wanted}") in _DERIVED:
        return _DERIVED[given]
    option = f"[{code(_option(name))}](options.md#{_option(name).removeprefix('--')})"
    if _option(name) not in FLAGS:
        option = code(_option(name))
    match sign, wanted:
        case ":", "any":
            return ""
        case ":", _:
            return f"{option} {_tested(name, wanted)}"
        case "=", "none":
            return f"no {option} is given"
        case "=", "false":
            return f"{option} is off"
        case "!=", "none":
            return f"{option} is not `none`" if name == "privacy" else f"{option} is given"
        case "=", _:
            return f"{option} is {' or '.join(map(code, wanted.split('|')))}"
        case "!=", _:
            return f"{option} is not {' or '.join(map(code, wanted.split('|')))}"
    return f"{option} is given"


def _tested(name: str, wanted: str) -> str:
    if name in _VALUES and wanted not in ("wayless", "zstd", "delta"):
        names, written = _VALUES[name]
        held = [one for one in names if _asked(TESTS[wanted], written(one))]
        return f"is {_listed(held)}"
    return _TESTED[wanted]


def _asked(test: Callable[[Any], object], value: str) -> bool:
    return bool(test(value))


def _listed(names: list[str]) -> str:
    *first, last = map(code, names)
    return f"{', '.join(first)} or {last}" if first else last


def anchors() -> Iterator[str]:
    """Of all rules."""
    yield from map(slug, [*RULES, *OF_STRATEGIES])
