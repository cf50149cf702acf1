"""Metrics by hand, and what is extracted of answers."""

import numpy as np
import pytest

from fedlotr.errors import InputError
from fedlotr.evaluation import scorers
from fedlotr.evaluation.marks import RESAMPLES, Chosen, Said, mean_and_error, whole_and_error
from fedlotr.evaluation.results import Results
from fedlotr.evaluation.scorers import EXTRACTS, boxed, extract_of, last_number, letter
from fedlotr.models.kinds import METRICS


def classified(labels: list[int], predictions: list[int]) -> Results:
    zeros = np.zeros(len(labels), np.int64)
    return Results(np.zeros(len(labels)), zeros + 1, zeros, np.array(labels), np.array(predictions))


def test_classes_by_hand() -> None:
    rows = classified([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2])
    assert mean_and_error(scorers.accuracy(rows)) == (4 / 6, pytest.approx(np.sqrt(4 / 6 * 2 / 6 / 5)))
    f1 = [2 * 2 / (2 * 2 + 0 + 1), 2 * 1 / (2 * 1 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 0)]
    assert scorers.macro_f1(rows) == pytest.approx(np.mean(f1))
    two = classified([1, 1, 0, 0], [1, 0, 0, 0])  # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN))
    assert scorers.matthews(two) == pytest.approx((1 * 2 - 0 * 1) / np.sqrt(1 * 2 * 2 * 3))


def test_scales_by_hand() -> None:
    rows = Results(
        np.array([1.0, 4.0, 9.0]),
        np.ones(3, np.int64),
        np.zeros(3, np.int64),
        np.array([1.0, 2.0, 4.0]),
        np.array([2.0, 4.0, 1.0]),
    )
    assert scorers.rmse(rows) == pytest.approx(np.sqrt(14 / 3))
    assert scorers.spearman(rows) == pytest.approx(-0.5)  # 1 - 6 Σd² / (n (n² - 1)), d of the ranks 1, 1, -2
    assert scorers.pearson(rows) == pytest.approx(np.corrcoef(rows.labels, rows.predictions)[0, 1])
    assert scorers.spearman(rows.take(np.array([0]))) is None


def test_choices_by_hand() -> None:
    losses = np.array([2.0, 1.9, 3.0, 1.0, 5.0])
    rows = Chosen.of(losses, [("a", "bc"), ("ab", "c", "defgh")], np.array([0, 2]))
    assert scorers.choice(rows).tolist() == [0, 0]  # 1.9 < 2.0; 1.0 is least
    assert scorers.choice_norm(rows).tolist() == [0, 0]  # 0.95 < 2.0; 1.5, 1.0 and 1.0: of two alike the first
    rows = Chosen.of(losses, [("a", "bc"), ("ab", "c", "defghi")], np.array([1, 2]))
    assert scorers.choice(rows).tolist() == [1, 0]
    assert scorers.choice_norm(rows).tolist() == [1, 1]
    assert rows.take(np.array([1])).right.tolist() == [2]


def test_answers_by_libraries() -> None:
    said = Said.of(["the cat sat", "10"], ["the cat sat down", "It is 10."], last_number)
    assert scorers.exact_match(said).tolist() == [0.0, 1.0], "without a number nothing is equal"
    assert scorers.rouge_l(said)[0] == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))
    assert scorers.chrf(Said.of(["a cat"], ["a cat"], last_number)) == pytest.approx(100)


def test_a_bootstrap_gives_what_the_formula_gives() -> None:
    random = np.random.default_rng(0)
    each = random.normal(size=400)
    rows = Results(each, np.ones(400, np.int64), *(np.zeros(400, np.int64) for _ in range(3)))
    value, error = whole_and_error(rows, lambda some: float(some.losses.mean()), np.random.default_rng(1))
    mean, formula = mean_and_error(each)
    assert value == mean
    assert error is not None and formula is not None
    assert error == pytest.approx(formula, rel=4 / np.sqrt(2 * RESAMPLES))
    again = whole_and_error(rows, lambda some: float(some.losses.mean()), np.random.default_rng(1))
    assert again == (value, error)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.", "7"),
        ("#### 1,250", "1250"),
        ("It costs $1,250.50.", "1250.5"),
        ("So -3.0", "-3"),
        ("= .50", "0.5"),
        ("007", "7"),
        ("-0", "0"),
        ("none", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B", "B"),
        (" (C) a dog", "C"),
        ("B. A dog", "B"),
        ("A dog barks, so the answer is D.", "D"),
        ("The answer is (B).", "B"),
        ("I think it is C", "C"),
        ("Answer: A", "A"),
        ("it is a dog", None),
    ],
)
def test_the_letter(text: str, found: str | None) -> None:
    assert letter(text) == found


def test_boxed_and_patterns() -> None:
    assert boxed(r"so \boxed{1} or \boxed{\frac{1}{2}} .") == r"\frac{1}{2}"
    assert boxed("no") is None
    assert boxed(r"\boxed{never") is None
    assert extract_of("#### (.+)")("a\n#### 12 \n#### 13") == "13"
    assert extract_of("[a-z]+")("12 ab") == "ab"
    assert extract_of("(x)?y")("y") == ""
    with pytest.raises(InputError, match=r"--extract \(: neither one of all, last-number, letter, boxed nor a regular"):
        extract_of("(")
    assert all(take(" 1 ") is not None for name, take in EXTRACTS.items() if name in ("all", "last-number"))


def test_every_metric_of_the_table_is_there() -> None:
    for name, metric in METRICS.items():
        module, _, function = metric.function.partition(":")
        assert module == scorers.__name__
        assert callable(getattr(scorers, function)), name
        assert metric.text
