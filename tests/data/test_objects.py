"""What people hold in Python, in the libraries of the trade, is taken as it is; what is left out of it is said."""

import dataclasses
import datetime
import decimal
import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from fedlotr import OwnTask, SimulationConfig, run_simulation
from fedlotr.config.configuration import dump_yaml
from fedlotr.data import Names, Source, load_source, resolve_task
from fedlotr.data.user_task import apply_task, check_task, task_name
from fedlotr.errors import InputError
from fedlotr.run.checking import check, read_source
from fedlotr.run.simulation import resolve
from tests.data.test_own_data import small
from tests.support import read_run

TEXTS = [f"{('kind', 'rude')[at % 2]} words {at}" for at in range(20)]
LABELS = [at % 2 for at in range(20)]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
PLAIN = load_source({"train": ROWS}).sha256
HIDDEN_CHAT = [{"speaker": "guest", "utterance": "hi"}, {"speaker": "host", "utterance": "ho"}]


class Pair(NamedTuple):
    text: str
    label: int


@dataclasses.dataclass
class Kept:
    text: str
    label: int


class Kind(enum.IntEnum):
    KIND = 0
    RUDE = 1


class OfTorch(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"text": TEXTS[at], "label": torch.tensor(LABELS[at], dtype=torch.int16)}


def rows(text: Callable[[str], Any] = str, label: Callable[[int], Any] = int) -> list[dict[str, Any]]:
    return [{"text": text(row["text"]), "label": label(row["label"])} for row in ROWS]


def table(kind: Any = None) -> pa.Table:
    values = pa.array([text.encode() for text in TEXTS] if kind and "binary" in str(kind) else TEXTS, kind)
    return pa.table({"text": values, "label": pa.array(LABELS, pa.uint8())})


DATASET = datasets.Dataset.from_list(ROWS)
SAME: dict[str, Any] = {
    "numpy scalars": rows(np.str_, np.uint8),
    "0-d tensors": rows(label=torch.tensor),
    "0-d arrays": rows(np.array, np.array),
    "an enum of numbers": rows(label=Kind),
    "bytes": rows(str.encode),
    "scalars of Arrow": rows(pa.scalar, pa.scalar),
    "torch": DATASET.with_format("torch"),
    "numpy": DATASET.with_format("numpy"),
    "pandas": DATASET.with_format("pandas"),
    "a stream": DATASET.to_iterable_dataset().with_format("torch"),
    "one that is transformed": DATASET.with_transform(lambda batch: dict(batch)),
    "a torch data set": OfTorch(),
    "a frame": pd.DataFrame(ROWS),
    "a frame whose texts are its index": pd.DataFrame(ROWS).set_index("text"),
    "a frame of pandas' own types": pd.DataFrame(ROWS).convert_dtypes(),
    "a frame of categories": pd.DataFrame(ROWS).astype({"text": "category"}),
    "a record batch": table().to_batches()[0],
    "columns": {"text": np.array(TEXTS, object), "label": torch.tensor(LABELS)},
    "a structured array": np.array([tuple(row.values()) for row in ROWS], [("text", "U30"), ("label", "i2")]),
    "named tuples": (Pair(*row.values()) for row in ROWS),
    "dataclasses": [Kept(*row.values()) for row in ROWS],
    "binary": table(pa.binary()),
    "large binary": table(pa.large_binary()),
    "binary views": table(pa.binary_view()),
    "large strings": table(pa.large_string()),
    "a dictionary": table().set_column(0, "text", table()["text"].dictionary_encode()),
    "a dictionary of bytes": table().set_column(0, "text", table(pa.binary())["text"].dictionary_encode()),
}


@pytest.mark.parametrize("form", SAME)
def test_the_same_rows_are_the_same_data_whatever_holds_them(form: str) -> None:
    assert load_source({"train": SAME[form]}).sha256 == PLAIN


@pytest.mark.parametrize(
    ("kind", "packed"),
    [(pa.large_binary(), False), (pa.string_view(), False), (pa.large_string(), True), (pa.binary(), True)],
)
def test_text_in_a_parquet_file_is_text_of_whatever_type(kind: pa.DataType, packed: bool, tmp_path: Path) -> None:
    column = table(kind)["text"]
    if packed:
        column = column.dictionary_encode()
    pq.write_table(table().set_column(0, "text", column), tmp_path / "train.parquet")
    assert load_source(str(tmp_path)).sha256 == PLAIN


def test_decimals_and_truth_are_classes_and_times_name_clients() -> None:
    assert resolve_task("auto", load_source(rows(label=decimal.Decimal))).label_names == ("0", "1")
    assert resolve_task("auto", load_source(rows(label=np.bool_))).label_names == ("false", "true")
    when = [{**row, "day": np.datetime64("2024-02-29T10:00", "ns")} for row in ROWS]
    assert set(load_source(when, names=Names(client="day")).train["day"]) == {"2024-02-29 10:00:00"}
    (note,) = load_source(when).notes
    assert "'day' (a date or time): passed over" in note


def media() -> datasets.Dataset:
    """Beside texts and labels what nobody could decode."""
    broken = [{"bytes": b"\x89 no picture", "path": None}] * len(ROWS)
    found = DATASET.add_column("image", broken).add_column("sound", broken)  # type: ignore[arg-type]
    found = found.add_column("tags", [[at] for at in LABELS]).cast_column("image", datasets.Image())
    return found.cast_column("sound", datasets.Audio()).cast_column(
        "label", datasets.ClassLabel(names=["kind", "rude"])
    )


@pytest.mark.parametrize("form", ["torch", "stream", "files", "saved"])
def test_columns_that_no_task_reads_are_named_and_never_decoded(form: str, tmp_path: Path) -> None:
    given: Any = {"torch": media().with_format("torch"), "stream": media().to_iterable_dataset()}.get(form)
    if form == "files":
        media().to_parquet(tmp_path / "train.parquet")
    elif form == "saved":
        media().save_to_disk(tmp_path)
    source = load_source(str(tmp_path) if given is None else {"train": given})
    assert source.sha256 == PLAIN and resolve_task("auto", source).label_names == ("kind", "rude")
    assert source.read_by(["text"]).splits.endswith(
        "; columns not read: 'image' (an image), 'sound' (a sound), 'tags' (a list)"
    )


def test_rows_of_which_a_library_says_no_are_refused_in_a_line() -> None:
    class Torn(OfTorch):
        def __getitem__(self, at: int) -> dict[str, Any]:
            raise RuntimeError("torn")

    refused: dict[str, tuple[Any, str]] = {
        "torn": (Torn(), "cannot be read: RuntimeError: torn; expected a datasets.Dataset"),
        "matrix": (np.ones((3, 2)), "row 1 is a ndarray; expected a datasets.Dataset, or rows"),
        "uneven": ({"text": ["a", "b"], "label": [1]}, "'text' has 2 values and 'label' 1"),
        "twice": (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "column 'text' is there twice"),
        "a path": (Path("x.csv"), r"named by the configuration: SimulationConfig\(data=...\)"),
        "tuples": ([("a", 1)], "row 1 is a tuple; expected"),
    }
    for given, message in refused.values():
        with pytest.raises(InputError, match=rf"data\['train'\].*{message}"):
            load_source({"train": given})


def test_a_configuration_holds_pythons_own_values_whatever_it_was_given(tmp_path: Path) -> None:
    given = {
        "clients": np.uint16(6),
        "rounds": torch.tensor(2),
        "sample": np.float64(0.5),
        "lr": np.float32(0.25),
        "join_labels": np.bool_(True),
        "model": tmp_path,
        "eval_data": tmp_path / "other",
        "method": np.str_("lotr"),
        "label_names": pd.Index(["a", "b"]),
        "client_rank": np.array([4, 16]),
        "strategy_arg": {np.str_("tau"): np.float64(0.5), "layers": np.arange(2), "deep": [{"x": torch.tensor(1.5)}]},
    }
    config = SimulationConfig(**given)  # type: ignore[arg-type]
    copied = config.model_copy(update={"lr": np.float64(0.5), "strategy_arg": {"k": np.int8(3)}})
    for made in (config, copied):
        dump_yaml(made, tmp_path / "config.yaml")
        kept = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
        assert {name: kept[name] for name in given} == made.model_dump(include=set(given))
    assert config.strategy_arg == {"tau": 0.5, "layers": [0, 1], "deep": [{"x": 1.5}]} and config.lr == 0.25
    assert config.labels == ("a", "b") and config.model == str(tmp_path) and type(config.clients) is int
    with pytest.raises(InputError, match="clients=.*expected a whole number") as refused:
        SimulationConfig(clients=torch.tensor([5, 6]), lr=np.datetime64("2020"))  # type: ignore[arg-type]
    assert len(refused.value.problems) == 2


class Graded(OwnTask):
    labels = np.array(["bad", "good"])  # type: ignore[assignment]

    def __init__(self, given: Any) -> None:
        self.given = given

    def encode(self, row: Mapping[str, Any]) -> Any:
        return np.str_(row["text"]), self.given


@pytest.mark.parametrize("given", [np.bool_(True), torch.tensor(1), np.array("good"), np.int8(1), True])
def test_a_task_of_ones_own_may_give_a_librarys_values(given: Any) -> None:
    task = check_task(Graded(given))
    source, found = apply_task(task, load_source(ROWS))
    assert found.label_names == ("bad", "good") and set(source.train["label"]) == {1}
    assert source.train["text"][0] in TEXTS and task_name(task) != task_name(Graded(np.int8(0)))


def left(data: Any, **fields: Any) -> str:
    """What a run says of the columns that it leaves out."""
    config = SimulationConfig(model="none/such", **fields)
    source = read_source(config, {"train": data})
    return source.read_by(() if config.text_column else resolve_task(config.task, source).columns).splits


def test_texts_that_are_not_read_are_named() -> None:
    rows = [{"question": t, "context": "c", "answers": "a", "text": "t", "n": "7"} for t in TEXTS]
    assert left(rows, text_column="question,answers").endswith("; columns not read: 'context', 'text'")
    assert left(rows, text_column="question,answers", partition="natural:context").endswith("not read: 'text'")
    assert "not read" not in left(ROWS) and "not read" not in left([{**row, "n": 7} for row in ROWS])
    named = [{**row, "label": "ham"} for row in ROWS]
    assert left(named, task="causal-lm").endswith("; columns not read: 'label'")
    assert left([{**row, **{f"c{at}": "x" for at in range(7)}} for row in ROWS]).endswith("'c4' and 2 more")


def test_numbers_beside_texts_are_not_passed_over_for_a_language_model(tmp_path: Path) -> None:
    doubtful = [{"text": text, "urgent": at % 2 == 0, "stars": at % 5, "row": at} for at, text in enumerate(TEXTS)]
    pd.DataFrame(doubtful).to_csv(tmp_path / "mails.csv", index=False)
    for data in (doubtful, str(tmp_path / "mails.csv")):
        source = load_source(data)
        with pytest.raises(InputError) as refused:
            resolve_task("auto", source)
        assert refused.value.problems == [
            f"--data {source.name}: text beside whole numbers ('urgent', 'stars'), and no column label; give the "
            "column of the labels by --label-column urgent, or --task causal-lm to learn the text alone"
        ]
        assert resolve_task("causal-lm", source).kind == "causal-lm"
        labelled = load_source(data, names=Names(label="stars"))
        assert resolve_task("auto", labelled).label_names == ("0", "1", "2", "3", "4")
    several = [{"text": text, "labels": [1, 2]} for text in TEXTS]
    with pytest.raises(
        InputError, match="'labels' is a list; expected .* one a row .several are not there yet.; .* --task causal-lm"
    ):
        load_source(several)


@pytest.mark.parametrize("form", ["rows", "a table", "files"])
def test_chat_is_called_chat(form: str, tmp_path: Path) -> None:
    def given(rows: list[dict[str, Any]]) -> Source:
        if form == "files":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
            return load_source(str(tmp_path))
        return load_source({"train": rows if form == "rows" else pa.Table.from_pylist(rows)})

    chat = "'dialogue' is chat, which --columns messages=dialogue reads, without any classes"
    with pytest.raises(InputError, match=f"no column of text or numbers; an OwnTask can read such columns; {chat}"):
        given([{"dialogue": HIDDEN_CHAT}] * 4)
    with pytest.raises(InputError, match=f"needs the columns prompt . answer or text; train has topic;.*; {chat}"):
        resolve_task("auto", given([{"dialogue": HIDDEN_CHAT, "topic": text} for text in TEXTS]))
    beside = given([{"dialogue": HIDDEN_CHAT, "text": text} for text in TEXTS])
    assert beside.read_by(["text"]).splits.endswith("; columns not read: 'dialogue' (chat)")
    with pytest.raises(InputError, match=f"--text-column dialogue: {chat}"):
        load_source({"train": [{"dialogue": HIDDEN_CHAT, "x": "y"}] * 4}, names=Names(("dialogue",)))


def test_a_run_on_objects_says_what_it_left_out(tiny_bert: Path, tmp_path: Path) -> None:
    days = [datetime.date(2024, 1, 1 + at % 3) for at in range(40)]
    frame = pd.DataFrame({"text": TEXTS * 2, "label": np.array(LABELS * 2, "i1"), "title": "t", "day": days})
    frame["talk"] = [HIDDEN_CHAT] * 40
    config = small(tmp_path, tmp_path / "run", rank=np.int64(4), lr=np.float32(0.01), partition="natural:day")
    config = config.model_copy(update={"clients": np.int64(3)})
    result = run_simulation(config, data={"train": frame}, model=tiny_bert)
    summary, _ = read_run(tmp_path / "run")
    assert summary["splits"].endswith("; columns not read: 'title', 'talk' (chat)")
    assert any("'talk' left out: chat, which --columns messages=talk reads" in line for line in summary["warnings"])
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"] == str(tiny_bert) and kept["clients"] == 3 and result.accuracy is not None
    frame.drop(columns="talk").to_csv(tmp_path / "d.csv", index=False)
    frame.drop(columns="talk").assign(text=[f"other {at}" for at in range(40)]).to_csv(tmp_path / "e.csv")
    files = {"model": str(tiny_bert), "data": str(tmp_path / "d.csv"), "eval_data": str(tmp_path / "e.csv")}
    private = {
        "privacy": "client",
        "noise_multiplier": 1.0,
        "clip_norm": 0.1,
        "label_names": "0,1",
        "public_eval": True,
    }
    hidden = config.model_copy(update={**files, **private, "partition": "iid", "out": None})
    assert "not read" not in check(resolve(hidden)).source.splits, "of private data no column is named"


def test_a_path_stands_for_data_that_the_configuration_would_name(
    animals: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    named = run_simulation(small(tiny_bert, tmp_path / "run"), data=animals).summary
    assert named["data"] == animals.name and named["splits"].endswith("; columns not read: 'client'")


def test_a_task_of_ones_own_reads_arrays_and_chat_and_no_pictures(tmp_path: Path) -> None:
    class Told(OwnTask):
        def encode(self, row: Mapping[str, Any]) -> Any:
            assert set(row) == {"talk", "vector"}
            return f"{row['talk'][0]['utterance']} {sum(row['vector'])}"

    found = [{"talk": HIDDEN_CHAT, "vector": np.arange(3), "picture": {"bytes": b"\xff"}} for _ in ROWS]
    held = datasets.Dataset.from_list([{**row, "vector": [0, 1, 2]} for row in found])
    held = held.cast_column("picture", datasets.Image())
    held.to_parquet(tmp_path / "train.parquet")
    for data in (str(tmp_path), {"train": held}, {"train": held.to_iterable_dataset()}, {"train": found}):
        source, _ = apply_task(Told(), load_source(data, names=Names(nested=True)))
        assert set(source.train["text"]) == {"hi 3"} and list(source.beside) == ["picture"]
