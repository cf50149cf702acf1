"""What a person sees of a run."""

import io
import re
from pathlib import Path
from typing import Any

import pytest

from fedlotr.configuration import SimulationConfig
from fedlotr.reporting.console import SHOWN_CLIENTS, Console, readable_bytes

FACTS: dict[str, Any] = {
    "parameters": 22_713_216,
    "trained_adapter": 9216,
    "trained_head": 3080,
    "train_examples": 9876,
    "test_examples": 1111,
    "labels": ["text", "numeric"],
    "task": "classification",
    "basis": "update",
    "strategy": "exact-average",
}
ROUND = {
    "round": 1,
    "loss": 1.25,
    "accuracy": 0.5,
    "clients": 10,
    "failed": 0,
    "bytes_up": 491_840,
    "bytes_down": 7_127_360,
    "aggregation_error": 3.2e-8,
    "train_seconds": 3.0,
    "evaluate_seconds": 1.5,
}
SUMMARY: dict[str, Any] = {
    "final": {"accuracy": 0.71, "loss": 0.9},
    "best": {"round": 2, "accuracy": 0.72},
    "communication": {
        "upload_payload_bytes_per_client_round": 49_184.0,
        "download_payload_bytes_per_client_round": 49_184.5,
        "one_off_bytes_per_client": 2_654_208,
        "total_payload_bytes": 123_456_789,
        "total_wire_bytes": 125_456_789,
    },
    "aggregation_error_max": 3.2e-8,
    "timing": {"seconds_total": 97.23, "base_model_loads": 2, "workers": 2},
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_forced_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def partition(clients: int) -> list[dict[str, Any]]:
    return [
        {"client": index, "examples": 10 + index, "labels": {"text": 10, "numeric": index}} for index in range(clients)
    ]


def shown(stream: io.StringIO, clients: int = 3, quiet: bool = False) -> str:
    with Console(quiet=quiet, stream=stream) as console:
        console.stage("reading pydoc")
        console.begin(Path("runs/brave-otter"))
        console.start(SimulationConfig(rounds=2), {**FACTS, "partition": partition(clients)})
        console.round(ROUND)
        console.round({**ROUND, "round": 2, "failed": 1, "loss": None, "accuracy": None})
        console.finish(SUMMARY)
    return stream.getvalue()


def test_piped_output_is_plain_with_one_line_a_round() -> None:
    text = shown(io.StringIO())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    end = "up 492 kB  down 7.13 MB  aggregation error 3.2e-08  4.5 s"
    assert [line for line in text.splitlines() if line.startswith("round ")] == [
        f"round 1/2  loss 1.2500  accuracy 0.5000  10 clients  {end}",
        f"round 2/2  10 clients  1 FAILED  {end}",
    ]
    assert "left" not in text


def test_a_terminal_gets_a_bar_that_is_taken_away_again() -> None:
    text = shown(Terminal())
    assert "1/2" in text and "left" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0  # the cursor is hidden, then shown again
    assert "left" not in text[text.rfind("\x1b[?25h") :]


def test_an_error_takes_the_bar_away_too() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Console(stream=stream) as console:
        console.start(SimulationConfig(), {})
        console.round(ROUND)
        raise KeyboardInterrupt
    text = stream.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_quiet_prints_nothing_but_knows_where_the_run_is() -> None:
    for stream in (io.StringIO(), Terminal()):
        assert shown(stream, quiet=True) == ""
    console = Console(quiet=True)
    console.begin(Path("runs/brave-otter"))
    console.start(SimulationConfig(), FACTS)
    console.round({**ROUND, "round": 4})
    assert (str(console.run_dir), console.finished_rounds) == ("runs/brave-otter", 4)


def test_the_header_says_what_runs() -> None:
    text = shown(io.StringIO())
    for words in (
        "all-MiniLM-L6-v2, 22,713,216 parameters",
        "pydoc, classification, 9,876 examples to train, 1,111 to test, 2 labels",
        "fed-sb, rank 16, basis update, strategy exact-average",
        "12,296 numbers (9,216 + 3,080 in the head), 0.05% of the model",
        "10 of 50 a round, 2 rounds, dirichlet:0.5, at most 64 examples each",
    ):
        assert words in text


def test_few_clients_are_all_in_the_table_and_many_are_summed_up() -> None:
    def rows(text: str) -> list[list[str]]:
        return [
            line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│") and line.count("│") > 3
        ]

    few = [[cell.strip() for cell in row] for row in rows(shown(io.StringIO(), clients=3))]
    assert few == [["0", "10", "10", "0"], ["1", "11", "10", "1"], ["2", "12", "10", "2"]]
    many = [[cell.strip() for cell in row] for row in rows(shown(io.StringIO(), clients=51))]
    assert len(many) == SHOWN_CLIENTS + 4
    assert many[-4:] == [
        ["43 more", "...", "...", "..."],
        ["least", "10", "10", "0"],
        ["median", "35", "10", "25"],
        ["most", "60", "10", "50"],
    ]


def test_many_labels_are_counted_instead_of_shown() -> None:
    stream = io.StringIO()
    labels = [f"intent-{number}" for number in range(77)]
    clients = [{"client": "a", "examples": 3, "labels": {"intent-1": 2, "intent-5": 1}}]
    Console(stream=stream).start(SimulationConfig(), {"labels": labels, "partition": clients})
    assert "intent-1" not in stream.getvalue()
    assert re.search(r"│ a +│ +3 │ +2 │", stream.getvalue())


def test_the_closing_table_has_the_whole_bill() -> None:
    text = shown(io.StringIO())
    for name, value in {
        "accuracy, final": "0.7100",
        "accuracy, best": "0.7200 (round 2)",
        "upload a client and round": "49.2 kB (49,184 B)",
        "download a client and round": "49.2 kB (49,184.5 B)",
        "one-off download a client": "2.65 MB (2,654,208 B)",
        "all payload": "123 MB (123,456,789 B)",
        "all bytes on the wire": "125 MB (125,456,789 B)",
        "largest aggregation error": "3.2e-08",
        "failed clients": "1",
        "seconds": "97.2",
        "loads of the frozen model": "2 by the server and 2 workers",
    }.items():
        assert re.search(rf"│ {re.escape(name)} +│ +{re.escape(value)} │", text), name
    assert "adapter  runs/brave-otter/adapter" in text


def test_the_closing_table_names_who_failed_and_how_and_stays_short() -> None:
    stream = io.StringIO()
    failures = {"not finite": {"7": 1}, "KeyError": {"12": 3, "40": 1}, "wrong shape": {str(k): 1 for k in range(1008)}}
    Console(stream=stream).finish({"failed_clients": 1013, "failures": failures})
    for name, value in {
        "failed clients": "1,013",
        "  not finite": "client 7",
        "  KeyError": "clients 12 (3 rounds), 40",
        "  wrong shape": "clients 0, 1, 2, 3, 4, 5 and 1,002 more",
    }.items():
        assert re.search(rf"│ {re.escape(name)} +│ +{re.escape(value)} │", stream.getvalue()), name


def test_markup_in_names_is_shown_as_it_is() -> None:
    stream = io.StringIO()
    Console(stream=stream).stage("reading data[red]/x :smile:")
    assert stream.getvalue() == "reading data[red]/x :smile:\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (49_184, "49.2 kB"), (999_999, "1 MB"), (1_234_567, "1.23 MB")],
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text
