"""The page of strategies: what each publishes, asks of clients and takes, from its own docstring and traits."""

import inspect
import sys
from importlib.metadata import entry_points

from docs_text import GENERATED, code, markdown, paragraphs, table
from house_docstrings import listed
from methods_page import differences

from fedlotr.adapters.methods import METHODS
from fedlotr.flower.traits import StrategyTraits, traits_of

_OPENING = """# Strategies

A strategy combines the updates of a round's clients on the server. [`--strategy`](options.md#strategy) chooses one,
[`--strategy-arg`](options.md#strategy-arg) KEY=VALUE sets its arguments; without, each method has its own. They stand
in the folder `strategies/` and are found by the entry point group `fedlotr.strategies`, as those of any installed
package are; they use nothing that [your own](../how-to/own-strategy.md) could not. `fedlotr ls strategies` prints what
is installed.

Certified means that the strategy says it publishes the weighted mean of the clients' updates, and that every round's
`aggregation_error` measures how far it is from that. A robust rule is no mean, so its error is null. Weights p_i are
the numbers of examples, divided by their sum ([`--weights`](options.md#weights)).

Clients of a method send what [Methods](methods.md) says; "beside that" is what a strategy adds to it.
"""


def strategies_page() -> str:
    """As Markdown."""
    points = sorted(entry_points(group="fedlotr.strategies"), key=lambda point: point.name)
    kinds = {point.name: point.load() for point in points if point.value.startswith("fedlotr.strategies.")}
    overview = table(
        ["strategy", "certified", "what it publishes"],
        (
            [
                f"[{code(name)}](#{name})",
                "yes" if traits_of(kind).averages else "no",
                markdown(paragraphs(kind.__doc__)[0].split("; the head")[0]),
            ]
            for name, kind in kinds.items()
        ),
    )
    return "\n".join([GENERATED, _OPENING, overview, "", *(_entry(name, kind) for name, kind in kinds.items())])


def _entry(name: str, kind: type) -> str:
    module = paragraphs(sys.modules[kind.__module__].__doc__)
    about = [*paragraphs(listed(kind.__doc__ or "", set(inspect.signature(kind).parameters)), "- "), *module]
    lines = [f"## `{name}` {{ #{name} }}", "", *(f"{markdown(text)}\n" for text in about)]
    lines += [f"- **{title}** {text}" for title, text in _facts(name, kind)]
    return "\n".join([*lines, "", *differences(name), ""])


def _facts(name: str, kind: type) -> list[tuple[str, str]]:
    traits: StrategyTraits = traits_of(kind)
    used = [code(method) for method, row in METHODS.items() if row.strategy == name]
    found = [("Usual for", ", ".join(used))] if used else []
    arguments = [
        f"{code(one.name)}{'' if one.default is one.empty else f' = {one.default}'}"
        for one in inspect.signature(kind).parameters.values()
        if one.name not in ("clients", "seed")
    ]
    found.append(("Arguments", ", ".join(arguments) or "none"))
    if traits.needs:
        able = [code(method) for method, row in METHODS.items() if traits.combines(row)]
        found.append(("Combines", f"{' and '.join(sorted(traits.needs))}: of the method {', '.join(able)}"))
    beside = []
    if traits.controls:
        beside.append("control variates, as many numbers again in both directions")
    if "merges" in vars(kind):
        beside.append("to clients, what was merged into the model since they took part last")
    found.append(("Sent beside that", "; ".join(beside) or "nothing"))
    if traits.rooted:
        found.append(("Needs", "public rows, on which the server trains in every round"))
    if "fewest" in vars(kind) or any("fewest" in vars(base) for base in kind.__mro__[1:-1]):
        found.append(("Needs", "so many clients in a round as its rule takes; fewer are refused before the run"))
    return found
