"""Which client holds which rows, by the partitioners of flwr-datasets: a function for each rule."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlotr.data.clients import name_of
from fedlotr.data.columns import Rows
from fedlotr.errors import InputError
from fedlotr.streams import generator, stream_key

if TYPE_CHECKING:
    import datasets

    from fedlotr.data.partitioners import Partitioner

DIRICHLET_DRAWS = 2000
"""A small ALPHA leaves some client without a row in most draws: 50 clients with 0.1 over four labels in 99 of 100."""

NAMED_GROUPS = 3
"""Groups without a row that a message names."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be dealt.

    rule: as it was given, for messages. arguments: of the rule, as `read_partition` has them. rows: to be dealt. of:
    (rows,) the label or the group of each, kind: which of the two that is. withheld, groups: as for `partition`.
    """

    rule: str
    arguments: tuple[Any, ...]
    rows: datasets.Dataset
    of: Rows
    kind: str
    clients: int
    seed: int
    withheld: Mapping[str, int] | None
    groups: Sequence[Any]

    @property
    def order(self) -> Rows:
        """The rows, shuffled: iid and quantity cut where rows stand, and the others keep the order within a group."""
        return generator(self.seed, "partition").permutation(len(self.rows))

    @property
    def less(self) -> str:
        """In words, of which of the data's rows these are the rest."""
        return less(len(self.rows), self.withheld)


def less(rows: int, withheld: Mapping[str, int] | None) -> str:
    """In words, of which of the data's rows so many are the rest; nothing where they are all there are."""
    taken = {why: count for why, count in (withheld or {}).items() if count}
    if not taken:
        return ""
    return f" (of {rows + sum(taken.values())} rows in the data, {_and([f'{n} {why}' for why, n in taken.items()])})"


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _deal(partitioner: Partitioner, rows: Rows, groups: Rows, clients: int) -> list[Rows]:
    """What flwr's partitioner makes of these rows: the first `clients` partitions."""
    import datasets

    with warnings.catch_warnings(action="ignore"):  # pyarrow's, on how datasets sorts
        partitioner.dataset = datasets.Dataset.from_dict({"row": rows, "group": groups})
        return [np.sort(np.array(partitioner.load_partition(client)["row"][:], np.int64)) for client in range(clients)]


def iid(job: Job) -> list[Rows]:
    """Equal shares at random."""
    from fedlotr.data.partitioners import IidPartitioner

    order = job.order
    return _deal(IidPartitioner(num_partitions=job.clients), order, order, job.clients)


def quantity(job: Job) -> list[Rows]:
    """Random rows, as many for each client as one Dirichlet draw says, and one at least."""
    from fedlotr.data.partitioners import SizePartitioner

    (alpha,), order = job.arguments, job.order
    shares = generator(job.seed, "quantity").dirichlet(np.full(job.clients, alpha))
    if not np.isfinite(shares).all():  # of a tiny ALPHA all numbers drawn may be zero: one client has it all
        shares = np.eye(job.clients)[generator(job.seed, "quantity", "one").integers(job.clients)]
    wanted = shares * (len(order) - job.clients)
    sizes = 1 + np.floor(wanted).astype(np.int64)
    sizes[np.argsort(np.floor(wanted) - wanted, kind="stable")[: len(order) - sizes.sum()]] += 1
    return _deal(SizePartitioner(sizes.tolist()), order, order, job.clients)


def dirichlet(job: Job) -> list[Rows]:
    """The rows of each label or group divided by a Dirichlet draw of its own (Hsu et al. 2019)."""
    from fedlotr.data.partitioners import DirichletPartitioner

    alpha, order = float(job.arguments[0]), job.order
    of = job.of[order]
    for draw in range(DIRICHLET_DRAWS):
        key = stream_key(job.seed, "dirichlet", draw)
        if _nobody_empty(key, of, alpha, job.clients):
            partitioner = DirichletPartitioner(
                num_partitions=job.clients, partition_by="group", alpha=alpha, min_partition_size=1, seed=key
            )
            return _deal(partitioner, order, of, job.clients)
    raise InputError(
        f"--partition {job.rule}: each of {DIRICHLET_DRAWS} draws left some of {job.clients} clients without a "
        f"row ({len(order)} rows{job.less}, {len(np.unique(of))} {job.kind}s); raise ALPHA or lower --clients"
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


def shards(job: Job) -> list[Rows]:
    """Rows sorted by label, cut in equal shards, K random ones a client; fewer than clients * K rows are left out."""
    from fedlotr.data.partitioners import ShardPartitioner

    (shards,), order, clients = job.arguments, job.order, job.clients
    if clients * shards > len(order):
        raise InputError(
            f"--partition shards:{shards}: {clients} clients need {clients * shards} rows, a row a shard; there are "
            f"{len(order)}{job.less}; lower K or --clients"
        )
    partitioner = ShardPartitioner(
        num_partitions=clients,
        partition_by="group",
        num_shards_per_partition=shards,
        seed=stream_key(job.seed, "shards"),
    )
    return _deal(partitioner, order, job.of[order], clients)


def natural(job: Job) -> list[Rows]:
    """A client for each of the largest groups of a column, in the order of size, then of name."""
    from fedlotr.data.partitioners import GroupedNaturalIdPartitioner

    (column,), rows, groups, clients = job.arguments, job.rows, job.groups, job.clients
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
            has += job.less
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


DEALERS: dict[str, Callable[[Job], list[Rows]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "lengths": dirichlet,
    "clusters": dirichlet,
    "quantity": quantity,
    "shards": shards,
    "natural": natural,
}
"""Rule -> what deals by it: to each client the rows it has, sorted indices, at least one, none twice."""
BY_LABEL = ("dirichlet", "shards")
"""Rules that divide by label where there are no groups."""
