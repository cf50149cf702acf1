"""Clients that mean harm, or are broken: they are refused, bounded or named, and a run they have harmed can go back."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file

from fedlotr.engines import LocalGrid
from fedlotr.flower import Fewest, Strategy, Update, weighted_mean
from fedlotr.flower.blame import StrategyError
from fedlotr.flower.certificate import Layer
from fedlotr.flower.federation import Weights
from fedlotr.flower.fewest import trimmed_mean_of
from fedlotr.flower.links.moments import MOMENTS, Moments
from fedlotr.flower.norms import outside
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.replies import LONGEST_REASON
from fedlotr.flower.round import Federation, Round, State, run_round
from fedlotr.flower.traits import traits_of
from fedlotr.flower.trouble import TooManyFailuresError
from fedlotr.said import hearing
from fedlotr.simulate import main
from tests import faulty_app
from tests.run.test_simulation import assert_same_results, flags
from tests.support import read_run

FLOWER = "flwr.serverapp.strategy:"


class Liars(ClientApp):
    """Client k adds k + 1 to what it was sent and weighs k + 1, unless `lies` changes its reply.

    lies: client -> a function that changes the records of its reply in place, or raises.
    """

    def __init__(self, lies: dict[int, Callable[[Any], None]]) -> None:
        super().__init__()

        @self.train()
        def train(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            content: Any = message.content
            moved = {name: Array(array.numpy() + np.float32(client + 1)) for name, array in content["arrays"].items()}
            records: dict[str, Any] = {
                "arrays": ArrayRecord(moved),
                "metrics": MetricRecord({"num-examples": client + 1, "weight": client + 1.0, "loss": 0.5}),
                "client": ConfigRecord({"client": client, "bases-sha256": "bases"}),
            }
            reply = RecordDict(records)
            lies.get(client, lambda content: None)(reply)
            return Message(reply, reply_to=message)


def a_round(
    lies: dict[int, Callable[[Any], None]],
    strategy: str | Strategy = "exact-average",
    clients: int = 6,
    state: State | None = None,
    most: int = 2**24,
    **fields: Any,
) -> tuple[Round, State, list[str]]:
    """One round of all clients, from a core of zeros and a head of ones: seven numbers; and what was said in it."""
    arrays = {"C": np.zeros((2, 2), np.float32), "head": np.ones(3, np.float32)}
    state = state or State(ArrayRecord({name: Array(array) for name, array in arrays.items()}))
    values: dict[str, Any] = {
        "clients": clients,
        "sampled": clients,
        "rounds": 3,
        "seed": 0,
        "max_failed": 1.0,
        "lr_factor": lambda server_round: 1.0,
        "basis": None,
        "bases_sha256": "bases",
        "layers": [Layer({"C": "C"}, np.eye(2, 3), np.eye(4, 2), 0.5)],
        "held_out": 0,
        "task": "classification",
        "method": "lotr",
    }
    made = load_strategy(strategy, {}, clients) if isinstance(strategy, str) else strategy
    said: list[str] = []
    with LocalGrid(Liars(lies), clients, run_config={}) as grid, hearing(said.append):
        grid.reply_bytes = most
        return run_round(grid, made, Federation(**{**values, **fields}), state), state, said


def says(record: str, key: str, value: Any) -> Callable[[Any], None]:
    """Past the checks of Flower's own record, as one who writes the bytes of a message can."""
    return lambda content: vars(content[record])["_data"].__setitem__(key, value)


def times(factor: float) -> Callable[[Any], None]:
    """Of the update, where the start was a core of zeros and a head of ones."""

    def lie(content: Any) -> None:
        moved = {name: array.numpy().astype(np.float64) for name, array in content["arrays"].items()}
        start = {"C": 0.0, "head": 1.0}
        longer = {n: (start[n] + factor * (x - start[n])).astype(np.float32) for n, x in moved.items()}
        content["arrays"] = ArrayRecord({name: Array(np.asarray(x)) for name, x in longer.items()})

    return lie


def all_of(*lies: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda content: [lie(content) for lie in lies] and None


# --- numbers that clients say of themselves ---------------------------------------------------------------------------

NO_WEIGHT = [math.nan, -math.inf, -0.5, 0, 5e-324, 1e9 + 1, 2**63, 10**400, 1.7e308, True, "8", [8.0], None, b"8"]
NO_COUNT = [math.nan, math.inf, 0, -3, 2.5, 8.0, 10**9 + 1, 2**64, True, "8", [1]]
NO_LOSS = [math.nan, -math.inf, 1e300, 10**400, True, "low", [0.5]]


def test_a_client_whose_numbers_cannot_be_reckoned_with_has_failed_and_the_rest_is_averaged() -> None:
    lies = [
        *(says("metrics", "weight", value) for value in NO_WEIGHT),
        *(says("metrics", "num-examples", value) for value in NO_COUNT),
        *(says("metrics", "loss", value) for value in NO_LOSS),
        says("client", "client", 3.0),
        says("client", "client", 0),
        says("client", "rank", 1),
    ]
    done, state, _ = a_round({client + 3: lie for client, lie in enumerate(lies)}, clients=len(lies) + 3)
    kinds = ["weight"] * len(NO_WEIGHT) + ["num-examples"] * len(NO_COUNT)
    found = [done.failures[client + 3].kind for client in range(len(lies))]
    assert found[: len(kinds)] == kinds and set(found[len(kinds) : -3]) == {"loss not finite", "loss"}
    assert found[-3:] == ["another client", "another client", "records"]
    reasons = [failure.reason for failure in done.failures.values()]
    assert "its weight is 1.7e+308, expected a number from 1e-09 to 1e+09 (--max-weight)" in reasons
    assert "its num-examples is 2.5, expected a whole number from 1 to 1e+09 (--max-weight)" in reasons
    np.testing.assert_allclose(state.arrays["C"].numpy(), 14 / 6, rtol=1e-7)  # (1·1 + 2·2 + 3·3) / (1 + 2 + 3)
    assert done.metrics["aggregation_error"] < 1e-15 and done.metrics["train_loss"] == 0.5


@pytest.mark.parametrize("weight", [1e-9, 1e9])
@pytest.mark.parametrize("strategy", ["exact-average", f"{FLOWER}FedAvg", "scaffold"])
def test_the_largest_and_the_smallest_weights_keep_the_digits_of_the_mean(weight: float, strategy: str) -> None:
    def lie(content: Any) -> None:
        says("metrics", "weight", weight)(content)
        if strategy == "scaffold":
            content["control"] = content["arrays"].copy()

    _, state, _ = a_round(dict.fromkeys(range(6), lie), strategy)
    np.testing.assert_allclose(state.arrays["C"].numpy(), 3.5, rtol=1e-6)


def test_where_all_clients_weigh_the_same_none_can_weigh_more() -> None:
    lies = {client: says("metrics", "weight", 1.0) for client in range(5)}  # and client 5 says 6
    done, state, _ = a_round(lies, weights=Weights(uniform=True))
    assert list(done.failures) == [5] and "expected 1 as of all clients (--weights uniform)" in done.failures[5].reason
    np.testing.assert_allclose(state.arrays["C"].numpy(), 3.0, rtol=1e-7)


def test_who_has_most_of_a_rounds_weight_is_named_once() -> None:
    heavy = {2: says("metrics", "weight", 1e8)}
    _, state, said = a_round(heavy)
    (line,) = said
    assert line.startswith("round 1: client 2 has 100.0% of the weight of all 6 clients")
    assert not a_round(heavy, state=state)[2], "said once a run"
    assert not a_round(heavy, clients=2)[2] and not a_round({})[2], "of two, one has most; and 6 of 21 is not most"


def test_tensors_in_another_order_are_put_right_for_strategies_that_go_by_it() -> None:
    """Flower's Bulyan takes the i-th tensor of each client for the same one."""

    def turned(content: Any) -> None:
        content["arrays"] = ArrayRecord({name: content["arrays"][name] for name in ("head", "C")})

    honest, lying = (a_round(lies, f"{FLOWER}Bulyan", clients=8)[1] for lies in ({}, {0: turned, 1: turned}))
    assert {n: a.data for n, a in honest.arrays.items()} == {n: a.data for n, a in lying.arrays.items()}


@pytest.mark.parametrize("pair", [(-1e-9, 0.5), (0.1, 0.0), (0.1, 1.5), (0.1, -0.5)])
def test_second_moments_that_no_optimizer_has_are_refused(pair: tuple[float, float]) -> None:
    def moments(*numbers: float) -> Callable[[Any], None]:
        pairs = {name: Array(np.float32(numbers)) for name in ("C", "head")}
        return lambda content: content.__setitem__(MOMENTS, ArrayRecord(pairs))

    lies = {client: moments(*((0.1, 0.5) if client else pair)) for client in range(6)}
    done, state, _ = a_round(lies, mean_moments=True)
    assert list(done.failures) == [0] and done.failures[0].kind == "moments"
    np.testing.assert_allclose(state.chain.the(Moments).means["C"], [0.1, 0.5], rtol=1e-6)


# --- how far updates go -----------------------------------------------------------------------------------------------


def test_a_round_says_the_norms_of_its_updates() -> None:
    metrics = a_round({})[0].metrics  # client k moves seven numbers by k + 1
    assert metrics["update_norm_median"] == pytest.approx(3.5 * math.sqrt(7), rel=1e-12)
    assert metrics["update_norm_largest"] == pytest.approx(6 * math.sqrt(7), rel=1e-12)
    assert "clipped" not in metrics


@pytest.mark.parametrize(
    ("norms", "far"),
    [
        ([1, 1, 1, 1, 1.5], []),  # nearly equal: the spread has a floor
        ([1, 1, 1, 1, 5.9], []),
        ([1, 1, 1, 1, 6.1], [4]),  # 1 + 10 · 0.5 · 1
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], []),
        ([1, 2, 3, 4, 5, 6, 7, 8, 40], [8]),  # 5 + 10 · 1.4826 · 2 = 34.7
        ([0.1, 1, 2, 4, 9, 16], []),  # honest clients of very different sizes
        ([1, 1, 1, 1e30], []),  # of four nobody can say
        ([1e-12, 1.1e-12, 0.9e-12, 1e-12, 1e-9], [4]),
        ([0, 0, 0, 0, 0], []),
        ([0, 1, 1, 1, 1], []),  # nothing is not far
        ([0, 0, 0, 1, 1], []),
        ([0, 0, 0, 1, 1, 1, 1e6], [6]),
        ([1, 1, 1e30, 1, 1e20, 1, 1], [2, 4]),
    ],
)
def test_what_is_far_outside_is_seen_by_median_and_spread(norms: list[float], far: list[int]) -> None:
    assert list(outside(dict(enumerate(norms)))) == far


@pytest.mark.parametrize("strategy", ["exact-average", f"{FLOWER}FedAvg", "median"])
@pytest.mark.parametrize("most", [2**24, 0])
def test_an_update_is_clipped_before_anybody_sees_it(strategy: str, most: int) -> None:
    """Client 1 turns round and is long; bound 9.5: those of 4 √7 = 10.6 and more are clipped too, all to 9.5."""
    done, state, said = a_round({1: times(-1e7)}, strategy, most=most, max_update_norm=9.5)
    most_of_one = 9.5 / math.sqrt(7)
    moves = [1.0, -most_of_one, 3.0, most_of_one, most_of_one, most_of_one]
    weighted = sum((k + 1) * move for k, move in enumerate(moves)) / 21
    wanted = float(np.median(moves)) if strategy == "median" else weighted
    np.testing.assert_allclose(state.arrays["C"].numpy(), wanted, rtol=1e-6)
    np.testing.assert_allclose(state.arrays["head"].numpy(), 1 + wanted, rtol=1e-6)
    assert done.metrics["clipped"] == 4 and not done.failures
    assert done.metrics["update_norm_largest"] == pytest.approx(2e7 * math.sqrt(7), rel=1e-6), "as it came"
    assert done.metrics["aggregation_error"] is None or done.metrics["aggregation_error"] < 1e-6
    (line,) = said
    assert "client 1 (5.29e+07," in line and "--max-update-norm has clipped it" in line
    assert state.watch.first is None, "nothing has harmed the model"


def test_with_an_update_its_change_of_control_variates_is_clipped() -> None:
    def control(content: Any) -> None:
        content["control"] = ArrayRecord({"C": Array(np.ones((2, 2), np.float32)), "head": Array(np.ones(3, "f4"))})

    made: Any = load_strategy("scaffold", {}, 6)
    _, state, _ = a_round(dict.fromkeys(range(6), control), made, max_update_norm=2 * math.sqrt(7))
    scaled = sum((k + 1) * min(1, 2 / (k + 1)) for k in range(6)) / 21  # client k moves seven numbers by k + 1
    np.testing.assert_allclose(made.control(state.arrays)["C"], scaled, rtol=1e-6)


def test_an_update_that_is_too_large_is_refused_where_that_is_wanted() -> None:
    done, state, said = a_round({1: times(-1e7)}, max_update_norm=20, refuse_large=True)
    assert {client: failure.kind for client, failure in done.failures.items()} == {1: "update too large"}
    np.testing.assert_allclose(state.arrays["C"].numpy(), (91 - 4) / 19, rtol=1e-6)
    assert not said and done.metrics["clipped"] == 0


def test_every_record_is_watched_that_reaches_all_clients() -> None:
    def controls(factor: float) -> Callable[[Any], None]:
        made = ArrayRecord({"C": Array(np.full((2, 2), factor, np.float32)), "head": Array(np.zeros(3, np.float32))})
        return lambda content: content.__setitem__("control", made)

    lies = {client: controls(1e20 if client == 4 else 1 + client / 10) for client in range(6)}
    _, state, said = a_round(lies, "scaffold")
    (line,) = said
    assert "the norm of a change of control variates is far outside: client 4 (2e+20" in line
    assert (state.watch.first, state.watch.last) == (1, 1)


class Tenfold(Strategy):
    """What is finite in float64 need not be in float32."""

    def combine(self, updates: Any, server_round: int) -> Any:
        """Ten times the mean."""
        return {name: 10 * value for name, value in weighted_mean(updates).items()}


class Hoarder(Strategy):
    """Keeps what is not finite, and publishes what is."""

    def __init__(self) -> None:
        self.best, self.seen = np.array(np.inf), np.zeros(1, np.float32)

    def combine(self, updates: Any, server_round: int) -> Any:
        """The mean; the sum of squares overflows."""
        largest = max(float(np.abs(value).max()) for update in updates for value in update.arrays.values())
        with np.errstate(over="ignore"):
            self.seen = self.seen + np.float32(largest) ** 2
        return weighted_mean(updates)


@pytest.mark.parametrize(
    ("strategy", "number", "error"),
    [
        (
            Tenfold(),
            3e38,
            "it gave C values up to .*e.38, which float32 has no room for; the longest update is that of",
        ),
        (
            Hoarder(),
            3e38,
            r"what it keeps between rounds is not finite \(seen\); the longest update is that of client 5",
        ),
    ],
)
def test_what_is_not_finite_is_never_published(strategy: Strategy, number: float, error: str) -> None:
    lies: dict[int, Callable[[Any], None]] = {
        client: lambda content: content.__setitem__(
            "arrays",
            ArrayRecord({n: Array(np.full(a.shape, number, np.float32)) for n, a in content["arrays"].items()}),
        )
        for client in range(5, 6)
    }
    state = a_round({}, strategy)[1]
    before, noticed = state.arrays["C"].data, state.watch.state()
    with pytest.raises(StrategyError, match=error):
        a_round(lies, strategy, state=state)
    assert (state.arrays["C"].data, state.round, state.watch.state()) == (before, 1, noticed)


# --- words of theirs --------------------------------------------------------------------------------------------------

FORGED = "2026-11-30 00:00:00 ERROR fedlotr: all clients are fine"


def test_what_a_client_says_cannot_pass_for_ours_nor_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def raising(text: str) -> Callable[[Any], None]:
        def lie(content: Any) -> None:
            raise RuntimeError(text)

        return lie

    lies = {
        0: raising(f"cheese\x1b[2J\x07\u202e[red]\r\n{FORGED}"),
        1: raising("x" * 10_000_000),
        2: says("client", "bases-sha256", "\x1b]0;title\x07" * 9),
        3: lambda content: content.__setitem__("\x1b[31m" + "n" * 10**6, MetricRecord({"a": 1})),
        4: says("client", "\x00" * 10**6, 1),
    }
    with caplog.at_level("INFO", "fedlotr"), pytest.raises(TooManyFailuresError) as caught:
        a_round(lies, max_failed=0.1)
    for text in (*caplog.messages, str(caught.value)):
        assert all(character.isprintable() or character == "\n" for character in text)
        assert len(text) < 4 * LONGEST_REASON and not any(line.startswith(FORGED) for line in text.splitlines())
    assert "cheese" in caplog.text and r"\x1b[2J\x07\u202e[red]" in caplog.text and FORGED in caplog.text
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 3000


# --- rules that need so many clients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.49, 0.4, 1 / 3, 0.25, 0.2, 0.1, 0.05, 1 / 49])
def test_a_trimmed_mean_needs_as_many_clients_as_leave_it_somebody_to_trim(beta: float) -> None:
    strategy: Any = load_strategy("trimmed-mean", {"beta": beta}, 5)

    def trims(n: int) -> bool:
        """Whether one liar among n has no say."""
        updates = [Update(k, {"C": np.array([1e6 if k == 0 else 1.0])}, 1.0) for k in range(n)]
        return float(strategy.combine(updates, 1)["C"][0]) == 1.0

    least = next(n for n in itertools.count(1) if trims(n))
    assert trimmed_mean_of(beta).clients == strategy.fewest().clients == max(least, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "clients"),
    [
        ("median", {}, 3),
        ("krum", {"f": 2}, 7),
        ("krum", {"f": 0}, 3),
        (f"{FLOWER}Krum", {"num_malicious_nodes": 2}, 7),
        (f"{FLOWER}MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}, 5),
        (f"{FLOWER}MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 9}, 10),
        (f"{FLOWER}Bulyan", {"num_malicious_nodes": 2}, 11),
        (f"{FLOWER}FedTrimmedAvg", {"beta": 0.1}, 10),
        (f"{FLOWER}FedMedian", {}, 3),
        (f"{FLOWER}FedAvg", {}, None),
        ("exact-average", {}, None),
    ],
)
def test_how_many_clients_a_rule_needs(name: str, arguments: dict[str, Any], clients: int | None) -> None:
    needed = traits_of(load_strategy(name, arguments, 20)).fewest()
    assert (None if needed is None else needed.clients) == clients


def test_a_round_that_is_left_with_too_few_clients_says_so_once() -> None:
    class Picky(Strategy):
        def combine(self, updates: Any, server_round: int) -> Any:
            return weighted_mean(updates)

        def fewest(self) -> Fewest:
            return Fewest(6, "five are not six")

    lies = {2: says("metrics", "weight", 0)}
    strategy = Picky()
    assert not a_round({}, strategy)[2]
    _, state, said = a_round(lies, strategy)
    assert said == ["round 1: of 6 clients 5 are left for Picky, which needs 6: five are not six"]
    assert not a_round(lies, strategy, state=state)[2]


# --- through the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tiny_bert: Path, animals: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Six clients, whom FAULTS may make hostile, all in every round."""
    monkeypatch.setattr("fedlotr.run.simulation.CLIENT_APP", "tests.faulty_app:app")
    monkeypatch.delenv("FAULTS", raising=False)
    faulty_app.SENT.clear()
    return {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 6,
        "sample": 6,
        "rounds": 5,
        "rank": 4,
        "public_examples": 16,
        "max_examples": 8,
        "partition": "iid",
        "method": "lotr",
        "lr_schedule": "constant",
        "engine": "local",
        "threads": 1,
        "dtype": "float32",
    }


def test_a_run_that_was_harmed_goes_back_to_before_the_first_warning(
    hostile: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(hostile), "--out", str(tmp_path / "honest"), "--quiet"]) == 0
    run = tmp_path / "run"
    words = [*flags(hostile), "--out", str(run)]
    monkeypatch.setenv("FAULTS", "4:times=1e4:2")
    assert main([*words, "--rounds", "4"]) == 0
    shown = capsys.readouterr().err
    summary, rows = read_run(run)
    (line,) = [line for line in summary["warnings"] if "far outside" in line]
    assert f"warning: {line}" in shown and "round 2: the norm of an update is far outside: client 4 (" in line
    assert "the checkpoint of round 1 is kept, and --resume --resume-round 1 goes back to it" in line
    assert rows[0]["update_norm_largest"] < 2 * rows[0]["update_norm_median"] < rows[1]["update_norm_largest"] / 100
    assert main([*words, "--resume", "--quiet"]) == 0, "it survives that the run goes on"
    assert read_run(run)[0]["checkpoints"] == [1, 4, 5]
    capsys.readouterr()

    assert main([*words, "--resume", "--resume-round", "3"]) == 2
    assert "--resume-round 3: no checkpoint of that round is kept; choose one of 1, 4, 5" in capsys.readouterr().err
    monkeypatch.delenv("FAULTS")
    assert main([*words, "--resume", "--resume-round", "1", "--max-update-norm", "1e6"]) == 0
    shown = capsys.readouterr().err
    assert "went back to round 1: what later rounds left, up to round 5, is dropped" in shown
    assert "--max-update-norm is 1000000.0 from round 2 on; before it was none" in shown
    found, wanted = read_run(run), read_run(tmp_path / "honest")
    assert found[0]["trained_sha256"] == wanted[0]["trained_sha256"] and len(found[1]) == 5
    assert [row["loss"] for row in found[1]] == [row["loss"] for row in wanted[1]]
    assert [row.get("clipped") for row in found[1]] == [None, 0, 0, 0, 0]
    assert "far outside" not in " ".join(found[0]["warnings"])
    assert found[0]["communication"] == wanted[0]["communication"], "what was dropped is not counted"


def test_a_run_that_went_back_and_was_ended_leaves_no_results_of_what_it_dropped(
    hostile: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*flags({**hostile, "rounds": 3}), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(words) == 0
    monkeypatch.setenv("FAULTS", " ".join(f"{client}:raises" for client in range(6)))
    assert main([*words, "--resume", "--resume-round", "2"]) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("checkpoints", "config.yaml", "facts.json", "ledger", "log.txt", "metrics.jsonl"),
    }
    monkeypatch.delenv("FAULTS")
    assert main([*flags({**hostile, "rounds": 3}), "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    assert main([*words, "--resume"]) == 0
    assert_same_results(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"codec": "int8", "broadcast_codec": "delta+int8"}, "times=-1e4"),
        ({"method": "lora", "strategy": "flora", "client_rank": "4,2"}, "times=1e4"),
        pytest.param({"strategy": f"{FLOWER}FedAdam", "method": "ravan"}, "all=1e30", marks=pytest.mark.slow),
        pytest.param({"strategy": "scaffold"}, "all=3e38", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_bound_holds_for_codecs_ranks_and_every_strategy(
    fields: dict[str, Any], fault: str, hostile: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No client moves the mean by more than its share of the bound, whatever it sends."""
    monkeypatch.setenv("FAULTS", f"4:{fault}")
    given = {**hostile, **fields, "rounds": 2, "max_update_norm": 0.75, "weights": "uniform"}
    assert main([*flags(given), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    summary, rows = read_run(tmp_path / "run")
    assert all(row["clipped"] >= 1 and row["failed"] == 0 for row in rows)
    assert all(row["aggregation_error"] is None or row["aggregation_error"] < 1e-6 for row in rows)
    assert np.isfinite(summary["final"]["loss"])
    if fields.get("codec"):
        first, second = (load_file(tmp_path / "run" / "checkpoints" / f"round-0000{n}.safetensors") for n in (1, 2))
        moved = sum(float(np.square(second[n] - first[n]).sum()) for n in first if n.startswith("base_model"))
        assert math.sqrt(moved) <= 0.75 * (1 + 1e-6)


def test_honest_clients_are_not_blamed_for_the_model_that_they_were_sent(
    hostile: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULTS", "4:all=1e25:2")
    words = [*flags(hostile), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "round 3: 6 of 6 clients failed" in error
    assert "the likely cause is not they but the model that round 2 published, with updates far outside in it" in error
    assert "go back with --resume --resume-round 1, and with --max-update-norm" in error
    assert main([*words, "--resume"]) == 1, "the model is as it was"
    assert "the model that round 2 published" in capsys.readouterr().err
    defended = [*words, "--resume", "--resume-round", "1", "--on-large-update", "refuse", "--quiet"]
    assert main([*defended, "--max-update-norm", "0.01"]) == 1
    assert "expected at most 0.01 (--max-update-norm)" in capsys.readouterr().err, "too little for honest ones"
    assert main([*defended, "--max-update-norm", "50"]) == 0
    summary, rows = read_run(tmp_path / "run")
    assert summary["failures"] == {"update too large": {"4": 4}} and np.isfinite(rows[-1]["loss"])


@pytest.mark.slow
def test_hidden_clients_are_not_named_and_what_is_spent_stays_spent(
    hostile: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULTS", "4:times=1e6")
    given = {**hostile, "rounds": 2, "privacy": "client", "noise_multiplier": 1, "clip_norm": 1}
    words = [*flags(given), "--out", str(tmp_path / "run")]
    assert main([*words, "--max-update-norm", "1"]) == 2
    assert "--max-update-norm 1.0 with --privacy client: the server clips every update" in capsys.readouterr().err
    assert main(words) == 0
    shown = capsys.readouterr().err + (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    summary, rows = read_run(tmp_path / "run")
    assert "far outside" not in shown and all(row["update_norm_largest"] is None for row in rows)
    spent = summary["privacy"]["epsilon"]
    assert main([*words, "--resume", "--resume-round", "1", "--quiet"]) == 0
    again = read_run(tmp_path / "run")[0]
    charged = (tmp_path / "run" / "privacy.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    assert [json.loads(line)["round"] for line in charged] == [1, 2, 2] and again["rounds"] == 2
    assert again["privacy"]["epsilon"] > 1.1 * spent, "round 2 has been paid for twice"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            "--strategy trimmed-mean --strategy-arg beta=0.1",
            "--strategy trimmed-mean with 6 clients a round: it needs 10",
        ),
        ("--strategy krum --strategy-arg f=2", "it needs 7 (Krum holds against 2 hostile clients"),
        ("--strategy median --sample 2", "it needs 3 (the median of fewer is their mean"),
        (f"--strategy {FLOWER}Bulyan --strategy-arg num_malicious_nodes=1", "it needs 7 (Bulyan"),
        (f"--strategy {FLOWER}FedMedian --client-rank 4,2", "with --client-rank: what a client of a lower rank lacks"),
        ("--strategy krum --privacy client --epsilon 8 --clip-norm 1", "needs more of every client"),
        (f"--strategy {FLOWER}Bulyan --privacy client --epsilon 8 --clip-norm 1", "is shown the noised mean alone"),
        ("--strategy trimmed-mean --strategy-arg beta=0", "expected a share above 0"),
        ("--resume-round 2", "--resume-round 2 with --resume false"),
        ("--on-large-update refuse", "with --max-update-norm none: no update is too large without a bound"),
        ("--max-weight 1e300", "--max-weight 1e300: expected at most 1e+15"),
    ],
)
def test_what_cannot_hold_is_refused_before_the_run(
    options: str, problem: str, hostile: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(hostile), *options.split(), "--out", str(tmp_path / "run")]) == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["Krum", "FedTrimmedAvg"])
def test_a_rule_that_compares_clients_says_that_it_sees_one_mean_where_they_are_hidden(
    name: str, hostile: dict[str, Any], tmp_path: Path
) -> None:
    given = {**hostile, "rounds": 2, "privacy": "client", "noise_multiplier": 1, "clip_norm": 1, "sample": 0.3}
    assert main([*flags(given), "--strategy", FLOWER + name, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    warnings = read_run(tmp_path / "run")[0]["warnings"]
    (said,) = [line for line in warnings if "the machine is busy" not in line]
    assert said.startswith(f"{name} compares clients, and where they are hidden it sees their noised mean alone")


def test_an_older_run_goes_on(hostile: dict[str, Any], tmp_path: Path) -> None:
    """Its checkpoints and config.yaml know nothing of bounds, or of what was noticed."""
    words = [*flags({**hostile, "rounds": 2}), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(words) == 0
    from fedlotr.run.directory import _digest

    path = tmp_path / "run" / "checkpoints" / "round-00002.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["sha256"], record["watch"]
    new = ("max_weight", "max_update_norm", "on_large_update")
    record["configuration"] = {key: value for key, value in record["configuration"].items() if key not in new}
    path.write_text(json.dumps({"sha256": _digest(record), **record}), encoding="utf-8")
    saved = tmp_path / "run" / "config.yaml"
    lines = saved.read_text(encoding="utf-8").splitlines(keepends=True)
    saved.write_text("".join(line for line in lines if not line.startswith(new)), encoding="utf-8")
    assert main([*words, "--resume", "--rounds", "3"]) == 0
