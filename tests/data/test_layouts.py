"""Splits have the names, and lie in the folders, that the `datasets` library takes; what is left unread is told."""

import json
from pathlib import Path

import datasets
import pytest

from fedlotr.data import load_source
from fedlotr.data.layouts import layout_of
from fedlotr.errors import InputError


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "label": at % 2}) + "\n" for at, text in enumerate(texts))


def folder_of(folder: Path, **files: str) -> str:
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return str(folder)


TRAIN = rows(*(f"train {at}" for at in range(20)))


@pytest.mark.parametrize(
    ("files", "scored", "unread"),
    [
        ({"train": TRAIN, "VALID": rows("v", "w")}, "VALID", ()),
        ({"Train": TRAIN, "Testing": rows("v", "w")}, "Testing", ()),
        ({"training": TRAIN, "my-dev-set": rows("v", "w"), "notes": rows("n")}, "my-dev-set", ("notes",)),
        ({"train": TRAIN, "test_two": rows("x"), "test_one": rows("v", "w")}, "test_one", ("test_two",)),
        ({"train": TRAIN, "test_b": rows("x"), "validation": rows("v", "w")}, "validation", ("test_b",)),
        ({"train__0000": TRAIN, "evaluation__a": rows("v"), "evaluation__b": rows("w")}, "evaluation", ()),
        ({"en__train__part": TRAIN, "en__validation__part": rows("v", "w")}, "validation", ()),
        ({"data__train-00000-of-00001-0a9b": TRAIN, "data__test-00000-of-00001-ff": rows("v", "w")}, "test", ()),
        ({"train-0": rows("a", "b"), "train-1": rows("c"), "test": rows("v", "w")}, "test", ()),
        ({"train_de": rows("a", "b"), "train_en": rows("c"), "test": rows("v", "w")}, "test", ()),
    ],
)  # fmt: skip
def test_splits_are_found_by_the_words_in_their_names(
    tmp_path: Path, files: dict[str, str], scored: str, unread: tuple[str, ...]
) -> None:
    source = load_source(folder_of(tmp_path, **files))
    assert (source.test_split, source.unread) == (scored, unread)
    assert len(source.test) == 2 and not source.drawn
    texts = source.train["text"][:]
    assert texts == (["a", "b", "c"] if len(texts) == 3 else [f"train {at}" for at in range(20)])


def test_a_name_with_train_in_it_is_no_test_split_and_parts_of_a_word_are_no_words(tmp_path: Path) -> None:
    source = load_source(folder_of(tmp_path, train=TRAIN, train_test=rows("x"), contest=rows("y"), device=rows("z")))
    assert source.test_split == "a seeded tenth of train"
    assert source.unread == ("contest", "device", "train_test")
    assert "so a seeded tenth of train is scored; left unread: contest, device, train_test" in source.notes[0]


def test_what_save_to_disk_left_is_read_without_what_was_kept_beside_it(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    whole = datasets.Dataset.from_dict({"text": [str(at) for at in range(20)], "label": [0, 1] * 10}, features=features)
    datasets.DatasetDict(train=whole, odd=whole.select([1, 2])).save_to_disk(
        tmp_path / "two", num_shards={"train": 2, "odd": 1}
    )
    whole.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-12ab.arrow").write_bytes(b"no Arrow")
    both, one = load_source(str(tmp_path / "two"), eval_split="odd"), load_source(str(tmp_path / "one"))
    assert both.train["text"][:] == whole["text"][:] and both.test["text"][:] == ["1", "2"]
    assert both.label_names == one.label_names == ("no", "yes")
    assert one.sha256 == load_source({"train": whole}).sha256
    (tmp_path / "two" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00002\.arrow is missing, which state\.json there names"):
        load_source(str(tmp_path / "two"))


def test_splits_of_one_folder_are_not_taken_for_parts_of_a_split(tmp_path: Path) -> None:
    data = folder_of(tmp_path, training_data__train=TRAIN, training_data__test=rows("v"))
    source = load_source(data)
    assert (len(source.train), source.test_split) == (20, "test")


def test_what_lies_beside_and_is_not_read_is_told(tmp_path: Path) -> None:
    data = folder_of(tmp_path, train=TRAIN, more__rows=rows("m"))
    (tmp_path / "test.xlsx").touch()
    (tmp_path / "README.txt").touch()
    source = load_source(data)
    assert source.splits == "trained on train.jsonl, scored on a seeded tenth of train; left unread: more/, test.xlsx"


def test_a_folder_called_as_a_split_whose_files_are_not_read_is_told(tmp_path: Path) -> None:
    for name in ("Validation/part.txt", "pictures/about.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert load_source(folder_of(tmp_path, train=TRAIN)).unread == ("Validation/",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"Train": TRAIN, "train": TRAIN}, "both Train.jsonl and train.jsonl; keep one of them"),
        ({"train": TRAIN, "train__0": TRAIN}, "both .* and .*; keep one of them"),
        ({"train": TRAIN, "test": TRAIN, "test__x": TRAIN}, r"both test/x\.jsonl and test\.jsonl; keep one"),
        ({"train-00000-of-00002-aa": TRAIN, "train-00000-of-00002-bb": TRAIN}, "both train-00000-of-00002-aa"),
        ({"train__a-00001-of-00003": TRAIN}, "1 of the 3 parts of train are there"),
        ({"a": TRAIN, "b": TRAIN}, "no split to train on; expected train"),
        ({"test": TRAIN}, "no split to train on; expected train"),
    ],
)
def test_what_could_be_two_things_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout_of(Path(folder_of(tmp_path, **files)), "--data x")


def test_splits_of_pythons_own_have_the_same_names() -> None:
    one = [{"text": str(at), "label": at % 2} for at in range(12)]
    source = load_source({"Training": one, "validation_matched": one[:2]})
    assert (source.trained, source.test_split, len(source.test)) == ("Training", "validation_matched", 2)
