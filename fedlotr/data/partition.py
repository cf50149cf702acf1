"""Which client holds which rows, by the partitioners of flwr-datasets."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlotr.data.clients import name_of
from fedlotr.data.columns import Rows
from fedlotr.errors import InputError, nearest
from fedlotr.streams import generator, stream_key

if TYPE_CHECKING:
    import datasets

    from fedlotr.data.partitioners import Partitioner

PARTITIONS = {
    "iid": "equal shares at random",
    "dirichlet:ALPHA": "each label divided by a Dirichlet draw; the smaller ALPHA, the fewer labels a client has",
    "shards:K": "rows sorted by label, cut in equal shards, K random ones a client",
    "natural[:COLUMN]": "a client for each of the largest groups of COLUMN (client)",
}
"""Rule -> what it does, for help texts."""

EXAMPLES = {"iid": "iid", "dirichlet": "dirichlet:0.3", "shards": "shards:2", "natural": "natural:client"}

DEFAULT = "dirichlet:0.5"
"""Of rows with labels: uneven, as clients are."""
CLIENT = "client"
"""The column that names the clients, where no other is given."""

MAX_ALPHA = 1e6
"""Already indistinguishable from equal shares; far larger ones overflow the sampler."""

DIRICHLET_DRAWS = 2000
"""A small ALPHA leaves some client without a row in most draws: 50 clients with 0.1 over four labels in 99 of 100."""

NAMED_GROUPS = 3
"""Groups without a row that a message names."""


@dataclass(frozen=True)
class Holding:
    """What one client holds: its number of examples, and of those of each label it has, the most frequent first."""

    client: int
    examples: int
    labels: dict[str, int]


def default_partition(columns: Collection[str], *, labelled: bool) -> str:
    """How rows with these columns are dealt where nothing is said: unevenly by label, or as they come to be held."""
    if labelled:
        return DEFAULT
    return "natural" if CLIENT in columns else "iid"


def parse_partition(rule: str) -> tuple[str, float | int | str | None]:
    """("iid", None), ("dirichlet", alpha), ("shards", shards a client) or ("natural", column).

    Raises InputError with the nearest rule.
    """
    name, colon, argument = rule.strip().partition(":")
    if name not in EXAMPLES:
        raise InputError(f"--partition {rule}: no such rule{nearest(name.lower(), EXAMPLES)}")
    wrong = f"--partition {rule}: expected {{}}, such as {EXAMPLES[name]}"
    if name == "iid":
        if colon:
            raise InputError(f"--partition {rule}: iid takes no value; expected iid")
        return name, None
    if name == "natural":
        if colon and not argument:
            raise InputError(wrong.format("the name of a column"))
        return name, argument or CLIENT
    try:
        value = float(argument) if name == "dirichlet" else int(argument)
    except ValueError:
        value = math.nan
    if name == "dirichlet" and not 0 < value <= MAX_ALPHA:
        raise InputError(wrong.format(f"a concentration above 0, up to {MAX_ALPHA:g}"))
    if name == "shards" and not value >= 1:
        raise InputError(wrong.format("a number of shards a client, 1 or more"))
    return name, value


def partition(
    rule: str,
    rows: datasets.Dataset,
    labels: Rows,
    *,
    clients: int,
    seed: int,
    max_examples: int | None,
    withheld: Mapping[str, int] | None = None,
    groups: Sequence[Any] = (),
) -> list[Rows]:
    """The rows of each client: sorted indices into `rows`, at least one a client, none twice.

    labels: (rows,) class indices. max_examples: a seeded choice of so many is kept where a client has more.
    withheld: for messages, which rows of the data are not among these, in words, and how many. groups: the column of
    `natural` in all rows of the data, with those.
    `shards` leaves out the fewer than clients * K rows that fill no shard; `natural` those of smaller groups and those
    whose column is None. Its clients are in the order of size, then of name.
    Raises InputError where the rule has no such partition of these rows, and says what to change.
    """
    name, value = parse_partition(rule)
    if max_examples is not None and max_examples < 1:
        raise InputError(f"--max-examples {max_examples}: expected 1 or more")
    if not 1 <= clients <= len(rows):
        raise InputError(
            f"--clients {clients}: expected 1 to {len(rows)}, the number of rows there are to divide"
            f"{less(len(rows), withheld)}"
        )
    if name in ("dirichlet", "shards") and len(np.unique(labels)) < 2:
        raise InputError(
            f"--partition {rule}: divides by label and all rows have the same (a causal language model has no labels); "
            "choose iid or natural"
        )
    if name == "natural":
        parts = _natural(rows, str(value), clients, withheld, groups)
    else:
        # Shuffled first: iid cuts where rows stand, and the others keep the order of equal labels.
        order = generator(seed, "partition").permutation(len(rows))
        if name == "iid":
            parts = _iid(order, clients)
        elif name == "dirichlet":
            parts = _dirichlet(order, labels[order], float(value or 0), clients, seed, less(len(rows), withheld))
        else:
            parts = _shards(order, labels[order], int(value or 0), clients, seed, less(len(rows), withheld))
    if max_examples is not None:
        parts = [_cap(part, max_examples, generator(seed, "max-examples", client)) for client, part in enumerate(parts)]
    return parts


def client_names(rule: str, rows: datasets.Dataset, parts: Sequence[Rows]) -> list[str] | None:
    """The name of each client's group under `natural`, otherwise None."""
    name, column = parse_partition(rule)
    if name != "natural":
        return None
    return [name_of(value) for value in rows.select([int(part[0]) for part in parts])[str(column)][:]]


def describe(parts: Sequence[Rows], labels: Rows, label_names: Sequence[str]) -> list[Holding]:
    """What each client holds. label_names: empty where there are no labels, and then no holding has any."""
    holdings = []
    for client, part in enumerate(parts):
        counts = Counter(labels[part].tolist()) if label_names else Counter[int]()
        most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        holdings.append(Holding(client, len(part), {label_names[label]: count for label, count in most_first}))
    return holdings


def less(rows: int, withheld: Mapping[str, int] | None) -> str:
    """In words, of which of the data's rows so many are the rest; nothing where they are all there are."""
    taken = {why: count for why, count in (withheld or {}).items() if count}
    if not taken:
        return ""
    return f" (of {rows + sum(taken.values())} rows in the data, {_and([f'{n} {why}' for why, n in taken.items()])})"


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def withhold_public(count: int, rows: int, seed: int, withheld: Mapping[str, int] | None = None) -> tuple[Rows, Rows]:
    """`count` of `rows` row indices drawn for public use, and the private rest; both sorted.

    withheld: as for `partition`. Raises InputError where nothing private would be left.
    """
    if not 0 <= count < rows:
        raise InputError(
            f"--public-examples {count}: expected 0 to {rows - 1}, fewer than the {rows} rows of train"
            f"{less(rows, withheld)}"
        )
    order = generator(seed, "public-examples").permutation(rows)
    return np.sort(order[:count]), np.sort(order[count:])


def _cap(part: Rows, most: int, random: np.random.Generator) -> Rows:
    return part if len(part) <= most else np.sort(random.choice(part, most, replace=False))


def _deal(partitioner: Partitioner, rows: Rows, groups: Rows, clients: int) -> list[Rows]:
    """What flwr's partitioner makes of these rows: the first `clients` partitions."""
    import datasets

    with warnings.catch_warnings(action="ignore"):  # pyarrow's, on how datasets sorts
        partitioner.dataset = datasets.Dataset.from_dict({"row": rows, "group": groups})
        return [np.sort(np.array(partitioner.load_partition(client)["row"][:], np.int64)) for client in range(clients)]


def _iid(rows: Rows, clients: int) -> list[Rows]:
    from fedlotr.data.partitioners import IidPartitioner

    return _deal(IidPartitioner(num_partitions=clients), rows, rows, clients)


def _dirichlet(rows: Rows, labels: Rows, alpha: float, clients: int, seed: int, less: str) -> list[Rows]:
    from fedlotr.data.partitioners import DirichletPartitioner

    for draw in range(DIRICHLET_DRAWS):
        key = stream_key(seed, "dirichlet", draw)
        if _nobody_empty(key, labels, alpha, clients):
            partitioner = DirichletPartitioner(
                num_partitions=clients, partition_by="group", alpha=alpha, min_partition_size=1, seed=key
            )
            return _deal(partitioner, rows, labels, clients)
    raise InputError(
        f"--partition dirichlet:{alpha:g}: each of {DIRICHLET_DRAWS} draws left some of {clients} clients without a "
        f"row ({len(rows)} rows{less}, {len(np.unique(labels))} labels); raise ALPHA or lower --clients"
    )


def _nobody_empty(key: int, labels: Rows, alpha: float, clients: int) -> bool:
    """Whether the partitioner's first draw with this seed gives every client a row.

    Rehearsed here on the sizes alone, since the partitioner gives up after eleven draws, each of all rows.
    """
    counts = np.unique(labels, return_counts=True)[1][:, None]
    shares = np.random.default_rng(key).dirichlet(np.full(clients, alpha), size=len(counts))
    cuts = (np.cumsum(shares, axis=1) * counts).astype(np.int64)
    cuts[:, -1:] = counts
    return bool(np.diff(cuts, axis=1, prepend=0).sum(axis=0).min() >= 1)


def _shards(rows: Rows, labels: Rows, shards: int, clients: int, seed: int, less: str) -> list[Rows]:
    from fedlotr.data.partitioners import ShardPartitioner

    if clients * shards > len(rows):
        raise InputError(
            f"--partition shards:{shards}: {clients} clients need {clients * shards} rows, a row a shard; there are "
            f"{len(rows)}{less}; lower K or --clients"
        )
    partitioner = ShardPartitioner(
        num_partitions=clients,
        partition_by="group",
        num_shards_per_partition=shards,
        seed=stream_key(seed, "shards"),
    )
    return _deal(partitioner, rows, labels, clients)


def _natural(
    rows: datasets.Dataset, column: str, clients: int, withheld: Mapping[str, int] | None, groups: Sequence[Any]
) -> list[Rows]:
    from fedlotr.data.partitioners import GroupedNaturalIdPartitioner

    if column not in rows.column_names:
        raise InputError(
            f"--partition natural:{column}: no column '{column}'; train has the columns {', '.join(rows.column_names)}"
        )
    values: list[Any] = rows[column][:]
    sizes = Counter(value for value in values if value is not None)
    if not any(value is not None for value in (*values, *groups)):
        raise InputError(f"--partition natural:{column}: no row of train names a client; give another column, or iid")
    if len(sizes) < clients:
        gone = [name_of(value) for value in dict.fromkeys(groups) if value is not None and value not in sizes]
        has = f"'{column}' has {len(sizes) + len(gone)} groups"
        if gone:
            named = ", ".join(gone[:NAMED_GROUPS]) + (", …" if len(gone) > NAMED_GROUPS else "")
            has += f", of which {len(gone)} ({named}) {'has' if len(gone) == 1 else 'have'} no row left to train on"
            has += less(len(rows), withheld)
        raise InputError(
            f"--partition natural:{column}: {clients} clients wanted, but {has}; "
            f"lower --clients to {len(sizes)} or less{', or --public-examples' if gone else ''}"
        )
    largest = sorted(sizes, key=lambda value: (-sizes[value], value))[:clients]
    ranks = {value: rank for rank, value in enumerate(largest)}
    chosen = np.array([row for row, value in enumerate(values) if value in ranks], np.int64)
    numbers = np.array([ranks[values[row]] for row in chosen], np.int64)
    # Groups of one: what NaturalIdPartitioner does, without its progress bar.
    partitioner = GroupedNaturalIdPartitioner(partition_by="group", group_size=1, sort_unique_ids=True)
    return _deal(partitioner, chosen, numbers, clients)
