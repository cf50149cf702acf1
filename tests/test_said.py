"""What a user must know of a run is on the console, in log.txt and in summary.json, and stays there on resume."""

import json
from pathlib import Path

import pytest

from fedlotr.machine import kept_waiting
from fedlotr.said import MOST, hearing, say
from fedlotr.simulate import main
from tests.support import read_run


def test_a_warning_is_told_in_three_places_and_by_a_run_that_goes_on(
    tiny_bert: Path, animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--model", tiny_bert, "--data", animals, "--clients", 4, "--sample", 2, "--out", out, "--batch-size", 1]
    words += ["--local-steps", 1, "--engine", "local", "--threads", 1, "--public-examples", 8]
    assert main([*map(str, words), "--rounds", "1"]) == 0
    wanted = "4 of 4 clients take steps of fewer tokens"
    assert f"warning: {wanted}" in capsys.readouterr().err
    assert wanted in (out / "log.txt").read_text(encoding="utf-8")
    (first,) = read_run(out)[0]["warnings"]
    assert first.startswith(wanted)

    assert main([*map(str, words), "--rounds", "2", "--resume"]) == 0
    again, schedule = read_run(out)[0]["warnings"]
    assert again == first and schedule.startswith("--rounds was 1: the cosine schedule")
    assert schedule in (out / "report.html").read_text(encoding="utf-8")


def test_a_line_counts_once_and_their_number_has_an_end() -> None:
    shown: list[str] = []
    with hearing(shown.append) as heard:
        for at in range(MOST + 5):
            say(f"line {at}")
            say(f"line {at}")
    say("nobody hears this")
    assert len(shown) == 2 * (MOST + 5) and heard.lines == [f"line {at}" for at in range(MOST)]


def test_a_round_that_is_kept_from_the_cores_says_so_once_and_what_one_thread_would_do(
    tiny_bert: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by other work: clocks by which each look at the time of day takes five seconds, of which one is computed."""
    words = f"--data {animals} --model {tiny_bert} --clients 2 --rounds 3 --rank 4 --public-examples 8 --engine local"
    words += f" --dtype float32 --threads 2 --out {tmp_path / 'run'}"
    now = [0.0]

    class Clocks:
        def monotonic(self) -> float:
            now[0] += 5.0
            return now[0]

        def process_time(self) -> float:
            return now[0] / 5.0

    monkeypatch.setattr("fedlotr.run.rounds.time", Clocks())
    assert main(words.split()) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    (line,) = [line for line in summary["warnings"] if "busy" in line]
    assert line.startswith("round 1 took 5.0 s, of which this process computed for 1.0: ") and "--threads 1" in line
    assert capsys.readouterr().err.count("warning: round 1 took 5.0 s") == 1


@pytest.mark.parametrize(("seconds", "computed", "waiting"), [(30, 3, True), (30, 11, False), (0.9, 0.0, False)])
def test_a_round_counts_as_kept_waiting_from_three_times_its_computing_on(
    seconds: float, computed: float, waiting: bool
) -> None:
    assert kept_waiting(seconds, computed) is waiting
