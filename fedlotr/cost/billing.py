"""The bills of all methods and strategies for one model: every pair that goes together, those alike as one."""

import operator
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from fedlotr.adapters.methods import METHODS, Method
from fedlotr.adapters.moves import Rebase, read_rebase
from fedlotr.communication.wire_form import UNCODED, Coding
from fedlotr.cost.formulas import PUBLISHED, Bill, Published, Shapes, bill
from fedlotr.errors import InputError, shorten
from fedlotr.flower.links.draws import OWN_FACTORS
from fedlotr.flower.plugins import installed, load_strategy
from fedlotr.flower.traits import StrategyTraits, traits_of
from fedlotr.models.targets import by_pattern, check_patterns, too_narrow

FEDIT = ("lora", "fedit")
"""What others are compared with."""


@dataclass(frozen=True)
class Row:
    """A method with the strategies that cost alike, the method's own first.

    published: what the papers count for it, in numbers. merged: rank that a round adds to the carried term. rebase: how
    its bases move, where they do. public: whether clients are sent public rows, to make bases of.
    """

    method: str
    strategies: tuple[str, ...]
    rank: int
    bill: Bill
    merged: int
    controls: bool
    published: Published | None
    published_numbers: int | None
    rebase: Rebase | None = None
    public: bool = False


def rank_of(row: Method, ranks: tuple[int, int]) -> int:
    """Of a method. ranks: of cores, and of LoRA's factors."""
    return ranks[1] if {"A", "B"} & set(row.train) else ranks[0]


def bills(
    shapes: Shapes,
    methods: Sequence[str],
    ranks: tuple[int, int],
    clients: int,
    rounds: int,
    coding: Coding = UNCODED,
    strategies: Mapping[str, Mapping[str, Any]] | None = None,
    rebase: Rebase | None = None,
    public: int | None = None,
) -> tuple[list[Row], dict[str, str]]:
    """A row for each of these methods and each way that its strategies cost; and what is left out, with the reason.

    strategies: which, each with its arguments (default: all that are installed, without any). rebase, public: as `bill`
    has them, of the methods that they go with.
    Raises InputError where the rank is above the width of a layer.
    """
    rows: list[Row] = []
    own = [layer.rank for layer in shapes.layers if layer.rank is not None]
    asked_of = {*ranks, *own}
    kinds, left_out = _made({name: {} for name in installed()} if strategies is None else strategies, asked_of, clients)
    narrowest = min(shapes.layers, key=lambda layer: min(layer.d_in, layer.d_out))
    width = min(narrowest.d_in, narrowest.d_out)
    for method in methods:
        row = METHODS[method]
        rank = max(own, default=rank_of(row, ranks))
        if row.factored and not own and rank > width:
            option = "--lora-rank" if rank_of(row, (0, 1)) else "--rank"
            way = f"choose at most {width}, or give --cap-rank"
            raise InputError(f"{option} {rank}: above the width {width} of {narrowest.name}; {way}")
        blocks = row.core_kind().blocks
        if (uneven := next((r for r in own or [rank] if r % blocks), None)) is not None:
            left_out[method] = f"rank {uneven} cannot be cut into its {blocks} blocks"
            continue
        if not row.adapts and not shapes.head:
            left_out[method] = "a language model has no classification head"
            continue
        moves = None if row.rebase is None else read_rebase(row.rebase)
        if rebase is not None and (row.freezes or row.both):
            moves = rebase
            if not _goes(row, rebase):
                left_out[method] = f"its bases do not move by {rebase.how!r}"
                continue
        of_gradient = row.freezes and not (row.basis_kind().derivable and (moves is None or moves.move.derivable))
        shown = public if of_gradient else None
        alike: dict[tuple[int, bool, bool], list[str]] = {}
        for name, terms in sorted(kinds.items(), key=lambda kind: (kind[0] != row.strategy, kind[0])):
            if terms.go_with(row):
                merged = terms.merges[rank]
                if merged and row.has_core:
                    continue  # what it merges is B A, without the core between them
                if moves is not None and terms.traits.remembers_factors:
                    continue
                terms_of = merged, bool(terms.traits.controls), OWN_FACTORS in terms.traits.asks
                alike.setdefault(terms_of, []).append(name)
        for (merged, controls, drawn), names in alike.items():
            # Two strategies that carry have each a formula of their own.
            for group in [[name] for name in names] if merged else [names]:
                who = [rank] * clients
                asked = row, shapes.layers, shapes.heads, who, rounds, coding
                each = {
                    r: [kinds[group[0]].merges[r or rank]] * rounds for r in {layer.rank for layer in shapes.layers}
                }
                made = bill(*asked, merged=each, controls=controls, drawn=drawn, rebase=moves, public=shown)
                counted = None if controls else PUBLISHED.get((method, group[0]))
                numbers = None if counted is None else counted.of(shapes.layers, rank, clients) + shapes.head
                told = method, tuple(group), rank, made, merged, controls, counted, numbers
                rows.append(Row(*told, rebase=moves, public=shown is not None))
    return rows, left_out


def _goes(row: Method, rebase: Rebase) -> bool:
    """Whether the bases of a method whose factors can move can move so."""
    made_of = rebase.move.made_of
    return set(row.train) == {"B"} if made_of == "product" else row.both or made_of != "start"


def fedit(shapes: Shapes, rank: int, clients: int, rounds: int) -> Bill:
    """What the others are compared with: LoRA averaged as FedIT, in float32."""
    rank = max((rank if layer.rank is None else layer.rank for layer in shapes.layers), default=rank)
    return bill(METHODS[FEDIT[0]], shapes.layers, shapes.heads, [rank] * clients, rounds)


def ranked(shapes: Shapes, rank: int, patterns: Mapping[str, int], *, cap: bool) -> Shapes:
    """With a rank of its own for each layer, as a run's --rank-pattern and --cap-rank give it.

    Raises InputError for a pattern that means no layer, and where a layer is too narrow and ranks are not capped.
    """
    check_patterns("--rank-pattern", patterns, [layer.name for layer in shapes.layers])
    found = []
    for layer in shapes.layers:
        width, own = min(layer.d_in, layer.d_out), by_pattern(patterns, layer.name, rank)
        if own > width and not cap:
            raise InputError(too_narrow("--rank", own, layer.name, width))
        found.append(layer._replace(rank=min(own, width)))
    return replace(shapes, layers=tuple(found))


@dataclass(frozen=True)
class _Terms:
    """What a strategy asks for. merges: the rank that a round adds to the carried term, for clients of each rank."""

    traits: StrategyTraits
    merges: Mapping[int, int]

    def go_with(self, row: Method) -> bool:
        """Whether clients send what the strategy combines, and can keep what it has them keep."""
        if self.traits.controls and row.adapts and row.core_kind().restarts:
            return False
        return self.traits.combines(row)


def _made(
    strategies: Mapping[str, Mapping[str, Any]], ranks: Collection[int], clients: int
) -> tuple[dict[str, _Terms], dict[str, str]]:
    """The terms of each; and those of other packages that cannot be loaded, made or asked, with the reason."""
    made: dict[str, _Terms] = {}
    left_out: dict[str, str] = {}
    for name, arguments in strategies.items():
        try:
            with redirect_stdout(sys.stderr):  # what it prints is no part of a bill
                made[name] = _terms(load_strategy(name, arguments, clients), ranks, clients)
        except InputError as error:
            left_out[name] = error.problems[0]
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            left_out[name] = f"--strategy {name}: it cannot be asked what it costs: {shorten(reason)}"
    return made, left_out


def _terms(strategy: Any, ranks: Collection[int], clients: int) -> _Terms:
    traits = traits_of(strategy)
    return _Terms(traits, {r: operator.index(traits.merges([r] * clients)) for r in ranks})
