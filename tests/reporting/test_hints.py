"""What to try next: every hint applies where a run's own figures call for it, and not beside that."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlotr.reporting.arrivals import Amount, Arrivals
from fedlotr.reporting.hints import HINTS, hints_of
from fedlotr.reporting.report import report_page, write_report
from fedlotr.reporting.run_record import RunRecord, Traffic, read_run
from fedlotr.reporting.spent import bytes_of, seconds_of
from tests.reporting.test_compare import made
from tests.reporting.test_report import Page

NOBODY = Traffic({}, {})
CORES = {"layers": [["layer", "attention", 8, 8, None]], "heads": [16]}
"""One layer and a head: at rank 2 an upload of 4 + 16 numbers."""
CODED = {"method": "fed-sb", "rank": 2, "codec": "int8", "broadcast_codec": "float32", "clients": 4}


def told(
    losses: list[float | None] = [],  # noqa: B006 (it is only read)
    *,
    initial: float | None = None,
    every: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    **config: Any,
) -> RunRecord:
    """A finished run with these losses after its rounds. every: what each row has besides."""
    rows: list[Any] = [
        {"round": at, "loss": loss, "bytes_up": 60, "bytes_down": 40, "evaluate_seconds": 1.0, "train_seconds": 4.0}
        | (every or {})
        for at, loss in enumerate(losses, 1)
    ]
    about: Any = {"rounds": len(rows), "initial": {} if initial is None else {"loss": initial}} | (summary or {})
    return RunRecord(Path("run"), {"rounds": len(rows), "lr": 0.01, **config}, rows, about, facts or {})  # type: ignore[arg-type]


def in_time(losses: list[float | None], outcomes: dict[str, int], **given: Any) -> RunRecord:
    """The same in virtual time. outcomes: how many messages came to what."""
    run = told(losses, **given)
    run.__dict__["arrivals"] = Arrivals({name: Amount(count) for name, count in outcomes.items()})
    return run


def asked(*clients: int) -> Traffic:
    return Traffic({}, {client: {("down", "broadcast"): 1} for client in clients})


def paid(size: float, lost: float | None, **config: Any) -> RunRecord:
    """A run that uploads so many bytes a client and round, of which coding loses this share."""
    summary = {"communication": {"upload_payload_bytes_per_client_round": size}}
    return told([1.0], every={"transport_error": lost}, summary=summary, facts={"shapes": CORES}, **CODED | config)


FAILED = {"clients": 10, "failed": 1, "failures": {"3": "raised"}}
CASES: dict[str, tuple[tuple[RunRecord, Traffic], tuple[RunRecord, Traffic], str]] = {
    "not finite": ((told([2.0, None]), NOBODY), (told([2.0, 1.9]), NOBODY), "after round 2 was not finite"),
    "above the start": (
        (told([2.5, 2.2], initial=2.1), NOBODY),
        (told([2.5, 2.0], initial=2.1), NOBODY),
        "ends at 2.2, above the 2.1",
    ),
    "turned": (
        (told([2.0, 1.0, 1.2, 1.3], initial=2.2), NOBODY),
        (told([2.0, 1.0, 1.1, 1.1], initial=2.2), NOBODY),
        "lowest after round 2, 1, and is 1.3 at the end",
    ),
    "still falling": (
        (told([1.8, 1.6, 1.5, 1.4], initial=2.0), NOBODY),
        (told([1.6, 1.2, 1.1, 1.1], initial=2.0), NOBODY),
        "still fell by 0.1 a round over the last 2 rounds, and by 0.2 before",
    ),
    "never asked": (
        (told([1.0], clients=10), asked(*range(9))),
        (told([1.0], clients=11), asked(*range(10))),
        "1 of 10 clients never took part",
    ),
    "fewer bits": (
        (paid(4 + 2 * 2 + 20, 0.01), NOBODY),
        (paid(4 + 2 * 2 + 20, 0.2), NOBODY),
        "uploads 28 B a round in int8, which lost at most 0.01 of a round's mean update; by the formulas of "
        "fedlotr cost it would be 18 B in int4",
    ),
    "failures": (
        (told([2.0, 1.0], every=FAILED), NOBODY),
        (told([2.0, 1.0], every={**FAILED, "clients": 21}), NOBODY),
        "2 of 20 updates failed (10.0%), 2 of them: raised",
    ),
    "evaluation": (
        (told([2.0, 1.0], every={"evaluate_seconds": 5.0}), NOBODY),
        (told([2.0, 1.0], every={"evaluate_seconds": 4.0}), NOBODY),
        "2 evaluations took 10 s, more than all training, 8 s",
    ),
    "late": (
        (in_time([1.0], {"used": 9, "late": 1}, deadline=5), NOBODY),
        (in_time([1.0], {"used": 10, "late": 1}, deadline=5), NOBODY),
        "1 of 10 messages came too late (10.0%)",
    ),
    "in vain": (
        (told([1.0], every={"bytes_in_vain": 26}, mode="over-select"), NOBODY),
        (told([1.0], every={"bytes_in_vain": 25}, mode="over-select"), NOBODY),
        "26 B of 100 B were sent in vain (26.0%)",
    ),
    "stale": (
        (told([1.0], every={"used": 4, "staleness_mean": 2.5}, mode="async"), NOBODY),
        (told([1.0], every={"used": 4, "staleness_mean": 2.0}, mode="async"), NOBODY),
        "The 4 updates that were used were 2.5 server steps old",
    ),
    "unspent": (
        (told([1.0], every={"epsilon": 3.0}, epsilon=8, privacy="client"), NOBODY),
        (told([1.0], every={"epsilon": 7.9}, epsilon=8, privacy="client"), NOBODY),
        "Of an epsilon of 8, 3 was spent in 1 rounds",
    ),
}
"""Hint -> where it applies, where it does not, and what it says."""


def test_every_hint_is_tried() -> None:
    assert set(CASES) == set(HINTS)


@pytest.mark.parametrize("name", CASES)
def test_a_hint_applies_where_a_figure_calls_for_it_and_not_beside_that(name: str) -> None:
    applies, does_not, words = CASES[name]
    assert HINTS[name].seen(*does_not) is None
    assert HINTS[name].seen(*applies) is not None
    said = [seen for seen, _ in hints_of(*applies)]
    assert any(words in seen for seen in said), said
    attempt = next(attempt for seen, attempt in hints_of(*applies) if words in seen)
    assert attempt.startswith(("a ", "more ", "--", "log.txt")) and "{" not in attempt


@pytest.mark.parametrize(
    "run",
    [
        paid(29, 0.01),  # not what the formula gives: something else is sent too
        paid(28, None),
        paid(28, 0.01, privacy="example"),
        paid(28, 0.01, engine="flower"),
        paid(18, 0.01, codec="int4"),
    ],
    ids=["other bytes", "no certificate", "private", "no memory", "few bits already"],
)
def test_no_codec_is_named_that_the_figures_do_not_bear(run: RunRecord) -> None:
    assert HINTS["fewer bits"].seen(run, NOBODY) is None


def test_of_hidden_clients_no_hint_tells_who_came() -> None:
    run = told(
        [2.0, 1.0],
        every=FAILED | {"evaluate_seconds": 9.0, "bytes_up": None, "bytes_down": None},
        privacy="client",
        clients=10,
    )
    assert hints_of(run, NOBODY) == []
    assert seconds_of(run) == {}


def test_faults_on_purpose_are_no_failures_to_look_into() -> None:
    assert HINTS["failures"].seen(told([2.0], every=FAILED, fault="nan:0.1"), NOBODY) is None


def test_seconds_and_bytes_are_shared_out_without_a_rest() -> None:
    run = told([2.0, 1.0], summary={"timing": {"seconds_total": 12.5}})
    assert seconds_of(run) == {"training": 8.0, "evaluation": 2.0, "the rest": 2.5}
    kinds = {("up", "update"): (1, 1, 5), ("down", "broadcast"): (1, 1, 7), ("down", "basis"): (1, 1, 90)}
    assert bytes_of(Traffic({**kinds, ("down", "control"): (1, 1, 3)}, {})) == {"up": 5, "down": 10, "down, bases": 90}
    unfinished = replace(run, summary={})  # type: ignore[arg-type]
    assert seconds_of(unfinished) == {"training": 8.0, "evaluation": 2.0}


def test_the_page_ends_with_them(tmp_path: Path) -> None:
    run = made(tmp_path / "run", 0.7, 100, clients=20)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert [row["seen"] for row in page.rows("hints")] == ["19 of 20 clients never took part."]
    assert page.rows("bytes-parts") == [
        {"part": "up", "bytes": 0, "per cent": 0.0},
        {"part": "down", "bytes": 200, "per cent": 100.0},
        {"part": "down, bases", "bytes": 0, "per cent": 0.0},
    ]
    quiet = made(tmp_path / "quiet", 0.7, 100)
    assert "Nothing in this run&#39;s own numbers asks for another setting." in report_page(read_run(quiet))
