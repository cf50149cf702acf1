"""A report's section on virtual time: learning over it, what became of messages, and what each client waited for."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fedlotr.fleet.modes import OUTCOMES
from fedlotr.reporting.arrivals import Arrivals
from fedlotr.reporting.console import readable_bytes, readable_seconds
from fedlotr.reporting.documents import under
from fedlotr.reporting.page import Figure, Section, Table
from fedlotr.reporting.run_record import RunRecord, Traffic, number, points
from fedlotr.reporting.svg import Bar, Series, bar_plot, line_plot, short, spread, spread_note

TITLE = "In virtual time"
OVER = "virtual seconds"
WAYS = (50, 75, 90, 95, 99)
"""Per cent of the way from the initial value of the metric to its best, of which the time to quality is told."""


def in_virtual_time(run: RunRecord, traffic: Traffic) -> list[Section]:
    """What there is to tell; nothing of a run whose time is not virtual."""
    if not run.virtual:
        return []
    figures = [*_learning(run), _rounds(run), *_quality(run)]
    if run.arrivals is not None and run.arrivals.outcomes:
        figures += [_outcomes(run, run.arrivals, traffic), _clients(run, run.arrivals, traffic)]
    told = [run.facts.get("virtual_time"), run.facts.get("fleet")]
    text = "Virtual seconds are reckoned from the fleet, never measured. " + " ".join(
        f"{words}." for words in told if words
    )
    return [Section(TITLE, figures, text.strip())]


def reached(run: RunRecord, metric: str, value: float) -> int | None:
    """The first row in which the metric is as good as this; None: it never is."""
    sign = 1.0 if run.higher_is_better else -1.0
    found = ((at, under(row, metric)) for at, row in enumerate(run.rows))
    return next((at for at, own in found if own is not None and sign * float(own) >= sign * value), None)


def _learning(run: RunRecord) -> list[Figure]:
    metric, ends, figures = run.metric, run.virtual_seconds, []
    if metric is not None:
        start = _initial(run)
        begun = [] if start is None else [(0.0, start)]
        lines = [Series(metric, begun + points(run.rows, metric, ends))]
        figures.append(_over(f"{metric}-virtual", f"{metric} over virtual seconds", lines, metric, _table(run, metric)))
    losses = [("loss", "loss, as tested"), ("train_loss", "train_loss, of the clients as they train")]
    lines = [Series(name, points(run.rows, key, ends)) for key, name in losses]
    table = _table(run, *(key for key, _ in losses))
    return [*figures, _over("loss-virtual", "Loss over virtual seconds", lines, "loss", table)]


def _over(name: str, title: str, lines: Sequence[Series], y: str, table: Table) -> Figure:
    return Figure(name, title, line_plot(lines, x=OVER, y=y, x_format=seconds), table)


def seconds(value: float) -> str:
    """On an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else short(value)


def _table(run: RunRecord, *keys: str) -> Table:
    rows = [[row["round"], end, *map(row.get, keys)] for row, end in zip(run.rows, run.virtual_seconds, strict=True)]
    return Table(["round", OVER, *keys], rows)


def _initial(run: RunRecord) -> float | None:
    """The metric before the first round, where it is told."""
    found = None if run.metric is None else number(under(run.summary.get("initial", {}), run.metric))
    return None if found is None else float(found)


def _rounds(run: RunRecord) -> Figure:
    keys = ("used", "staleness_mean", "bytes_in_vain", "under_way")
    took = [
        None if before is None or after is None else after - before
        for before, after in pairwise([0.0, *run.virtual_seconds])
    ]
    rows = [
        [row["round"], end, each, *map(row.get, keys)]
        for row, end, each in zip(run.rows, run.virtual_seconds, took, strict=True)
    ]
    table = Table(["round", OVER, "seconds of the round", *keys], rows)
    spent = [(float(row["round"]), each) for row, each in zip(run.rows, took, strict=True) if each is not None]
    plot = line_plot([Series(OVER, spent)], x="round", y=OVER, y_format=seconds)
    return Figure("virtual-rounds", "Virtual seconds of each round", plot, table)


def _quality(run: RunRecord) -> list[Figure]:
    """When the metric had come how far."""
    name, title, metric, start = "virtual-quality", "Time to quality", run.metric, _initial(run)
    if metric is None or start is None or run.best is None:
        return []
    best = float(under(run.best, metric))
    if (best - start) * (1 if run.higher_is_better else -1) <= 0:
        return [Figure(name, title, note=f"{metric} was never better than before the first round, {start:.6g}.")]
    rows: list[list[Any]] = []
    for share in (*WAYS, 100):
        wanted = best if share == 100 else start + (best - start) * share / 100
        at = reached(run, metric, wanted)
        assert at is not None, "its best is as good"
        row = run.rows[at]
        rows.append([f"{share} %", wanted, row["round"], row.get("virtual_seconds"), run.bytes_so_far[at]])
    table = Table(["of the way", metric, "round", OVER, "bytes so far"], rows)
    note = (
        f"When {metric} was first as good: so much of the way from {start:.6g}, before the first round, to {best:.6g}, "
        "its best. Bytes are those on the wire, both ways."
    )
    return [Figure(name, title, table=table, note=note, open=True)]


def _outcomes(run: RunRecord, arrivals: Arrivals, traffic: Traffic) -> Figure:
    """What became of messages; with what is under way, the ledger's sums."""
    order = [*OUTCOMES, *sorted(arrivals.outcomes.keys() - OUTCOMES.keys())]
    found = {name: arrivals.outcomes[name] for name in order if name in arrivals.outcomes}
    rows: list[list[Any]] = [
        [name, OUTCOMES.get(name, "failed"), amount.messages, amount.down, amount.up] for name, amount in found.items()
    ]
    bars: list[Bar] = [(name, {"down": float(own.down), "up": float(own.up)}) for name, own in found.items()]
    sent = {
        way: sum(own[2] for (direction, _), own in traffic.kinds.items() if direction == way) for way in ("down", "up")
    }
    down, up = (sum(row[at] for row in rows) for at in (3, 4))
    under_way, note = (run.rows[-1].get("under_way") or 0), ""
    if under_way:
        rows.append(["under way", "nothing is known of it yet", under_way, sent["down"] - down, sent["up"] - up])
        bars.append(("under way", {"down": float(max(0, sent["down"] - down)), "up": float(max(0, sent["up"] - up))}))
    rows.append(["all", "as in the ledger", sum(row[2] for row in rows), sent["down"], sent["up"]])
    if up != sent["up"] or down > sent["down"] or (down < sent["down"] and not under_way):
        note = "The bytes are not those of the ledger: arrivals.jsonl is not whole."
    plot = bar_plot(bars, what="bytes on the wire, all rounds", form=readable_bytes)
    table = Table(["outcome", "what it is", "messages", "bytes down", "bytes up"], rows)
    return Figure("virtual-outcomes", "What became of messages", plot, table, note, open=True)


def _clients(run: RunRecord, arrivals: Arrivals, traffic: Traffic) -> Figure:
    """Who was there, and what each waited for."""
    named, reasons = run.client_names(), [name for name in arrivals.outcomes if name != "used"]
    reasons.sort(key=[*OUTCOMES, *sorted(reasons)].index)
    rows: list[list[Any]] = []
    bars: list[Bar] = []
    for client, own in sorted(arrivals.clients.items()):
        name = named.get(client, str(client))
        lost = [own.lost[reason] for reason in reasons]
        spent = [own.computing, own.on_links, own.in_vain]
        rows.append([client, name, own.asked, own.used, *lost, *spent, own.staleness / own.used if own.used else None])
        bars.append((name, dict(zip(("computing", "on its links", "in vain"), spent, strict=True))))
    bars.sort(key=lambda bar: -sum(bar[1].values()))
    columns = ["client", "name", "asked", "used", *(f"lost: {reason}" for reason in reasons)]
    columns += ["seconds computing", "seconds on its links", "seconds in vain", "mean staleness"]
    never = (run.config.get("clients") or 0) - len(traffic.clients)
    parts = [
        f"{never:,} clients were never asked." if never > 0 else "",
        spread_note(len(rows)),
    ]
    parts.append(
        "Seconds computing and on links are those of used updates; in vain, until others were known to be lost."
    )
    plot = bar_plot(spread(bars), what=OVER, form=readable_seconds)
    note = " ".join(filter(None, parts))
    return Figure("virtual-clients", "Who was there, and waited for what", plot, Table(columns, rows), note)
