"""What to try next, told by a run's own numbers: a table of hints, each of which applies or does not.

A hint says what was seen and which option answers to it; what that does to quality, only another run can tell.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedlotr.adapters.methods import METHODS
from fedlotr.communication.wire_form import Kind, coding_in
from fedlotr.cost.formulas import bill
from fedlotr.errors import InputError
from fedlotr.fleet.modes import OUTCOMES
from fedlotr.reporting.console import readable_bytes, readable_seconds
from fedlotr.reporting.documents import under
from fedlotr.reporting.page import Figure, Section, Table
from fedlotr.reporting.run_record import Points, RunRecord, Traffic, number, points

TITLE = "What to try next"
TURNED = 0.2
"""Share of the way that the loss had fallen: a rise by more is no noise of a small test split."""
STEEP = 0.5
"""Of the slope in the first half: a loss that falls so fast in the second one has not levelled off."""
LEAST = 4
"""Losses of which a slope of each half can be told."""
NEVER = 0.1
"""Share of the clients: chance leaves a few out of any run."""
MANY_FAILED = 0.05
MANY_LATE = 0.1
IN_VAIN = 0.25
"""Share of the bytes; asking 130 % of the clients that are needed costs 23 %."""
OLD = 2.0
"""Server steps: what an update of that age counts is about half of a fresh one."""
UNSPENT = 0.1
LITTLE_LOST = 0.1
"""Relative transport error, above which fewer bits are no matter of bytes alone."""
NEXT: Mapping[Kind, Kind] = {"float32": "int8", "bfloat16": "int8", "int8": "int4"}
"""A codec for updates, and the next one of about half its bytes or fewer that needs nothing else changed."""

Seen = Callable[[RunRecord, Traffic], Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Hint:
    """seen: the figures that call for it; None where it does not apply. says, attempt: with those figures put in."""

    seen: Seen
    says: str
    attempt: str


def hints_of(run: RunRecord, traffic: Traffic) -> list[tuple[str, str]]:
    """What was seen and what to try, of each hint that applies; those whose figures make no sense do not."""
    found = []
    for hint in HINTS.values():
        try:
            figures = hint.seen(run, traffic)
        except (ArithmeticError, AttributeError, InputError, LookupError, TypeError, ValueError):
            continue  # files that are not as a run writes them; what is odd about them is said elsewhere
        if figures is not None:
            found.append((hint.says.format(**figures), hint.attempt.format(**figures)))
    return found


def what_to_try(run: RunRecord, traffic: Traffic) -> Section:
    """The last section of a report."""
    found = hints_of(run, traffic)
    if not found:
        return Section(TITLE, text="Nothing in this run's own numbers asks for another setting.")
    figure = Figure("hints", "By this run's own numbers", table=Table(["seen", "to try"], found), open=True, wide=True)
    return Section(TITLE, [figure], "What a change would do to quality, only another run can tell.")


def _losses(run: RunRecord) -> Points:
    """As tested, over rounds, before the first one too where that is told."""
    start = number(under(run.summary.get("initial", {}), "loss"))
    return [*([] if start is None else [(0.0, float(start))]), *points(run.rows, "loss")]


def _not_finite(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    tested = (row for row in run.rows if row.get("evaluate_seconds") is not None and row.get("loss") is None)
    row = None if run.notes else next(tested, None)  # a damaged row lacks numbers for other reasons
    return None if row is None else {"round": row["round"], "lr": run.config.get("lr")}


def _above_the_start(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    losses = _losses(run)
    if len(losses) < 2 or losses[0][0] or losses[-1][1] <= losses[0][1]:
        return None
    return {"last": losses[-1][1], "first": losses[0][1], "lr": run.config.get("lr")}


def _turned(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    losses = _losses(run)
    if len(losses) < LEAST or (not losses[0][0] and losses[-1][1] > losses[0][1]):
        return None
    at, (best, low) = min(enumerate(losses), key=lambda found: found[1][1])
    last = losses[-1][1]
    if len(losses) - at < 3 or last - low <= TURNED * (losses[0][1] - low):
        return None
    return {"low": low, "best": int(best), "last": last}


def _still_falling(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    losses = _losses(run)
    if not run.finished or run.config.get("privacy", "none") != "none" or len(losses) < LEAST:
        return None  # a private run has its rounds reckoned into its noise
    begun, middle, end = losses[0], losses[len(losses) // 2], losses[-1]
    early, late = ((a[1] - b[1]) / (b[0] - a[0]) for a, b in ((begun, middle), (middle, end)))
    if early <= 0 or late < STEEP * early:
        return None
    return {"late": late, "early": early, "since": int(end[0] - middle[0]), "rounds": run.config["rounds"]}


def _never_asked(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    clients = run.config.get("clients")
    never = clients - len(traffic.clients) if run.tells_bytes and run.rows and type(clients) is int else 0
    return {"never": never, "clients": clients} if clients and never >= NEVER * clients else None


def _fewer_bits(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    """By the closed form; only where that gives what this run has paid, and its transport error says little is lost."""
    paid = number(run.summary.get("communication", {}).get("upload_payload_bytes_per_client_round"))
    lost = max((value for _, value in points(run.rows, "transport_error")), default=None)
    now = coding_in(run.config)
    kind = NEXT.get(now.update.kind)
    plain = run.config.get("privacy", "none") == "none" and run.config.get("engine") != "flower"
    if not plain or not run.tells_bytes or kind is None or lost is None or lost > LITTLE_LOST:
        return None
    row = METHODS[run.config["method"]]
    row = replace(row, **{part: run.config[part] for part in ("basis", "tie", "core") if run.config.get(part)})
    shapes = run.shapes()
    before, after = (
        bill(row, shapes.layers, shapes.heads, [run.config["rank"]], len(run.rows), coding).round_up
        for coding in (now, replace(now, codec=kind))
    )
    if paid != before:
        return None
    return {"codec": now.codec, "before": readable_bytes(before), "kind": kind, "after": readable_bytes(after)} | {
        "lost": lost
    }


def _failed(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    if run.hides_clients or run.config.get("fault"):
        return None
    kinds = Counter({kind: sum(map(len, who.values())) for kind, who in run.failures().items() if kind not in OUTCOMES})
    failed, asked = kinds.total(), sum(row.get("clients") or 0 for row in run.rows)
    if not failed or failed < MANY_FAILED * asked:
        return None
    kind, times = kinds.most_common(1)[0]
    return {"failed": failed, "asked": asked, "share": failed / asked, "kind": kind, "times": times}


def _evaluating(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    train, spent = (sum(value for _, value in points(run.rows, f"{key}_seconds")) for key in ("train", "evaluate"))
    tested = len(points(run.rows, "evaluate_seconds"))
    if run.hides_clients or not train or tested < 2 or spent <= train:
        return None
    every = {"every": 2 * run.config.get("eval_every", 1), "tested": tested}
    return every | {"spent": readable_seconds(spent), "train": readable_seconds(train)}


def _late(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    """In rounds that end at a deadline."""
    if run.config.get("deadline") is None or run.arrivals is None:
        return None
    asked = sum(amount.messages for amount in run.arrivals.outcomes.values())
    late = run.arrivals.outcomes.get("late")
    if late is None or late.messages < MANY_LATE * asked:
        return None
    return {"late": late.messages, "asked": asked, "share": late.messages / asked, "deadline": run.config["deadline"]}


def _in_vain(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    """Where more are asked than are needed."""
    if run.config.get("mode") != "over-select" or not run.tells_bytes or not run.rows:
        return None
    vain, total = sum(row.get("bytes_in_vain") or 0 for row in run.rows), run.bytes_so_far[-1]
    if not total or vain <= IN_VAIN * total:
        return None
    return {"vain": readable_bytes(vain), "total": readable_bytes(total), "share": vain / total}


def _stale(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    """Where a buffer makes a round."""
    if run.config.get("mode") != "async":
        return None
    used = [(row.get("used") or 0, row.get("staleness_mean") or 0.0) for row in run.rows]
    count = sum(number for number, _ in used)
    mean = sum(number * age for number, age in used) / count if count else 0.0
    return {"age": mean, "used": count} if mean > OLD else None


def _unspent(run: RunRecord, traffic: Traffic) -> Mapping[str, Any] | None:
    spent, budget = points(run.rows, "epsilon"), number(run.config.get("epsilon"))
    if not run.summary or not spent or not budget or spent[-1][1] >= (1 - UNSPENT) * budget:
        return None
    return {"spent": spent[-1][1], "budget": budget, "rounds": len(run.rows)}


HINTS: Mapping[str, Hint] = {
    "not finite": Hint(
        seen=_not_finite,
        says="The loss of the model after round {round} was not finite.",
        attempt="a lower --lr (here {lr}), or a bound on updates, --max-update-norm",
    ),
    "above the start": Hint(
        seen=_above_the_start,
        says="The loss ends at {last:.6g}, above the {first:.6g} from before training.",
        attempt="a lower --lr (here {lr})",
    ),
    "turned": Hint(
        seen=_turned,
        says="The loss was lowest after round {best}, {low:.6g}, and is {last:.6g} at the end.",
        attempt="--keep best, for an adapter of the best round; --stop-after; a lower --lr",
    ),
    "still falling": Hint(
        seen=_still_falling,
        says="The loss still fell by {late:.3g} a round over the last {since} rounds, and by {early:.3g} before.",
        attempt="more --rounds (here {rounds}); with --resume those that are there are kept",
    ),
    "never asked": Hint(
        seen=_never_asked,
        says="{never:,} of {clients:,} clients never took part.",
        attempt="a larger --sample, or more --rounds",
    ),
    "fewer bits": Hint(
        seen=_fewer_bits,
        says="A client uploads {before} a round in {codec}, which lost at most {lost:.2g} of a round's mean update; "
        "by the formulas of fedlotr cost it would be {after} in {kind}.",
        attempt="--codec {kind}; what that loses of quality is not known",
    ),
    "failures": Hint(
        seen=_failed,
        says="{failed:,} of {asked:,} updates failed ({share:.1%}), {times:,} of them: {kind}.",
        attempt="log.txt has each one's reason; --max-failed ends a run in which too many fail",
    ),
    "evaluation": Hint(
        seen=_evaluating,
        says="{tested} evaluations took {spent}, more than all training, {train}.",
        attempt="--eval-every {every}, or fewer --eval-examples",
    ),
    "late": Hint(
        seen=_late,
        says="{late:,} of {asked:,} messages came too late ({share:.1%}).",
        attempt="a longer --deadline (here {deadline:g} virtual seconds), or --late use",
    ),
    "in vain": Hint(
        seen=_in_vain,
        says="{vain} of {total} were sent in vain ({share:.1%}).",
        attempt="a smaller --over-select, or --late use",
    ),
    "stale": Hint(
        seen=_stale,
        says="The {used:,} updates that were used were {age:.3g} server steps old in the mean.",
        attempt="a larger --buffer, or fewer clients at a time, --sample",
    ),
    "unspent": Hint(
        seen=_unspent,
        says="Of an epsilon of {budget:g}, {spent:.6g} was spent in {rounds} rounds.",
        attempt="more --rounds with --resume, which go on until it is spent; a new run of fewer needs less noise",
    ),
}
"""By name; in the order in which a report has them."""
