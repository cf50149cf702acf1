"""A file of JSON is an array of objects or has one a line; what is wrong in it is named with its row."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedlotr.data import lines, load_source
from fedlotr.errors import InputError

ROWS = [{"text": f"é 💬 words {at}", "label": at % 2} for at in range(20)]
ARRAY = json.dumps(ROWS)
SAME: dict[str, bytes] = {
    "x.jsonl": "".join(f"{json.dumps(row)}\n" for row in ROWS).encode(),
    "x.ndjson": "".join(f"{json.dumps(row)}\n" for row in ROWS).encode(),
    "x.json": ARRAY.encode(),
    "X.JSON": json.dumps(ROWS, indent=4, ensure_ascii=False).encode("utf-8-sig"),
    "x.json.gz": gzip.compress(ARRAY.encode()),
    "data.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "one.json": json.dumps({"data": ROWS}).encode(),
    "lines.json": b"\n" + "".join(f"{json.dumps(row)}\n\n" for row in ROWS).encode(),
    "line.json": "".join(f"\n {json.dumps(row)}" for row in ROWS).encode(),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_rows_are_the_same_data_however_json_holds_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(SAME[name])
    assert load_source(str(tmp_path / name)).sha256 == load_source({"train": ROWS}).sha256


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "cut off": (ARRAY[:-20], r"row 20: not JSON \(Unterminated string .* at line 1, column \d+"),
    "no end": (ARRAY[:-1], r"row 21: not JSON \(the file ends within the array at line 1"),
    "a comma too much": (ARRAY[:-1] + ",]", r"row 20: not JSON \(a comma after the last row"),
    "no comma": ('[{"text": "a"}\n{"text": "b"}]', r"row 1: not JSON \(Expecting ',' .* at line 2, column 1\)"),
    "more": (ARRAY + "[]", "row 20: not JSON .more text after the end of the array"),
    "a word": ('[{"text": tru}]', "row 1: not JSON .Expecting value at line 1, column 11"),
    "no object": ('[{"text": "a"}, ["b"], "c"]', "row 2: expected an object such as .*, found a list"),
    "half": ('[{"text": "a"}, {"text": "\\ud83d"}]', "row 2: half of a surrogate pair"),
    "deep": ('[{"text": "a"}, {"text": ' + "[" * 200_000, "row 2: nested too deeply"),
    "bytes": (b'[{"text": "a"},\n{"text": "\xe9t\xe9"}]', r"line 2: not UTF-8 \(.* at byte 27\)"),
    "empty": (" \n", r"is empty; expected an array of objects, \[\{...\}, ...\], or an object such as"),
    "no rows": ("[]", "is empty; expected an array of objects"),
    "another key": (
        '{"rows": [{"text": "a"}],\n "n": 2}',
        "holds one object with 'rows', 'n'; expected an array of objects.*; its rows, if they are those of 'rows', as",
    ),
    "a number": ("5", "holds a number; expected an array"),
    "a kind more": ('[{"text": "a"}, {"text": 5}]', "row 2: 'text' is a number, but text in row 1"),
    "a broken line": ('{"text": "a"}\n{"text": \n{"text": "c"}\n', "line 2: not JSON"),
    "the first line": ('{"text": \n{"text": "b"}\n{"text": "c"}\n', "line 1: not JSON"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_is_named_with_its_row(what: str, tmp_path: Path) -> None:
    content, message = BROKEN[what]
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=f"^--data: .*rows.json,? ?{message}"):
        load_source(str(path))


def test_two_halves_are_a_character_and_blank_rows_are_skipped_with_their_number(tmp_path: Path) -> None:
    rows = ['{"text": "\\ud83d\\udcac", "label": NaN}', '{"text": ""}', '{"text": "b"}']
    (tmp_path / "rows.json").write_text(f"[{', '.join(rows)}]", encoding="utf-8")
    source = load_source(str(tmp_path / "rows.json"))
    assert sorted([*source.train["text"], *source.test["text"]]) == ["b", "💬"]
    assert source.notes == ("rows.json: row 2 has no value at all and is skipped",)
    assert {source.place("train", 0), source.place("test", 0)} >= {f"--data: {tmp_path / 'rows.json'}, row 3"}


def test_an_array_may_be_one_line_longer_than_a_row_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    (tmp_path / "rows.json").write_text(ARRAY, encoding="utf-8")
    assert load_source(str(tmp_path / "rows.json")).sha256 == load_source({"train": ROWS}).sha256
    monkeypatch.setattr(lines, "MOST_BYTES", len(ARRAY) - 1)
    for name, content in (("rows.json", ARRAY.encode()), ("rows.json.gz", gzip.compress(ARRAY.encode()))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="holds .* bytes.*; at most .* are read here"):
            load_source(str(tmp_path / name))


def written(folder: Path, files: dict[str, Any]) -> str:
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return str(folder)


ABOUT = {"description": "what this is", "features": {"text": "string"}}
TEST = ROWS[:3]


@pytest.mark.parametrize(
    ("files", "trained", "scored", "unread"),
    [
        ({"train.json": ROWS, "test.json": TEST, "dataset_info.json": ABOUT}, "train.json", "test", ()),
        ({"alpaca_data.json": ROWS, "dataset_infos.json": ABOUT}, "alpaca_data.json", None, ()),
        ({"data/train.json": ROWS, "data/val.json": TEST, "words.json": ABOUT}, "train.json", "val", ("words.json",)),
        ({"train.json": ROWS, "config.json": ABOUT, "extra.json": ABOUT}, "train.json", None, ("extra.json",)),
        ({"train/a.json": ROWS, "train/dataset_info.json": ABOUT, "test/a.json": TEST}, "a.json", "test", ()),
        ({"train.json": ROWS, "eval_results.json": ABOUT, "trainer_state.json": ABOUT}, "train.json", None, ()),
        ({"train.json": ROWS, "model/config.json": ABOUT, "model/tokenizer.json": ABOUT}, "train.json", None, ()),
    ],
)  # fmt: skip
def test_files_that_describe_are_not_taken_for_rows(
    files: dict[str, Any], trained: str, scored: str | None, unread: tuple[str, ...], tmp_path: Path
) -> None:
    source = load_source(written(tmp_path, files))
    assert Path(source.trained).name == trained and source.unread == unread
    assert source.test_split == (scored or "a seeded tenth of train")
    assert len(source.train) == (20 if scored else 18)


def test_rows_in_lines_are_data_whatever_json_lies_beside_them(tmp_path: Path) -> None:
    (tmp_path / "mails.csv").write_text("text,label\n" + "a,1\nb,2\n" * 10, encoding="utf-8")
    source = load_source(written(tmp_path, {"notes.json": ABOUT, "info.json": ABOUT}))
    assert (source.trained, source.unread) == ("mails.csv", ("notes.json",))
