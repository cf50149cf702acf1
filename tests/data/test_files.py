"""The forms in which people keep rows: CSV, Parquet, single files, the hub's repositories, Python's own objects."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlotr.data import Names, load_source, resolve_task
from fedlotr.errors import InputError

ROWS = [{"text": f'He said "{i}", twice\nor so', "label": ("ham", "spam")[i % 2]} for i in range(20)]


def csv_of(rows: list[dict[str, Any]], mark: str = ",") -> str:
    lines = [mark.join(rows[0])]
    lines += [mark.join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
    return "\n".join(lines) + "\n"


def jsonl_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_the_same_rows_are_the_same_data_in_every_form(tmp_path: Path) -> None:
    forms: dict[str, Any] = {
        "train.jsonl": jsonl_of(ROWS).encode(),
        "train.csv": csv_of(ROWS).encode(),
        "train.csv.gz": gzip.compress(csv_of(ROWS).encode()),
        "TRAIN.CSV": b"\xef\xbb\xbf" + csv_of(ROWS, ";").replace("\n", "\r\n").replace("twice\r\n", "twice\n").encode(),
        "train.tsv": csv_of(ROWS, "\t").encode(),
    }
    found = {}
    for name, content in forms.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(content)
        found[name] = load_source(str(folder / name), seed=3).sha256
    write_parquet(tmp_path / "p" / "train.parquet", ROWS)
    found["parquet"] = load_source(str(tmp_path / "p"), seed=3).sha256
    found["rows"] = load_source({"train": ROWS}, seed=3).sha256
    found["Dataset"] = load_source(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), seed=3).sha256
    assert len(set(found.values())) == 1, found


def test_in_csv_nothing_is_guessed_from_what_a_value_looks_like(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label,\n007,10,a\n,2,b\n1e3,1,c\n", encoding="utf-8")
    (tmp_path / "test.csv").write_text("label,text,title\n10,8,x\n", encoding="utf-8")
    source = load_source(str(tmp_path))
    assert source.train["text"][:] == ["007", "", "1e3"] and source.train.column_names == ["text", "label"]
    task = resolve_task("auto", source)
    assert task.label_names == ("1", "2", "10"), "labels that are numbers stand in their order"
    assert task.labels(source.train).tolist() == [2, 1, 0] and source.test_split == "test"


def test_a_csv_split_without_labels_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(csv_of(ROWS), encoding="utf-8")
    (tmp_path / "test.csv").write_text("text,label\na,\nb,\n", encoding="utf-8")
    assert load_source(str(tmp_path)).test_split == "a seeded tenth of train (test has no labels)"
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,\nc,y\n", encoding="utf-8")
    (tmp_path / "test.csv").unlink()
    with pytest.raises(InputError, match=r"line \d: 'label' is None; expected one of the classes"):
        resolve_task("auto", load_source(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\na,b\nc\n", "line 3: 1 fields, but the header has 2; a field that holds the separator"),
        (b"text,text\na,b\n", "line 1: expected a header of different column names, 'text' is there twice"),
        (b"text,label\n\xe9t\xe9,b\n", "line 2: not UTF-8 .*; save it again"),
        (b'text,label\na,b\n"c,d\ne,f\n', r"the row that begins in line 3: not CSV"),
        (b"text,label\n", "has no rows; expected a header line"),
        (b"", "has no rows; expected a header line"),
    ],
)
def test_a_broken_csv_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"--data: .*train.csv,? ?{message}"):
        load_source(str(tmp_path))


def test_parts_of_a_split_are_read_in_their_order_and_class_names_are_kept(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for part, rows in enumerate(([("a", 0), ("b", 1)], [("c", 1)])):
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        path = tmp_path / "data" / f"train-{part:05d}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [{"text": "d", "label": 0, "extra": [1]}])
    source = load_source(str(tmp_path))
    assert source.train["text"][:] == ["a", "b", "c"] and source.test_split == "validation"
    assert resolve_task("auto", source).label_names == ("no", "yes")


def test_parts_that_are_not_there_are_missed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00003.parquet", ROWS)
    with pytest.raises(InputError, match="1 of the 3 parts of train are there"):
        load_source(str(tmp_path))


def test_class_names_are_those_of_the_column_that_is_the_label(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "intent": datasets.ClassLabel(names=["ask", "tell", "sing"]),
        }
    )
    columns = {"text": ["a"] * 20, "label": [0, 1] * 10, "intent": [0, 1, 2, 1] * 5}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    source = load_source(str(tmp_path), names=Names(label="intent"))
    assert resolve_task("auto", source).label_names == ("ask", "tell", "sing")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, r"data\['train'\] is a int; expected a datasets.Dataset, or rows"),
        ({"train": None}, r"data\['train'\] is a NoneType"),
        ({"train": [{7: "a"}]}, "column 7 is not named by text"),
        ({"train": [{"text": "\ud800"}]}, r"row 1: 'text' has half of a surrogate pair"),
        ({"test": []}, "no split 'train' among test"),
    ],
)
def test_data_from_python_that_cannot_be_used_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_source(data)


def test_one_of_several_folders_of_data_has_to_be_named(tmp_path: Path) -> None:
    for name in ("big", "small"):
        write_parquet(tmp_path / name / "train.parquet", ROWS)
    with pytest.raises(InputError, match=r"data in several folders \(big, small\); name one of them, as .*big"):
        load_source(str(tmp_path))
    assert load_source(str(tmp_path / "small")).name == "small"


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as Parquet: "):
        load_source(str(tmp_path))


def test_columns_of_other_names_are_told_and_never_guessed(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "text": "id 7", "gold": "yes"}] * 9 + [
        {"premise": "c", "hypothesis": "d", "text": "id 8", "gold": "no"}
    ]
    (tmp_path / "nli.csv").write_text(csv_of(rows), encoding="utf-8")
    data = str(tmp_path / "nli.csv")
    pair = load_source(data, names=Names(("premise", "hypothesis"), "gold"))
    assert pair.train.column_names == ["text_a", "text_b", "label"] and pair.name == "nli"
    assert resolve_task("auto", pair).columns == ("text_a", "text_b")
    prompted = load_source(data, names=Names(("premise", "hypothesis")))
    assert resolve_task("auto", prompted).columns == ("prompt", "answer")
    with pytest.raises(InputError) as refused:
        load_source(data, names=Names(("premis",), "label"))
    assert refused.value.problems == [
        "--text-column premis: train has no such column, did you mean 'premise'?",
        "--label-column label: train has no such column; choose one of: gold, hypothesis, premise, text",
    ]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the hub, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cache(hub: Path, repo: str) -> Path:
    """Where the cache keeps the files of a data set's only revision."""
    folder = hub / f"datasets--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


def test_a_data_set_of_the_hub_is_taken_from_the_local_cache(hub: Path) -> None:
    write_parquet(cache(hub, "someone/letters") / "data" / "train-00000-of-00001.parquet", ROWS)
    source = load_source("someone/letters", seed=3)
    assert source.name == "someone/letters" and source.sha256 == load_source({"train": ROWS}, seed=3).sha256
    several = cache(hub, "someone/several")
    write_parquet(several / "en" / "train-00000-of-00001.parquet", ROWS)
    write_parquet(several / "de" / "train-00000-of-00001.parquet", ROWS[:10])
    assert len(load_source("someone/several:de").train) == 9
    with pytest.raises(InputError, match=r"--data someone/several: data in several folders"):
        load_source("someone/several")


def test_a_data_set_that_is_nowhere_says_that_the_hub_cannot_be_reached(hub: Path) -> None:
    with pytest.raises(InputError, match="--data no/where: no such folder, and the hub cannot be reached"):
        load_source("no/where")


def mutated(content: bytes, draw: random.Random) -> bytes:
    """What transport, editors and bad exports do to a file."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = draw.choice(
                    [b"\0", b"\xff\xfe", b'"', b"1e999", b"-" + b"9" * 40, b"\\ud800", b"\r", b"{" * 9]
                )
            case 3:
                lines = bytes(data).split(b"\n")
                lines.insert(draw.randrange(len(lines)), draw.choice(lines))
                data = bytearray(b"\n".join(lines))
            case 4:
                lines = bytes(data).split(b"\n")
                del lines[draw.randrange(len(lines))]
                data = bytearray(b"\n".join(lines))
            case 5:
                data = bytearray(bytes(data).decode("latin-1").encode("utf-16"))
            case 6:
                data[at:at] = b'{"text": ' + b"[" * draw.choice([10, 100_000]) + b"\n"
            case _:
                del data[at : at + draw.randrange(1, 40)]
    return bytes(data)


def test_a_damaged_file_is_read_or_refused_by_name_and_never_changed(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    rows = [{"text": f"some words {i}", "label": i % 3, "client": f"farm {i % 4}"} for i in range(24)]
    write_parquet(tmp_path / "good.parquet", rows)
    good = {
        "jsonl": jsonl_of(rows).encode(),
        "csv": csv_of(rows).encode(),
        "parquet": (tmp_path / "good.parquet").read_bytes(),
    }
    refused = 0
    for number in range(501):
        form = list(good)[number % 3]
        path = tmp_path / f"set-{number}.{form}"
        content = mutated(good[form], draw)
        path.write_bytes(content)
        try:
            source = load_source(str(path))
            resolve_task("auto", source).labels(source.train)
        except InputError as error:
            refused += 1
            assert error.problems and all(path.name.split(".")[0] in problem for problem in error.problems), (
                error.problems
            )
            assert all("\n" not in problem for problem in error.problems), error.problems
        assert path.read_bytes() == content
        path.unlink()
    assert 100 < refused < 501
