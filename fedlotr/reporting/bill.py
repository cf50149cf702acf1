"""The bills of `fedlotr cost` as a table, as JSON and as CSV; all digits in the last two."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich import box
from rich.console import Console

from fedlotr.adapters.kinds import CORES
from fedlotr.adapters.methods import METHODS
from fedlotr.adapters.moves import Rebase
from fedlotr.communication.links import Link
from fedlotr.communication.wire_form import FINGERPRINT, Coding
from fedlotr.cost.formulas import CODED, FACTORS, PAIR, Bill, Formula, Layer, Published, in_words, of_core, source
from fedlotr.files import as_json as valid_json
from fedlotr.reporting.console import readable_bytes
from fedlotr.reporting.escaping import cells
from fedlotr.reporting.fitting import show_table, wrapped

WIDTH = 150
"""Columns of a table that is piped."""


class Billed(Protocol):
    """A row of `billing.bills`."""

    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def strategies(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def bill(self) -> Bill: ...  # noqa: D102
    @property
    def merged(self) -> int: ...  # noqa: D102
    @property
    def controls(self) -> bool: ...  # noqa: D102
    @property
    def published(self) -> Published | None: ...  # noqa: D102
    @property
    def published_numbers(self) -> int | None: ...  # noqa: D102
    @property
    def rebase(self) -> Rebase | None: ...  # noqa: D102
    @property
    def public(self) -> bool: ...  # noqa: D102


class Model(Protocol):
    """An `Architecture`."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def layers(self) -> tuple[Layer, ...]: ...  # noqa: D102
    @property
    def head(self) -> int: ...  # noqa: D102
    @property
    def parameters(self) -> int: ...  # noqa: D102
    @property
    def source(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Quote:
    """What is shown: the model by name, its bills, those that are left out and why, and what they are held against.

    against: the bill of FedIT, of as many clients and rounds. coding: of all rows. rebase: how bases move, in words, of
    methods that can. public: bytes of the rows of which clients make bases of gradients by themselves.
    """

    name: str
    model: Model
    rows: Sequence[Billed]
    left_out: Mapping[str, str]
    against: Bill
    link: Link
    coding: Coding
    rebase: str | None = None
    public: int | None = None


def entries(quote: Quote) -> list[dict[str, Any]]:
    """One flat row a bill. Numbers are exact; *_bytes are of one client unless they are called total."""
    found, against, link = [], quote.against, quote.link
    for row in quote.rows:
        bill, method = row.bill, METHODS[row.method]
        seconds = link.seconds(bill.round_up, bill.round_down, bill.clients)
        adapted = f"Σ {in_words(method)}" if method.adapts else "0"
        up = f"{'2 × ' if row.controls else ''}({adapted} + head)"
        found.append(
            {
                "method": row.method,
                "strategies": list(row.strategies),
                "rank": row.rank if method.factored else None,
                "trained_numbers": bill.trained,
                "upload_bytes": bill.round_up,
                "download_bytes": bill.round_down,
                "one_off_bytes": bill.one_off,
                "total_bytes": bill.total,
                "total_against_fedit": bill.total / against.total if against.total else None,
                "rounds_to_break_even": bill.break_even(against),
                "seconds_a_round": seconds,
                "seconds_one_off": link.seconds(0, bill.one_off, bill.clients) if bill.one_off else 0.0,
                "published_numbers": row.published_numbers,
                "upload_formula": up,
                "carried_formula": f"{row.merged}·Σ(d_in + d_out)" if row.merged else "",
                "published_formula": "" if row.published is None else row.published.text,
                "published_note": "" if row.published is None else row.published.note,
                "source": source(method),
            }
        )
    return found


def as_json(quote: Quote) -> str:
    """One object: the model, the link, the rows, the table of formulas, and what is left out."""
    formulas: dict[str, Formula] = {str(factor): formula for factor, formula in FACTORS.items()}
    formulas |= {f"core {name}": of_core(kind) for name, kind in CORES.items() if kind.trained} | {"frozen pair": PAIR}
    return (
        valid_json(
            {
                "model": {
                    "name": quote.name,
                    "kind": quote.model.kind,
                    "parameters": quote.model.parameters,
                    "adapted_layers": len(quote.model.layers),
                    "sum_d_in": sum(layer.d_in for layer in quote.model.layers),
                    "sum_d_out": sum(layer.d_out for layer in quote.model.layers),
                    "head": quote.model.head,
                    "source": quote.model.source,
                },
                "link": asdict(quote.link),
                "codec": quote.coding.codec,
                "broadcast_codec": quote.coding.broadcast_codec,
                "basis_codec": quote.coding.basis_codec,
                "rebase": quote.rebase,
                "public_bytes": quote.public,
                "clients": quote.against.clients,
                "rounds": len(quote.against.ups),
                "rows": entries(quote),
                "formulas": {key: {"numbers": f.text, "source": f.source} for key, f in formulas.items()},
                "codecs": {kind: {"bytes": form.text, "source": form.source} for kind, form in CODED.items()},
                "left_out": dict(quote.left_out),
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


def as_csv(quote: Quote) -> str:
    """A line a row."""
    found = entries(quote)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]) if found else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells({**row, "strategies": " ".join(row["strategies"])} for row in found))
    return text.getvalue()


def as_table(quote: Quote, width: int = WIDTH) -> str:
    """For the eye, with the formulas and what they mean below. width: in columns."""
    model, rows, clients, rounds = quote.model, quote.rows, quote.against.clients, len(quote.against.ups)
    title = (
        f"{quote.name}: {len(model.layers)} adapted layers, {model.parameters:,} parameters, head {model.head:,}\n"
        f"{clients} clients, {rounds} rounds, link {quote.link.name}"
    )
    head = [
        "method, strategies",
        "r",
        "trained",
        "up",
        "down",
        "one-off",
        "total",
        "× FedIT",
        "even at",
        "s a round",
        "published",
    ]
    body = []
    for row, entry in zip(rows, entries(quote), strict=True):
        even, ratio, counted = entry["rounds_to_break_even"], entry["total_against_fedit"], row.published_numbers
        body.append(
            [
                f"{row.method}, {_alike(row.strategies)}",
                str(entry["rank"] or ""),
                f"{entry['trained_numbers']:,}",
                *(readable_bytes(entry[f"{what}_bytes"]) for what in ("upload", "download", "one_off", "total")),
                "" if ratio is None else f"{ratio:.3g}",
                "never" if even is None else f"{even:.2f}",
                f"{entry['seconds_a_round']:.3g}",
                "" if counted is None else f"{counted:,}",
            ]
        )
    console = Console(width=width, no_color=True, highlight=False, markup=False)
    with console.capture() as capture:
        show_table(console, head, body, title=title, right=range(1, len(head)), frame=box.SIMPLE_HEAD)
    lines = [
        "up, down: bytes of a client and round (down from the second round on, with what the server merged); total: "
        "of all clients and rounds, one-off included;",
        "even at: rounds from which the bill is below FedIT's; published: numbers of a client and round in the papers' "
        "figures, which count the larger direction alone and no one-off.",
        "alike: strategies that cost the same, by name in --json; one that lowers clients' ranks as it goes (hetlora) "
        "sends at most this.",
        "Each adapted layer sends, in numbers of 4 bytes:",
        *(f"  {method:14} {in_words(METHODS[method])}   ({source(METHODS[method])})" for method in _methods(rows)),
    ]
    lines[:0] = [*_coded(quote.coding), *_moved(quote)]
    lines += [
        f"{row.method} with {row.strategies[0]}: published as {row.published.text}; {row.published.note}"
        for row in rows
        if row.published is not None and row.published.note
    ]
    lines += [
        f"{row.method} with {', '.join(row.strategies)}: control variates too, both ways"
        for row in rows
        if row.controls
    ]
    lines += [f"left out: {method}, {reason}" for method, reason in quote.left_out.items()]
    lines = [wrapped(line, width, indent="    ") for line in lines]
    return "\n".join(line.rstrip() for line in [*capture.get().splitlines(), *lines]) + "\n"


def _coded(coding: Coding) -> list[str]:
    """What codecs make of the numbers; nothing where there is none."""
    lines = []
    for direction, words, form in (
        ("up", coding.codec, coding.update),
        ("down", coding.broadcast_codec, coding.broadcast),
    ):
        if form.coded:
            text = f"{direction} as {words}: 4 bytes, and of each tensor of n numbers {CODED[form.kind].text}"
            text += f", k = ⌈{form.density}·n⌉" if form.kind == "top-k" else ""
            text += "; at most, before zstd" if form.zstd else ""
            other = form.delta and coding.whole.kind != form.kind
            lines.append(text + (f"; a client's first message as {coding.whole.kind}" if other else ""))
    lines += ["× FedIT, even at: against FedIT in float32."] if lines else []
    if (form := coding.basis).coded:
        text = f"one-off as {coding.basis_codec}: 4 bytes, and of each of B's and A's vectors {CODED[form.kind].text}"
        lines.append(text + ("; at most, before zstd" if form.zstd else ""))
    return lines


def _moved(quote: Quote) -> list[str]:
    """What `rebase` and `public` add to the bytes."""
    lines = []
    if any(row.rebase is not None for row in quote.rows):
        lines.append(
            f"down: bases move ({_ways(quote)}); of each fold that a client missed the core, and what bases cost"
        )
    if quote.public is not None and any(row.public for row in quote.rows):
        lines.append(
            f"bases of gradients: {quote.public:,} B of public rows once, then {FINGERPRINT} B a pair of each version, "
            "and the head that they were made beside"
        )
    return lines


def _ways(quote: Quote) -> str:
    """How bases move in the rows in which they do."""
    ways: dict[str, list[str]] = {}
    for row in quote.rows:
        if row.rebase is not None:
            ways.setdefault(f"{row.rebase.every}:{row.rebase.how}", []).append(row.method)
    if len(ways) == 1:
        return next(iter(ways))
    return "; ".join(f"{way} of {', '.join(dict.fromkeys(methods))}" for way, methods in ways.items())


def _alike(strategies: Sequence[str]) -> str:
    first, *others = strategies
    return first if not others else f"{first} and {len(others)} alike" if len(others) > 1 else ", ".join(strategies)


def _methods(rows: Sequence[Billed]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))
