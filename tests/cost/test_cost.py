"""`fedlotr cost`: the counts that papers published, to the number; and one bill whatever way it is asked for.

Where the counts are from: the figures of Singhal et al. 2025, Fed-SB, and of its code on SNLI.
"""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from fedlotr import cli
from fedlotr.adapters import METHODS
from fedlotr.adapters.bases import Factors
from fedlotr.adapters.carry import Carry
from fedlotr.communication.links import Link, read_link
from fedlotr.communication.wire_form import Coding
from fedlotr.cost.architectures import public_models, read_architecture
from fedlotr.cost.formulas import Layer, bill, carried
from fedlotr.errors import InputError


def cost(words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["cost", *words.split(), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def row(found: dict[str, Any], method: str, strategy: str) -> dict[str, Any]:
    return next(row for row in found["rows"] if row["method"] == method and strategy in row["strategies"])


@pytest.mark.parametrize(
    ("model", "clients", "fedit", "ffa", "ffa_code", "cores"),
    [
        ("mistral-7b", 25, 83_886_080, 41_943_040, 44_040_192, {120: 3_225_600, 160: 5_734_400, 200: 8_960_000}),
        ("gemma-2-9b", 25, 108_036_096, 54_018_048, 59_179_008, {120: 4_233_600, 160: 7_526_400, 200: 11_760_000}),
        ("llama-3.2-3b", 5, 48_627_712, 24_313_856, 24_772_608, {120: 2_822_400, 160: 5_017_600, 200: 7_840_000}),
    ],
)
def test_the_published_counts_of_language_models(
    model: str,
    clients: int,
    fedit: int,
    ffa: int,
    ffa_code: int,
    cores: dict[int, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = f"--model {model} --clients {clients} --rounds 2 --lora-rank 32 --methods fed-sb,lora,ffa-lora"
    for rank, numbers in cores.items():
        found = cost(f"{words} --rank {rank}", capsys)
        core = row(found, "fed-sb", "exact-average")
        assert core["published_numbers"] == core["trained_numbers"] == numbers
        assert core["upload_bytes"] == core["download_bytes"] == 4 * numbers
    assert row(found, "lora", "fedit")["published_numbers"] == row(found, "lora", "fedit")["trained_numbers"] == fedit
    fedex, flora = row(found, "lora", "fedex-lora"), row(found, "lora", "flora")
    assert fedex["published_numbers"] == flora["published_numbers"] == clients * fedit
    assert fedex["download_bytes"] == 4 * clients * fedit, "(c - 1) r of the residual, and r of the factors"
    assert flora["download_bytes"] == 4 * (clients + 1) * fedit, "the stack, and the new factors"
    # The paper's figure has half of FedIT; what its code trains is B.
    other = row(found, "ffa-lora", "ffa-lora")
    assert (other["published_numbers"], other["trained_numbers"]) == (ffa, ffa_code)
    assert "half of FedIT" in other["published_note"]


def test_the_published_counts_of_bert_on_snli_have_the_head(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model bert-base --labels 3 --targets .*\\.(query|value) --clients 3 --lora-rank 32"
    for rank, numbers in {32: 26_883, 48: 57_603, 64: 100_611}.items():
        found = cost(f"{words} --rank {rank} --methods fed-sb,lora,ffa-lora", capsys)
        assert found["model"]["head"] == 2307
        assert row(found, "fed-sb", "exact-average")["trained_numbers"] == numbers
    assert row(found, "ffa-lora", "ffa-lora")["trained_numbers"] == 592_131
    assert row(found, "lora", "flora")["published_numbers"] == 3_541_251


def test_the_one_off_and_the_round_in_which_it_is_paid_back(capsys: pytest.CaptureFixture[str]) -> None:
    found = cost(
        "--model mistral-7b --rank 200 --lora-rank 32 --clients 25 --methods fed-sb,lora-xs,lotr-sb,lora "
        "--basis-codec float32",
        capsys,
    )
    sent = row(found, "fed-sb", "exact-average")
    assert sent["one_off_bytes"] == 4 * 524_288_000
    assert sent["rounds_to_break_even"] == pytest.approx(3.50, abs=0.005)
    derived = row(found, "lora-xs", "exact-average")
    assert derived["one_off_bytes"] == 8 + 32, "a seed, and a hash to know the bases by"
    assert derived["rounds_to_break_even"] < 1e-6
    assert row(found, "lotr-sb", "exact-average")["one_off_bytes"] == 4 * 16_384_000, "shared by all layers of a type"
    assert row(found, "lora", "fedit")["one_off_bytes"] == 0
    assert sent["total_bytes"] == 25 * (10 * 2 * 4 * 8_960_000 + 4 * 524_288_000)
    usual = row(cost("--model mistral-7b --rank 200 --methods fed-sb", capsys), "fed-sb", "exact-average")
    vectors = 2 * 200 * 7 * 32
    assert usual["one_off_bytes"] == 4 + 2 * vectors + 524_288_000 // 4, "two bits a number, and a scale a vector"


def test_bases_that_move_cost_a_core_a_fold_and_in_few_bits_or_as_hashes_the_bases(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, layers, numbers = "--model mistral-7b --rank 16 --methods fed-sb,lora,rolora --rebase 1", 224, 224 * 256
    sides = 16 * 32 * (9 * 4096 + 2 * 1024 + 3 * 14336)  # of A and B, in all layers
    core = 4 + 4 * numbers
    for more, one_off in (("", 4 + 2 * 2 * 16 * layers + sides // 4), ("--derive-bases 50000", 8 * layers + 50_000)):
        found = cost(f"{words} {more}", capsys)
        fold = core + (8 * layers if more else one_off)
        moved = row(found, "fed-sb", "exact-average")
        assert moved["one_off_bytes"] == one_off
        assert moved["total_bytes"] == 10 * (10 * 2 * 4 * numbers + 9 * fold + one_off)
        kept, both = row(found, "rolora", "rolora"), row(found, "lora", "fedit")
        assert kept["one_off_bytes"] == 0 and kept["rounds_to_break_even"] == 0, "its factors take turns, and stay"
        assert both["total_bytes"] == 10 * (10 * 2 * both["upload_bytes"] + 9 * (4 + both["upload_bytes"]))
    for wrong, message in (
        ("--rebase 0", "after how many rounds"),
        ("--rebase 2:", "after how many rounds"),
        ("--derive-bases 0", "expected the bytes of"),
    ):
        assert cli.main(["cost", "--model", "minilm", *wrong.split()]) == 2
        assert message in capsys.readouterr().err


def test_a_bill_of_moving_bases_has_the_pairs_that_a_run_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model minilm --labels 4 --rank 8 --clients 5 --rounds 4 --methods fed-sb,fedsvd,frlora,lora,full"
    as_they_are, moved = cost(words, capsys), cost(f"{words} --rebase 2", capsys)
    for method in ("fedsvd", "frlora"):  # they move by themselves, every round; less often where that is asked for
        own, asked = (next(r for r in found["rows"] if r["method"] == method) for found in (as_they_are, moved))
        assert asked["total_bytes"] < own["total_bytes"]
    remembering = {"scaffold", "fedavgm", "fedadam", "flora", "fedex-lora", "hetlora"}
    there = {name for r in moved["rows"] if r["method"] != "full" for name in r["strategies"]}
    assert not there & remembering and {"exact-average", "median", "fedit"} <= there
    assert remembering & {name for r in as_they_are["rows"] if r["method"] == "lora" for name in r["strategies"]}
    turned = cost(f"{words} --rebase 2:product", capsys)
    assert {r["method"] for r in turned["rows"]} == {"fedsvd", "full"}
    for given, said in ((f"{words} --rebase 2", "bases move (2:gradient)"), (words, "1:product of fedsvd; 1:start of")):
        assert cli.main(["cost", *given.split()]) == 0
        assert said in " ".join(capsys.readouterr().out.split())
    assert cli.main(["cost", *words.replace("fed-sb,fedsvd,frlora,lora,", "").split(), "--rebase", "2"]) == 0
    assert "bases move" not in capsys.readouterr().out


@pytest.mark.parametrize("model", sorted(public_models()))
def test_the_dimensions_that_come_with_the_package_make_the_published_number_of_parameters(model: str) -> None:
    about = public_models()[model]
    found = read_architecture(model, None, 2, "all-linear")
    encoder = model.startswith(("bert", "roberta"))
    # Published with a pooler, which RoBERTa's classifier goes without; a classifier adds its head.
    width = about["config"]["hidden_size"]
    pooler = width * (width + 1) if model.startswith("roberta") else 0
    assert found.parameters == about["parameters"] - pooler + found.head
    assert (found.kind == "classification") == (encoder or model == "minilm")
    assert found.source == about["source"] and about["hub"] in found.source


def test_every_method_and_strategy_that_go_together_is_in_the_table_in_three_forms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    words = "--model minilm --rank 8 --clients 5 --rounds 3"
    found = cost(words, capsys)
    assert {row["method"] for row in found["rows"]} == set(METHODS)
    assert {name for row in found["rows"] for name in row["strategies"]} >= {"scaffold", "flora", "hetlora", "krum"}
    assert row(found, "lotr", "scaffold")["upload_bytes"] == 2 * row(found, "lotr", "exact-average")["upload_bytes"]
    assert row(found, "fedsa-lora", "fedsa")["upload_bytes"] < row(found, "lora", "fedit")["upload_bytes"]
    assert cli.main(["cost", *words.split(), "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(line["total_bytes"]) for line in lines] == [row["total_bytes"] for row in found["rows"]]
    assert cli.main(["cost", *words.split()]) == 0
    shown = capsys.readouterr().out
    assert "half of FedIT" in shown and "r·d_out, then r·d_in" in shown and "control variates too" in shown
    assert all(f"\n  {method}, " in shown for method in METHODS)


def test_a_configuration_without_weights_is_enough(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.from_pretrained(stories).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    words = "--rank 4 --methods lora,fed-sb --task causal-lm"
    bare, whole = (cost(f"--model {folder} {words}", capsys) for folder in (tmp_path, stories))
    assert bare["rows"] == whole["rows"]


def test_uploads_do_not_grow_with_the_clients_and_the_downloads_of_merged_updates_do() -> None:
    layers = read_architecture("minilm", None, 2, "all-linear").layers
    for method, merged in (("fed-sb", 0), ("lora", 1)):
        bills = [bill(METHODS[method], layers, (), [4] * c, 2, merged=merged * 4 * c) for c in (5, 50, 500)]
        assert len({b.round_up for b in bills}) == 1
        assert len({b.round_down for b in bills}) == (3 if merged else 1)


def test_a_carried_term_is_a_matrix_once_that_is_smaller() -> None:
    assert carried(2, 2, (8, 8)) == 32
    assert carried(6, 6, (8, 8)) == 96, "of a rank below full, as factors"
    assert carried(6, 12, (8, 8)) == 64, "12 is above 8: the matrix"
    assert carried(2, 18, (8, 8)) == 32, "a part alone is smaller still"


LAYERS = (Layer("0.up", "*.up", 2, 3), Layer("1.up", "*.up", 2, 3), Layer("out", "out", 3, 2))
"""15 numbers of LoRA at rank 1."""


def test_a_bill_of_some_clients_a_round_is_that_of_those_who_came() -> None:
    coding = Coding("int8", "delta+bfloat16")
    rounds = [[0, 1], [0, 2], [1, 2]]
    owed = bill(METHODS["lora"], LAYERS, (5,), [2, 1, 1, 1], rounds, coding)
    # Clients have 35, 20 and 20 numbers in seven tensors; the first time they are sent them whole, in the same format.
    assert owed.downs == (2 * 4 + 2 * (35 + 20), 2 * 4 + 2 * (35 + 20), 2 * (4 + 2 * 20))
    assert owed.ups == (2 * 4 + 4 * 7 + 35 + 20, 2 * 4 + 4 * 7 + 35 + 20, 2 * (4 + 2 * 7 + 20))
    assert (owed.clients, owed.messages, owed.trained) == (3, 6, 35), "the fourth never came"
    turns = bill(METHODS["rolora"], LAYERS, (5,), [1, 1, 1], rounds)
    assert turns.ups == (2 * 4 * (8 + 5), 2 * 4 * (7 + 5), 2 * 4 * (8 + 5)), "B, A and B again"
    assert bill(METHODS["lora"], LAYERS, (), [1, 1], [[0]], rank=4).trained == 4 * 15, "though nobody has that many"


@pytest.mark.parametrize("words", ["float32", "delta+int8"])
def test_all_in_every_round_is_a_number_of_rounds_or_their_names(words: str) -> None:
    asked = METHODS["lora"], LAYERS, (5, 1), [2, 1, 2]
    for merged in (0, 1):
        by_number, by_name = (
            bill(*asked, rounds, Coding(broadcast_codec=words), merged=merged) for rounds in (4, [[0, 1, 2]] * 4)
        )
        assert by_number == by_name and by_number.messages == 12


def test_what_clients_missed_of_the_carried_term_is_what_the_term_itself_hands_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        started = {layer.name: int(rng.integers(0, 4)) for layer in LAYERS}
        rounds = [rng.choice(5, 2, replace=False).tolist() for _ in range(8)]
        added = [int(rng.integers(0, 3)) for _ in rounds]
        bare, owed = (
            bill(METHODS["lora"], LAYERS, (), [1] * 5, rounds, merged=merged, started=started) for merged in (0, added)
        )

        def parts(rank: dict[str, int]) -> dict[str, Factors]:
            return {
                name: Factors(torch.zeros(rank[name], d_in), torch.zeros(d_out, rank[name]))
                for name, _, d_in, d_out, _ in LAYERS
                if rank[name]
            }

        carry, holds = Carry.start(parts(started)), dict[int, int]()
        for number, clients in enumerate(rounds):
            missed = [carry.missed(holds.get(client, 0)).values() for client in clients]
            sent = owed.downs[number] - bare.downs[number]
            assert sent == 4 * sum(tensor.numel() for tensors in missed for tensor in tensors), (started, added, rounds)
            holds |= dict.fromkeys(clients, carry.version)
            carry = carry.grown(parts(dict.fromkeys(started, added[number])))
        held = sum(tensor.numel() for term in carry.terms.values() for tensor in term.tensors())
        assert owed.carried == (4 * held if any(added) else 0) and bare.carried == 0


def test_the_one_off_is_of_the_runs_own_tie() -> None:
    for tie, pairs in (("layer", 3), ("type", 2), ("all", 1)):
        row = replace(METHODS["fed-sb"], tie=tie)
        assert bill(row, LAYERS, (), [2], 1).one_off == pairs * 4 * 2 * (2 + 3)


def test_what_is_wrong_is_said_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model mistral-7b --rank 0 --methods fedsb --link 5g"
    assert cli.main(["cost", *words.split()]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'fed-sb'" in said and "--rank 0: expected 1 or more" in said and "--link 5g" in said
    assert cli.main(["cost", "--model", "mistral7b"]) == 2
    assert "did you mean 'mistral-7b'" in capsys.readouterr().err
    assert cli.main(["cost", "--model", "qwen-2.5-0.5b", "--rank", "200"]) == 2
    assert "--rank 200: above the width 128" in capsys.readouterr().err
    assert cli.main(["cost", "--model", "minilm", "--targets", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: --targets nothing: no linear layer")


def test_codecs_are_in_the_bill(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model minilm --labels 4 --rank 8 --clients 5 --rounds 3 --methods lora-xs,lora"
    plain, coded = cost(words, capsys), cost(f"{words} --codec int4 --broadcast-codec delta+sign", capsys)
    before, after = row(plain, "lora-xs", "exact-average"), row(coded, "lora-xs", "exact-average")
    cores, head = 36, (4 * 384, 4)
    assert before["upload_bytes"] == 4 * (cores * 64 + sum(head))
    assert after["upload_bytes"] == 4 + cores * (2 + 32) + (2 + head[0] // 2) + (2 + 2)
    assert after["download_bytes"] == 4 + cores * (2 + 8) + (2 + head[0] // 8) + (2 + 1)
    whole = 4 + cores * (2 + 32) + (2 + head[0] // 2) + (2 + 2)
    downloads = whole + 2 * after["download_bytes"]
    assert after["total_bytes"] == 5 * (40 + 3 * after["upload_bytes"] + downloads), "the first broadcast is in int4"
    fedit = row(plain, "lora", "fedit")["total_bytes"]
    assert after["total_against_fedit"] == after["total_bytes"] / fedit, "against FedIT as it is published"
    assert cli.main(["cost", *words.split(), "--codec", "top-k:0.01+zstd"]) == 0
    assert "k = ⌈0.01·n⌉; at most, before zstd" in capsys.readouterr().out
    assert cli.main(["cost", *words.split(), "--codec", "int5", "--broadcast-codec", "sign"]) == 2
    said = capsys.readouterr().err
    assert "--codec int5: not a codec" in said and "--broadcast-codec sign: too little of a model would arrive" in said


def test_ranks_of_single_layers_are_in_the_bill(capsys: pytest.CaptureFixture[str]) -> None:
    """Of MiniLM: in each of 6 blocks four square layers of 384, one up to 1,536 and one down."""
    words = "--model minilm --labels 4 --rank 8 --lora-rank 4 --clients 5 --rounds 2 --methods lora-xs,lora"
    found = cost(f"{words} --rank-pattern query|value=16 --rank-pattern intermediate.dense=2", capsys)
    head, wide, pair = 4 * (4 * 384 + 4), 384 + 1536, 2 * 384
    assert row(found, "lora-xs", "exact-average")["upload_bytes"] == head + 4 * 6 * (2 * 16**2 + 3 * 8**2 + 2**2)
    lora = head + 4 * 6 * (2 * 16 * pair + 2 * 4 * pair + 2 * wide + 4 * wide)
    assert row(found, "lora", "fedit")["upload_bytes"] == lora
    merged = row(found, "lora", "flora")
    assert merged["download_bytes"] == lora + 5 * (lora - head), "of each layer five clients' ranks, in the last round"
    capped = cost("--model minilm --labels 4 --rank 500 --methods lora-xs --cap-rank", capsys)
    assert row(capped, "lora-xs", "exact-average")["upload_bytes"] == head + 4 * 36 * 384**2
    for wrong, said in (
        (
            "--rank-pattern qury=3",
            "--rank-pattern qury=3: 'qury' matches no layer that is adapted; did you mean 'query'",
        ),
        ("--rank-pattern query=x", "--rank-pattern query=x: expected a whole number of 1 or more"),
        ("--rank-pattern query", "--rank-pattern query: expected a pattern of layers' names and a number"),
        ("--rank-pattern query=500", "above the width 384 of "),
    ):
        assert cli.main(["cost", *words.split(), *wrong.split()]) == 2
        assert said in capsys.readouterr().err


def test_a_link_is_latency_twice_and_bytes_over_rates() -> None:
    link = read_link("up=8k,down=80k,latency=50ms,server=160k")
    assert link == Link("up=8k,down=80k,latency=50ms,server=160k", 8e3, 80e3, 0.05, 160e3)
    assert link.seconds(1000, 1000, clients=1) == pytest.approx(0.1 + 1 + 0.1)
    assert link.seconds(1000, 1000, clients=100) == pytest.approx(0.1 + 5 + 5), "the server's line is the narrower one"
    assert read_link("3g").seconds(125_000, 0, clients=10**6) == pytest.approx(0.2 + 1), "each client has its own line"
    with pytest.raises(InputError) as caught:
        read_link("up=5X,dwn=3M")
    assert len(caught.value.problems) == 3
