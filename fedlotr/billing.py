"""The bills of all methods and strategies for one model: every pair that goes together, those alike as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from fedlotr.adapters.cores import HEADS
from fedlotr.adapters.methods import METHODS, Method
from fedlotr.architectures import Architecture
from fedlotr.errors import InputError
from fedlotr.flower.plugins import GROUP, load_strategy
from fedlotr.formulas import PUBLISHED, Bill, Published, bill
from fedlotr.wire_form import UNCODED, Coding

FEDIT = ("lora", "fedit")
"""What others are compared with."""


@dataclass(frozen=True)
class Row:
    """A method with the strategies that cost alike, the method's own first.

    published: what the papers count for it, in numbers. merged: rank that a round adds to the carried term.
    """

    method: str
    strategies: tuple[str, ...]
    rank: int
    bill: Bill
    merged: int
    controls: bool
    published: Published | None
    published_numbers: int | None


def rank_of(row: Method, ranks: tuple[int, int]) -> int:
    """Of a method. ranks: of cores, and of LoRA's factors."""
    return ranks[1] if {"A", "B"} & set(row.train) else ranks[0]


def bills(
    architecture: Architecture,
    methods: Sequence[str],
    ranks: tuple[int, int],
    clients: int,
    rounds: int,
    coding: Coding = UNCODED,
) -> tuple[list[Row], dict[str, str]]:
    """A row for each of these methods and each way that its strategies cost; and what is left out, with the reason.

    Raises InputError where the rank is above the width of a layer.
    """
    kinds: list[tuple[str, Any]] = []
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            kinds.append((point.name, load_strategy(point.name, {}, clients)))
        except InputError as error:  # of another package: it cannot be loaded, or wants arguments
            left_out[point.name] = error.problems[0]
    narrowest = min(architecture.layers, key=lambda layer: min(layer.d_in, layer.d_out))
    width = min(narrowest.d_in, narrowest.d_out)
    for method in methods:
        row = METHODS[method]
        rank = rank_of(row, ranks)
        if row.factored and rank > width:
            option = "--lora-rank" if rank_of(row, (0, 1)) else "--rank"
            raise InputError(f"{option} {rank}: above the width {width} of {narrowest.name}; choose at most {width}")
        if row.core == "heads" and rank % HEADS:
            left_out[method] = f"rank {rank} cannot be cut into its {HEADS} blocks"
            continue
        if not row.adapts and not architecture.head:
            left_out[method] = "a language model has no classification head"
            continue
        alike: dict[tuple[int, bool], list[str]] = {}
        for name, strategy in sorted(kinds, key=lambda kind: (kind[0] != row.strategy, kind[0])):
            if _go_together(row, strategy):
                merged = strategy.merges([rank] * clients) if hasattr(strategy, "merges") else 0
                if merged and row.has_core:
                    continue  # what it merges is B A, without the core between them
                alike.setdefault((merged, getattr(strategy, "controls", False)), []).append(name)
        for (merged, controls), names in alike.items():
            # Two strategies that carry have each a formula of their own.
            for group in [[name] for name in names] if merged else [names]:
                made = bill(
                    row,
                    architecture.layers,
                    architecture.heads,
                    [rank] * clients,
                    rounds,
                    coding,
                    merged=merged,
                    controls=controls,
                )
                counted = None if controls else PUBLISHED.get((method, group[0]))
                numbers = (
                    None if counted is None else counted.of(architecture.layers, rank, clients) + architecture.head
                )
                rows.append(Row(method, tuple(group), rank, made, merged, controls, counted, numbers))
    return rows, left_out


def fedit(architecture: Architecture, rank: int, clients: int, rounds: int) -> Bill:
    """What the others are compared with: LoRA averaged as FedIT, in float32."""
    return bill(METHODS[FEDIT[0]], architecture.layers, architecture.heads, [rank] * clients, rounds)


def _go_together(row: Method, strategy: Any) -> bool:
    """Whether clients send what the strategy combines, and can keep what it has them keep."""
    needs: frozenset[str] = getattr(strategy, "needs", frozenset())
    if getattr(strategy, "controls", False) and row.adapts and row.core == "heads":
        return False  # the scales of its blocks start again in every round
    return all(needs <= set(turn) for turn in row.sent)
