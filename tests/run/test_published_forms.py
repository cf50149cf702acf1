"""Forms that were published under a name which stands for something else here, as PAPERS.md tells: they can be run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlotr.commands import simulate
from fedlotr.flower import by_layer
from fedlotr.flower.links.draws import drawn
from tests.support import read_run

R = 4


def run(model: Path, data: Path, out: Path, words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    common = "--clients 3 --sample 3 --rounds 2 --max-examples 12 --public-examples 16 --eval-examples 6"
    common += f" --partition iid --engine local --threads 1 --dtype float32 --quiet --rank {R}"
    assert simulate.main([*f"--model {model} --data {data} --out {out} {common} {words}".split()]) == 0
    return read_run(out)


def test_published_lotr_trains_what_its_layers_share_and_is_not_exact(
    tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    summary, rows = run(tiny_bert, animals, tmp_path / "run", "--method lotr-trained")
    assert all(row["aggregation_error"] > 1e-5 for row in rows)
    lora = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    queries = [lora[name] for name in sorted(lora) if name.endswith("query.lora_A.weight")]
    assert len(queries) == 2 and np.array_equal(*queries), "one A for the layers of a type"
    alone, _ = run(tiny_bert, animals, tmp_path / "alone", "--method lotr-trained --tie layer")
    ours, _ = run(tiny_bert, animals, tmp_path / "ours", "--method lotr --basis normal --alpha 1")
    sent = [found["communication"]["upload_payload_bytes_per_client_round"] for found in (ours, summary, alone)]
    assert sent == sorted(sent) and sent[0] < sent[1] < sent[2]
    before = load_file(tmp_path / "ours" / "adapter" / "adapter_model.safetensors")
    same = [name for name in lora if name.endswith("query.lora_A.weight") and np.array_equal(lora[name], before[name])]
    assert not same, "it has moved from where the frozen one stays"


def test_flora_whose_clients_draw_their_own_a_is_exact_and_sends_neither_a_nor_b(
    tiny_bert: Path, animals: Path, tmp_path: Path
) -> None:
    words = "--method lora --strategy flora --client-rank 2,4,3"
    one, _ = run(tiny_bert, animals, tmp_path / "one", words)
    own, rows = run(tiny_bert, animals, tmp_path / "own", f"{words} --strategy-arg restart=client")
    assert all(row["aggregation_error"] < 1e-12 for row in rows)
    both = [found["communication"] for found in (one, own)]
    ups, downs = ([found[f"{way}_payload_bytes_per_client_round"] for found in both] for way in ("upload", "download"))
    assert ups[0] == ups[1]
    layers = 2 * (4 * (32 + 32) + 2 * (48 + 32)) + 32 + 32
    assert (downs[0] - downs[1]) * 3 == 4 * (2 + 4 + 3) * layers, "A and B of every client in every round"
    again, _ = run(tiny_bert, animals, tmp_path / "again", f"{words} --strategy-arg restart=client --rounds 1")
    resumed, _ = run(tiny_bert, animals, tmp_path / "again", f"{words} --strategy-arg restart=client --resume")
    assert resumed["trained_sha256"] == own["trained_sha256"] != again["trained_sha256"]


def test_an_a_is_drawn_for_the_round_and_the_client() -> None:
    shapes = {f"base_model.model.q.core_{side}": shape for side, shape in (("A", (2, 16)), ("B", (8, 2)))}
    (names,) = by_layer(shapes).values()
    first, same, later, other = (
        drawn(shapes, 0, number, client) for number, client in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    a = first[names["A"]]
    assert np.array_equal(a, same[names["A"]]) and not first[names["B"]].any()
    assert abs(a).max() <= 16**-0.5 and a.dtype == np.float32
    assert not np.array_equal(a, later[names["A"]]) and not np.array_equal(a, other[names["A"]])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method lora --strategy flora --strategy-arg restart=client --codec int4", "draw A and B by themselves"),
        ("--method lora --strategy flora --strategy-arg restart=client --broadcast-codec int8", "draw A and B by"),
        ("--method lotr-trained --strategy hetlora", "what it combines is B A, without the core"),
        ("--method personal-core --strategy fedex-lora", "what it merges is B A, without the core"),
        ("--method lotr --basis svd-root", "made from one layer's weights, so tie 'type' cannot hold"),
        (
            "--method lotr-trained --privacy example --epsilon 8 --public-eval 8 --privacy-engine opacus",
            "what layers share",
        ),
        ("--method lora --tie type", "so no layers can share them"),
    ],
)
def test_what_they_do_not_go_with_is_said(
    words: str, said: str, tiny_bert: Path, animals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"--model {tiny_bert} --data {animals} --partition iid --clients 3 --public-examples 16 {words}"
    assert simulate.main(given.split()) == 2
    assert said in capsys.readouterr().err
