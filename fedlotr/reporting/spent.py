"""A report's section on where a run's seconds and bytes went, in a few parts that add up to all of them."""

from collections.abc import Mapping

from fedlotr.reporting.console import readable_bytes, readable_seconds
from fedlotr.reporting.page import Figure, Section, Table
from fedlotr.reporting.run_record import RunRecord, Traffic, number, points
from fedlotr.reporting.svg import Format, bar_plot

ONE_OFF = "basis"
"""The kind in the ledger of what a client is sent once, and again only where bases move."""


def where_it_went(run: RunRecord, traffic: Traffic) -> list[Section]:
    """Nothing of a run in which neither is told."""
    seconds, sent = seconds_of(run), bytes_of(traffic)
    figures = []
    if any(seconds.values()):
        note = "" if "the rest" in seconds else "How long the rest took is known once the run is finished."
        note = note or "The rest: set-up, the evaluation before training, checkpoints, samples, the adapter."
        figures.append(_figure("seconds-parts", "Seconds, in all", seconds, "seconds", readable_seconds, note))
    if any(sent.values()):
        note = "On the wire, of all clients and rounds."
        figures.append(_figure("bytes-parts", "Bytes, in all", dict(sent), "bytes", readable_bytes, note))
    return [Section("Where time and bytes went", figures)] if figures else []


def seconds_of(run: RunRecord) -> dict[str, float]:
    """Of training, of evaluation after rounds and, of a finished run, of all else; none where whole clients are hidden,
    since they would tell how many came."""
    if run.hides_clients:
        return {}
    found = {
        name: sum(value for _, value in points(run.rows, key))
        for name, key in (("training", "train_seconds"), ("evaluation", "evaluate_seconds"))
    }
    total = number(run.summary.get("timing", {}).get("seconds_total")) if run.summary else None
    return found if total is None else found | {"the rest": max(0.0, total - sum(found.values()))}


def bytes_of(traffic: Traffic) -> dict[str, int]:
    """On the wire: up, down in the rounds, and what a client is sent once."""
    found = {"up": 0, "down": 0, "down, bases": 0}
    for (way, kind), (_, _, wire) in traffic.kinds.items():
        part = "down, bases" if kind == ONE_OFF else way
        if part in found:  # a ledger of someone else's making may have other directions
            found[part] += wire
    return found


def _figure(name: str, title: str, parts: Mapping[str, float], unit: str, form: Format, note: str) -> Figure:
    total = sum(parts.values())
    rows = [[part, value, 100 * value / total] for part, value in parts.items()]
    plot = bar_plot([(part, {unit: float(value)}) for part, value in parts.items()], what=unit, form=form)
    return Figure(name, title, plot, Table(["part", unit, "per cent"], rows), note, open=True)
