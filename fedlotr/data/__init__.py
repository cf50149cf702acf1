"""Data: sources of rows, tasks over them, and their division among clients."""

from fedlotr.data.partition import (
    PARTITIONS,
    Holding,
    client_names,
    describe,
    parse_partition,
    partition,
    withhold_public,
)
from fedlotr.data.pydoc import build_pydoc
from fedlotr.data.sources import Names, OwnData, Source, load_source
from fedlotr.data.tasks import Task, encode, resolve_task

__all__ = [
    "PARTITIONS",
    "Holding",
    "Names",
    "OwnData",
    "Source",
    "Task",
    "build_pydoc",
    "client_names",
    "describe",
    "encode",
    "load_source",
    "parse_partition",
    "partition",
    "resolve_task",
    "withhold_public",
]
