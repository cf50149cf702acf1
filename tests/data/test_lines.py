"""Rows are read as they were written: quotes that are text, lines that say nothing, what is too large, and where."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from fedlotr.data import columns, lines, load_source, resolve_task
from fedlotr.errors import InputError

STRAY = ['"Great, she said', 'it was 5" long"', '"so?', 'it ended"']


def written(path: Path, texts: list[str], mark: str = "\t") -> str:
    path.write_text(
        f"text{mark}label\n" + "".join(f"{text}{mark}{at % 2}\n" for at, text in enumerate(texts)), encoding="utf-8"
    )
    return str(path)


def texts_of(path: str) -> list[str]:
    source = load_source(path)
    assert source.train_places is not None and source.test_places is not None
    both = (source.train_places, source.train), (source.test_places, source.test)
    found = {place.number[row]: text for place, rows in both for row, text in enumerate(rows["text"][:])}
    return [found[line] for line in sorted(found)]


def test_quotes_that_swallow_lines_of_tabs_are_text_and_that_is_said(tmp_path: Path) -> None:
    stray = [f"{text} {at}" for at, text in enumerate(STRAY * 4)]
    data = written(tmp_path / "reviews.tsv", stray)
    assert texts_of(data) == stray
    assert "reviews.tsv: quotation marks are text, since each line has 2 fields" in load_source(data).notes[0]
    pairs = ['"open', 'close"'] * 6  # a well-formed quoted field, were it one
    assert texts_of(written(tmp_path / "pairs.tsv", pairs)) == pairs
    note = load_source(str(tmp_path / "pairs.tsv")).notes[0]
    assert note.endswith("lines 2 to 3 would be one row")


def test_where_commas_leave_it_open_both_lines_are_named(tmp_path: Path) -> None:
    data = written(tmp_path / "reviews.csv", ["fine", '"open', "between", 'close"', "fine"], ",")
    with pytest.raises(InputError, match=r"reviews\.csv, line 3: .* the lines up to 5 would be one row"):
        load_source(data)


@pytest.mark.parametrize("mark", ["\t", ",", ";"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_fields_of_several_lines_stay_one(tmp_path: Path, mark: str, quoting: int) -> None:
    wanted = [f'a "word"{mark} {at}\nand a line\n\n' for at in range(12)]
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=mark, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([("text", "label"), *((text, at % 2) for at, text in enumerate(wanted))])
    path = tmp_path / f"train.{'tsv' if mark == chr(9) else 'csv'}"
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    assert texts_of(str(path)) == wanted and not load_source(str(path)).notes


def test_one_column_says_which_lines_are_one_row(tmp_path: Path) -> None:
    (tmp_path / "poems.csv").write_text('text\n"one\ntwo"\n' + "three\n" * 12, encoding="utf-8")
    assert texts_of(str(tmp_path / "poems.csv"))[0] == "one\ntwo"
    assert "lines 2 to 3 are one row" in load_source(str(tmp_path / "poems.csv")).notes[0]


def test_the_line_that_excel_reads_is_read_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    for said, mark in (("sep=;", ";"), ('"sep=|"', "|"), ("SEP=\\t", "\t")):
        rows = "".join(f"a, b {at}{mark}{at % 2}\r\n" for at in range(12))
        (tmp_path / "x.csv").write_bytes(f"\ufeff{said}\r\ntext{mark}label\r\n{rows}".encode())
        source = load_source(str(tmp_path / "x.csv"))
        assert source.train.column_names == ["text", "label"] and texts_of(str(tmp_path / "x.csv"))[0] == "a, b 0"
    (tmp_path / "x.csv").write_text("sep=;\ntext;label\na;1\nb\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 4: 1 fields, but the header has 2"):
        load_source(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_without_any_value_are_skipped_and_counted(tmp_path: Path, form: str) -> None:
    full = [{"text": f"t {at}", "label": f"l{at % 2}"} for at in range(12)]
    rows = [*full, {"text": None, "label": None}, {"text": " ", "label": ""}]
    path = tmp_path / f"train.{form}"
    if form == "csv":
        path.write_text(
            "text,label\n" + "".join(f"{row['text'] or ''},{row['label'] or ''}\n" for row in rows), encoding="utf-8"
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = load_source(str(path))
    assert resolve_task("auto", source).label_names == ("l0", "l1")
    assert source.sha256 == load_source({"train": full}).sha256
    first = 14 if form == "csv" else 13
    assert source.notes == (f"train.{form}: 2 lines have no value at all and are skipped, the first of them {first}",)


def test_a_bad_row_is_named_by_its_line_in_the_file(tmp_path: Path) -> None:
    lines_ = ["text,label", *(f'"t\n{at}",{at % 2}' for at in range(30)), "late,", "later,1"]
    (tmp_path / "train.csv").write_text("\n".join(lines_), encoding="utf-8")
    with pytest.raises(InputError, match=r"train\.csv, line 62: 'label' is None"):
        resolve_task("auto", load_source(str(tmp_path / "train.csv")))
    rows = [{"text": str(at), "label": None if at == 17 else "x" if at % 2 else "y"} for at in range(30)]
    with pytest.raises(InputError, match=r"data\['train'\], row 18: 'label' is None"):
        resolve_task("auto", load_source({"train": rows}))


def test_limits_are_said_before_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 1000)
    for name in ("long.jsonl", "long.csv.gz", "long.jsonl.gz"):
        content = b'{"text": "short"}\n' + b"x" * 2000
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(InputError, match=rf"{name}, line 2: longer than 1,000 bytes"):
            load_source(str(tmp_path / name))
    monkeypatch.setattr(lines, "MOST_BYTES", 5000)
    for name in ("much.jsonl", "much.jsonl.gz", "much.parquet", "much.arrow"):
        content = b'{"text": "short"}\n' * 1000
        if name.endswith("parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": [f"{at} text" for at in range(9000)]}), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(InputError, match=rf"{name} holds .* bytes.*; at most 5,000 are read here"):
            load_source(str(tmp_path / name))


def test_a_table_that_lies_on_its_side_is_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [f"c{at}" for at in range(columns.MOST_COLUMNS + 1)]
    (tmp_path / "wide.csv").write_text(",".join(wide) + "\n" + ",".join(wide) + "\n", encoding="utf-8")
    (tmp_path / "wide.jsonl").write_text("".join(json.dumps({name: 1}) + "\n" for name in wide), encoding="utf-8")
    for name in ("wide.csv", "wide.jsonl"):
        with pytest.raises(InputError, match=rf"{name}.*: 5,001 columns; expected at most 5,000"):
            load_source(str(tmp_path / name))
    monkeypatch.setattr(columns, "MOST_CELLS", 50)
    with pytest.raises(InputError, match="26 rows of 2 columns; expected at most 50 values"):
        (tmp_path / "many.jsonl").write_text('{"text": "a", "b": 1}\n' * 26, encoding="utf-8")
        load_source(str(tmp_path / "many.jsonl"))


@pytest.mark.parametrize("ending", [".TSV.GZ", ".Jsonl.gz", ".jsonl.GZ"])
def test_a_compressed_file_is_read_whatever_the_case_of_its_ending(ending: str, tmp_path: Path) -> None:
    plain = Path(written(tmp_path / "rows.tsv", [f"text {at}" for at in range(20)]))
    text = plain.read_bytes()
    if "json" in ending.lower():
        text = b"".join(b'{"text": "text %d", "label": %d}\n' % (at, at % 2) for at in range(20))
    packed = tmp_path / f"packed{ending}"
    packed.write_bytes(gzip.compress(text))
    assert sorted(texts_of(str(packed))) == sorted(texts_of(str(plain)))
