"""Whom a round asks: each rule draws with the chances that it says, and weights make up for them."""

from typing import Any

import numpy as np
import pytest

from fedlotr.fleet.draws import EVEN, Known, Sampler, inclusion
from fedlotr.fleet.sampling import SAMPLINGS, read_sampling
from fedlotr.streams import generator

SIZES = [1, 2, 3, 4, 100, 7, 8, 0]


def drawn(words: str, number: int, wanted: int = 3, known: Known | None = None, there: Any = None) -> dict[int, float]:
    sampler = Sampler(sampling=read_sampling(words), sizes=SIZES)
    there = np.arange(len(SIZES)) if there is None else np.array(there)
    return sampler.draw(generator(0, "test", number), there, wanted, known or Known.nothing(len(SIZES)))


def test_chances_go_with_sizes_and_none_is_above_one() -> None:
    np.testing.assert_allclose(inclusion(np.array([1.0, 2, 3]), 1), [1 / 6, 2 / 6, 3 / 6])
    np.testing.assert_allclose(inclusion(np.array([1.0, 1, 100, 50]), 3), [0.5, 0.5, 1, 1])
    np.testing.assert_allclose(inclusion(np.array([5.0, 0, 5]), 3), [1, 0, 1])
    assert inclusion(np.zeros(3), 2).sum() == 0


@pytest.mark.parametrize("wanted", [1, 3, 7])
def test_by_size_each_is_drawn_as_often_as_said_and_the_mean_is_that_of_all(wanted: int) -> None:
    """4,000 draws from seed 0; values of clients that the mean of all is known of."""
    values, sizes = np.arange(8) ** 2.0, np.array(SIZES, float)
    counts, means, said = np.zeros(8), [], np.zeros(8)
    for number in range(4000):
        found = drawn("size", number, wanted)
        assert len(found) == wanted and list(found) == sorted(found)
        for client, chance in found.items():
            counts[client] += 1
            said[client] = chance * wanted / 8
        means.append(sum(sizes[k] / chance * values[k] for k, chance in found.items()) / wanted * 8 / sizes.sum())
    chances = inclusion(sizes, wanted)
    seen = chances > 0
    np.testing.assert_allclose(said[seen], chances[seen])
    assert (np.abs(counts / 4000 - chances) <= 4.5 * np.sqrt(chances * (1 - chances) / 4000)).all(), counts
    # over wanted / 8 each: Σ n_i v_i / π_i is unbiased of Σ n_i v_i (Horvitz & Thompson)
    mean, error = np.mean(means) * 1.0, np.std(means) / 4000**0.5
    assert abs(mean - sizes @ values / sizes.sum()) <= 4.5 * error + 1e-12


def test_of_alike_sizes_a_weight_stays_what_it_is() -> None:
    sampler = Sampler(sampling=read_sampling("size"), sizes=[6] * 10)
    found = sampler.draw(generator(0, "test"), np.arange(10), 4, Known.nothing(10))
    assert len(found) == 4 and set(found.values()) == {1.0}


def test_by_loss_those_go_first_who_were_never_asked_and_then_the_worst_off() -> None:
    known = Known.nothing(8).after(range(7), {0: 5.0, 1: 1.0, 2: 4.0, 3: 0.5, 4: 2.0, 5: 3.0})
    assert known.expected.tolist() == [5, 1, 4, 0.5, 2, 3, 15.5 / 6, np.inf], "who told nothing counts as the mean"
    assert list(drawn("loss:1000", 0, 3, known)) == [0, 2, 5], "client 7 holds nothing, so it is never drawn"
    some = {tuple(drawn("loss", number, 3, known)) for number in range(50)}
    assert len(some) > 1 and all({0, 2} & set(found) for found in some), "of twice as many as are wanted, drawn by size"
    fresh = Known.nothing(8).after([4], {4: 99.0})
    assert all(4 not in drawn("loss:1000", number, 6, fresh) for number in range(20))


def test_by_availability_the_rarest_guest_goes_first() -> None:
    known = Known.nothing(8).after([0, 1, 2, 3], {}).after([0, 1], {})
    assert list(drawn("availability", 0, 4, known)) == [4, 5, 6, 7]
    assert list(drawn("availability", 0, 2, known, [0, 1, 3])) in ([0, 3], [1, 3])
    times = np.zeros(8)
    state = Known.nothing(8)
    for number in range(24):  # client 7 is there in every fourth round alone
        found = drawn("availability", number, 2, state, range(8 if number % 4 == 0 else 7))
        state = state.after(found, {})
        for client, chance in found.items():
            times[client] += 1
            assert chance == 1.0
    assert times.max() - times.min() <= 2 and times[7] >= 5, times


def test_a_plain_draw_is_what_it_always_was() -> None:
    found = EVEN.draw(generator(3, "sample", 7), np.arange(50), 10, Known.nothing(50))
    assert list(found) == sorted(generator(3, "sample", 7).choice(50, 10, replace=False).tolist())
    assert set(found.values()) == {1.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("los", "did you mean 'loss'"),
        ("uniform:2", "takes no number"),
        ("size:", "takes no number"),
        ("availability:3", "takes no number"),
        ("loss:", "D from 1 to 1000"),
        ("loss:0.5", "D from 1 to 1000"),
        ("loss:nan", "D from 1 to 1000"),
        ("loss:two", "D from 1 to 1000"),
        ("", "no such rule"),
    ],
)
def test_words_that_say_no_rule_are_refused(words: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_sampling(words)
    assert all(read_sampling(name) for name in SAMPLINGS)
