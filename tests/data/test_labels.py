"""The classes are what the labels say, in every form that data come in, and what is doubtful about them is said."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedlotr import SimulationConfig
from fedlotr.commands import doctor
from fedlotr.data import Names, Source, default_partition, load_source, resolve_task, unshared_classes
from fedlotr.errors import InputError
from fedlotr.simulate import main
from tests.support import read_run

FORMS = ("csv", "jsonl", "parquet", "Python")


def source(train: Sequence[Any], test: Sequence[Any] | None = None, form: str = "Python", at: Path = Path()) -> Source:
    """Rows with these labels, as they come in a form."""
    splits = {"train": train, "test": train if test is None else test}
    rows = {split: [{"text": f"t{n}", "label": label} for n, label in enumerate(of)] for split, of in splits.items()}
    if form == "Python":
        return load_source(rows)
    for split, held in rows.items():
        path = at / f"{split}.{form}"
        if form == "csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(held)
        elif form == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
        else:
            datasets.Dataset.from_list(held).to_parquet(path)
    return load_source(str(at))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([404, 200, 500, 200], ("200", "404", "500")),
        ([2, 5, 3], ("2", "3", "5")),
        ([-10, 10, -10], ("-10", "10")),
        ([1, 0, 2], ("0", "1", "2")),
        ([2**62 + 1, 2**62, 7], ("7", str(2**62), str(2**62 + 1))),
    ],
)
def test_whole_numbers_are_as_many_classes_as_there_are_in_every_form(
    form: str, labels: list[int], names: tuple[str, ...], tmp_path: Path
) -> None:
    found = source(labels, form=form, at=tmp_path)
    task = resolve_task("auto", found)
    assert task.label_names == names
    assert [names[index] for index in task.labels(found.train)] == [str(label) for label in labels]


def test_numbers_of_one_split_and_their_text_in_another_are_the_same_classes(tmp_path: Path) -> None:
    rows = '{"text": "a", "label": 30}\n{"text": "b", "label": 4}\n'
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "test.csv").write_text("text,label\nc,4\nd,30\n", encoding="utf-8")
    found = load_source(str(tmp_path))
    task = resolve_task("auto", found)
    assert task.label_names == ("4", "30") and task.labels(found.test).tolist() == [0, 1]


@pytest.mark.parametrize("form", FORMS)
def test_names_that_are_given_settle_what_numbers_mean(form: str, tmp_path: Path) -> None:
    found = source([0, 2, 1], form=form, at=tmp_path)
    assert resolve_task("auto", found, ("bad", "fair", "good")).labels(found.train).tolist() == [0, 2, 1]
    assert resolve_task("auto", found, ("2", "1", "0")).labels(found.train).tolist() == [2, 0, 1]
    with pytest.raises(
        InputError, match="(row 2|line [23]): 'label' is '?2'?; expected one of the classes bad to good"
    ):
        resolve_task("auto", found, ("bad", "good"))


@pytest.mark.parametrize("form", FORMS)
def test_minus_one_beside_zero_may_be_no_label_and_has_to_be_named(form: str, tmp_path: Path) -> None:
    found = source([-1, 0, 1], form=form, at=tmp_path)
    with pytest.raises(InputError, match=r"(row 1|line [12]): 'label' is '?-1'?.* give --label-names=-1,0,1") as caught:
        resolve_task("auto", found)
    (given,) = re.findall("--label-names=([^ ]+)", caught.value.problems[0])
    assert resolve_task("auto", found, SimulationConfig(label_names=given).labels).labels(found.train).tolist() == [
        *(0, 1, 2)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [[1.0, 2.0, 1.0, 2.0], [0.25, 0.5, 1.0, 0.25]])
def test_numbers_with_a_point_are_refused_with_both_ways_out(form: str, labels: list[float], tmp_path: Path) -> None:
    found = source(labels, form=form, at=tmp_path)
    with pytest.raises(InputError, match="holds numbers with a decimal point .*--task regression") as caught:
        resolve_task("auto", found, joined=True)
    (given,) = re.findall("--label-names=([^;]+)", caught.value.problems[0])
    task = resolve_task("auto", found, SimulationConfig(label_names=given).labels)
    assert task.labels(found.train).tolist() == [sorted(set(labels)).index(label) for label in labels]
    with pytest.raises(InputError) as caught:
        resolve_task("auto", found, joined=True, told=False)
    assert not re.search(r"\d\.\d", str(caught.value)), "of private rows no label is repeated"


def test_decimals_of_a_table_that_lacks_a_label_are_not_what_is_refused() -> None:
    with pytest.raises(InputError, match=r"row 2: 'label' is None; expected one of the classes 3 to 8"):
        resolve_task("auto", source([3.0, None, 8.0]))


ALIKE = [
    ("Ham", "ham"),
    ("no spam", "no  spam"),
    ("spam", "spam\u00a0"),
    ("caf\u00e9", "cafe\u0301"),
    ("spam", "spam\u200b"),
    ("stra\u00dfe", "STRASSE"),
]


@pytest.mark.parametrize("pair", ALIKE)
def test_labels_that_look_alike_are_named_and_refused_or_joined(pair: tuple[str, str]) -> None:
    found = source([*pair, "other", pair[0]])
    with pytest.raises(InputError, match="space or Unicode form, or as numbers: .* or by --join-labels") as caught:
        resolve_task("auto", found)
    one, other = re.findall(r"'[^']*'", str(caught.value))[:2]
    assert one != other and all(name.isprintable() for name in (one, other)), "so that one sees the difference"
    task = resolve_task("auto", found, joined=True)
    assert len(task.label_names) == 2 and len(set(task.labels(found.train)[[0, 1, 3]])) == 1
    apart = resolve_task("auto", found, (*pair, "other"))
    assert apart.labels(found.train).tolist() == [0, 1, 2, 0], "names that are given are different classes"
    with pytest.raises(InputError) as caught:
        resolve_task("auto", found, told=False)
    assert pair[0] not in str(caught.value)


def test_numbers_with_and_without_a_point_are_one_class_each(tmp_path: Path) -> None:
    found = source(["3", "7"], ["3.0", "7.00"], form="csv", at=tmp_path)
    with pytest.raises(InputError, match="--label-names=3,7; where they are a scale"):
        resolve_task("auto", found)
    task = resolve_task("auto", found, ("3", "7"))
    assert task.labels(found.train).tolist() == task.labels(found.test).tolist() == [0, 1]


def test_a_label_that_is_a_given_name_but_for_case_says_so_and_is_joined() -> None:
    found = source(["YES", "no"])
    for names in (("no", "yes"), ("yes", "no")):
        with pytest.raises(InputError, match="'label' is 'YES'.*yes is equal but for case.*--join-labels"):
            resolve_task("auto", found, names)
    assert resolve_task("auto", found, ("no", "yes"), joined=True).labels(found.train).tolist() == [1, 0]


def test_classes_that_a_split_lacks_are_named() -> None:
    found = source(["a", "b", "c"], ["b", "d", "d"])
    task = resolve_task("auto", found)
    assert [line.partition(": ")[2] for line in unshared_classes(found, task)] == [
        "2 of 4 classes (a, c) are in train alone, so that nothing tests them",
        "1 of 4 classes (d) are in test alone, so that no client learns them",
    ]
    assert not unshared_classes(source(["a", "b"]), resolve_task("auto", source(["a", "b"])))
    given = resolve_task("auto", found, ("a", "b", "c", "d", "e"))
    assert unshared_classes(found, given)[2].endswith("1 of 5 classes (e) are in no row")
    for private in (found, source(["a", "b", "e"], ["b", "d", "d"])):  # of train nothing is told
        (line,) = unshared_classes(private, given, told=False)
        assert line.endswith("3 of 5 classes (a, c, e) are not in test, so that nothing tests them")


def test_a_run_and_doctor_say_which_classes_a_split_lacks(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, labels in (("train", (7, 3, 12)), ("test", (3, 7))):
        rows = [{"text": f"{split} {n}", "label": labels[n % len(labels)]} for n in range(24)]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    words = f"--model {tiny_bert} --data {tmp_path} --clients 2 --sample 2 --rounds 1 --partition iid --method head"
    words += f" --engine local --threads 1 --dtype float32 --public-examples 4 --out {tmp_path / 'run'}"
    assert main(words.split()) == 0
    said = f"--data {tmp_path.name}: 1 of 3 classes (12) are in train alone, so that nothing tests them"
    assert f"warning: {said}" in " ".join(capsys.readouterr().err.split())
    assert said in read_run(tmp_path / "run")[0]["warnings"]
    assert "0 = 3, 1 = 7, 2 = 12" in (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert doctor.main([*words.replace(str(tmp_path / "run"), str(tmp_path / "other")).split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert any(finding["text"] == said and finding["status"] == "warning" for finding in found)


@pytest.mark.parametrize("called", ["labels", "Label", "LABELS"])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "Python", "stream"])
def test_a_column_labels_has_the_labels_and_their_names(called: str, form: str, tmp_path: Path) -> None:
    classes = datasets.Features({"text": datasets.Value("string"), called: datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"t{n}", called: n % 2} for n in range(6)]
    held = datasets.Dataset.from_list(rows, features=classes)
    if form == "csv":
        held.to_csv(tmp_path / "train.csv")
    elif form == "jsonl":
        held.to_json(tmp_path / "train.jsonl")
    elif form == "parquet":
        held.to_parquet(tmp_path / "train.parquet")
    data: Any = {"Python": {"train": held}, "stream": {"train": held.to_iterable_dataset()}}.get(form, str(tmp_path))
    found = load_source(data)
    task = resolve_task("auto", found)
    assert task.label_names == (("0", "1") if form in ("csv", "jsonl") else ("no", "yes"))
    assert set(task.labels(found.train).tolist()) == {0, 1}
    assert resolve_task("causal-lm", found).kind == "causal-lm"


def test_a_column_label_comes_before_one_that_is_called_alike() -> None:
    rows = [{"text": "a", "labels": "x", "label": "k"}, {"text": "b", "labels": "y", "label": "l"}]
    assert resolve_task("auto", load_source({"train": rows, "test": rows})).label_names == ("k", "l")
    named = load_source({"train": rows, "test": rows}, names=Names(label="labels"))
    assert resolve_task("auto", named).label_names == ("x", "y")


def test_a_stream_of_rows_is_read_to_its_end_whatever_form_its_values_are_given_in() -> None:
    def stream() -> Any:
        yield from ({"text": f"t{n}", "label": "ab"[n % 2]} for n in range(20))

    found = load_source({"train": datasets.IterableDataset.from_generator(stream).with_format("numpy")})
    assert len(found.train) == 18 and resolve_task("auto", found).label_names == ("a", "b")


@pytest.mark.parametrize(
    ("columns", "labelled", "rule"),
    [(["text", "client"], False, "natural"), (["text"], False, "iid"), (["text", "client"], True, "dirichlet:0.5")],
)
def test_the_default_partition_fits_the_task(columns: list[str], labelled: bool, rule: str) -> None:
    assert default_partition(columns, labelled=labelled) == rule


def test_a_language_model_runs_without_a_word_on_the_partition(
    tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"a line of text {n}", "client": f"shop {n % 3}"} for n in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    common = ["--model", str(tiny_gpt2), "--data", str(tmp_path), "--engine", "local", "--public-examples", "0"]
    common += ["--method", "lora", "--rank", "2", "--rounds", "1", "--threads", "1", "--dtype", "float32"]
    assert main([*common, "--clients", "3", "--out", str(tmp_path / "run")]) == 0
    assert "natural" in capsys.readouterr().err
    facts = json.loads((tmp_path / "run" / "facts.json").read_text(encoding="utf-8"))
    assert {held["client"] for held in facts["partition"]} == {"shop 0", "shop 1", "shop 2"}
    assert "partition: natural\n" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    again = [str(tmp_path / "run" / "config.yaml"), "--resume", "--out", str(tmp_path / "run"), "--rounds", "2"]
    assert main([*again, "--quiet"]) == 0
    assert main([*common, "--clients", "4", "--out", str(tmp_path / "more")]) == 2
    assert "natural is the default where there is a column client, or give --partition iid" in capsys.readouterr().err


@pytest.mark.parametrize("pair", [("007", "7"), ("+3", "3"), ("\u0663", "3"), ("-05", "-5")])
def test_two_ways_to_write_one_number_are_refused_or_joined(pair: tuple[str, str], tmp_path: Path) -> None:
    found = source([*pair, "12"] * 2, form="csv", at=tmp_path)
    with pytest.raises(
        InputError, match="equal but for case, space or Unicode form, or as numbers: .* or by --join-lab"
    ):
        resolve_task("auto", found)
    task = resolve_task("auto", found, joined=True)
    first, second, third, *_ = task.labels(found.train).tolist()
    assert len(task.label_names) == 2 and first == second != third
    assert resolve_task("auto", found, (*pair, "12")).labels(found.train).tolist() == [0, 1, 2] * 2


def test_numbers_that_are_refused_are_shown_as_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a decimal point or an exponent \(1\.0\)\. "):
        resolve_task("auto", source(["1", "1.0", "2"], form="csv", at=tmp_path))


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, None]])
def test_which_private_rows_have_no_label_is_not_told(labels: list[Any]) -> None:
    with pytest.raises(InputError) as caught:
        resolve_task("auto", source(labels * 9, [0, 1]), told=False)
    assert caught.value.problems == [
        f"--data {source(labels * 9, [0, 1]).name}, train: some row has no label, or -1 for none (which, is private); "
        "leave such rows out"
    ]
