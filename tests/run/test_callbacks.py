"""Callbacks see every client, evaluation and round, in order; what they raise ends the run and loses nothing."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from fedlotr import Callbacks, ClientEvent, EvaluateEvent, RoundEvent, run_simulation
from fedlotr.errors import InputError
from fedlotr.run.callbacks import CallbackError
from tests.data.test_own_data import ROWS, small
from tests.support import read_run


class Notes(Callbacks):
    def __init__(self) -> None:
        self.events: list[ClientEvent | EvaluateEvent | RoundEvent] = []

    def on_client(self, event: ClientEvent) -> None:
        self.events.append(event)

    def on_evaluate(self, event: EvaluateEvent) -> None:
        self.events.append(event)

    def on_round(self, event: RoundEvent) -> None:
        rows = (event.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(rows[-1]) == event.metrics and len(rows) == event.round, "the round is on disk by then"
        assert any((event.run_dir / "checkpoints").glob(f"*{event.round:05}.json"))
        self.events.append(event)


class BreaksIn(Callbacks):
    def __init__(self, method: str, server_round: int) -> None:
        def on(event: Any) -> None:
            if event.round == server_round:
                raise RuntimeError("no room for a note")

        setattr(self, method, on)


def test_every_client_evaluation_and_round_is_told_in_order(tiny_bert: Path, tmp_path: Path) -> None:
    config = small(tiny_bert, tmp_path / "run", rounds=3, eval_every=2, clients=3, sample=2)
    notes = Notes()
    result = run_simulation(config, data={"train": ROWS}, callbacks=[notes, Callbacks()])
    kinds = [type(event).__name__.removesuffix("Event") + str(event.round) for event in notes.events]
    assert kinds == [
        *("Evaluate0", "Client1", "Client1", "Round1"),
        *("Client2", "Client2", "Evaluate2", "Round2"),
        *("Client3", "Client3", "Evaluate3", "Round3"),
    ]
    rounds = [event.metrics for event in notes.events if isinstance(event, RoundEvent)]
    assert rounds == result.history
    clients = [event for event in notes.events if isinstance(event, ClientEvent)]
    for row in result.history:
        told = [event for event in clients if event.round == row["round"]]
        assert [event.client for event in told] == sorted(event.client for event in told)
        weights = [event.weight or 0.0 for event in told]
        losses = [event.loss or 0.0 for event in told]
        mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        assert mean == pytest.approx(row["train_loss"], rel=1e-9)
        assert weights == [event.examples for event in told], "weighed by examples"
    (last,) = [event for event in notes.events if isinstance(event, EvaluateEvent) and event.round == 3]
    assert last.metrics == {name: result.history[-1][name] for name in ("loss", "accuracy")}
    with pytest.raises(FrozenInstanceError):
        last.round = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        rounds[0]["loss"] = 0.0


def test_a_client_that_fails_is_told_with_its_reason(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlotr.flower import client_app

    train = client_app.Worker.train

    def failing(self: Any, jobs: Any) -> None:
        if 1 in {job.client for job in jobs}:
            raise RuntimeError("client 1 is out of paper")
        train(self, jobs)

    monkeypatch.setattr(client_app.Worker, "train", failing)
    notes = Notes()
    config = small(tiny_bert, tmp_path / "run", cohort=1)
    run_simulation(config, data={"train": ROWS}, callbacks=notes)
    good, failed = [event for event in notes.events if isinstance(event, ClientEvent)]
    assert (good.client, good.failure) == (0, None) and good.loss is not None
    assert failed.client == 1 and failed.failure and "out of paper" in str(failed.reason) and failed.loss is None


@pytest.mark.parametrize("method", ["on_client", "on_evaluate", "on_round"])
def test_a_callback_that_raises_is_named_and_the_round_is_kept(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    config = small(tiny_bert, tmp_path / "run", rounds=3)
    whole = run_simulation(config.model_copy(update={"out": tmp_path / "whole"}), data={"train": ROWS})
    expected = f"callback BreaksIn.{method}, round 2: RuntimeError: no room for a note"
    with pytest.raises(CallbackError, match=expected):
        run_simulation(config, data={"train": ROWS}, callbacks=BreaksIn(method, 2))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["round"] for row in rows] == [1, 2]
    notes = Notes()
    again = run_simulation(config.model_copy(update={"resume": True}), data={"train": ROWS}, callbacks=notes)
    assert {event.round for event in notes.events} == {3}
    assert again.summary["trained_sha256"] == whole.summary["trained_sha256"]
    assert len(read_run(tmp_path / "run")[1]) == 3


def test_what_is_no_callback_is_refused_before_anything_starts(tiny_bert: Path, tmp_path: Path) -> None:
    for given, got in ((Notes, "the class Notes"), ([print], "one of the type builtin_function_or_method")):
        with pytest.raises(InputError, match=f"derived from fedlotr.Callbacks, got {got}"):
            run_simulation(small(tiny_bert, tmp_path / "run"), data={"train": ROWS}, callbacks=given)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
