"""The table of a grid: a line a row, with mean and standard deviation over its seeds, as Markdown and as CSV."""

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlotr.errors import shorten
from fedlotr.models.kinds import ATTACK_SUCCESS, DECISIVE
from fedlotr.reporting.console import FORMS, readable_bytes
from fedlotr.reporting.documents import Privacy, Summary, under
from fedlotr.reporting.escaping import cell, markdown
from fedlotr.reporting.escaping import cells as escaped

LOSS = "{:.4f}"

Cell = str | int | float | None


@dataclass(frozen=True)
class Line:
    """What there is of a row: the summaries of its finished runs, and why others failed, by seed.

    options: what the row says beside the base. planned: the number of its runs. chosen: values that trials chose.
    notes: what the table says of the row below. trials: the summaries of those that are finished.
    """

    name: str
    options: Mapping[str, object]
    planned: int
    finished: Mapping[int, Summary]
    failed: Mapping[int, str]
    chosen: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    trials: Sequence[Summary] = ()

    def values(self, read: Callable[[Summary], Any]) -> list[float]:
        """One number of each finished run that has it."""
        found = [read(summary) for summary in self.finished.values()]
        return [value for value in found if value is not None]


def metric_of(lines: Iterable[Line]) -> str:
    """The metric of the finished runs; 'metric' where there are none. Lines of two metrics have none in common."""
    found = {name for line in lines for run in line.finished.values() for name in DECISIVE if name in run["final"]}
    return found.pop() if len(found) == 1 else "metric"


def as_csv(lines: Sequence[Line]) -> str:
    """A line a row; bytes are payload, a client and round; certificate: the largest aggregation error of any round."""
    records = [_record(line) for line in lines]
    options = list(dict.fromkeys(key for line in lines for key in line.options))
    columns = list(dict.fromkeys(["row", *options, *(column for record in records for column in record)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(map(cell, columns)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(escaped(records))
    return text.getvalue()


def as_markdown(lines: Sequence[Line]) -> str:
    """For a person; what failed is named below."""
    head, *body = cells(lines)
    rows = [head, ["---", *("---:" for _ in head[1:])], *([markdown(text) for text in row] for row in body)]
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    said = [note for line in lines for note in line.notes]
    spent = spending([run for line in lines for run in [*line.finished.values(), *line.trials]])
    notes = "".join(f"- {markdown(note)}\n" for note in [*_spreads(lines), *said, *spent, *failures(lines)])
    return f"{text}\n{notes}" if notes else text


def cells(lines: Sequence[Line]) -> list[list[str]]:
    """The table as text, its head first."""
    metric = metric_of(lines)
    head = ["row", "seeds", metric, "loss", "trained", "up", "down", "one-off", "certificate", "seconds"]
    rows = [_cells(line, metric) for line in lines]
    if any(run.get("privacy") for line in lines for run in line.finished.values()):
        head.insert(4, "epsilon")
        for line, row in zip(lines, rows, strict=True):
            row.insert(4, _epsilon(line))
    if any(run.get("virtual") for line in lines for run in line.finished.values()):
        head.append("virtual seconds")
        for line, row in zip(lines, rows, strict=True):
            found = line.values(_virtual_seconds)
            row.append(f"{statistics.fmean(found):,.6g}" if found else "")
    if any(ATTACK_SUCCESS in run["final"] for line in lines for run in line.finished.values()):
        head.insert(4, ATTACK_SUCCESS)
        for line, row in zip(lines, rows, strict=True):
            row.insert(4, _with_spread(_record(line), ATTACK_SUCCESS, FORMS[ATTACK_SUCCESS]))
    return [head, *rows]


def _virtual_seconds(run: Summary) -> float | None:
    """All of a run; None where time is not virtual."""
    return None if (virtual := run.get("virtual")) is None else virtual["seconds_total"]


def _epsilon(line: Line) -> str:
    """Of the row's dearest run."""
    private = [promise["epsilon"] for run in line.finished.values() if (promise := run.get("privacy"))]
    claimed = [epsilon for epsilon in private if epsilon is not None]
    return "" if not private else "none claimed" if len(claimed) < len(private) else f"{max(claimed):.3g}"


def spending(runs: Iterable[Summary]) -> list[str]:
    """What runs that hide the same data spent together, one line for each data set and unit of more than one run.

    By basic composition: epsilons and deltas add up, whatever the runs were.
    """
    spent: dict[tuple[str, str], list[Privacy]] = {}
    for run in runs:
        if promise := run.get("privacy"):
            spent.setdefault((str(run.get("data")), promise["unit"]), []).append(promise)
    notes = []
    for (data, unit), promises in spent.items():
        claimed = [(promise["epsilon"], promise["delta"]) for promise in promises if promise["epsilon"] is not None]
        if len(promises) < 2 or not claimed:
            continue
        together = f"epsilon {sum(e for e, _ in claimed):.3g} at delta {sum(d for _, d in claimed):.2g}"
        void = f", and {len(promises) - len(claimed)} that claim none" if len(claimed) < len(promises) else ""
        notes.append(
            f"privacy: budgets of runs over the same data add up: of one {unit} of {data} these {len(claimed)} runs, "
            f"trials included, tell {together} together{void}; an epsilon above is that of its run alone"
        )
    return notes


def failures(lines: Sequence[Line]) -> list[str]:
    """Each run that failed, with its reason."""
    return [f"{line.name}, seed {seed}: FAILED: {reason}" for line in lines for seed, reason in line.failed.items()]


def _spreads(lines: Sequence[Line]) -> list[str]:
    """Of rows in which each client has its own model: how far the clients are apart."""
    notes = []
    for line in lines:
        record = _record(line)
        for name, form in FORMS.items():
            if record.get(f"{name}_clients_std") is not None:
                notes.append(
                    f"{line.name}: mean over the clients; their standard deviation is "
                    f"{form.format(record[f'{name}_clients_std'])}, the mean of the worst tenth of them "
                    f"{form.format(record[f'{name}_clients_worst_tenth'])}"
                )
    return notes


def _cells(line: Line, metric: str) -> list[str]:
    record = _record(line)

    def shown(column: str, form: Callable[[Any], str]) -> str:
        return _shown(record, column, form)

    return [
        line.name,
        f"{len(line.finished)}/{line.planned}" + (f", {len(line.failed)} FAILED" if line.failed else ""),
        _with_spread(record, metric, FORMS.get(metric, LOSS)),
        _with_spread(record, "loss", LOSS),
        shown("trained_numbers", "{:,.0f}".format),
        shown("upload_bytes", readable_bytes),
        shown("download_bytes", readable_bytes),
        shown("one_off_bytes", readable_bytes),
        shown("certificate", "{:.1e}".format),
        shown("seconds", "{:.1f}".format),
    ]


def _shown(record: Mapping[str, Cell], column: str, form: Callable[[Any], str]) -> str:
    value = record.get(column)
    return "" if value is None or value == "" else form(value)


def _with_spread(record: Mapping[str, Cell], metric: str, form: str) -> str:
    spread = _shown(record, f"{metric}_std", lambda value: f" ± {form.format(value)}")
    return _shown(record, f"{metric}_mean", form.format) + spread


def _record(line: Line) -> dict[str, Cell]:
    """The numbers of a row, unrounded; none where no run of it is finished."""
    record: dict[str, Cell] = {"row": line.name}
    record |= {key: shorten(value) for key, value in line.options.items()}
    record |= {f"chosen_{key}": shorten(value) for key, value in line.chosen.items()}
    record |= {"seeds": len(line.finished), "planned": line.planned}
    names = [name for name in FORMS if any(name in run["final"] for run in line.finished.values())]
    for name in [*names, "loss"]:
        found = line.values(lambda run, name=name: run["final"].get(name))  # type: ignore[misc]
        record[f"{name}_mean"] = statistics.fmean(found) if found else None
        record[f"{name}_std"] = statistics.stdev(found) if len(found) > 1 else None
        for figure in ("std", "worst_tenth"):
            apart = line.values(lambda run, key=f"{name}_{figure}": (run.get("over_clients") or {}).get(key))  # type: ignore[misc]
            if apart:
                record[f"{name}_clients_{figure}"] = statistics.fmean(apart)
    numbers: list[tuple[str, Callable[[Summary], Any], Callable[[list[float]], float]]] = [
        ("trained_numbers", lambda run: run.get("trained_numbers"), statistics.fmean),
        ("upload_bytes", _traffic("upload_payload_bytes_per_client_round"), statistics.fmean),
        ("download_bytes", _traffic("download_payload_bytes_per_client_round"), statistics.fmean),
        ("one_off_bytes", _traffic("one_off_bytes_per_client"), statistics.fmean),
        ("certificate", lambda run: run["aggregation_error_max"], max),
        ("seconds", lambda run: run["timing"]["seconds_total"], statistics.median),
    ]
    for column, read, combine in numbers:
        found = line.values(read)
        value = combine(found) if found else None
        record[column] = int(value) if value is not None and value.is_integer() else value
    if found := line.values(_virtual_seconds):
        record["virtual_seconds"] = statistics.fmean(found)
    every = [promise for run in [*line.finished.values(), *line.trials] if (promise := run.get("privacy"))]
    if every:
        found = line.values(lambda run: under(run.get("privacy") or {}, "epsilon"))
        record["epsilon"] = max(found) if found else None
        record["delta"] = max(promise["delta"] for promise in every)
        record["epsilon_together"] = sum(promise["epsilon"] or 0.0 for promise in every)
    record["failed"] = "; ".join(f"seed {seed}: {reason}" for seed, reason in line.failed.items())
    return record


def _traffic(key: str) -> Callable[[Summary], Any]:
    return lambda run: under(run["communication"], key)
