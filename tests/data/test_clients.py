"""A cell that names nobody makes no client, and one client is one, however its name is written."""

import datetime
import decimal
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlotr import SimulationConfig, run_simulation
from fedlotr.data import Names, load_source, partition, withhold_public
from fedlotr.data.partition import client_names
from fedlotr.data.sources import Source
from fedlotr.errors import InputError
from fedlotr.reporting.console import Console
from fedlotr.run.checking import _deal, read_source

NATURAL = Names(client="owner")


def write_csv(path: Path, owners: list[Any]) -> Any:
    pd.DataFrame({"text": [f"t{at}" for at in range(len(owners))], "owner": owners}).to_csv(path / "train.csv")
    return str(path)


def write_jsonl(path: Path, owners: list[Any]) -> Any:
    lines = [json.dumps({"text": f"t{at}", "owner": owner}) for at, owner in enumerate(owners)]
    (path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, owners: list[Any]) -> Any:
    frame = pd.DataFrame({"text": [f"t{at}" for at in range(len(owners))], "owner": owners})
    frame.to_parquet(path / "train.parquet")
    return str(path)


def own_rows(path: Path, owners: list[Any]) -> Any:
    return {"train": [{"text": f"t{at}", "owner": owner} for at, owner in enumerate(owners)]}


FORMS = (write_csv, write_jsonl, write_parquet, own_rows)


def clients(source: Source) -> Counter[Any]:
    return Counter(value for rows in (source.train, source.test) for value in rows["owner"][:])


@pytest.mark.parametrize("write", FORMS)
def test_cells_that_name_nobody_are_no_client_counted_and_said(
    tmp_path: Path, write: Callable[[Path, list[Any]], Any]
) -> None:
    source = load_source(
        write(tmp_path, ["a", None, "b", "nan", float("nan"), "  ", "a", "NaT"] + ["b"] * 4), names=NATURAL
    )
    assert clients(source) == {"a": 2, "b": 5, None: 5}
    assert "--partition natural:owner: 5 of 12 rows name no client ('owner' is" in source.notes[0]
    hidden = Names(client="owner", told=False)
    assert (
        "some rows (how many, is private)" in load_source(write(tmp_path, ["a", "nan", "b"] * 4), names=hidden).notes[0]
    )


@pytest.mark.parametrize("write", FORMS)
def test_numbers_beside_empty_cells_name_whole_clients(tmp_path: Path, write: Callable[[Path, list[Any]], Any]) -> None:
    source = load_source(write(tmp_path, [1.0, float("nan"), 2.0, float("nan")] * 6), names=NATURAL)
    assert sum(count for name, count in clients(source).items() if name is None) == 12
    parts = partition(
        "natural:owner",
        source.train,
        None,
        clients=2,
        seed=0,
        max_examples=None,  # type: ignore[arg-type]
    )
    if write is write_csv:
        assert set(client_names("natural:owner", source.train, parts) or ()) == {"1.0", "2.0"}, "text as it stands"
    else:
        assert set(client_names("natural:owner", source.train, parts) or ()) == {"1", "2"}


@pytest.mark.parametrize(
    ("spellings", "kept"),
    [
        (["7", "7.0", "7"], "7"),
        (["Zoe\u0308", "Zo\xeb", "Zo\xeb"], "Zo\xeb"),
        (["\uff33hop", "Shop", "Shop"], "Shop"),
        (["north\xa0farm", "north farm", "north farm "], "north\xa0farm"),
        (["a\u200bb", "ab", "ab"], "ab"),
    ],
)
def test_spellings_of_one_client_are_joined_and_said(tmp_path: Path, spellings: list[str], kept: str) -> None:
    source = load_source(write_jsonl(tmp_path, spellings * 4), names=NATURAL)
    assert clients(source) == {kept: 12}
    assert source.notes[0].startswith("--partition natural:owner: one client is written in several ways")


def test_other_names_stay_what_they_are_and_the_data_keep_their_bytes(tmp_path: Path) -> None:
    write_csv(tmp_path, ["007", "7", "1.5", "Anna", "anna", "NA", "Nan", "none"] * 3)
    named, plain = load_source(str(tmp_path), names=NATURAL), load_source(str(tmp_path))
    assert len(clients(named)) == 8 and not named.notes and named.sha256 == plain.sha256


def test_numbers_that_lost_their_last_digits_are_refused(tmp_path: Path) -> None:
    owners = [2**53 + 1, 2**53, None] * 6  # pandas makes decimal numbers of these
    with pytest.raises(InputError, match="and its neighbours are one number, since 'owner' holds decimal numbers"):
        load_source(write_parquet(tmp_path, pd.Series(owners, dtype="float64")), names=NATURAL)


ODD = {
    "date": [datetime.date(2024, 1, day) for day in (1, 2, 3)],
    "time": [datetime.time(9, minute) for minute in (1, 2, 3)],
    "timestamp": [datetime.datetime(2024, 5, day, 12) for day in (1, 2, 3)],
    "decimal": [decimal.Decimal(text) for text in ("1.10", "2.00", "3.25")],
    "duration": [datetime.timedelta(days=days) for days in (1, 2, 3)],
    "uint64": [2**64 - 1, 2**63 + 5, 2**63],
}


@pytest.mark.parametrize("kind", ODD)
def test_columns_that_no_task_reads_name_clients_or_are_passed_over(tmp_path: Path, kind: str) -> None:
    texts = [f"t{at}" for at in range(18)]
    pq.write_table(
        pa.table({"text": texts, "owner": pa.array(ODD[kind] * 6, pa.uint64() if kind == "uint64" else None)}),
        tmp_path / "train.parquet",
    )
    rows = {"train": [{"text": text, "owner": owner} for text, owner in zip(texts, ODD[kind] * 6, strict=True)]}
    for data in (str(tmp_path), rows):
        assert set(clients(load_source(data, names=NATURAL)).values()) == {6}
        plain = load_source(data)
        assert (
            plain.train.column_names == ["text"] and "'owner' (" in plain.notes[0] and "passed over" in plain.notes[0]
        )
    assert load_source(str(tmp_path)).sha256 == load_source({"train": [{"text": text} for text in texts]}).sha256


def test_a_timestamp_that_python_cannot_hold_makes_no_file_unreadable(tmp_path: Path) -> None:
    odd = pa.array([2**62, 5, None] * 6, pa.timestamp("ns", tz="America/New_York"))
    far = pa.array([10**9] * 18, pa.date32())
    pq.write_table(pa.table({"text": ["t"] * 18, "at": odd, "far": far}), tmp_path / "train.parquet")
    assert load_source(str(tmp_path)).train.column_names == ["text"]


def test_a_whole_number_beyond_64_bits_is_an_id_in_json_lines_too(tmp_path: Path) -> None:
    source = load_source(write_jsonl(tmp_path, [2**64, 5, 2**70] * 5), names=NATURAL)
    assert clients(source) == {str(2**64): 5, "5": 5, str(2**70): 5}


def test_messages_count_what_is_in_the_data_before_anything_is_withheld(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path, ["rare"] + ["a", "b", "c"] * 7)
    told = {"data": data, "partition": "natural:owner", "clients": 4, "max_examples": None}
    # A draw of either kind takes the only row of `rare` with some seed.
    config = next(
        config
        for config in (SimulationConfig(**told, public_examples=8, seed=seed) for seed in range(99))
        if "rare" not in private_of(config)
    )
    with pytest.raises(InputError) as refused:
        _deal(config, "natural:owner", read_source(config), np.zeros(20, np.int64))
    assert refused.value.problems == [
        "--partition natural:owner: 4 clients wanted, but 'owner' has 4 groups, of which 1 (rare) has no row left to "
        "train on (of 22 rows in the data, 2 held out to test and 8 public examples); lower --clients to 3 or less, or "
        "--public-examples"
    ]
    many = config.model_copy(update={"clients": 15})
    with pytest.raises(
        InputError, match=r"expected 1 to 12, .* to divide \(of 22 rows in the data, 2 held out to test and 8"
    ):
        _deal(many, "natural:owner", read_source(many), np.zeros(20, np.int64))
    with pytest.raises(
        InputError, match=r"fewer than the 20 rows of train \(of 22 rows in the data, 2 held out to test\)"
    ):
        _deal(
            config.model_copy(update={"public_examples": 20}),
            "natural:owner",
            read_source(config),
            np.zeros(20, np.int64),
        )


def private_of(config: SimulationConfig) -> set[str]:
    """The owners that rows are left of."""
    source = read_source(config)
    _, private = withhold_public(config.public_examples, len(source.train), config.seed)
    return set(source.train.select(private)["owner"][:])


def test_what_is_said_of_files_is_on_the_console_and_in_the_summary(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [f"the {('cat', 'dog')[at % 2]} {at},{at % 2},{('nan', 'x', 'y')[at % 3]}" for at in range(60)]
    (tmp_path / "Train.csv").write_text("\n".join(["text,label,owner", *rows, ",,", ",,"]), encoding="utf-8")
    (tmp_path / "valid.csv").write_text("\n".join(["text,label", *(row.rpartition(",")[0] for row in rows[:9])]))
    (tmp_path / "extra.csv").write_text("text,label\na,1\n", encoding="utf-8")
    stream = io.StringIO()
    config = SimulationConfig(
        **{"data": str(tmp_path), "model": str(tiny_bert), "partition": "natural:owner", "clients": 2, "sample": 2},
        **{"rounds": 1, "rank": 4, "public_examples": 8, "engine": "local", "threads": 1, "dtype": "float32"},
        out=tmp_path / "run",
    )
    summary = run_simulation(config, console=Console(stream=stream)).summary
    shown = " ".join(stream.getvalue().split())
    assert summary["test_split"] == "valid"
    assert (
        summary["splits"] == "trained on Train.csv, scored on valid; left unread: extra" and summary["splits"] in shown
    )
    assert summary["warnings"] == [
        "Train.csv: 2 lines have no value at all and are skipped, the first of them 62",
        "--partition natural:owner: 20 of 60 rows name no client ('owner' is 'nan') and are left out",
    ]
    assert all(f"warning: {line}" in shown for line in summary["warnings"])


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--partition natural:odd", Names(client="odd")),
        ("--text-column odd", Names(text=("odd",))),
    ],
)
@pytest.mark.parametrize("values", [[["a"], ["b"]], [b"\xff", b"\xfe"], [{"a": 1}, {"a": 2}]])
def test_a_column_that_is_there_and_not_read_is_not_said_to_be_missing(
    tmp_path: Path, option: str, names: Names, values: list[Any]
) -> None:
    texts = ["s", "t"] * 10
    pq.write_table(pa.table({"text": texts, "odd": values * 10}), tmp_path / "train.parquet")
    own = {"train": [{"text": text, "odd": odd} for text, odd in zip(texts, values * 10, strict=True)]}
    for data in (str(tmp_path), own):
        with pytest.raises(InputError, match=f"^{option}: 'odd' is .*, which is not read; expected text or numbers"):
            load_source(data, names=names)  # type: ignore[arg-type]
        assert load_source(data).train.column_names == ["text"]  # type: ignore[arg-type]


def test_times_of_a_zone_that_nobody_knows_name_clients_too(tmp_path: Path) -> None:
    times = [datetime.datetime(2020, 1, 1 + at % 2) for at in range(20)]
    owner = pa.array(times, pa.timestamp("us", "Nowhere/Land"))
    pq.write_table(pa.table({"text": [f"t{at}" for at in range(20)], "owner": owner}), tmp_path / "train.parquet")
    assert set(clients(load_source(str(tmp_path), names=NATURAL))) == {"2020-01-01 00:00:00Z", "2020-01-02 00:00:00Z"}


def test_a_column_that_names_nobody_is_refused_as_such(tmp_path: Path) -> None:
    source = load_source(write_jsonl(tmp_path, [None, "", "nan"] * 5), names=NATURAL)
    with pytest.raises(InputError, match="natural:owner: no row of train names a client; give another column, or iid"):
        partition(
            "natural:owner", source.train, np.zeros(len(source.train), np.int64), clients=2, seed=0, max_examples=9
        )


def test_a_hidden_client_is_not_named_where_its_number_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_source(write_jsonl(tmp_path, [2.0**60, 1.0] * 5), names=Names(client="owner", told=False))
    assert str(2**60) not in str(caught.value) and "a number beyond 9,007,199,254,740,992" in str(caught.value)
