"""The round loop keeps its promises for every strategy: order, checks, ledger, certificate, Flower's own unchanged."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from fedlotr.communication.ledger import Entry, Totals, payload_bytes, read_ledger, write_part
from fedlotr.config.configuration import SimulationConfig
from fedlotr.engines import LocalGrid
from fedlotr.errors import InputError
from fedlotr.flower import Strategy
from fedlotr.flower.blame import StrategyError
from fedlotr.flower.certificate import Layer, Weighted, aggregation_error, transport_error
from fedlotr.flower.chain import Chain
from fedlotr.flower.client_app import worker
from fedlotr.flower.links.bases import Bases
from fedlotr.flower.plugins import load_strategy
from fedlotr.flower.records import to_record
from fedlotr.flower.round import Federation, State, run_round, sample_clients
from fedlotr.flower.state import load_strategy_state, save_strategy
from fedlotr.flower.trouble import TooManyFailuresError
from fedlotr.run.checking import check
from fedlotr.run.federation import federation as simulated_federation
from fedlotr.run.preparation import prepare
from fedlotr.run.simulation import resolve

CLIENTS = 6


def federation(**fields: Any) -> Federation:
    values: dict[str, Any] = {
        "clients": CLIENTS,
        "sampled": CLIENTS,
        "rounds": 3,
        "seed": 0,
        "max_failed": 0.5,
        "lr_factor": lambda server_round: 1.0,
        "basis": ConfigRecord({"seed": 0, "sha256": bytes(32)}),
        "bases_sha256": "bases",
        "layers": [Layer({"C": "C"}, np.eye(2, 3), np.eye(4, 2), 0.5)],
        "held_out": 0,
        "task": "classification",
        "method": "lotr",
    }
    return Federation(**{**values, **fields})


def start() -> State:
    arrays = {"C": np.zeros((2, 2), np.float32), "head": np.ones((3,), np.float32)}
    return State(ArrayRecord({name: Array(array) for name, array in arrays.items()}))


def grid(trouble: str = "", kind: Callable[..., LocalGrid] = LocalGrid) -> LocalGrid:
    return kind("tests.toy_app:app", CLIENTS, run_config={"trouble": trouble})


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))


def exact() -> Any:
    return load_strategy("exact-average", {}, CLIENTS)


def test_the_mean_is_weighted_by_examples_and_certified() -> None:
    state = start()
    done = run_round(grid(), exact(), federation(), state)
    mean = sum((k + 1) ** 2 for k in range(6)) / 21  # Σ n_k x_k / Σ n_k with n_k = x_k = k + 1
    np.testing.assert_allclose(state.arrays["C"].numpy(), mean, rtol=1e-7)
    np.testing.assert_allclose(state.arrays["head"].numpy(), 1 + mean, rtol=1e-7)
    assert state.arrays["C"].numpy().dtype == np.float32
    assert (done.metrics["clients"], done.metrics["failed"], state.round) == (6, 0, 1)
    assert done.metrics["aggregation_error"] < 1e-15
    assert done.metrics["transport_error"] < 1e-7
    assert done.metrics["train_loss"] == 0.5


class Shuffled(LocalGrid):
    """Replies come back in another order every time."""

    order = itertools.permutations(range(CLIENTS))

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        return [replies[i] for i in next(self.order)]


def test_a_permutation_of_the_replies_gives_equal_bytes() -> None:
    class Awkward(Strategy):
        def combine(self, updates: Any, server_round: int) -> Any:
            assert [update.client for update in updates] == list(range(CLIENTS))
            return {name: sum(0.1 * u.arrays[name] ** 3 for u in updates) for name in updates[0].arrays}

    results = set()
    for _ in range(5):
        state = start()
        run_round(grid(kind=Shuffled), Awkward(), federation(), state)
        results.add(state.arrays["C"].numpy().tobytes())
    assert len(results) == 1


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raises", "RuntimeError: out of cheese"),
        ("nan", "C has values that are not finite"),
        ("shape", r"C is float32 (1, 2), expected float32 (2, 2)"),
        ("dtype", r"C is float64 (2, 2), expected float32 (2, 2)"),
        ("missing", "tensors missing: ['head']"),
        ("weight", "its weight is -1.0"),
        ("bases", "trained between other bases (SHA-256 others"),
        ("records", "a reply needs the records arrays, metrics and client"),
    ],
)
def test_a_client_that_fails_is_named_and_left_out_and_the_rest_is_averaged_exactly(what: str, reason: str) -> None:
    state = start()
    done = run_round(grid(f"2:{what}"), exact(), federation(), state)
    assert list(done.failures) == [2] and reason in done.failures[2].reason
    assert done.metrics["failed"] == 1 and done.metrics["clients"] == 6
    mean = (sum((k + 1) ** 2 for k in range(6)) - 9) / 18
    np.testing.assert_allclose(state.arrays["C"].numpy(), mean, rtol=1e-7)
    assert done.metrics["aggregation_error"] < 1e-15
    assert state.chain.the(Bases).known == {0, 1, 3, 4, 5}, "a client that failed is sent the bases again"


@pytest.mark.parametrize("basis", ["random", "update"])
def test_a_real_client_with_other_bases_is_refused(basis: str, tiny_bert: Path, animals: Path, tmp_path: Path) -> None:
    config = SimulationConfig(
        model=str(tiny_bert),
        data=str(animals),
        method="lotr",
        basis=basis,
        basis_codec="float32",
        rank=4,
        clients=4,
        sample=2,
        public_examples=16,
        local_steps=1,
        engine="local",
        threads=1,
        dtype="float32",
    )
    prepared = prepare(check(resolve(config)), tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "other")
    if basis == "random":  # made again by the client from its seed
        path = tmp_path / "other" / "recipe.json"
        recipe = json.loads(path.read_text(encoding="utf-8"))
        recipe["core"]["seed"] += 1
        path.write_text(json.dumps(recipe), encoding="utf-8")
    run = simulated_federation(config, prepared)
    if basis == "update":  # sent by the server, and damaged on the way
        assert isinstance(run.basis, ArrayRecord)
        run = replace(run, basis=ArrayRecord({name: Array(2 * array.numpy()) for name, array in run.basis.items()}))
    client_app = "fedlotr.flower.client_app:app"
    state = State(to_record(prepared.model.values()))
    with (
        LocalGrid(client_app, 4, run_config={"fedlotr.work": str(tmp_path / "other")}) as engine,
        pytest.raises(TooManyFailuresError, match=r"2 of 2 clients failed .* other bases"),
    ):
        run_round(engine, exact(), run, state)
    assert state.round == 0
    state = State(to_record(prepared.model.values()))
    with LocalGrid(client_app, 4, run_config={"fedlotr.work": str(tmp_path / "good")}) as engine:
        assert not run_round(engine, exact(), simulated_federation(config, prepared), state).failures
    worker.cache_clear()


def test_too_many_failures_stop_the_run_and_leave_the_state_as_it_was() -> None:
    state = start()
    run_round(grid("0:nan 1:nan 2:nan"), exact(), federation(), state)
    before = state.arrays["C"].numpy().tobytes()
    with pytest.raises(TooManyFailuresError, match="round 2: 4 of 6 clients failed .*; client 0: C has values"):
        run_round(grid("0:nan 1:nan 2:nan 3:raises"), exact(), federation(), state)
    assert state.arrays["C"].numpy().tobytes() == before and state.round == 1


def test_a_round_samples_its_clients_from_its_own_stream() -> None:
    here = federation(clients=50, sampled=10)
    first = list(sample_clients(here, 1))
    assert first == list(sample_clients(here, 1)) == sorted(set(first)) and len(first) == 10
    assert first != list(sample_clients(here, 2))
    assert first != list(sample_clients(federation(clients=50, sampled=10, seed=1), 1))


def test_the_ledger_has_a_row_for_every_record_of_every_message(tmp_path: Path) -> None:
    state = start()
    entries = []
    for _ in range(2):
        done = run_round(grid(), exact(), federation(), state)
        write_part(tmp_path, state.round, done.entries)
        entries += done.entries
    assert read_ledger(tmp_path) == entries
    kinds = [(e.direction, e.kind) for e in entries if e.client == 3 and e.round == 1]
    assert sorted(kinds) == [
        ("down", "basis"),
        ("down", "broadcast"),
        ("down", "control"),
        ("up", "control"),
        ("up", "control"),
        ("up", "update"),
    ]
    assert not any(e.kind == "basis" for e in entries if e.round == 2), "the bases go out once"
    summary = Totals().add(entries).summary()
    assert summary["upload_payload_bytes_per_client_round"] == 4 * (2 * 2 + 3)
    assert summary["download_payload_bytes_per_client_round"] == 4 * (2 * 2 + 3)
    assert summary["one_off_bytes_per_client"] == 40
    assert summary["total_payload_bytes"] == sum(e.payload_bytes for e in entries)
    assert summary["total_wire_bytes"] == sum(e.wire_bytes for e in entries)


def test_changing_one_messages_dtype_changes_the_ledger() -> None:
    """The ledger measures what a message holds; it does not know what it ought to hold."""

    def upload(trouble: str) -> int:
        done = run_round(grid(trouble), exact(), federation(), start())
        return sum(e.payload_bytes for e in done.entries if e.kind == "update")

    assert upload("2:dtype") - upload("") == 4 * 4  # client 2 sent its 2 × 2 core in eight bytes a number


@pytest.mark.parametrize(
    ("record", "payload"),
    [
        (ArrayRecord({"a": Array(np.zeros((3, 5), np.float16))}), 30),
        (ConfigRecord({"seed": 1, "hash": bytes(32), "name": "äb", "list": [1.0, 2.0]}), 8 + 32 + 3 + 16),
    ],
)
def test_payload_is_numbers_times_width(record: Any, payload: int) -> None:
    assert payload_bytes(record) == payload
    assert record.count_bytes() >= payload


def test_an_error_of_a_strategy_names_it_with_its_round_and_method() -> None:
    class Broken(Strategy):
        def combine(self, updates: Any, server_round: int) -> Any:
            raise KeyError("alhpa")

    class Misshapen(Strategy):
        def combine(self, updates: Any, server_round: int) -> Any:
            return {name: array[:1] for name, array in updates[0].arrays.items()}

    state = start()
    with pytest.raises(StrategyError, match="strategy Broken, combine, round 1, method lotr: KeyError"):
        run_round(grid(), Broken(), federation(), state)
    with pytest.raises(StrategyError, match=r"strategy Misshapen.* it gave C the shape \(1, 2\), expected \(2, 2\)"):
        run_round(grid(), Misshapen(), federation(), state)
    assert state.round == 0


FLOWERS = ["FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "FedTrimmedAvg", "Krum"]


@pytest.mark.parametrize("name", FLOWERS)
def test_flowers_strategies_run_unchanged_and_resume_to_equal_bytes(name: str) -> None:
    def strategy() -> Any:
        return load_strategy(f"flwr.serverapp.strategy:{name}", {}, CLIENTS)

    through, state = strategy(), start()
    for _ in range(2):
        done = run_round(grid(), through, federation(), state)
        assert done.metrics["aggregation_error"] is None, "it does not say that it averages"
    packed, arrays, _ = save_strategy(through)
    links, link_arrays = state.chain.save()
    halfway = State(ArrayRecord(dict(state.arrays.items())), state.round, Chain.at_server(federation()))
    halfway.chain.load(links, link_arrays, {})
    run_round(grid(), through, federation(), state)

    again = strategy()
    load_strategy_state(again, packed, arrays)
    run_round(grid(), again, federation(), halfway)
    assert state.arrays["C"].numpy().tobytes() == halfway.arrays["C"].numpy().tobytes()
    assert state.arrays["C"].numpy().dtype == np.float32, "FedAdam's float64 is cast back"
    assert np.any(state.arrays["C"].numpy())


def test_flowers_fedavg_gives_our_weighted_mean() -> None:
    ours, theirs = start(), start()
    run_round(grid(), exact(), federation(), ours)
    run_round(grid(), load_strategy("flwr.serverapp.strategy:FedAvg", {}, CLIENTS), federation(), theirs)
    np.testing.assert_allclose(theirs.arrays["C"].numpy(), ours.arrays["C"].numpy(), rtol=1e-6)


def test_fedavg_trains_a_single_client_where_its_own_minimum_is_two() -> None:
    state = start()
    one = load_strategy("flwr.serverapp.strategy:FedAvg", {}, 1)
    assert run_round(grid(), one, federation(sampled=1), state).metrics["clients"] == 1


EVERY = [name for name in flwr.serverapp.strategy.__all__ if name.startswith(("Fed", "Krum", "Multi", "Bulyan"))]
EVERY.remove("FedXgbBagging")  # it is for trees


class Demanding(flwr.serverapp.strategy.FedYogi):
    """A user's, who wants five clients."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=5, min_available_nodes=6, weighted_by_key="weight")


class Around(flwr.serverapp.strategy.DifferentialPrivacyServerSideFixedClipping):
    """Flower's wrapper of one that wants five."""

    def __init__(self) -> None:
        super().__init__(Demanding(), 0.0, 1.0, 5)


@pytest.mark.parametrize("there", [1, 2, 4])
@pytest.mark.parametrize("name", [*EVERY, "tests.flower.test_rounds:Demanding", "tests.flower.test_rounds:Around"])
def test_flowers_strategies_go_on_with_whoever_is_there(
    name: str, there: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def waits(_: float) -> None:
        raise AssertionError("it waits for more clients")

    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", waits)
    strategy: Any = load_strategy(name if ":" in name else f"flwr.serverapp.strategy:{name}", {}, CLIENTS)
    before = {key: vars(strategy).get(key) for key in ("min_train_nodes", "min_available_nodes")}
    # Of six in the plan so many come, as where the others have spent their budget.
    state = start()
    done = run_round(grid(), strategy, federation(sampled=there), state)
    assert done.metrics["clients"] == (1 if name == "FedXgbCyclic" else there)
    assert {key: vars(strategy).get(key) for key in before} == before
    told = "Bulyan combined nothing of a round's updates" in caplog.text
    assert told == (name == "Bulyan" and there < 3) and bool(np.any(state.arrays["C"].numpy())) != told


def test_a_strategy_that_waits_all_the_same_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits(Strategy):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            while len(grid.get_node_ids()) < 3:
                clock[0] += 1.0
            return []

        def combine(self, updates: Any, server_round: int) -> Any:
            raise AssertionError

    clock = [0.0]
    monkeypatch.setattr("fedlotr.flower.round_grid.time.monotonic", lambda: clock[0])
    with pytest.raises(
        StrategyError, match="Waits, configure_train, round 1, .*waits for more clients than this round"
    ):
        run_round(grid(), Waits(), federation(sampled=2), start())


def test_more_clients_than_a_round_has_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="min_available_nodes=7: a round has 6 clients .*FedProx would wait"):
        load_strategy("flwr.serverapp.strategy:FedProx", {"min_available_nodes": 7}, CLIENTS)


def test_a_strategys_arguments_are_checked() -> None:
    made: Any = load_strategy("flwr.serverapp.strategy:FedTrimmedAvg", {"beta": 0.3}, 4)
    assert made.beta == 0.3 and made.fraction_train == 1.0
    with pytest.raises(InputError, match="arg betta: FedTrimmedAvg has no such argument, did you mean 'beta'"):
        load_strategy("flwr.serverapp.strategy:FedTrimmedAvg", {"betta": 0.3}, 4)
    with pytest.raises(InputError, match="QFedAvg cannot be made: .*client_learning_rate"):
        load_strategy("flwr.serverapp.strategy:QFedAvg", {}, 4)
    with pytest.raises(InputError, match="did you mean 'FedAvg'"):
        load_strategy("flwr.serverapp.strategy:FedAv", {}, 4)
    with pytest.raises(InputError, match="did you mean 'fedit'"):
        load_strategy("fedti", {}, 4)
    with pytest.raises(InputError, match="expected a class derived from"):
        load_strategy("collections:OrderedDict", {}, 4)


def test_state_that_cannot_be_written_is_refused_by_name() -> None:
    class Hoarder(Strategy):
        def combine(self, updates: Any, server_round: int) -> Any: ...

        def state(self) -> dict[str, Any]:
            return {"function": print}

    with pytest.raises(TypeError, match="a builtin_function_or_method cannot be part of a checkpoint"):
        save_strategy(Hoarder())


def dense(layer: Layer, arrays: Any) -> Any:
    a = arrays[layer.trained["A"]] if "A" in layer.trained else layer.A
    b = arrays[layer.trained["B"]] if "B" in layer.trained else layer.B
    c = arrays[layer.trained["C"]] if "C" in layer.trained else np.eye(a.shape[0])
    return layer.scale * b @ c @ a


SHAPES = [(6, 6, 2), (4, 9, 3), (9, 4, 4), (5, 5, 5)]
"""d_out, d_in, r: square, wide, tall with r = d_in, and r = d."""


@pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)
@pytest.mark.parametrize("trained", ["C", "AB", "B", "ABC"])
@pytest.mark.parametrize("clients", [1, 2, 7])
def test_the_certificate_equals_a_dense_oracle(d_out: int, d_in: int, r: int, trained: str, clients: int) -> None:
    rng = np.random.default_rng(d_out * 100 + clients)
    shapes = {"A": (r, d_in), "B": (d_out, r), "C": (r, r)}

    def draw() -> Any:
        return {f"{i}.{f}": rng.normal(size=shapes[f]) for i in range(2) for f in trained}

    layers = [
        Layer(
            {f: f"{i}.{f}" for f in trained},
            None if "A" in trained else rng.normal(size=shapes["A"]),
            None if "B" in trained else rng.normal(size=shapes["B"]),
            1.7,
        )
        for i in range(2)
    ]
    before, weights = draw(), rng.random(clients) + 0.1
    replies = [Weighted(draw(), share) for share in weights / weights.sum()]
    for published in (draw(), {k: sum(r.share * r.arrays[k] for r in replies) for k in before}):
        above = below = 0.0
        for layer in layers:
            mean = sum(r.share * dense(layer, r.arrays) for r in replies)
            above += np.square(dense(layer, published) - mean).sum()
            below += np.square(mean - dense(layer, before)).sum()
        found = aggregation_error(layers, before, published, replies)
        assert found == pytest.approx(np.sqrt(above / below), rel=1e-6, abs=1e-12)
    exact_method = len(trained) == 1 or clients == 1
    assert found is not None and (found < 1e-12) == exact_method


def test_fedits_error_is_the_covariance_of_the_factors() -> None:
    rng = np.random.default_rng(0)
    layer = Layer({"A": "A", "B": "B"}, None, None, 1.0)
    before = {"A": rng.normal(size=(2, 5)), "B": np.zeros((4, 2))}
    replies = [Weighted({"A": rng.normal(size=(2, 5)), "B": rng.normal(size=(4, 2))}, p) for p in (0.2, 0.3, 0.5)]
    mean = {k: sum(r.share * r.arrays[k] for r in replies) for k in before}
    covariance = sum(r.share * (r.arrays["B"] - mean["B"]) @ (r.arrays["A"] - mean["A"]) for r in replies)
    change = sum(r.share * r.arrays["B"] @ r.arrays["A"] for r in replies)
    expected = np.linalg.norm(covariance) / np.linalg.norm(change)
    assert aggregation_error([layer], before, mean, replies) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("clients", [2, 40])
def test_the_certificate_stays_sharp_when_a_round_changes_little(clients: int) -> None:
    """Round 200: the change is a millionth of what is there, and the mean is still seen to be the mean."""
    rng = np.random.default_rng(0)
    layer = Layer({"A": "A", "B": "B"}, None, None, 1.0)
    before = {"A": rng.normal(size=(4, 30)), "B": rng.normal(size=(20, 4))}
    replies = [
        Weighted({"A": before["A"], "B": before["B"] + 1e-6 * rng.normal(size=(20, 4))}, 1 / clients)
        for _ in range(clients)
    ]
    mean = {k: sum(r.share * r.arrays[k] for r in replies) for k in before}
    error = aggregation_error([layer], before, mean, replies)
    assert error is not None and error < 1e-8


def test_nothing_over_nothing_is_null() -> None:
    layer = Layer({"C": "C"}, np.eye(2), np.eye(2), 1.0)
    zero = {"C": np.zeros((2, 2))}
    assert aggregation_error([layer], zero, zero, [Weighted(zero, 1.0)]) is None
    assert aggregation_error([], zero, zero, [Weighted(zero, 1.0)]) is None
    one = {"C": np.eye(2)}
    assert aggregation_error([layer], zero, one, [Weighted(zero, 1.0)]) == float("inf")
    assert transport_error([layer], zero, one, {"C": np.eye(2) * (1 + 1e-3)}) == pytest.approx(1e-3)


def test_a_custom_strategy_of_one_method_reads_like_its_formula(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from fedlotr.flower import Strategy\n\n"
        "class Median(Strategy):\n"
        "    def combine(self, updates, server_round):\n"
        "        return {k: np.median([u.arrays[k] for u in updates], axis=0) for k in updates[0].arrays}\n"
    )
    state = start()
    done = run_round(grid(), load_strategy(f"{tmp_path / 'mine.py'}:Median", {}, CLIENTS), federation(), state)
    np.testing.assert_allclose(state.arrays["C"].numpy(), 3.5)
    assert done.metrics["aggregation_error"] is None


def test_the_readmes_strategy_runs_and_keeps_its_momentum_over_a_crash(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    code = re.search(r'```python title="momentum.py"\n(# momentum.py\n.*?)```', readme, re.DOTALL)
    assert code is not None and len(code[1].splitlines()) <= 20
    (tmp_path / "momentum.py").write_text(code[1])

    def strategy() -> Any:
        return load_strategy(f"{tmp_path / 'momentum.py'}:Momentum", {"beta": 0.5}, CLIENTS)

    # Every round's mean lies x above the broadcast: 1, then 1 + x, then that + (x + β x), ...
    x = sum((k + 1) ** 2 for k in range(6)) / 21
    first, state = strategy(), start()
    for wanted in (x, 2 * x):
        run_round(grid(), first, federation(), state)
        np.testing.assert_allclose(state.arrays["C"].numpy(), wanted, rtol=1e-6)
    packed, arrays, _ = save_strategy(first)
    again = strategy()
    load_strategy_state(again, packed, arrays)
    run_round(grid(), again, federation(), state)
    np.testing.assert_allclose(state.arrays["C"].numpy(), 2 * x + (x + 0.5 * x), rtol=1e-6)


def test_a_ledger_entry_is_plain(tmp_path: Path) -> None:
    write_part(tmp_path, 1, [Entry(1, 2, "up", "update", 3, 4)])
    assert [path.name for path in tmp_path.iterdir()] == ["round-00001.parquet"]
