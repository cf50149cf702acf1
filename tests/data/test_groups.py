"""Rows are dealt by what they are about, how long they are, or what words they share, where no label says so."""

import datetime
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from fedlotr.config.partitions import PARTITIONS, read_partition
from fedlotr.data import Groups, Holding, Names, describe, groups_of, load_source, partition
from fedlotr.data.dealing import BY_LABEL, DEALERS
from fedlotr.data.groups import by_length, texts_of
from fedlotr.errors import InputError
from fedlotr.simulate import main

SUBJECTS = {
    "cooking": "the soup needs salt, butter and an onion in the pan",
    "sailing": "the harbour lies astern, the mast and the sail hold in the wind",
    "chess": "the bishop takes the pawn and the rook gives check",
}


def dealt(rule: str, rows: Dataset, clients: int, texts: Sequence[str] = ("text",), seed: int = 0) -> list[list[int]]:
    by = groups_of(rule, rows, texts, seed)
    labels = np.zeros(len(rows), np.int64)
    parts = partition(rule, rows, labels, clients=clients, seed=seed, max_examples=None, by=by)
    return [part.tolist() for part in parts]


def about(count: int, start: int = 0) -> Dataset:
    """So many texts of each subject, no two alike, and of two in three the language."""
    rows = [
        {"text": f"Number {at}: {' '.join(np.random.default_rng(at).permutation(text.split()))}", "subject": subject}
        | {"language": ["en", None, "de"][at % 3]}
        for at in range(start, start + count)
        for subject, text in SUBJECTS.items()
    ]
    return Dataset.from_list(rows)


def test_every_rule_has_a_dealer_and_an_example_that_is_read() -> None:
    assert PARTITIONS.keys() == DEALERS.keys() and set(BY_LABEL) <= PARTITIONS.keys()
    for name, form in PARTITIONS.items():
        assert read_partition(form.example)[0] == name and form.form.startswith(name)


def test_a_small_alpha_over_a_column_gives_a_client_few_of_its_values() -> None:
    rows = about(60)

    def largest_share(alpha: str) -> float:
        parts = dealt(f"dirichlet:{alpha}:subject", rows, 4)
        assert sorted(row for part in parts for row in part) == list(range(len(rows)))
        counts = [Counter(rows[part]["subject"]) for part in parts]
        return float(np.mean([max(one.values()) / one.total() for one in counts]))

    assert largest_share("0.05") > 0.75 and largest_share("1000") < 0.4


def test_rows_without_a_value_are_a_group_of_their_own() -> None:
    rows = Dataset.from_dict({"text": ["x"] * 6, "task": ["b", None, "a", " ", "b", "a"], "level": [1.0, 2.0] * 3})
    for column, numbers, names in (("task", [1, 2, 0, 2, 1, 0], ("a", "b", "none")), ("level", [0, 1] * 3, ("1", "2"))):
        found = groups_of(f"dirichlet:1:{column}", rows, ["text"], 0)
        assert found is not None and (found.by, found.of.tolist(), found.names) == (column, numbers, names)


def test_the_label_can_be_dealt_by_as_any_other_column_can() -> None:
    labels = np.array([0, 1, 2] * 20)
    rows = Dataset.from_dict({"text": ["x"] * 60, "label": labels})
    by = groups_of("dirichlet:0.3:label", rows, ["text"], 0)
    given = {"clients": 4, "seed": 3, "max_examples": None}
    named = partition("dirichlet:0.3:label", rows, labels, by=by, **given)  # type: ignore[arg-type]
    assert [part.tolist() for part in named] == [
        part.tolist()
        for part in partition("dirichlet:0.3", rows, labels, **given)  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("dirichlet:0.5:subjekt", "no column 'subjekt', did you mean 'subject'"),
        ("dirichlet:0.5:text", "'text' has 30 values in 30 rows; expected one that tells the kind of a row"),
        ("dirichlet:0.5:same", "all rows are of one group"),
        ("clusters:0.5:20", "30 rows are too few"),
    ],
)
def test_a_column_that_groups_nothing_is_refused(rule: str, message: str) -> None:
    rows = about(10).add_column("same", ["x"] * 30)
    with pytest.raises(InputError, match=f"--partition {rule}: .*{message}"):
        groups_of(rule, rows, ["text"], 0)


def test_lengths_are_ten_ranges_of_as_many_rows() -> None:
    found = by_length(["x" * length for length in range(1, 101)])
    assert found.names == tuple(f"{10 * at + 1}-{10 * at + 10}" for at in range(10))
    assert found.of.tolist() == [row // 10 for row in range(100)]
    few = by_length(["aa"] * 8 + ["a"] * 2)
    assert few.names == ("1", "2") and few.of.tolist() == [1] * 8 + [0] * 2


def test_a_small_alpha_over_lengths_gives_clients_texts_of_like_length() -> None:
    rows = Dataset.from_dict({"prompt": ["why?"] * 200, "answer": ["x" * length for length in range(1, 201)]})

    def spread(rule: str) -> float:
        parts = dealt(rule, rows, 4, ("prompt", "answer"))
        return float(np.mean([np.std(part) for part in parts]))  # a row's number is its length

    assert spread("lengths:0.05") < 0.8 * spread("lengths:1000")


def test_the_text_of_a_conversation_is_what_is_said_in_it() -> None:
    parts = [{"type": "text", "text": "Look:"}, {"type": "image"}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "No."},
    ]
    rows = Dataset.from_dict({"messages": [json.dumps(turns)], "prompt": ["a"], "answer": ["b"]})
    assert texts_of(rows, ("messages",)) == ["Look:\n\n\nNo."]
    assert texts_of(rows, ("prompt", "answer")) == ["a\nb"]


def test_clusters_are_the_subjects_and_named_by_their_words() -> None:
    rows = about(20)
    found = groups_of("clusters:0.1:3", rows, ["text"], 0)
    assert found is not None and found.by == "cluster" and len(found.names) == 3
    for number, name in enumerate(found.names):
        (subject,) = set(rows[np.flatnonzero(found.of == number).tolist()]["subject"])
        assert name.startswith(f"{number + 1}: ") and set(name.split()[1:]) <= set(
            re.findall(r"\w+", SUBJECTS[subject])
        )
    assert dealt("clusters:0.05:3", rows, 3) != dealt("clusters:1000:3", rows, 3)


def test_clusters_do_not_depend_on_the_threads_of_the_machine() -> None:
    program = """
from fedlotr.data import groups_of, load_source
from datasets import Dataset
rows = load_source("pydoc-chat").test
print(hash(tuple(groups_of("clusters:0.5", rows, ["prompt", "answer"], 1).of.tolist())))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PATH": ""},
            check=True,
            capture_output=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(outputs) == 1 and outputs != {b""}


def test_without_scikit_learn_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(InputError, match=r"clusters:1:3: needs scikit-learn; .*\[clusters\]"):
        groups_of("clusters:1:3", about(10), ["text"], 0)
    with pytest.raises(InputError, match="no word stands in several texts"):
        monkeypatch.undo()
        groups_of("clusters:1:3", Dataset.from_dict({"text": list("abcdefgh")}), ["text"], 0)


def test_quantities_are_as_uneven_as_alpha_says_and_never_nothing() -> None:
    rows = Dataset.from_dict({"text": ["x"] * 500})

    def sizes(rule: str) -> list[int]:
        parts = dealt(rule, rows, 10)
        assert sorted(row for part in parts for row in part) == list(range(500))
        return sorted(map(len, parts))

    assert sizes("quantity:0.0001") == [1] * 9 + [491], "all that can be with one client is"
    assert sizes("quantity:1e-6")[-1] == 491
    assert sizes("quantity:1000000") == [50] * 10
    assert 10 * np.median(sizes("quantity:0.2")) < sizes("quantity:0.2")[-1]
    assert dealt("quantity:1", rows, 10) != dealt("quantity:1", rows, 10, seed=1)
    assert dealt("quantity:1", rows, 10)[0] != list(range(len(dealt("quantity:1", rows, 10)[0]))), "shuffled"


def test_holdings_count_groups_beside_labels() -> None:
    by = Groups("task", np.array([0, 0, 1]), ("a", "b"))
    assert describe([np.array([0, 2]), np.array([1])], np.array([0, 0, 1]), ("no", "yes"), by) == [
        Holding(0, 2, {"no": 1, "yes": 1}, {"a": 1, "b": 1}),
        Holding(1, 1, {"no": 1}, {"a": 1}),
    ]


def test_a_column_of_dates_is_read_where_rows_are_dealt_by_it_and_a_list_is_refused() -> None:
    days = [datetime.date(2026, 1, 1 + at % 2) for at in range(8)]
    rows = [{"prompt": f"Q{at}", "answer": "A", "tags": [1], "day": day} for at, day in enumerate(days)]
    data = {"train": rows, "test": rows}
    assert load_source(data, names=Names(grouped="day")).train["day"][:2] == ["2026-01-01", "2026-01-02"]
    assert "day" not in load_source(data).train.column_names
    with pytest.raises(InputError, match="--partition dirichlet:ALPHA:tags: 'tags' is a list, which is not read"):
        load_source(data, names=Names(grouped="tags"))


@pytest.fixture
def words(tmp_path: Path, tiny_gpt2: Path) -> list[str]:
    """Of a short run on questions about three subjects."""
    for split, start in (("train", 0), ("test", 20)):
        rows = [{"prompt": row["text"], "answer": "Yes.", "subject": row["subject"]} for row in about(20, start)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--clients 4 --sample 2 --rounds 1 --method lora --rank 2 --max-length 32 --engine local --threads 1"
    given = f"--model {tiny_gpt2} --data {tmp_path} --dtype float32 --public-examples 6 --out {tmp_path / 'run'}"
    return [*options.split(), *given.split()]


@pytest.mark.parametrize("rule", ["dirichlet:0.3:subject", "clusters:0.3:3"])
def test_a_run_tells_which_groups_its_clients_hold(
    rule: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--partition", rule]) == 0
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    names = facts["groups"]
    assert ("scikit-learn" in facts["versions"]) == rule.startswith("clusters")
    assert facts["grouped_by"] == ("subject" if "subject" in rule else "cluster") and len(names) == 3
    held = [client["groups"] for client in facts["partition"]]
    assert [sum(groups.values()) for groups in held] == [client["examples"] for client in facts["partition"]]
    assert sum(map(sum, (groups.values() for groups in held))) == 60 - 6
    shown = capsys.readouterr()
    assert f"Examples of the 4 clients by {facts['grouped_by']}" in shown.out + shown.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Examples of each client by {facts['grouped_by']}" in page and all(name in page for name in names)


def test_of_private_examples_no_group_is_told(words: list[str], tmp_path: Path) -> None:
    options = "--partition dirichlet:0.3:subject --privacy example --epsilon 8 --sample 4 --public-examples 0"
    assert main([*words, *options.split()]) == 0
    facts = (tmp_path / "run" / "facts.json").read_text()
    assert "cooking" not in facts and "group" not in facts


def test_a_column_that_is_not_there_is_one_clear_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--partition", "dirichlet:0.3:subjects"]) == 2
    assert (
        "--partition dirichlet:0.3:subjects: no column 'subjects', did you mean 'subject'?" in capsys.readouterr().err
    )
    assert main([*words, "--partition", "dirichlet:0.3"]) == 2
    assert "divide by a column (dirichlet:0.5:COLUMN)" in capsys.readouterr().err
