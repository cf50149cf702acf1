"""Attacks on purpose: who is hostile, and what of an update goes up then, to the last bit."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlotr.communication.attacks import ATTACKS, counts, read_attack
from fedlotr.flower.link import Job
from fedlotr.flower.links.attacks import Attacks, hostile_clients
from fedlotr.flower.records import to_record
from fedlotr.training.cohort import ClientResult

START, TRAINED = np.array([1.0, -2.0, 0.5], np.float32), np.array([1.5, -2.0, 0.25], np.float32)


def sent(words: str, clients: int = 6, client: int = 0) -> Any:
    """What goes up of a client that was sent START and came to TRAINED; one that is not client 0 is honest."""
    (attack,) = read_attack(f"{words}:1")
    link = Attacks({0: attack.factor(clients)})
    result = ClientResult({"x": torch.from_numpy(TRAINED.copy())}, 8, 1, 0.5)
    job = Job(client=client, records={"arrays": to_record({"x": START, "y": START})}, memory={}, result=result)
    link.send(job)
    assert job.trained.loss == 0.5 and job.trained.examples == 8
    return job.trained.tensors["x"].numpy()


@pytest.mark.parametrize(
    ("words", "update"),
    [
        ("sign-flip", [0.5, -2.0, 0.75]),  # 1 - 0.5, -2, 0.5 + 0.25
        ("scale", [6.0, -2.0, -2.0]),  # ten times
        ("scale=0.5", [1.25, -2.0, 0.375]),
        ("replace", [4.0, -2.0, -1.0]),  # six clients' worth
        ("backdoor+replace", [4.0, -2.0, -1.0]),
        ("thin=0.1+scale=2", [2.0, -2.0, 0.0]),
        ("label-flip", [1.5, -2.0, 0.25]),  # its update is what its rows made it
    ],
)
def test_what_goes_up_of_a_hostile_client(words: str, update: list[float]) -> None:
    assert sent(words).tolist() == update and sent(words).dtype == np.float32
    assert sent(words, client=1).tolist() == TRAINED.tolist(), "an honest client's is its own"


def test_a_replaced_model_is_what_the_mean_becomes_where_the_others_stay() -> None:
    others = [START] * 5
    np.testing.assert_allclose(np.mean([sent("replace"), *others], axis=0), TRAINED, atol=1e-7)


def test_every_kind_does_something_and_says_what() -> None:
    for name, kind in ATTACKS.items():
        (attack,) = read_attack(f"{name}:0.5")
        assert kind.text and (attack.factor(6) != 1) == (kind.side == "updates") == (not kind.poisons)
        assert bool(kind.takes) == bool(kind.usual)


@given(
    st.lists(st.sampled_from([*ATTACKS, "backdoor+replace", "label-flip+sign-flip"]), min_size=1, unique=True),
    st.data(),
    st.integers(1, 60),
    st.integers(0, 2**62),
)
def test_hostile_clients_are_as_many_as_their_shares_say_and_of_one_entry_each(
    kinds: list[str], data: Any, clients: int, seed: int
) -> None:
    parts = [data.draw(st.integers(1, 1000 // len(kinds))) for _ in kinds]
    attacks = read_attack(",".join(f"{kind}:{part / 1000}" for kind, part in zip(kinds, parts, strict=True)))
    found = hostile_clients(attacks, clients, seed)
    assert found == hostile_clients(attacks, clients, seed) and set(found) <= set(range(clients))
    assert list(found) == sorted(found)
    each = [sum(one is attack for one in found.values()) for attack in attacks]
    assert each == counts(attacks, clients) and len(found) == round(Fraction(sum(parts), 1000) * clients)
    assert all(abs(count - attack.share * clients) < 1.01 for count, attack in zip(each, attacks, strict=True))


def test_who_is_hostile_is_drawn_and_of_another_seed_others_are() -> None:
    attacks = read_attack("sign-flip:0.2,scale:0.1")
    drawn = {tuple(hostile_clients(attacks, 20, seed)) for seed in range(20)}
    assert len(drawn) > 15 and all(len(clients) == 6 for clients in drawn)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("sign-flap:0.1", "'sign-flap' is no attack, did you mean 'sign-flip'"),
        ("sign-flip", "gives no share"),
        ("sign-flip:0", "gives no share"),
        ("sign-flip:1.5", "gives no share"),
        ("sign-flip:nan", "gives no share"),
        ("sign-flip:1/0", "gives no share"),
        (":0.2", "'' is no attack"),
        ("sign-flip:0.2,", "gives no share"),
        ("sign-flip:0.6,scale:0.5", "the shares add up to 1.1"),
        ("sign-flip:0.1,sign-flip:0.1", "stands there twice"),
        ("sign-flip+scale:0.1", "does two things to a client's update"),
        ("backdoor+label-flip:0.1", "does two things to a client's data"),
        ("sign-flip=2:0.1", "takes no value"),
        ("scale=0:0.1", "expected what it multiplies by"),
        ("scale=inf:0.1", "expected what it multiplies by"),
        ("thin=2:0.1", "expected a share of its rows, such as thin=0.05"),
    ],
)
def test_words_that_make_no_sense_are_refused(words: str, problem: str) -> None:
    with pytest.raises(ValueError, match="attack|expected|twice|things|value|share") as caught:
        read_attack(words)
    assert problem in str(caught.value)
