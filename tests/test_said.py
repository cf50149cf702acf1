"""What a user must know of a run is on the console, in log.txt and in summary.json, and stays there on resume."""

from pathlib import Path

import pytest

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
