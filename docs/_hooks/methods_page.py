"""The page of methods: what each trains, between what, what it sends, and how it differs from what was published."""

import re
from functools import cache
from pathlib import Path

from docs_text import GENERATED, code, markdown, table

from fedlotr.adapters.methods import METHODS, Method
from fedlotr.commands.ls import one_off
from fedlotr.cost.formulas import PUBLISHED, in_words, source

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "PAPERS.md"
_CITED = re.compile(r'(\w+ et al\. \d{4}),?(?: "[^"]*"| [A-Za-z-]+)?,? \(?(?:arXiv:)?(\d{4}\.\d{5})')

_OPENING = """# Methods

An adapted layer computes

    y = W x + s·B C A x        A: d_in → r    C: r → r    B: r → d_out

and a method says where B and A come from (its [basis](choices.md#bases)), which layers share them (its
[tie](choices.md#ties)), what C is (its [core](choices.md#cores)) and which of the three a client trains. `full` has no
factors: it trains a matrix D of y = W x + D x. s is 1, or alpha / r ([`--alpha`](options.md#alpha)).

[`--basis`](options.md#basis), [`--tie`](options.md#tie) and [`--core`](options.md#core) put a method on another point
of that grid, and [`--strategy`](options.md#strategy) has the server combine updates otherwise
([Strategies](strategies.md)). Formulas are numbers that one client sends in one round for one adapted
layer, the head aside; as bytes they are four a number, or what a [codec](choices.md#codecs) makes of them.
`fedlotr cost` multiplies them out for a model, `fedlotr ls methods` prints this table.

Default learning rates are those of AdamW under the cosine schedule. They were searched for `fed-sb`, `lotr` and
`lora-xs` only.
"""


def methods_page() -> str:
    """As Markdown."""
    overview = table(
        ["method", "trained by a client", "basis", "tie", "core", "sent a layer", "strategy"],
        (
            [
                f"[{code(name)}](#{name})",
                _trained(row),
                _choice("bases", row.basis) if row.factored else "",
                _choice("ties", row.tie) if row.factored else "",
                _choice("cores", row.core) if row.factored else "",
                in_words(row),
                f"[{code(row.strategy)}](strategies.md#{row.strategy})",
            ]
            for name, row in METHODS.items()
        ),
    )
    return "\n".join([GENERATED, _OPENING, overview, "", *(_entry(name, row) for name, row in METHODS.items())])


def _trained(row: Method) -> str:
    turns = [", ".join(turn) for turn in row.turns or (row.train,)]
    return ", then ".join(turns) or "the head"


def _choice(section: str, name: str) -> str:
    return f"[{code(name)}](choices.md#{section})"


def _entry(name: str, row: Method) -> str:
    lines = [f"## `{name}` {{ #{name} }}", "", f"{row.title[0].upper()}{row.title[1:]}.", ""]
    if row.paper:
        lines.append(f"- **Paper** {markdown(_linked(row.paper))}")
    lines.append(f"- **Trains** {_trained(row)}{_staying(row)}")
    if row.factored:
        lines.append(f"- **Between** {row.basis_kind().text}; {code('--basis')} {_choice('bases', row.basis)}")
        lines.append(f"- **Core** {row.core_kind().text}; {code('--core')} {_choice('cores', row.core)}")
    lines.append(f"- **Sends** {in_words(row)} numbers a layer and round ({source(row)})")
    lines.append(f"- **Receives once** {one_off(row)}")
    if row.rebase:
        lines.append(f"- **Bases move** by {code(f'--rebase {row.rebase}')}")
    lines.append(f"- **Combined by** [{code(row.strategy)}](strategies.md#{row.strategy})")
    alpha = "" if row.alpha is None else f"; alpha {row.alpha:g}"
    lines.append(f"- **Rates** {row.lr:g}, of the head {row.head_lr:g}{alpha}")
    for (method, strategy), published in PUBLISHED.items():
        if method == name:
            note = f" ({markdown(published.note)})" if published.note else ""
            lines.append(f"- **Counted in the figures of Fed-SB**, with {code(strategy)}: {published.text}{note}")
    return "\n".join([*lines, "", *differences(name), ""])


def _linked(paper: str) -> str:
    """With the number that the code cites it by, where it does."""
    numbers = cited()
    return "; ".join(
        f"{one} (arXiv:{number})" if (number := numbers.get(" ".join(one.split()[:4]).rstrip(","))) else one
        for one in paper.split("; ")
    )


@cache
def cited() -> dict[str, str]:
    """Authors and year -> arXiv's number, of the papers that docstrings of adapters and strategies name so."""
    files = [*(ROOT / "fedlotr" / "adapters").glob("*.py"), *(ROOT / "strategies").glob("*.py")]
    texts = (" ".join(file.read_text(encoding="utf-8").split()) for file in files)
    return {who: number for text in texts for who, number in _CITED.findall(text)}


def _staying(row: Method) -> str:
    if row.personal:
        return f"; {', '.join(sorted(row.personal))} stays with the client"
    return "; scales stay with the client, and start again in every round" if row.core_kind().restarts else ""


def differences(name: str) -> list[str]:
    """How what is here differs from what was published under a name, as PAPERS.md tells it, as an admonition."""
    found = []
    for names, published, here, form in papers():
        if name in names:
            lines = f"Published: {published}.", f"Here: {here}.", f"The published form: {form}."
            found += [part for line in lines for part in (f"    {line}", "")]
    return ['!!! note "Differs from what was published"', "", *found] if found else []


@cache
def papers() -> list[tuple[list[str], str, str, str]]:
    """The rows of both tables of PAPERS.md: names, published, here, the published form."""
    rows = []
    for line in PAPERS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 4 and (names := re.findall(r"`([a-z-]+)`", cells[0])):
            rows.append((names, cells[1], cells[2], cells[3]))
    return rows
