"""Which labels are a scale, by themselves or since it is said, in every form that data come in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlotr.data import Names, load_source, partition, resolve_task, unshared_classes
from fedlotr.data.scales import why_scale
from fedlotr.errors import InputError
from tests.data.test_labels import FORMS, source


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([0.0, 2.5, 5.0], "fraction"),
        (["0.0", "2.5", "5"], "fraction"),
        ([0.25, None], "fraction"),
        ([1e-3, 1e-4], "fraction"),
        ([1.0, 2.0, 3.0], "point"),
        (["1.0", "2.0", "3.0", "1.0"], "point"),
        ([0.0, 1.0, 0.0], ""),
        ([1.0, 2.0, 3.0, None], ""),
        ([1.0, 2.0, 3.0, float("nan")], ""),
        (["1.0", "2", "3"], ""),
        ([1, 2, 3], ""),
        (["1", "2", "3"], ""),
        ([True, False], ""),
        (["good", "2.5"], ""),
        ([None], ""),
        ([], ""),
    ],
)
def test_decimals_are_a_scale_and_whole_ones_only_where_all_rows_of_three_values_have_a_point(
    labels: list[Any], why: str
) -> None:
    assert why_scale([labels]) == why and why_scale([labels, labels]) == why


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_is_seen_in_every_form_and_whole_numbers_are_one_where_it_is_said(form: str, tmp_path: Path) -> None:
    found = source([0.0, 2.5, 5.0], [1.0, 3.25], form, tmp_path)
    task = resolve_task("auto", found)
    assert task.kind == "regression" and task.label_names == () and task.outputs == 1 and not task.doubt
    assert task.labels(found.train).tolist() == [0.0, 2.5, 5.0] and task.labels(found.test).tolist() == [1.0, 3.25]
    (tmp_path / "whole").mkdir()
    whole = source([4, 2, 5], [1, 3], form, tmp_path / "whole")
    assert resolve_task("auto", whole).kind == "classification"
    assert resolve_task("regression", whole).labels(whole.train).tolist() == [4.0, 2.0, 5.0]


@pytest.mark.parametrize("form", FORMS)
def test_whole_numbers_with_a_point_are_taken_as_a_scale_which_is_said_or_as_classes(form: str, tmp_path: Path) -> None:
    found = source([1.0, 2.0, 3.0], [3.0, 1.0], form, tmp_path)
    task = resolve_task("auto", found)
    assert task.kind == "regression"
    (line,) = unshared_classes(found, task)
    assert "written with a decimal point, taken as a scale (regression); --task classification takes them as" in line
    assert not unshared_classes(found, resolve_task("regression", found)), "what is asked for is in no doubt"
    classes = resolve_task("classification", found)
    assert len(classes.label_names) == 3 and classes.labels(found.test).tolist() == [2, 0]


def test_names_and_joined_labels_are_of_classes() -> None:
    found = source([0.5, 1.5, 0.5])
    assert resolve_task("auto", found, ("0.5", "1.5")).kind == "classification"


@pytest.mark.parametrize("form", FORMS)
def test_a_split_without_labels_is_passed_over_and_minus_one_among_others_is_named(form: str, tmp_path: Path) -> None:
    assert source([0.5, 2.0] * 10, [-1.0, -1.0], form, tmp_path).test_split.startswith("a seeded tenth of train")
    (tmp_path / "some").mkdir()
    found = source([0.5, -1.0, 2.0], [1.0, 0.5], form, tmp_path / "some")
    with pytest.raises(InputError, match=r"(row 2|line [23]): 'label' is '?-1.0'?.*or give --task regression, which"):
        resolve_task("auto", found)
    assert resolve_task("regression", found).labels(found.train).tolist() == [0.5, -1.0, 2.0]
    (tmp_path / "below").mkdir()
    below = source([0.5, -1.0, -2.0], [1.0, 0.5], form, tmp_path / "below")
    assert resolve_task("auto", below).kind == "regression"


BAD: dict[str, tuple[list[Any], str]] = {
    "none": ([0.5, None, 1.5], "row 2: 'label' is None; expected a finite number"),
    "no number": (["0.5", "much", "1.5"], "row 2: 'label' is 'much'; expected a finite number"),
    "infinite": ([0.5, float("inf"), 1.5], "row 2: 'label' is inf; expected a finite number"),
    "alike": ([0.5, 0.5, 0.5], "every label is the same"),
}


@pytest.mark.parametrize("what", BAD)
def test_rows_without_a_number_are_named_unless_they_are_private(what: str) -> None:
    labels, message = BAD[what]
    with pytest.raises(InputError, match=message):
        resolve_task("regression", source(labels))
    with pytest.raises(InputError) as caught:
        resolve_task("regression", source(labels), told=False)
    assert "row 2" not in str(caught.value) and "0.5" not in str(caught.value)


def test_a_pair_with_a_score_is_one_text_pair_and_one_number() -> None:
    """As STS-B has it: two sentences and a score."""
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "score": n / 2} for n in range(9)]
    names = Names(columns=(("text_a", "sentence1"), ("text_b", "sentence2"), ("label", "score")), format="pair+score")
    found = load_source({"train": rows}, names=names)
    task = resolve_task("auto", found)
    assert (task.kind, task.columns, found.format) == ("regression", ("text_a", "text_b"), "pair+score")
    whole = load_source({"train": [row | {"score": n} for n, row in enumerate(rows)]}, names=names)
    assert resolve_task("auto", whole).kind == "regression", "the format says it"


@pytest.mark.parametrize("rule", ["dirichlet:0.5", "shards:2"])
def test_no_rule_deals_by_a_number(rule: str) -> None:
    found = source(np.linspace(0, 5, 40).tolist())
    labels = resolve_task("auto", found).labels(found.train)
    with pytest.raises(InputError, match="numbers on a scale, not classes; choose iid or natural"):
        partition(rule, found.train, labels, clients=2, seed=0, max_examples=None)
    parts: Sequence[Any] = partition("iid", found.train, labels, clients=2, seed=0, max_examples=None)
    assert sorted(np.concatenate(parts)) == list(range(40))
