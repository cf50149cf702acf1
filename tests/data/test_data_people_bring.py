"""Real sets and awkward ones, with the same flags and no tuning: each trains, resumes and exports what PEFT loads."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedlotr import SimulationConfig, run_simulation
from fedlotr.errors import InputError
from fedlotr.simulate import main
from tests.support import TEXTS, assert_logits, our_logits, plain_logits, read_run

FLAGS = "--clients 4 --sample 2 --rounds 1 --rank 4 --public-examples 32 --max-examples 24 --eval-examples 64 --quiet"
ENGINE = "--engine local --threads 1 --dtype float32 --max-length 48 --partition iid"


def rows_of(shared: Path, name: str, split: str, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = datasets.load_dataset(
        "json", data_files=str(shared / "data" / name / f"{split}.jsonl.gz"), split=f"train[:{count}]", cache_dir=None
    ).to_list()
    return rows


@pytest.fixture(scope="module")
def bring(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[str, list[str]]:
    """Name -> the options that name the data."""
    folder = tmp_path_factory.mktemp("people")
    topics = ("World", "Sports", "Business", "Sci/Tech")
    news = rows_of(shared, "agnews", "train", 300)
    with (folder / "news.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", "headline", "topic"])
        writer.writerows([at, row["text"], topics[row["label"]]] for at, row in enumerate(news))
    (folder / "parquet").mkdir()
    for split in ("train", "validation"):
        part = [{"text": row["text"], "label": row["label"]} for row in news]
        datasets.Dataset.from_list(part).to_parquet(folder / "parquet" / f"{split}-00000-of-00001.parquet")
    giant = [{**row, "owner": "giant" if at < 260 else f"small {at}"} for at, row in enumerate(news)]
    (folder / "giant.jsonl").write_text("".join(json.dumps(row) + "\n" for row in giant), encoding="utf-8")
    return {
        "sst2": ["--data", str(shared / "data" / "sst2")],
        "snli": ["--data", str(shared / "data" / "snli")],
        "banking77": ["--data", str(shared / "data" / "banking77"), "--public-examples", "200"],
        "csv": ["--data", str(folder / "news.csv"), "--text-column", "headline", "--label-column", "topic"],
        "parquet": ["--data", str(folder / "parquet")],
        "giant": ["--data", str(folder / "giant.jsonl"), "--partition", "natural:owner", "--max-examples", "none"],
    }


@pytest.mark.slow
def test_data_people_have_trains_resumes_and_exports(
    bring: dict[str, list[str]], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in bring.items():
        flags = [*FLAGS.split(), *ENGINE.split(), "--model", str(tiny_bert), "--out", name, *words]
        assert main(flags) == 0, name
        assert main([*flags, "--rounds", "2", "--resume"]) == 0, name
        summary, rows = read_run(tmp_path / name)
        assert [row["failed"] for row in rows] == [0, 0] and summary["rounds"] == 2, name
        assert summary["final"] != summary["initial"] and summary["aggregation_error_max"] <= 1e-6, name
    pairs = {"snli": [TEXTS[0], ["Its other half.", "And the other half of the second."]]}
    found = plain_logits(*(tmp_path / name / "adapter" for name in bring))
    for (name, _), plain in zip(bring.items(), found, strict=True):
        config = SimulationConfig(**(saved(tmp_path / name) | {"out": tmp_path / name}))
        ours = our_logits(config, tmp_path / name, pairs.get(name, TEXTS))
        assert_logits(plain, ours)
    assert found[list(bring).index("banking77")].shape == (2, 77)
    assert "0 = Business, 1 = Sci/Tech" in (tmp_path / "csv" / "adapter" / "README.md").read_text(encoding="utf-8")
    log = (tmp_path / "giant" / "log.txt").read_text(encoding="utf-8")
    assert "--max-length 48 cuts" in log


def saved(run: Path) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return values


def test_clients_of_one_row_and_a_giant_train_together(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [
        {
            "text": f"{('cats', 'dogs')[at % 2]} number {at}",
            "label": at % 2,
            "owner": "giant" if at < 90 else f"one {at}",
        }
        for at in range(100)
    ]
    config = SimulationConfig(
        model=str(tiny_bert),
        partition="natural:owner",
        clients=6,
        sample=6,
        rounds=1,
        rank=4,
        max_examples=None,
        public_examples=8,
        engine="local",
        threads=1,
        dtype="float32",
        out=tmp_path / "run",
    )
    result = run_simulation(config, data={"train": rows})
    sizes = Counter(part["owner"] for part in rows)
    assert sizes["giant"] == 90 and result.summary["failed_clients"] == 0
    assert result.summary["aggregation_error_max"] <= 1e-6 and result.summary["data"].startswith("own:")
    again = config.model_copy(update={"rounds": 2, "resume": True})
    with pytest.raises(InputError, match=r"--data own:\w+: the run in .* was begun with own:\w+, the caller's own"):
        run_simulation(again, data={"train": rows[:-1]})
    assert run_simulation(again, data={"train": rows}).summary["rounds"] == 2
