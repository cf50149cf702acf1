"""A run as its directory tells it, finished or not: what reports and comparisons are made from.

What makes no sense in its files, whoever wrote them, is left out and noted: a gap in the report, and no traceback.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from fedlotr.communication.ledger import part_path
from fedlotr.config.yaml_file import read_yaml
from fedlotr.cost.formulas import Layer, Shapes
from fedlotr.errors import InputError, shorten
from fedlotr.files import finite
from fedlotr.fleet.modes import OUTCOMES
from fedlotr.models.kinds import DECISIVE, METRICS
from fedlotr.reporting.arrivals import Arrivals, arrivals_in
from fedlotr.reporting.documents import Facts, MetricsRow, Samples, Summary, under
from fedlotr.reporting.samples import samples_in

AMOUNTS = ("payload_bytes", "wire_bytes")
LARGEST = 1e150
"""Of a number that can be drawn: the square of a larger one is none."""
OBJECTS = ("client_evaluation", "over_clients", "standard_errors", "score_by", "over_groups", "faults")
"""Keys of a row that hold more than a number, beside its failures."""
NOTES_SHOWN = 5
"""Of one file; others are counted."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Traffic:
    """The byte ledger, summed up.

    kinds: (direction, kind) -> records, payload bytes, wire bytes. clients: client -> (direction, kind) -> wire bytes.
    """

    kinds: dict[tuple[str, str], tuple[int, int, int]]
    clients: dict[int, dict[tuple[str, str], int]]


@dataclass(frozen=True)
class RunRecord:
    """config: config.yaml. rows: metrics.jsonl. summary, facts: empty where there is none.

    Numbers of rows are finite, or None; of summary and facts, what reports look into is as a run writes it, or is not
    there. samples: samples.json, where there is one. notes: what had to be left out.
    """

    folder: Path
    config: dict[str, Any]
    rows: list[MetricsRow]
    summary: Summary
    facts: Facts
    notes: tuple[str, ...] = ()
    samples: Samples | None = None

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
        names = dict.fromkeys([*([self.facts["metric"]] if "metric" in self.facts else []), *DECISIVE])
        return next((name for name in names for row in self.rows if under(row, name) is not None), None)

    @property
    def higher_is_better(self) -> bool:
        """Which of two values of the metric is the better one."""
        usual = self.metric not in METRICS or METRICS[self.metric].higher_is_better
        if self.facts.get("metric", "") == self.metric:
            return bool(self.facts.get("higher_is_better", usual))
        return usual

    @cached_property
    def bytes_so_far(self) -> list[int]:
        """All bytes on the wire, both directions, up to and with each round."""
        total, found = 0, []
        for row in self.rows:
            total += (row["bytes_up"] or 0) + (row["bytes_down"] or 0)
            found.append(total)
        return found

    @property
    def virtual(self) -> bool:
        """Whether time is virtual."""
        return any("virtual_seconds" in row for row in self.rows)

    @cached_property
    def arrivals(self) -> Arrivals | None:
        """What became of messages in virtual time; None where it is not virtual, or nothing is told of clients."""
        if self.hides_clients or not self.virtual:
            return None
        return arrivals_in(self.folder, max(row["round"] for row in self.rows))

    @property
    def virtual_seconds(self) -> list[float | None]:
        """When each round was over; all None where time is not virtual."""
        return [row.get("virtual_seconds") for row in self.rows]

    @property
    def last(self) -> MetricsRow | None:
        """The last row with an evaluation, also one whose loss was not finite."""
        keys = ("loss", "evaluate_seconds")
        return next((row for row in reversed(self.rows) if any(row.get(key) is not None for key in keys)), None)

    @property
    def best(self) -> MetricsRow | None:
        """The first row with the best value of the metric."""
        metric = self.metric
        if metric is None:
            return None
        evaluated = [row for row in self.rows if under(row, metric) is not None]
        return (max if self.higher_is_better else min)(evaluated, key=lambda row: float(under(row, metric)))

    def client_names(self) -> dict[int, str]:
        """Of the groups under `natural`; otherwise a client's number is its name."""
        return {number: str(held["client"]) for number, held in enumerate(self.facts.get("partition") or ())}

    def shapes(self) -> Shapes:
        """Of the model, for a bill. Raises one of several errors where facts.json is not as a run writes it."""
        known = self.facts["shapes"]
        return Shapes(tuple(Layer(*layer) for layer in known["layers"]), tuple(known["heads"]))

    def failures(self) -> dict[str, dict[str, list[int]]]:
        """What went wrong -> client -> the rounds in which it did."""
        found: dict[str, dict[str, list[int]]] = {}
        for row in self.rows:
            for client, kind in (row.get("failures") or {}).items():
                found.setdefault(kind, {}).setdefault(client, []).append(row["round"])
        return found

    def lost(self) -> dict[str, dict[str, list[int]]]:
        """Of these, what in virtual time is nobody's failure."""
        return {kind: clients for kind, clients in self.failures().items() if kind in OUTCOMES}

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
                sums.append(_summed(part, keys))
            except FileNotFoundError:
                raise InputError(f"{path} is missing: {self.folder} is not whole; bring it back from a copy") from None
            except (OSError, pa.ArrowException, KeyError, ValueError) as error:
                reason = shorten(next(iter(str(error).splitlines()), type(error).__name__))
                raise InputError(f"{path} cannot be read ({reason}); bring it back from a copy") from None
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
    if summary is not None and type(summary.get("rounds")) is not int:
        raise InputError(f"{folder / 'summary.json'} is not the summary of a run: it has no rounds")
    notes: list[str] = []
    rows = _rows(folder / "metrics.jsonl", notes)
    if summary is not None and len(rows) < summary["rounds"]:
        notes.append(
            f"{folder / 'metrics.jsonl'} has {len(rows)} of the {summary['rounds']} rounds in summary.json: a gap"
        )
    summary = _fitting(summary or {}, SUMMARY, folder / "summary.json", notes)
    facts = _fitting(facts or {}, FACTS, folder / "facts.json", notes)
    samples = samples_in(folder, notes)
    return RunRecord(folder, dict(config), rows, cast(Summary, summary), cast(Facts, facts), tuple(notes), samples)


def points(rows: Sequence[Mapping[str, Any]], key: str, across: Sequence[float | None] | None = None) -> Points:
    """The values of one key over the rounds, or over what `across` has for each row; nulls left out."""
    places = [row["round"] for row in rows] if across is None else across
    known = [(x, row[key]) for x, row in zip(places, rows, strict=True) if x is not None and row.get(key) is not None]
    return [(float(x), float(value)) for x, value in known]


def number(value: object) -> float | int | None:
    """The number that this is, where it can be drawn; None for anything else."""
    fits = type(value) in (int, float) and -LARGEST < value < LARGEST  # type: ignore[operator]
    return value if fits else None  # type: ignore[return-value]


def _summed(part: pa.Table, keys: list[str]) -> pa.Table:
    """One round's ledger by client, direction and kind. Raises ValueError where it is not of these."""
    if any(not pa.types.is_integer(part[name].type) for name in ("client", *AMOUNTS)):
        raise ValueError("its columns are not numbers")
    return part.group_by(keys).aggregate([("client", "count"), *((name, "sum") for name in AMOUNTS)])


def _is_partition(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(held, dict)
        and {"client"} <= held.keys()
        and _is_count(held.get("examples"))
        and _counts(held.get("labels", {}))
        and _counts(held.get("groups", {}))
        for held in found
    )


def _is_count(found: object) -> bool:
    return type(found) is int and number(found) is not None


def _counts(found: object) -> bool:
    return isinstance(found, dict) and all(map(_is_count, found.values()))


def _is_promise(found: object) -> bool:
    return found is None or (
        isinstance(found, dict)
        and isinstance(found.get("unit"), str)
        and "epsilon" in found
        and (found["epsilon"] is None or number(found["epsilon"]) is not None)
        and number(found.get("delta")) is not None
    )


def _of(*kinds: type) -> Callable[[object], bool]:
    return lambda found: isinstance(found, kinds)


NONE = type(None)
SUMMARY: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("communication", "timing", "initial", "final", "best", "versions"), _of(dict)),
    "warnings": lambda found: isinstance(found, list) and all(isinstance(line, str) for line in found),
    "privacy": _is_promise,
    "codec": _of(dict, NONE),
    "faults": lambda found: isinstance(found, dict) and all(map(_counts, found.values())),
    "data_sha256": _of(str, NONE),
}
FACTS: dict[str, Callable[[object], bool]] = {
    "partition": _is_partition,
    **dict.fromkeys(
        ("labels", "groups"), lambda found: isinstance(found, list) and all(isinstance(label, str) for label in found)
    ),
    "grouped_by": _of(str),
    "metric": _of(str),
    "higher_is_better": _of(bool),
    "clients_per_round": _is_count,
    **dict.fromkeys(("shapes", "losses", "versions"), _of(dict)),
    "attack": lambda found: isinstance(found, dict) and isinstance(found.get("words"), str),
    "data_sha256": _of(str, NONE),
}
"""Keys that are looked into, and whether what is there is what a run writes there."""


def _fitting(
    found: Mapping[str, Any], known: Mapping[str, Callable[[object], bool]], path: Path, notes: list[str]
) -> dict[str, Any]:
    """Without the keys whose values are none that a run writes."""
    wrong = [key for key, fits in known.items() if key in found and not fits(found[key])]
    if wrong:
        are = "makes no sense and is" if len(wrong) == 1 else "make no sense and are"
        notes.append(f"{path}: {', '.join(wrong)} {are} left out")
    return {key: value for key, value in found.items() if key not in wrong}


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        found = finite(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({shorten(error)}); bring it back from a copy") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; bring it back from a copy")
    return found


def _rows(path: Path, notes: list[str]) -> list[MetricsRow]:
    """The rounds so far; what is no row of one, or no number in one, is left out and noted.

    A last line that a crash cut off is none of them, and not worth a word.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); bring it back from a copy") from None
    rows: list[MetricsRow] = []
    told: list[str] = []
    for at, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or type(row.get("round")) is not int or not 0 < row["round"] <= LARGEST:
            if at < len(lines) or row is not None:
                told.append(f"{path}, line {at} is no row of a round: a gap")
            continue
        if any(row["round"] == other["round"] for other in rows):
            told.append(f"{path}, line {at} is round {row['round']} once more and is left out")
            continue
        wrong = [key for key, value in row.items() if not _in_a_row(key, value)]
        missing = [key for key in ("bytes_up", "bytes_down") if key not in row]
        if wrong or missing:
            told.append(
                f"{path}, line {at}: {', '.join([*wrong, *missing][:NOTES_SHOWN])} not as a run writes it: a gap"
            )
        rows.append(cast(MetricsRow, dict.fromkeys(("bytes_up", "bytes_down")) | row | dict.fromkeys(wrong)))
    notes += told[:NOTES_SHOWN]
    if len(told) > NOTES_SHOWN:
        notes.append(f"{path}: {len(told) - NOTES_SHOWN} more lines like these")
    return rows


def _in_a_row(key: str, value: object) -> bool:
    """Whether a row may have this value: a number, none, or what is known to be an object."""
    if key == "failures":
        return value is None or (
            isinstance(value, dict)
            and all(c.isdecimal() and len(c) < 10 and isinstance(kind, str) for c, kind in value.items())
        )
    return value is None or number(value) is not None or (key in OBJECTS and isinstance(value, dict))
