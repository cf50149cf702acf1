"""How far scores of clients, or of groups of rows, are apart, and what clients gained."""

from collections.abc import Sequence

import numpy as np

from fedlotr.models.kinds import METRICS
from fedlotr.reporting.documents import ClientEvaluation, ClientScore, Gain, Spread


def worst_tenth(scores: Sequence[float], *, larger_is_worse: bool) -> float:
    """The mean of the worst tenth of the clients' scores: of ⌈n/10⌉ of n, so never of fewer than a tenth, nor of none.

    This is what "worst tenth" means wherever a run says it.
    """
    ordered = sorted(scores, reverse=larger_is_worse)
    return float(np.mean(ordered[: -(-len(ordered) // 10)]))


def spread_of(metric: str, scores: Sequence[float]) -> Spread:
    """How far scores are apart. metric: which they are."""
    return _spread(scores, larger_is_worse=not METRICS[metric].higher_is_better)


def _spread(scores: Sequence[float], *, larger_is_worse: bool) -> Spread:
    return {
        "mean": float(np.mean(scores)),
        "spread": float(np.std(scores)),
        "worst_tenth": worst_tenth(scores, larger_is_worse=larger_is_worse),
    }


def summary_of(scores: Sequence[ClientScore], before: Sequence[ClientScore] = ()) -> ClientEvaluation:
    """Of at least one score by client. before: the first round, of the same clients."""
    metric = scores[0]["metric"]
    found: ClientEvaluation = {
        "metric": metric,
        "clients": len(scores),
        "loss": float(np.mean([one["loss"] for one in scores])),
        **spread_of(metric, [one["score"] for one in scores]),  # type: ignore[typeddict-item]
    }
    if (each := gains(scores, before)) is not None:
        found["gain"] = gain_of(each)
    return found


def gains(scores: Sequence[ClientScore], others: Sequence[ClientScore]) -> list[float] | None:
    """By how much each is better than the other of the same client on as many rows, in the metric's unit.

    None where these are not the same clients, rows and metric. A positive gain is always the better score.
    """
    if not scores or [_of(one) for one in scores] != [_of(other) for other in others]:
        return None
    sign = 1.0 if METRICS[scores[0]["metric"]].higher_is_better else -1.0
    return [sign * (one["score"] - other["score"]) for one, other in zip(scores, others, strict=True)]


def gain_of(each: Sequence[float]) -> Gain:
    """Over clients."""
    return {**_spread(each, larger_is_worse=False), "worse": sum(gain < 0 for gain in each)}


def _of(score: ClientScore) -> tuple[int, int, str]:
    return score["client"], score["rows"], score["metric"]
