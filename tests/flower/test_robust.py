"""Robust rules on cases that a reader can reckon: what each makes of a handful of numbers."""

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedlotr.flower import Strategy, Update
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import to_record
from fedlotr.flower.traits import traits_of
from fedlotr.streams import own_streams


class _NoNodes:
    def get_node_ids(self) -> list[int]:
        return []


def combined(strategy: Strategy, values: list[float], start: float | None = None) -> float:
    """Of clients that send a number each, and weigh as much as they like; as two tensors of it, which stay alike."""
    arrays = {"b": np.full((1, 2), start or 0.0, np.float32), "a": np.full(1, start or 0.0, np.float32)}
    strategy.configure_train(1, to_record(arrays), ConfigRecord(), _NoNodes())  # type: ignore[arg-type]
    updates = [
        Update(k, {"b": np.full((1, 2), value), "a": np.full(1, value)}, 10.0 ** (3 * k % 7))
        for k, value in enumerate(values)
    ]
    found: Any = strategy.combine(updates, 1)
    assert found["b"].shape == (1, 2) and found["a"].shape == (1,)
    np.testing.assert_allclose([found["b"][0, 0], found["b"][0, 1]], found["a"][0], rtol=1e-12)
    return float(found["a"][0])


@pytest.mark.parametrize(("arguments", "mean"), [({}, 1.5), ({"m": 3}, 1.0), ({"m": 2}, 1.5), ({"m": 1}, 1.0)])
def test_multi_krum_is_the_mean_of_the_best(arguments: dict[str, Any], mean: float) -> None:
    """Scores, over the two nearest: 1+4, 1+1, 1+1, 1+4, 97²+98²; of equals the first."""
    strategy = load_strategy("multi-krum", arguments, 5)
    assert combined(strategy, [0.0, 1.0, 2.0, 3.0, 100.0]) == mean


def test_multi_krum_needs_so_many_that_its_mean_can_do_without_the_hostile_ones() -> None:
    for m, clients in ((1, 7), (5, 7), (6, 8)):
        needed = traits_of(load_strategy("multi-krum", {"f": 2, "m": m}, 20)).fewest()
        assert needed is not None and needed.clients == clients


@pytest.mark.parametrize(
    ("iterations", "across"),
    [
        (1, 12 / 11),  # from (0, 0), at distances 3, 3 and 4: 4 (1/4) / (1/3 + 1/3 + 1/4)
        (2, 4 * (11 / 32) / (2 * 11 / 1233**0.5 + 11 / 32)),  # at √1233/11 twice, and 4 - 12/11
        (300, 3**0.5),  # Fermat's point, from which each two of them are 120° apart
    ],
)
def test_the_geometric_median_is_approached_as_weiszfeld_does(iterations: int, across: float) -> None:
    points = [(0.0, 3.0), (0.0, -3.0), (4.0, 0.0)]
    updates = [Update(k, {"y": np.array([y]), "x": np.array([[x]])}, 9.0**k) for k, (x, y) in enumerate(points)]
    found: Any = load_strategy("geometric-median", {"iterations": iterations}, 3).combine(updates, 1)  # type: ignore[attr-defined]
    np.testing.assert_allclose((found["x"][0, 0], found["y"][0]), (across, 0.0), atol=1e-7)


def test_the_geometric_median_stands_on_a_client_without_dividing_by_nothing() -> None:
    assert combined(load_strategy("geometric-median", {}, 3), [4.0, 4.0, 4.0]) == 4.0
    assert abs(combined(load_strategy("geometric-median", {}, 3), [0.0, 0.0, 1e6])) < 1e-5


@pytest.mark.parametrize(
    ("bound", "moved"),
    [
        (None, 5 / 3),  # steps of 1, 2 and 10, the median 2: (1 + 2 + 2) / 3
        (3**0.5, 1.0),  # the norm of a step of 1 in three numbers
        (1e6, 13 / 3),
    ],
)
def test_norm_clip_is_a_mean_of_steps_that_are_bounded(bound: float | None, moved: float) -> None:
    strategy = load_strategy("norm-clip", {"bound": bound}, 3)
    assert combined(strategy, [2.0, 3.0, 11.0], start=1.0) == pytest.approx(1 + moved)


def test_norm_clips_noise_is_the_rounds() -> None:
    def noisy(seed: int) -> Any:
        strategy = load_strategy("norm-clip", {"noise": 0.5}, 2)
        zeros = {"x": np.zeros(4000, np.float32)}
        strategy.configure_train(1, to_record(zeros), ConfigRecord(), _NoNodes())  # type: ignore[arg-type]
        with own_streams(seed):
            return strategy.combine([Update(k, {"x": np.zeros(4000)}, 1.0) for k in range(2)], 1)["x"]  # type: ignore[attr-defined]

    assert (noisy(1) == noisy(1)).all() and (noisy(1) != noisy(2)).all()
    assert abs(noisy(1).std() - 0.5) < 0.05


def test_fltrust_weighs_by_the_servers_own_direction_and_goes_as_far() -> None:
    """g_0 = (2, 0). Across it and against it: no trust. (3, 4): 0.6, as long as g_0 it is (1.2, 1.6). (10, 0): 1."""
    x, root = (1.0, 1.0), (3.0, 1.0)

    def step(*updates: tuple[float, float], **arguments: Any) -> Any:
        strategy: Any = load_strategy("fltrust", arguments, len(updates))
        sent = {"b": np.array([x[0]], np.float32), "a": np.array([[x[1]]], np.float32)}
        strategy.configure_train(1, to_record(sent), ConfigRecord(), _NoNodes())
        strategy.take_root({"b": np.array([root[0]]), "a": np.array([[root[1]]])})
        each = [{"b": np.array([x[0] + d[0]]), "a": np.array([[x[1] + d[1]]])} for d in updates]
        found = strategy.combine([Update(k, arrays, 7.0**k) for k, arrays in enumerate(each)], 1)
        assert strategy.state().keys() == {"alpha"}, "what is of one round is no state"
        return [found["b"][0] - x[0], found["a"][0, 0] - x[1]]

    some = ((0.0, 5.0), (3.0, 4.0), (-1.0, 0.0), (10.0, 0.0))
    np.testing.assert_allclose(step(*some), [(0.6 * 1.2 + 2) / 1.6, 0.6 * 1.6 / 1.6])
    np.testing.assert_allclose(step(*some, alpha=0.5), [1.7 / 2, 0.6 / 2])
    assert step((-1.0, 1.0), (0.0, 0.0), (-3.0, 0.0)) == [0.0, 0.0], "with nobody to be trusted the model stays"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("multi-krum", {"m": 0}), ("geometric-median", {"eps": 0.0}), ("geometric-median", {"iterations": 0})),
        *(("norm-clip", {"bound": 0.0}), ("norm-clip", {"noise": -1.0}), ("fltrust", {"alpha": 0.0})),
    ],
)
def test_arguments_that_make_no_sense_are_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="expected"):
        load_strategy(name, arguments, 5)
