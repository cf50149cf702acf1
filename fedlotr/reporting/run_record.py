"""A run as its directory tells it, finished or not: what reports and comparisons are made from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from fedlotr.communication.ledger import part_path
from fedlotr.config.yaml_file import read_yaml
from fedlotr.errors import InputError, shorten
from fedlotr.reporting.documents import Facts, MetricsRow, Summary, under

METRICS = ("accuracy", "perplexity")
"""The metrics of the tasks that come with fedlotr."""
AMOUNTS = ("payload_bytes", "wire_bytes")


@dataclass(frozen=True)
class Traffic:
    """The byte ledger, summed up.

    kinds: (direction, kind) -> records, payload bytes, wire bytes. clients: client -> (direction, kind) -> wire bytes.
    """

    kinds: dict[tuple[str, str], tuple[int, int, int]]
    clients: dict[int, dict[tuple[str, str], int]]


@dataclass(frozen=True)
class RunRecord:
    """config: config.yaml. rows: metrics.jsonl. summary, facts: empty where there is none."""

    folder: Path
    config: dict[str, Any]
    rows: list[MetricsRow]
    summary: Summary
    facts: Facts

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def baseline(self) -> str | None:
        """`central` or `local` of a run in which nothing was sent; None of a federation."""
        return self.config.get("baseline")

    @property
    def tells_bytes(self) -> bool:
        """Whether bytes were counted: a baseline sends nothing, and of hidden clients they would tell who came."""
        return self.baseline is None and not self.hides_clients

    @property
    def hides_clients(self) -> bool:
        """Whether nothing is told of which clients took part."""
        return self.config.get("privacy") == "client"

    @property
    def finished(self) -> bool:
        """Whether all rounds that the configuration asks for are there, and the summary of just these."""
        return bool(self.summary) and len(self.rows) == self.summary["rounds"] == self.config.get("rounds")

    @cached_property
    def metric(self) -> str | None:
        """The decisive metric of the task, one of the caller's own too; None where no round has been evaluated."""
        names = dict.fromkeys([*([self.facts["metric"]] if "metric" in self.facts else []), *METRICS])
        return next((name for name in names for row in self.rows if under(row, name) is not None), None)

    @property
    def higher_is_better(self) -> bool:
        """Which of two values of the metric is the better one."""
        if self.facts.get("metric", "") == self.metric:
            return bool(self.facts["higher_is_better"])
        return self.metric != "perplexity"

    @cached_property
    def bytes_so_far(self) -> list[int]:
        """All bytes on the wire, both directions, up to and with each round."""
        total, found = 0, []
        for row in self.rows:
            total += (row["bytes_up"] or 0) + (row["bytes_down"] or 0)
            found.append(total)
        return found

    @property
    def last(self) -> MetricsRow | None:
        """The last row with an evaluation."""
        return next((row for row in reversed(self.rows) if row.get("loss") is not None), None)

    @property
    def best(self) -> MetricsRow | None:
        """The first row with the best value of the metric."""
        metric = self.metric
        if metric is None:
            return None
        evaluated = [row for row in self.rows if under(row, metric) is not None]
        return (max if self.higher_is_better else min)(evaluated, key=lambda row: float(under(row, metric)))

    def failures(self) -> dict[str, dict[str, list[int]]]:
        """What went wrong -> client -> the rounds in which it did."""
        found: dict[str, dict[str, list[int]]] = {}
        for row in self.rows:
            for client, kind in (row.get("failures") or {}).items():
                found.setdefault(kind, {}).setdefault(client, []).append(row["round"])
        return found

    def traffic(self) -> Traffic:
        """The ledger of the rounds in `rows`. Raises InputError for a part that is missing or damaged."""
        kinds: dict[tuple[str, str], tuple[int, int, int]] = {}
        clients: dict[int, dict[tuple[str, str], int]] = {}
        keys = ["client", "direction", "kind"]
        # A sum a part: the rows of 500 rounds with thousands of clients are not for one table.
        sums = []
        for row in self.rows:
            path = part_path(self.folder / "ledger", row["round"])
            try:
                part = pq.read_table(path, columns=[*keys, *AMOUNTS])
            except FileNotFoundError:
                raise InputError(f"{path} is missing: {self.folder} is not whole; bring it back from a copy") from None
            except (OSError, pa.ArrowInvalid, KeyError) as error:
                reason = shorten(str(error).splitlines()[0])
                raise InputError(f"{path} cannot be read ({reason}); bring it back from a copy") from None
            sums.append(part.group_by(keys).aggregate([("client", "count"), *((name, "sum") for name in AMOUNTS)]))
        if not sums or self.hides_clients:
            return Traffic({}, {})
        table = pa.concat_tables(sums).group_by(keys)
        table = table.aggregate([("client_count", "sum"), *((f"{name}_sum", "sum") for name in AMOUNTS)])
        for entry in table.sort_by([(key, "ascending") for key in keys]).to_pylist():
            key = (entry["direction"], entry["kind"])
            amounts = (entry["client_count_sum"], *(entry[f"{name}_sum_sum"] for name in AMOUNTS))
            before = kinds.get(key, (0, 0, 0))
            kinds[key] = (before[0] + amounts[0], before[1] + amounts[1], before[2] + amounts[2])
            clients.setdefault(entry["client"], {})[key] = amounts[2]
        order = sorted(kinds, key=lambda key: (key[0] != "up", -kinds[key][2], key[1]))
        return Traffic({key: kinds[key] for key in order}, clients)


def read_run(folder: Path) -> RunRecord:
    """Read a run directory. Raises InputError where the folder is none, or where a file of it makes no sense."""
    if not folder.is_dir():
        raise InputError(f"{shorten(folder)}: there is no such folder; give the folder of a run, such as runs/NAME")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{shorten(folder)} is not a run: it has no config.yaml; give the folder that --out named")
    problems: list[str] = []
    config = read_yaml(folder / "config.yaml", problems)
    if problems:
        raise InputError(problems)
    summary, facts = (_object(folder / name) for name in ("summary.json", "facts.json"))
    rows = _rows(folder / "metrics.jsonl")
    if summary is not None and not isinstance(summary.get("rounds"), int):
        raise InputError(f"{folder / 'summary.json'} is not the summary of a run: it has no rounds")
    return RunRecord(folder, dict(config), rows, cast(Summary, summary or {}), cast(Facts, facts or {}))


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({shorten(error)}); bring it back from a copy") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; bring it back from a copy")
    return found


def _rows(path: Path) -> list[MetricsRow]:
    """The rounds so far; a last line that a crash cut off is none of them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({shorten(error)}); bring it back from a copy") from None
    rows: list[MetricsRow] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = isinstance(row, Mapping) and {"round", "bytes_up", "bytes_down"} <= row.keys()
        except ValueError:
            whole = False
        if whole:
            rows.append(row)
        elif number < len(lines):
            raise InputError(f"{path}, line {number} is no row of a round; bring the file back from a copy")
    return rows
