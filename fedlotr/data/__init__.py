"""Data: sources of rows, tasks over them, and their division among clients."""

from fedlotr.config.partitions import PARTITIONS
from fedlotr.data.conversation import Style
from fedlotr.data.groups import Groups, groups_of
from fedlotr.data.partition import (
    Holding,
    client_names,
    default_partition,
    describe,
    parse_partition,
    partition,
    withhold_public,
)
from fedlotr.data.pydoc import build_pydoc
from fedlotr.data.pydoc_chat import build_pydoc_chat
from fedlotr.data.seen import Seen, Shares
from fedlotr.data.sources import Names, OwnData, Source, load_source
from fedlotr.data.tasks import Encoded, Task, encode, encode_rows, resolve_task, unshared_classes
from fedlotr.data.user_task import OwnTask, apply_task, check_task, measure, task_name

__all__ = [
    "PARTITIONS",
    "Encoded",
    "Groups",
    "Holding",
    "Names",
    "OwnData",
    "OwnTask",
    "Seen",
    "Shares",
    "Source",
    "Style",
    "Task",
    "apply_task",
    "build_pydoc",
    "build_pydoc_chat",
    "check_task",
    "client_names",
    "default_partition",
    "describe",
    "encode",
    "encode_rows",
    "groups_of",
    "load_source",
    "measure",
    "parse_partition",
    "partition",
    "resolve_task",
    "task_name",
    "unshared_classes",
    "withhold_public",
]
