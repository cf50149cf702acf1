"""What each client has of a run: its model on rows of its own, beside the one before, and beside one of its own."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlotr.evaluation.spreads import gain_of, gains
from fedlotr.models.kinds import METRICS
from fedlotr.reporting.documents import ClientScore
from fedlotr.reporting.lines import Lines, count, number
from fedlotr.reporting.page import Figure, Section, Table
from fedlotr.reporting.run_record import RunRecord
from fedlotr.reporting.svg import Bar, bar_plot, short, spread, spread_note

Scores = Mapping[int, Sequence[ClientScore]]
"""Round -> of each client, in their order; 0: before the first."""


def scores_in(folder: Path) -> tuple[Scores, list[str]]:
    """(client_scores.jsonl of a run, what of it had to be left out); nothing of a run that has none."""
    path = folder / "client_scores.jsonl"
    if not path.exists():
        return {}, []
    lines = Lines(path, "how each client did", "no score of a client", _score)
    found: dict[int, dict[int, ClientScore]] = {}
    for _, score in lines:
        found.setdefault(score["round"], {})[score["client"]] = score
    return {at: [of[client] for client in sorted(of)] for at, of in sorted(found.items())}, lines.notes


def _score(found: dict[str, Any]) -> ClientScore | None:
    whole = all(count(found.get(key)) for key in ("round", "client", "rows"))
    if not whole or not all(number(found.get(key)) for key in ("loss", "score")) or found.get("metric") not in METRICS:
        return None
    return {key: found[key] for key in ClientScore.__annotations__}  # type: ignore[return-value]


def of_clients(run: RunRecord) -> list[Section]:
    """The report's section; nothing of a run without such scores, or that tells nothing of clients."""
    scores, notes = ({}, []) if run.hides_clients else scores_in(run.folder)
    rounds = [at for at in scores if run.last is not None and at <= run.last["round"]]
    if not rounds or not (last := rounds[-1]):
        return []
    after, first = scores[last], scores.get(0, ())
    metric, gained = after[0]["metric"], gains(after, first)
    columns, values = ["client", "name", "rows held back", f"{metric} after round {last}"], list[list[Any]]()
    names = run.client_names()
    bars: list[Bar] = []
    for at, one in enumerate(after):
        name = names.get(one["client"], str(one["client"]))
        gain = [] if gained is None else [first[at]["score"], gained[at]]
        values.append([one["client"], name, one["rows"], one["score"], *gain])
        bars.append((name, {metric: one["score"]}))
    if gained is not None:
        columns += [f"{metric} before the first round", "gain"]
    bars.sort(key=lambda bar: -bar[1][metric])
    text = "" if gained is None else f"{told(metric, gained, 'the model before the first round')}"
    plot = bar_plot(spread(bars), what=f"{metric} after round {last}", form=short)
    note = " ".join(filter(None, (spread_note(len(bars)), *notes)))
    return [
        Section("Each client by itself", [Figure("own-rows", metric, plot, Table(columns, values), note)], text),
    ]


def told(metric: str, gained: Sequence[float], over: str) -> str:
    """In a sentence. over: what is gained over."""
    gain, form = gain_of(gained), METRICS[metric].form.format
    return (
        f"On rows that each holds back, {len(gained):,} clients gain {form(gain['mean'])} of {metric} over {over} in "
        f"the mean, standard deviation {form(gain['spread'])}, worst tenth {form(gain['worst_tenth'])}; "
        f"{gain['worse']:,} lose."
    )


COLUMNS = ("run", "over", "clients", "mean gain", "standard deviation", "worst tenth", "clients that lose")
ALIKE = ("clients", "client_eval", "partition", "seed", "max_examples")
"""Keys by which two runs' clients hold back the same rows, of the same data."""


def compared(runs: Mapping[str, RunRecord]) -> Iterator[tuple[Any, ...]]:
    """Rows of `COLUMNS`: what clients gain of each run over no training, and over a model of their own.

    A model of their own is that of a run of the baseline local with the same data, clients, seed and share.
    """
    scores = {name: scores_in(run.folder)[0] for name, run in runs.items() if not run.hides_clients}
    for name, of in scores.items():
        if not of or not (last := max(of)):
            continue
        others = {"no training": of.get(0, ())}
        others |= {
            f"one's own ({other})": theirs[max(theirs)]
            for other, theirs in scores.items()
            if theirs
            and other != name
            and runs[other].config.get("baseline") == "local"
            and runs[name].config.get("baseline") is None
            and _alike(runs[name], runs[other])
        }
        for over, before in others.items():
            if (each := gains(of[last], before)) is not None:
                gain = gain_of(each)
                yield name, over, len(each), gain["mean"], gain["spread"], gain["worst_tenth"], gain["worse"]


def _alike(run: RunRecord, other: RunRecord) -> bool:
    same = all(run.config.get(key) == other.config.get(key) for key in ALIKE)
    return same and run.facts.get("data_sha256") == other.facts.get("data_sha256")
