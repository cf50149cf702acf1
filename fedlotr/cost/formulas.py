"""What clients send and receive, in closed form: ONE table of formulas, each with its source, and bills made of it.

Nothing here looks at a tensor or a message; `tests/test_conformance.py` holds every row to what crosses in a run.
This module imports nothing heavy.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, repeat
from types import MappingProxyType
from typing import NamedTuple

from fedlotr.adapters.kinds import CoreKind
from fedlotr.adapters.methods import Factor, Method
from fedlotr.adapters.moves import Rebase
from fedlotr.communication.wire_form import FINGERPRINT, UNCODED, Coding, Kind, WireForm

WIRE_BYTES = 4
"""Of a trained number on the wire: float32."""
SEED_AND_HASH = 40
"""Bytes that tell a client how to make a basis again, and how to know it: a seed of 8 and a SHA-256 of 32."""


class Layer(NamedTuple):
    """An adapted matrix (d_out, d_in). kind: the layers of one projection type have it in common.

    rank: its own, of which a client of a lower rank has the leading block; None: that of the run or client.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    rank: int | None = None

    def rank_at(self, r: int) -> int:
        """Of a client, or a run, of rank r."""
        return r if self.rank is None else min(self.rank, r)


@dataclass(frozen=True)
class Shapes:
    """What a bill needs of a model. heads: numbers of each tensor of its classification head."""

    layers: tuple[Layer, ...]
    heads: tuple[int, ...]

    @property
    def head(self) -> int:
        """Numbers of the whole head."""
        return sum(self.heads)


@dataclass(frozen=True)
class Formula:
    """Numbers in one layer. text: as people write it; of: the same of (r, d_in, d_out); source: who says so."""

    text: str
    of: Callable[[int, int, int], int]
    source: str

    def over(self, layers: Iterable[Layer], r: int) -> int:
        """The sum over layers."""
        shapes = Counter((layer.rank_at(r), layer.d_in, layer.d_out) for layer in layers)
        return sum(count * self.of(*shape) for shape, count in shapes.items())


FACTORS: Mapping[Factor, Formula] = {
    "A": Formula("r·d_in", lambda r, d_in, d_out: r * d_in, "Hu et al. 2021, LoRA"),
    "B": Formula("r·d_out", lambda r, d_in, d_out: r * d_out, "Hu et al. 2021, LoRA"),
    "D": Formula("d_in·d_out", lambda r, d_in, d_out: d_in * d_out, "McMahan et al. 2017, FedAvg"),
}
"""Of a factor that is trained as it is."""
PER_TIE: tuple[Factor, ...] = ("A", "B")
"""What the layers of a tie have together."""
PAIR = Formula("r·(d_in + d_out)", lambda r, d_in, d_out: r * (d_in + d_out), "Singhal et al. 2025, Fed-SB: B and A")
"""Of a frozen pair that is sent, once a tie."""


def of_core(kind: CoreKind) -> Formula:
    """Of what is trained between B and A."""
    return Formula(kind.numbers, lambda r, d_in, d_out: kind.count(r), kind.source)


@dataclass(frozen=True)
class CodedForm:
    """Bytes of one tensor of n numbers, coded. k: how many of them top-k sends."""

    text: str
    of: Callable[[int, int], int]
    source: str


CODED: Mapping[Kind, CodedForm] = {
    "float32": CodedForm("4·n", lambda n, k: 4 * n, "IEEE 754"),
    "bfloat16": CodedForm("2·n", lambda n, k: 2 * n, "the upper half of float32"),
    "int8": CodedForm("2 + n", lambda n, k: 2 + n, "Alistarh et al. 2017, QSGD; one scale a tensor"),
    "int4": CodedForm("2 + ⌈n/2⌉", lambda n, k: 2 + -(-n // 2), "Alistarh et al. 2017, QSGD; one scale a tensor"),
    "int2": CodedForm("2 + ⌈n/4⌉", lambda n, k: 2 + -(-n // 4), "Max 1960; one step a tensor"),
    "sign": CodedForm("2 + ⌈n/8⌉", lambda n, k: 2 + -(-n // 8), "Karimireddy et al. 2019, EF-SignSGD"),
    "top-k": CodedForm(
        "4·k + min(⌈n/8⌉, ⌈k·⌈log2 n⌉/8⌉)",
        lambda n, k: 4 * k + min(-(-n // 8), -(-k * max(n - 1, 0).bit_length() // 8)),
        "Stich et al. 2018; k = ⌈density·n⌉",
    ),
}
"""Of a codec. A message has 4 bytes of checksum besides; +zstd sends at most as much."""
CHECKSUM = 4


def coded_bytes(form: WireForm, sizes: Iterable[int]) -> int:
    """Bytes of a message with tensors of so many numbers each; with a lossless stage, the most there can be."""
    if not form.coded:
        return WIRE_BYTES * sum(sizes)
    counted = Counter(sizes)
    return CHECKSUM + sum(times * CODED[form.kind].of(n, form.kept(n)) for n, times in counted.items())


def carried(missed: int, rank: int, layer: tuple[int, int]) -> int:
    """Numbers of a layer's carried term that a client lacks who has all but the newest parts.

    missed: the rank of those together; rank: of all parts. A round's part is a pair of rank k (Wang et al. 2024, FLoRA:
    k = Σ r_i; Singhal et al. 2024, FedEx-LoRA: (c - 1) r). Once the ranks add up to more than a full matrix has, that
    is sent instead where it is smaller.
    """
    pair, matrix = missed * sum(layer), layer[0] * layer[1]
    return pair if pair < matrix or rank <= min(layer) else matrix


@dataclass(frozen=True)
class Published:
    """How a paper counts, where it does: numbers of one client and round, the larger direction, without the head."""

    text: str
    of: Callable[[Sequence[Layer], int, int], int]
    note: str = ""


def _pairs(layers: Sequence[Layer], r: int) -> int:
    return PAIR.over(layers, r)


_STACKED = Published("c·r·Σ(d_in + d_out)", lambda layers, r, c: c * _pairs(layers, r))
PUBLISHED: Mapping[tuple[str, str], Published] = {
    ("fed-sb", "exact-average"): Published("N·r²", lambda layers, r, c: sum(layer.rank_at(r) ** 2 for layer in layers)),
    ("lora", "fedit"): Published("r·Σ(d_in + d_out)", lambda layers, r, c: _pairs(layers, r)),
    ("lora", "fedex-lora"): _STACKED,
    ("lora", "flora"): Published(
        _STACKED.text,
        _STACKED.of,
        "the clients of the published code draw the next A themselves, as with restart=client; without it they are "
        "sent the new A and B with the stack, r·Σ(d_in + d_out) more, as any strategy may set them",
    ),
    ("ffa-lora", "ffa-lora"): Published(
        "r·Σ(d_in + d_out)/2",
        lambda layers, r, c: _pairs(layers, r) // 2,
        "plotted as half of FedIT in the figures of Fed-SB; its code trains and sends B, r·Σ d_out, which differs "
        "wherever layers are not square on average",
    ),
}
"""(method, strategy) -> the count in the figures of Singhal et al. 2025, Fed-SB."""


@dataclass(frozen=True)
class Bill:
    """What clients send and receive, in bytes of payload.

    trained: numbers that a client trains. clients: that take part at least once; messages: how many there are in each
    direction, one a client and round. ups, downs: of all clients, round by round; control variates are counted in.
    one_off: of each client, once. round_down: mean of a client in the last round, or the second, had all been in every
    one. carried: of the term that a strategy carries, in the end.
    """

    trained: int
    clients: int
    messages: int
    ups: tuple[int, ...]
    downs: tuple[int, ...]
    one_off: int
    round_down: float
    carried: int

    @property
    def round_up(self) -> float:
        """Mean of a client and round."""
        return sum(self.ups) / self.messages

    @property
    def total(self) -> int:
        """Of all clients and rounds, both directions, the one-off included."""
        return sum(self.ups) + sum(self.downs) + self.clients * self.one_off

    def break_even(self, other: "Bill") -> float | None:
        """Rounds after which this bill is the lower one; 0 where it is from the start, None where it never is."""
        saved = other.round_up + other.round_down - self.round_up - self.round_down
        ahead = self.one_off - other.one_off
        if saved > 0:
            return max(ahead, 0) / saved
        return 0.0 if saved == 0 and ahead <= 0 else None


def bill(
    row: Method,
    layers: Sequence[Layer],
    heads: Sequence[int],
    ranks: Sequence[int],
    rounds: int | Sequence[Sequence[int]],
    coding: Coding = UNCODED,
    *,
    merged: int | Sequence[int] | Mapping[int | None, Sequence[int]] = 0,
    started: Mapping[str, int] = MappingProxyType({}),
    rank: int | None = None,
    controls: bool = False,
    drawn: bool = False,
    rebase: Rebase | None = None,
    public: int | None = None,
) -> Bill:
    """The bill of a method; of a run that chose another basis, tie or core, its row has them.

    heads: numbers of each tensor of the classification head. ranks: of each client. rounds: the clients of each round,
    or how many rounds there are that all take part in. coding: of the trained tensors; all else travels as it is.
    merged: the rank that a strategy adds to every layer's carried term, each round or round by round, or that by the
    layers' own ranks; started: by layer the rank of what every client has of it before. rank: of the run's factors
    (default: the largest of the clients'). controls: whether control variates go with the trained tensors (Karimireddy
    et al. 2020, SCAFFOLD: as many numbers again). drawn: whether clients draw A and B by themselves, so that these are
    not sent to them. rebase: how the bases move; then who missed folds is sent the core of each, and the next bases
    where these cannot be derived. public: bytes of the rows of which clients make bases of gradients by themselves,
    where they do: they are sent these once, and hashes and the head in place of bases.
    """
    kinds = Counter(((layer.d_in, layer.d_out), layer.rank, started.get(layer.name, 0)) for layer in layers)
    count = rounds if isinstance(rounds, int) else len(rounds)
    each = [merged] * count if isinstance(merged, int) else merged
    by_rank = each if isinstance(each, Mapping) else {layer.rank: each for layer in layers}
    added = {own: list(accumulate(ranks, initial=0)) for own, ranks in by_rank.items()}
    turns = row.sent
    published = tuple(f for f in row.train if f not in row.personal and not (drawn and f in PER_TIE))
    held = {f: Counter(layer._replace(name="", kind="") for layer in holders(row, f, layers)) for f in row.train}
    rank = rank or max(ranks)
    offered = None if public is None else sum(heads)
    fold = 0 if rebase is None else folded(row, layers, rank, rebase, coding, offered)

    @cache
    def sent(factors: tuple[Factor, ...], r: int, form: WireForm) -> int:
        of = [(_factor(row, f), layer) for f in factors for layer in held[f].elements()]
        sizes = [*heads, *(formula.of(layer.rank_at(r), layer.d_in, layer.d_out) for formula, layer in of)]
        return coded_bytes(form, sizes) + (WIRE_BYTES * sum(sizes) if controls else 0)

    def broadcast(r: int, has: int | None, number: int) -> int:
        """To a client. has: how many rounds there were before the one that it last took part in; None: it never did."""
        form = coding.whole if has is None else coding.broadcast
        lacks = 0
        for (shape, own, before), n in kinds.items():
            if missed := added[own][number] - added[own][has or 0]:
                lacks += n * carried(missed, before + added[own][number], shape)
        folds = 0 if rebase is None else rebase.versions(number) - rebase.versions(has or 0)
        return sent(published, r, form) + WIRE_BYTES * lacks + folds * fold

    ups, downs, clients, messages = [], [], 0, 0
    for number, crowd in enumerate(_crowds(ranks, rounds)):
        ups.append(sum(n * sent(turns[number % len(turns)], r, coding.update) for (r, _), n in crowd.items()))
        downs.append(sum(n * broadcast(r, has, number) for (r, has), n in crowd.items()))
        clients += sum(n for (_, has), n in crowd.items() if has is None)
        messages += crowd.total()
    late = max(count - 1, 1)
    ends = [(n, shape, before + added[own][-1]) for (shape, own, before), n in kinds.items()]
    return Bill(
        trained=sum(_factor(row, f).over(holders(row, f, layers), rank) for f in row.train) + sum(heads),
        clients=clients,
        messages=messages,
        ups=tuple(ups),
        downs=tuple(downs),
        one_off=one_off(row, layers, rank, coding.basis, offered) + (public or 0),
        round_down=sum(broadcast(r, late - 1, late) for r in ranks) / len(ranks),
        carried=WIRE_BYTES * sum(n * carried(k, k, shape) for n, shape, k in ends)
        if any(ranks[-1] for ranks in added.values())
        else 0,
    )


def _crowds(ranks: Sequence[int], rounds: int | Sequence[Sequence[int]]) -> Iterator[Counter[tuple[int, int | None]]]:
    """Of each round how many clients there are of a rank that last took part in a round, counted from 0, or never."""
    if isinstance(rounds, int):
        alike = Counter(ranks)
        for number in range(rounds):
            yield Counter({(r, number - 1 if number else None): n for r, n in alike.items()})
        return
    last: dict[int, int] = {}
    for number, clients in enumerate(rounds):
        yield Counter((ranks[client], last.get(client)) for client in clients)
        last |= dict.fromkeys(clients, number)


def one_off(row: Method, layers: Sequence[Layer], r: int, form: WireForm, offered: int | None = None) -> int:
    """Bytes that a client receives once: nothing, a seed and a hash, or B and A of every tie, each of their vectors
    coded by itself. offered: numbers of the head, where a client makes bases of gradients by itself."""
    if not row.freezes:
        return 0
    if row.basis_kind().derivable:
        return SEED_AND_HASH
    ties = holders(row, "A", layers)
    if offered is not None:
        return FINGERPRINT * len(ties) + WIRE_BYTES * offered
    if not row.basis_kind().unit:
        form = UNCODED.basis
    vectors = ((layer.rank_at(r), width) for layer in ties for width in (layer.d_in, layer.d_out))
    return coded_bytes(form, chain.from_iterable(repeat(width, rank) for rank, width in vectors))


def folded(
    row: Method, layers: Sequence[Layer], r: int, rebase: Rebase, coding: Coding, offered: int | None = None
) -> int:
    """Bytes that a client is sent for each fold that it missed: the core that all fold, and the vectors of the next
    bases, of which a trained B is none, where clients cannot derive them. offered: as of `one_off`."""
    sizes = [_factor(row, f).of(layer.rank_at(r), layer.d_in, layer.d_out)
             for f in row.train for layer in holders(row, f, layers)]  # fmt: skip
    cores = CHECKSUM + sum(CODED[coding.whole.kind].of(n, n) for n in sizes)
    if rebase.move.derivable or row.both:  # both are trained, and broadcast as such
        return cores
    ties = holders(row, "A", layers)
    if offered is not None:
        return cores + FINGERPRINT * len(ties) + WIRE_BYTES * offered
    widths = [
        (layer.rank_at(r), w) for layer in ties for w in (layer.d_in, layer.d_out)[: 1 if "B" in row.train else 2]
    ]
    return cores + CHECKSUM + sum(rank * CODED[coding.basis.kind].of(width, width) for rank, width in widths)


def holders(row: Method, factor: Factor, layers: Sequence[Layer]) -> Sequence[Layer]:
    """A layer for each of a factor that there is: all of them, or one of every tie for what its layers share."""
    if factor not in PER_TIE or row.tie == "layer":
        return layers
    return layers[:1] if row.tie == "all" else list({layer.kind: layer for layer in layers}.values())


def in_words(row: Method) -> str:
    """Numbers that a client sends a round for each adapted layer, as a formula in r, d_in and d_out."""
    return ", then ".join(" + ".join(_in_words(row, f) for f in turn) for turn in row.sent) or "0"


def _in_words(row: Method, factor: Factor) -> str:
    once = " once a tie" if factor in PER_TIE and row.tie != "layer" else ""
    return f"{_factor(row, factor).text}{once}"


def source(row: Method) -> str:
    """Who the formulas of a method's factors are from."""
    return "; ".join(dict.fromkeys(_factor(row, factor).source for factor in row.train)) or "the head alone"


def _factor(row: Method, factor: Factor) -> Formula:
    return of_core(row.core_kind()) if factor == "C" else FACTORS[factor]
