"""Runs side by side: what each came to and cost, what differs between them, and which of them none other beats."""

import csv
import io
import json
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlotr.errors import InputError, shorten
from fedlotr.fleet.modes import OUTCOMES
from fedlotr.models.kinds import ATTACK_SUCCESS
from fedlotr.reporting.console import readable_bytes
from fedlotr.reporting.documents import under
from fedlotr.reporting.escaping import cell, cells, markdown
from fedlotr.reporting.fitting import show_table
from fedlotr.reporting.gains import COLUMNS, compared
from fedlotr.reporting.grid_table import spending
from fedlotr.reporting.page import MISSING, Figure, Script, Section, Table, render
from fedlotr.reporting.report import flat
from fedlotr.reporting.run_record import RunRecord, points, read_run
from fedlotr.reporting.svg import COLOURS, Series, line_plot, short
from fedlotr.reporting.virtual import OVER, reached, seconds

GAINS = "What each client gains"
REPORTS_ONLY = ("workers", "threads", "cohort", "tensorboard", "mlflow", "wandb")
"""Keys that change how fast a run is, or who is told of it, not what it comes to (beyond the last bits): no reason for
another group."""
TESTED_ON = ("data", "client_eval", "eval_examples", "eval_split", "task")
"""Keys that decide which examples a metric is of."""
TOLD = (
    "aggregation_error_max",
    "communication.upload_payload_bytes_per_client_round",
    "communication.one_off_bytes_per_client",
    "timing.seconds_total",
)
"""What is taken from summary.json."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone. metric, spread: mean and standard deviation of the last values.

    bytes: mean of the totals; None of a baseline, which sends nothing and so is no point of a frontier.
    """

    name: str
    runs: tuple[str, ...]
    seeds: tuple[Any, ...]
    metric: float | None
    spread: float | None
    bytes: float | None
    epsilon: float | None


@dataclass(frozen=True)
class Comparison:
    """rows: one a run, a value a column. differing: keys of config.yaml and the value of each run.

    frontier, private_frontier: names of the groups that no other beats in the metric and in bytes, or in epsilon.
    warnings: what makes the runs hard to compare.
    """

    metric: str | None
    runs: Mapping[str, RunRecord]
    rows: Sequence[Mapping[str, Any]]
    differing: Mapping[str, Sequence[Any]]
    groups: Sequence[Group]
    frontier: frozenset[str]
    private_frontier: frozenset[str]
    warnings: Sequence[str]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs that are named, or that lie in a folder that is named. Raises InputError for what is neither."""
    found: list[Path] = []
    problems = []
    for path in paths:
        if (path / "config.yaml").is_file():
            found.append(path)
        elif not path.is_dir():
            problems.append(f"{shorten(path)}: there is no such folder; give runs, or a folder of runs")
        elif inside := sorted(config.parent for config in path.rglob("config.yaml")):
            found += [run for run in inside if not any(other in run.parents for other in inside)]
        else:
            problems.append(f"{shorten(path)} is no run and no folder of runs: there is no config.yaml in it")
    if problems:
        raise InputError(problems)
    return list({run.resolve(): run for run in found}.values())


def compare(paths: Sequence[Path]) -> Comparison:
    """Read and compare runs. Raises InputError, with all problems, where one is none or their metrics differ."""
    folders = find_runs(paths)
    if len(folders) < 2:
        raise InputError(f"{len(folders)} run is given; comparing takes at least two, or a folder that holds them")
    records, problems = [], []
    for folder in folders:
        try:
            records.append(read_run(folder))
        except InputError as error:
            problems += error.problems
    metrics = {record.metric: record for record in records if record.metric is not None}
    if len(metrics) > 1:
        one, other = (f"{shorten(record.folder)} has {metric}" for metric, record in list(metrics.items())[:2])
        problems.append(f"the runs are of different metrics: {one}, {other}; compare those of one metric")
    if problems:
        raise InputError(problems)
    metric = next(iter(metrics), None)
    higher = all(record.higher_is_better for record in records)
    short_names = [record.name for record in records]
    runs = {record.name if short_names.count(record.name) == 1 else str(record.folder): record for record in records}
    keys = list(dict.fromkeys(key for record in records for key, _ in flat(record.config)))
    values = {key: [dict(flat(record.config)).get(key) for record in records] for key in keys}
    differing = {
        key: row
        for key, row in values.items()
        if len({json.dumps(_known_by(key, record, records)) for record in records}) > 1
    }
    common = common_quality(records, metric, higher)
    attacked = any(record.config.get("attack") is not None for record in records)
    groups = _groups(runs, metric, [key for key in differing if key not in ("seed", *REPORTS_ONLY)])
    return Comparison(
        metric,
        runs,
        [_row(name, record, metric, common, attacked=attacked) for name, record in runs.items()],
        differing,
        groups,
        frontier(groups, higher, lambda group: group.bytes),
        frontier(groups, higher, lambda group: group.epsilon),
        _warnings(runs, differing),
    )


def _known_by(key: str, run: RunRecord, others: Collection[RunRecord]) -> Any:
    """The value of a key; of data, which may go to another folder between two runs, what is in them if all tell that.

    others: the runs that it is compared with.
    """
    if key == "data" and all(_data_sha256(other) for other in others):
        return _data_sha256(run)
    return dict(flat(run.config)).get(key)


def _data_sha256(run: RunRecord) -> str | None:
    found: str | None = (run.summary or run.facts).get("data_sha256")
    return found


def frontier(groups: Sequence[Group], higher: bool, cost: Callable[[Group], float | None]) -> frozenset[str]:
    """Names of the groups for which no other is as good in both, and better in one of metric and cost.

    higher: of two values of the metric the higher is the better one.
    """
    sign = 1.0 if higher else -1.0
    known = [(sign * g.metric, c, g.name) for g in groups if g.metric is not None and (c := cost(g)) is not None]
    return frozenset(
        name
        for value, price, name in known
        if not any(v >= value and p <= price and (v > value or p < price) for v, p, _ in known)
    )


def common_quality(runs: Collection[RunRecord], metric: str | None, higher: bool) -> float | None:
    """What all have come to: the worst of their best values of the metric; None without virtual time."""
    best = [float(under(run.best, metric)) for run in runs if metric is not None and run.best is not None]
    if not best or not any(run.virtual for run in runs):
        return None
    return min(best) if higher else max(best)


def _in_virtual_time(run: RunRecord, metric: str | None, common: float | None) -> dict[str, Any]:
    """When it was over, and when it was as good as all have come to be."""
    at = None if metric is None or common is None else reached(run, metric, common)
    ends = run.virtual_seconds
    known: dict[str, Any] = {"virtual_seconds": ends[-1] if ends else None}
    known |= {} if metric is None else {f"common_{metric}": common}
    return known | {"virtual_seconds_to_common": None if at is None else ends[at]}


def _row(name: str, run: RunRecord, metric: str | None, common: float | None, *, attacked: bool) -> dict[str, Any]:
    last: Mapping[str, Any] = run.last or {}
    best: Mapping[str, Any] = run.best or {}
    told = dict(flat(run.summary))
    row: dict[str, Any] = {"run": name, "finished": run.finished, "rounds": len(run.rows)}
    row |= {key: run.config.get(key) for key in ("method", "strategy", "model", "data", "seed")}
    if metric is not None:
        row |= {metric: last.get(metric), f"best_{metric}": best.get(metric)}
    told_of = not run.hides_clients
    if attacked:
        row[ATTACK_SUCCESS] = under(last, ATTACK_SUCCESS)
    row |= {"loss": last.get("loss"), "bytes": _bytes(run) if told_of else None}
    ways = {name: sum(under(line, name) or 0 for line in run.rows) for name in ("bytes_up", "bytes_down")}
    row |= ways if told_of else dict.fromkeys(ways)
    kinds = (kind for line in run.rows for kind in (line.get("failures") or {}).values())
    failed = sum(line.get("failed") or 0 for line in run.rows) - sum(kind in OUTCOMES for kind in kinds)
    row |= {"epsilon": _spent(run), "failed": failed if told_of else None}
    row |= _in_virtual_time(run, metric, common)
    return row | {key.rpartition(".")[2]: told.get(key) for key in TOLD}


def _bytes(run: RunRecord) -> int:
    return run.bytes_so_far[-1] if run.rows else 0


def _spent(run: RunRecord) -> float | None:
    spent = points(run.rows, "epsilon")
    return spent[-1][1] if spent else None


def _groups(runs: Mapping[str, RunRecord], metric: str | None, keys: Sequence[str]) -> list[Group]:
    members: dict[str, list[tuple[str, RunRecord]]] = {}
    for name, run in runs.items():
        members.setdefault(json.dumps([_known_by(key, run, runs.values()) for key in keys]), []).append((name, run))
    # As long as no seed repeats, a group is a run and has its name.
    alone = len(members) == len(runs)
    groups = []
    for inside in members.values():
        names = tuple(name for name, _ in inside)
        last = [under(run.last, metric) for _, run in inside if run.last is not None and metric is not None]
        values = [float(value) for value in last if value is not None]
        spent = [value for _, run in inside if (value := _spent(run)) is not None]
        own = dict(flat(inside[0][1].config))
        told = " ".join(f"{key}={own[key]}" for key in keys if own.get(key) is not None)
        groups.append(
            Group(
                names[0] if alone else told or "all runs",
                names,
                tuple(run.config.get("seed") for _, run in inside),
                statistics.mean(values) if values else None,
                statistics.stdev(values) if len(values) > 1 else None,
                None if not inside[0][1].tells_bytes else statistics.mean(_bytes(run) for _, run in inside),
                max(spent) if spent else None,
            )
        )
    return groups


def _warnings(runs: Mapping[str, RunRecord], differing: Mapping[str, Sequence[Any]]) -> list[str]:
    found = []
    hashes = {_data_sha256(run) for run in runs.values()} - {None}
    tested = [key for key in TESTED_ON if key in differing]
    if len(hashes) > 1 or tested:
        by = f" ({', '.join(tested)} differ)" if tested else ""
        found.append(f"The runs are not of the same data{by}: their metrics are of different examples.")
    found += [note for run in runs.values() for note in run.notes]
    found += spending([run.summary for run in runs.values() if run.summary])
    real = [name for name, run in runs.items() if not run.virtual]
    if real and len(real) < len(runs):
        found.append(
            f"Not in virtual time: {', '.join(real)}; these have no virtual seconds to compare, and their rounds "
            "waited for all clients."
        )
    open_runs = [name for name, run in runs.items() if not run.finished]
    if open_runs:
        found.append(f"Not finished: {', '.join(open_runs)}; what is shown is as far as they came.")
    return found


def as_csv(found: Comparison) -> str:
    """One line a run, numbers with all their digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(map(cell, found.rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(found.rows))
    return out.getvalue()


def tables(found: Comparison) -> dict[str, Table]:
    """What the page and the Markdown show, by title."""
    metric = found.metric or "metric"
    columns = [key for key in found.rows[0] if any(row[key] is not None for row in found.rows)]
    pareto: list[list[Any]] = [
        [
            group.name,
            len(group.runs),
            ", ".join(map(str, group.seeds)),
            group.metric,
            group.spread,
            group.bytes,
            "yes" if group.name in found.frontier else "no",
        ]
        for group in found.groups
    ]
    titles = ["runs", "number", "seeds", f"mean {metric}", "standard deviation", "mean bytes", "on the frontier"]
    if any(group.epsilon is not None for group in found.groups):
        titles += ["epsilon", "on the frontier over epsilon"]
        for row, group in zip(pareto, found.groups, strict=True):
            row += [group.epsilon, "yes" if group.name in found.private_frontier else "no"]
    shown = {
        "Runs": Table(columns, [[row[key] for key in columns] for row in found.rows]),
        "Seeds together, and the Pareto frontier": Table(titles, pareto),
        "What differs": Table(["key", *found.runs], [[key, *values] for key, values in found.differing.items()]),
    }
    gained = list(compared(found.runs))
    return shown | ({GAINS: Table(COLUMNS, gained)} if gained else {})


def show_tables(found: Comparison, console: Console) -> None:
    """The tables, for a person at a terminal."""
    for title, table in tables(found).items():
        rows = [[_in_words(value) for value in line] for line in table.rows]
        show_table(console, [*map(str, table.columns)], rows, title=title)


def _in_words(value: Any) -> str:
    text = MISSING if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())


def as_markdown(found: Comparison) -> str:
    """The tables, for a README or an issue."""

    def written(value: Any) -> str:
        return markdown(_in_words(value))

    parts = [f"> {written(warning)}" for warning in found.warnings]
    for title, table in tables(found).items():
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        parts.append("\n".join([f"## {title}", "", *(f"| {' | '.join(map(written, line))} |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def as_page(found: Comparison) -> str:
    """One self-contained page, whose script filters and sorts what is there without it."""
    metric = found.metric
    shown = tables(found)
    (runs, groups, differing, *gained) = shown.values()
    runs = _with_options(runs, found)
    (_, together, *_) = shown
    figures = []
    if metric is not None:
        figures = [_frontier_plot(found, metric, "bytes", groups)]
        if any(group.epsilon is not None for group in found.groups):
            figures.append(_frontier_plot(found, metric, "epsilon", groups))
        for name, title in (("curves", "rounds"), ("curves-bytes", "bytes")):
            lines = [
                Series(
                    label, points(run.rows, metric, None if title == "rounds" else list(map(float, run.bytes_so_far)))
                )
                for label, run in list(found.runs.items())[:COLOURS]
                if title == "rounds" or run.tells_bytes
            ]
            form = short if title == "rounds" else readable_bytes
            x = "round" if title == "rounds" else "bytes on the wire, both ways"
            note = f"The first {COLOURS} of {len(found.runs)} runs." if len(found.runs) > COLOURS else ""
            rows = [
                [label, row["round"], None if run.hides_clients else total, row.get(metric)]
                for label, run in found.runs.items()
                for row, total in zip(run.rows, run.bytes_so_far, strict=True)
            ]
            table = Table(["run", "round", "bytes so far", metric], rows)
            figures.append(
                Figure(name, f"{metric} over {title}", line_plot(lines, x=x, y=metric, x_format=form), table, note)
            )
        figures += _virtual_curves(found, metric)
    sections = [
        Section("Result", [Figure("runs", "Runs", table=runs, open=True, wide=True)]),
        Section(together, [Figure("groups", "Seeds together", table=groups, open=True, wide=True), *figures]),
        Section(
            "What differs",
            [Figure("differing", "Configurations", table=differing, open=True, wide=True)] if found.differing else (),
            "" if found.differing else "Nothing: the configurations are the same.",
        ),
        *(Section(GAINS, [Figure("gains", GAINS, table=table, open=True, wide=True)]) for table in gained),
    ]
    names = ", ".join(found.runs)
    return render(
        f"{len(found.runs)} runs side by side",
        names if len(names) < 300 else "",
        sections,
        warning=" ".join(found.warnings),
        script=Script("compare.js"),
    )


def _with_options(runs: Table, found: Comparison) -> Table:
    """The table of runs with what differs in their configurations, so that they can be sorted by it."""
    keys = [key for key in found.differing if key not in runs.columns]
    options = zip(*(found.differing[key] for key in keys), strict=True) if keys else [()] * len(runs.rows)
    return Table([*runs.columns, *keys], [[*row, *more] for row, more in zip(runs.rows, options, strict=True)])


def _virtual_curves(found: Comparison, metric: str) -> list[Figure]:
    """The metric over virtual seconds, of the runs that have them."""
    runs = {label: run for label, run in found.runs.items() if run.virtual}
    if not runs:
        return []
    lines = [
        Series(label, points(run.rows, metric, run.virtual_seconds)) for label, run in list(runs.items())[:COLOURS]
    ]
    rows = [
        [label, row["round"], end, row.get(metric)]
        for label, run in runs.items()
        for row, end in zip(run.rows, run.virtual_seconds, strict=True)
    ]
    plot = line_plot(lines, x=OVER, y=metric, x_format=seconds)
    note = f"The first {COLOURS} of {len(runs)} runs." if len(runs) > COLOURS else ""
    return [Figure("curves-virtual", f"{metric} over {OVER}", plot, Table(["run", "round", OVER, metric], rows), note)]


def _frontier_plot(found: Comparison, metric: str, over: str, table: Table) -> Figure:
    """The groups as dots, and a line through those on the frontier."""
    best = found.frontier if over == "bytes" else found.private_frontier
    known = [
        (float(cost), group.metric, group)
        for group in found.groups
        if group.metric is not None and (cost := getattr(group, over)) is not None
    ]
    on = sorted((cost, value) for cost, value, group in known if group.name in best)
    dots = [Series(group.name, [(cost, value)], line=False) for cost, value, group in known]
    series = [
        Series("frontier", on),
        *(dots if len(dots) < COLOURS else [Series("others", _off(known, best), line=False)]),
    ]
    form = readable_bytes if over == "bytes" else short
    x = "bytes on the wire, both ways" if over == "bytes" else "epsilon"
    plot = line_plot(series, x=x, y=metric, x_format=form)
    return Figure(f"pareto-{over}", f"{metric} over {over}, last round", plot, table)


def _off(known: Sequence[tuple[float, float, Group]], best: frozenset[str]) -> list[tuple[float, float]]:
    return [(cost, value) for cost, value, group in known if group.name not in best]
