"""The values that a grid's file leaves to be chosen, by trials on rows of train that no client holds: never on test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fedlotr.errors import shorten
from fedlotr.grid.file import Grid, Row, Run
from fedlotr.models.kinds import DECISIVE, METRICS
from fedlotr.reporting.documents import Summary


@dataclass(frozen=True)
class Choice:
    """What the trials of a row say. values: of the best point, or None where no point has all of its trials.

    notes: for the table.
    """

    values: Mapping[str, object] | None
    notes: Sequence[str]


def choose(grid: Grid, row: Row, finished: Mapping[str, Summary], failed: Mapping[str, str]) -> Choice:
    """The best point of a row: by the metric's mean over the trials' seeds, then by the loss.

    A point that has a failed trial is out: a rate at which training breaks down is one. finished, failed: by run.
    """
    points: dict[str, list[Run]] = {}
    for run in grid.trials:
        if run.row is row:
            points.setdefault(run.trial, []).append(run)
    if not points:
        return Choice({}, [])
    notes = [
        f"{run.name}: FAILED: {failed[run.name]}" for runs in points.values() for run in runs if run.name in failed
    ]
    whole = [runs for runs in points.values() if all(run.name in finished for run in runs)]
    if not whole:
        return Choice(None, notes)

    def worth(runs: Sequence[Run]) -> tuple[float, float]:
        finals = [finished[run.name]["final"] for run in runs]
        metric = next(name for name in DECISIVE if name in finals[0])
        sign = 1.0 if METRICS[metric].higher_is_better else -1.0
        values, losses = ([final[name] for final in finals] for name in (metric, "loss"))
        # What is not finite is null on disk, and the worst there is.
        worst = float("-inf")
        return (
            worst if None in values else sign * fmean(values),
            worst if None in losses else -fmean(losses),
        )

    best = max(whole, key=worth)[0]
    said = ", ".join(f"{key} {shorten(value)}" for key, value in best.point.items())
    tried = f"{len(points)} tried on {finished[best.name]['test_split']}"
    return Choice(best.point, [f"{row.name}: {said} chosen of {tried}", *notes])


def decided(grid: Grid, choices: Mapping[str, Choice]) -> Grid:
    """The grid with what was chosen, by row; runs of a row for which nothing could be chosen are left as they are."""
    runs = []
    for run in grid.runs:
        values = choices[run.row.name].values
        config = run.config if values is None else run.config.model_copy(update=dict(values))
        runs.append(replace(run, config=config, open=frozenset() if values is not None else run.open))
    return replace(grid, runs=runs)
