"""What counts as public where a run hides its data: which rows may be scored or fitted on in the clear."""

from collections.abc import Iterable

import datasets

from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import Source, Task
from fedlotr.data.layouts import test_rank
from fedlotr.errors import InputError

MOST_SHARED = 0.1
"""Of the different texts of train, or of those said to be public, that may stand in both: more is no coincidence."""
INSTEAD = "give data with a test split that no client holds, or --eval-data and --public-eval"
"""What to do where rows of clients would be scored."""


def check_scored(config: SimulationConfig, source: Source, task: Task) -> None:
    """Raise InputError where a run that hides its data would score rows of clients: no noise would cover that."""
    if config.privacy == "none":
        return
    of = f"--privacy {config.privacy}"
    if source.drawn:
        given = f"--data {config.data}" if config.eval_split is None else f"--eval-split {config.eval_split}"
        tuned = "" if config.eval_split is None else " (of a grid's trials 'on' in tune names the split)"
        raise InputError(
            f"{given} with {of}: the run would be evaluated on {source.test_split}, whose rows are as private as the "
            f"others, and no noise covers their scores; {INSTEAD}{tuned}"
        )
    own = config.eval_split is not None and test_rank(config.eval_split) is None
    if own and config.eval_data is None and not config.public_eval:
        raise InputError(
            f"--eval-split {config.eval_split} with {of}: its rows are scored without noise; where they are nobody's "
            "secret, say so by --public-eval"
        )
    if _shared(_texts(source.test, task), _texts(source.train, task)) > MOST_SHARED:
        raise InputError(
            f"--data {config.data} with {of}: many rows of {source.test_split} are rows of train too, which no noise "
            f"would cover when they are scored; {INSTEAD}, or leave them out of one of the two"
        )


def check_public(config: SimulationConfig, public: Source, source: Source, task: Task) -> None:
    """Raise InputError where what --public-data names are to a large part the clients' own rows."""
    if config.privacy == "none":
        return
    if _shared(_texts(public.train, task), _texts(source.train, task)) > MOST_SHARED:
        raise InputError(
            f"--public-data {config.public_data} with --privacy {config.privacy}: many of its rows are rows of --data "
            "too, which it is there to hide; give other data, or leave it out"
        )


def _texts(rows: datasets.Dataset, task: Task) -> set[str]:
    """The different texts, whatever their labels, capitals and white space."""
    columns: Iterable[tuple[str, ...]] = zip(*(rows[column][:] for column in task.columns), strict=True)
    return {"\0".join(" ".join((text or "").casefold().split()) for text in texts) for texts in columns}


def _shared(one: set[str], other: set[str]) -> float:
    """How much of the smaller one stands in the other."""
    return len(one & other) / max(1, min(len(one), len(other)))


def shown(config: SimulationConfig, source: Source, public: Source | None) -> tuple[datasets.Dataset, str] | None:
    """Rows whose very text may be shown, and what they are, in words; None where a run hides its data and has none.

    public: what --public-data names. A test split that is only assumed public may be scored, and is not shown.
    """
    if config.privacy == "none" or config.public_eval:
        return source.test, source.test_split
    return None if public is None else (public.train, "the public data (--public-data)")


def scored_on(config: SimulationConfig, source: Source) -> str:
    """What a run that hides its data is evaluated on, in words."""
    said = "said to be public (--public-eval)" if config.public_eval else "assumed public: a split that no client holds"
    return f"{source.test_split}, {said}"
