"""What a person sees of a run."""

import io
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich.console
from rich.cells import cell_len

from fedlotr import cli
from fedlotr.adapters import METHODS
from fedlotr.commands import doctor, grid
from fedlotr.config.configuration import SimulationConfig
from fedlotr.reporting.callbacks import FinishEvent, RoundEvent, StartEvent
from fedlotr.reporting.console import SHOWN_CLIENTS, Console, readable_bytes
from fedlotr.reporting.fitting import fits, show_table
from fedlotr.reporting.grid_table import Line

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


def start(console: Console, config: SimulationConfig, facts: dict[str, Any]) -> None:
    console.on_start(StartEvent(0, config, facts))


def show_round(console: Console, row: dict[str, Any]) -> None:
    console.on_round(RoundEvent(row["round"], row, Path()))


def finish(console: Console, summary: dict[str, Any]) -> None:
    console.on_finish(FinishEvent(1, summary))


def shown(stream: io.StringIO, clients: int = 3, quiet: bool = False) -> str:
    with Console(quiet=quiet, stream=stream) as console:
        console.stage("reading pydoc")
        console.begin(Path("runs/brave-otter"))
        config = SimulationConfig(rounds=2, partition="dirichlet:0.5")
        start(console, config, {**FACTS, "partition": partition(clients)})
        show_round(console, ROUND)
        show_round(console, {**ROUND, "round": 2, "failed": 1, "loss": None, "accuracy": None})
        finish(console, SUMMARY)
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
        start(console, SimulationConfig(), {})
        show_round(console, ROUND)
        raise KeyboardInterrupt
    text = stream.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_quiet_prints_nothing_but_knows_where_the_run_is() -> None:
    for stream in (io.StringIO(), Terminal()):
        assert shown(stream, quiet=True) == ""
    console = Console(quiet=True)
    console.begin(Path("runs/brave-otter"))
    start(console, SimulationConfig(), FACTS)
    show_round(console, {**ROUND, "round": 4})
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
    start(Console(stream=stream), SimulationConfig(), {"labels": labels, "partition": clients})
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
    finish(Console(stream=stream), {"failed_clients": 1013, "failures": failures})
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


# --- 80 columns -------------------------------------------------------------------------------------------------------

WIDTH = 80


def whole(text: str, *given: str) -> None:
    """Every word that was given is on one line, and no line is too long unless it is one long word."""
    assert not [line for line in text.splitlines() if cell_len(line) > WIDTH and len(line.split()) > 2]
    lost = [word for part in given for word in part.split() if word not in text]
    assert not lost, f"{lost} in\n{text}"


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.fixture(params=["terminal", "pipe"])
def stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    return Terminal() if request.param == "terminal" else io.StringIO()


def test_header_and_tables_of_a_run_fit_eighty_columns(stream: io.StringIO) -> None:
    path = f"/data/{'x' * 90}/model"
    labels = ["an_intent_with_a_name_of_its_own", "another_intent_with_such_a_name", "ein_anderer_Wunsch"]
    clients = [
        {"client": f"hospital of the district of {number}", "examples": 10**9, "labels": {labels[0]: 10**6}}
        for number in range(30)
    ]
    reason = f"strategy {'strategies_of_mine.' * 3}Reduce does not say that it averages"
    failures = {"a.module.of.the.callers.own.ClientIsTiredError": {f"hospital-{number}": 2 for number in range(9)}}
    summary = {**SUMMARY, "aggregation_error_max": None, "aggregation_error_reason": reason, "failures": failures}
    summary["communication"] = {"total_wire_bytes": 12_345_678_901_234, "total_payload_bytes": 9_876_543_210_987}
    with Console(stream=stream) as console:
        start(console, SimulationConfig(model=path, rounds=1), {**FACTS, "labels": labels, "partition": clients})
        finish(console, summary)
    text = bare(stream.getvalue())
    whole(text, path, *(f"hospital of…istrict of {number}" for number in range(8)), reason, *failures)
    assert labels[0] not in text and "12.3 TB (12,345,678,901,234 B)" in text and "1,000,000,000" in text


def test_a_round_and_its_bar_fit_a_terminal_of_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    stream = Terminal()
    with Console(stream=stream) as console:
        start(console, SimulationConfig(rounds=1000), {})
        console.warn("4 of 4 clients take steps of fewer tokens than the rank: one such gradient names its tokens")
        show_round(console, {**ROUND, "round": 999, "failed": 12, "bytes_up": 123_456_789_012})
    text = bare(stream.getvalue()).replace("\r", "\n")
    whole(text, "aggregation error 3.2e-08", "gradient names its tokens")
    (bar,) = {line for line in text.splitlines() if "999/1000" in line and "━" in line and "loss" in line}
    assert "loss 1.2500  accuracy 0.5000  123 GB" in bar and bar.endswith("left")


ADVICE = "a path: /var/lib/" + "y" * 70
LINES = [
    Line("a row of a rather long name with method=lotr", {}, 3, {}, {0: "it failed"}),
    Line("another-row-whose-name-is-of-one-single-word", {}, 3, {}, {}),
]


@pytest.mark.parametrize(
    ("show", "given"),
    [
        (lambda: cli.main(["ls", "methods"]), ["r·d_out, then r·d_in", "seed and hash, 40 bytes", *METHODS]),
        (lambda: cli.main(["ls", "strategies"]), ["fedlotr.strategies.server_optimizers:FedAdagrad", "certified"]),
        (lambda: cli.main(["cost", "--model", "mistral-7b", "--rank", "200"]), ["one-off", *METHODS]),
        (lambda: doctor._print([doctor.Finding("packages", "warning", "torch " * 30, ADVICE)], []), [ADVICE]),
        (lambda: grid._print(LINES), ["a row of a rather long name with method=lotr", LINES[1].name]),
    ],
    ids=["methods", "strategies", "cost", "doctor", "grid"],
)
def test_every_table_of_the_command_line_fits_eighty_columns(
    show: Callable[[], object], given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setattr(sys, "stdout", stream)
    show()
    whole(bare(stream.getvalue()), *given)


def test_a_table_has_the_width_that_its_words_need_or_becomes_paragraphs() -> None:
    """By hand: 'longest' and 'b' with two frames of 3 and one of 1 are 15 cells."""
    rows = [["longest of all", "b b b"]]
    assert fits(rows, 15) and not fits(rows, 14)
    for width, wanted in (
        (15, ["┌─────────┬───┐", "│ longest │ b │", "│ of all  │ b │", "│         │ b │", "└─────────┴───┘"]),
        (14, ["longest of all", "  second: b b", "  b"]),
    ):
        stream = io.StringIO()
        console = rich.console.Console(file=stream, width=width)
        show_table(console, [] if width == 15 else ["first", "second"], rows)
        assert stream.getvalue().splitlines() == wanted


# --- notebooks --------------------------------------------------------------------------------------------------------


def test_a_notebook_has_one_output_that_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    handles: list[object] = []

    class Handle:
        def update(self, forms: dict[str, str], raw: bool) -> None:
            shown.append(forms)

    def display(forms: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(forms)
        handles.append(Handle())
        return handles[0]  # type: ignore[return-value]

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a kernel has it
    with Console() as console:
        console.stage("reading <data>")
        start(console, SimulationConfig(rounds=2), FACTS)
        show_round(console, ROUND)
        show_round(console, {**ROUND, "round": 2})
        bar = shown[-1]["text/plain"].splitlines()[-1]
        finish(console, SUMMARY)
    assert len(handles) == 1 and len(shown) > 5
    assert re.match(r"rounds ━+ 2/2 loss 1.2500  accuracy 0.5000  15.2 MB", bar)
    last = shown[-1]
    assert "left" not in last["text/plain"] and "\x1b" not in last["text/plain"]
    assert [line[:9] for line in last["text/plain"].splitlines() if line.startswith("round ")] == [
        "round 1/2",
        "round 2/2",
    ]
    assert "reading &lt;data&gt;" in last["text/html"] and "Result" in last["text/html"]
    assert "monospace" in last["text/html"], "tables hold together whatever font the page has"
    shown.clear()
    with Console(quiet=True) as console:
        start(console, SimulationConfig(rounds=2), FACTS)
        show_round(console, ROUND)
    assert not shown
