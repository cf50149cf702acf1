"""Report, comparison and the page of a run that goes on, in headless Chromium: light, dark and as wide as a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlotr import cli
from tests.commands.test_watch import served
from tests.reporting.test_compare import made
from tests.reporting.test_report import large_run

pytestmark = [pytest.mark.slow, pytest.mark.serial]
VIEWS = {"light": ("light", 1200), "dark": ("dark", 1200), "phone": ("light", 375)}
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'dev')")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    large = large_run(folder / "runs" / "large", rounds=500, clients=5000, sampled=20)
    small = large_run(folder / "runs" / "small", rounds=6, clients=12, sampled=4)
    comparison = folder / "compare.html"
    assert cli.main(["report", str(large)]) == cli.main(["report", str(small)]) == 0
    assert cli.main(["compare", str(large), str(small), "--out", str(comparison)]) == 0
    return {"large": large / "report.html", "small": small / "report.html", "comparison": comparison}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["large", "small", "comparison"])
def test_pages_open_offline_without_a_word_on_the_console(
    browser: Any, pages: dict[str, Path], name: str, view: str
) -> None:
    scheme, width = VIEWS[view]
    context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": width, "height": 800})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.goto(pages[name].as_uri(), wait_until="load")
    assert not said
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    assert all(
        page.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height > 30)")
    )
    table = page.locator("figure:has(svg) details").first
    assert not table.locator("tbody tr").first.is_visible()
    table.locator("summary").click()
    assert table.locator("tbody tr").first.is_visible()
    context.close()


def test_a_comparison_filters_sorts_and_hides_columns_and_is_whole_without_its_script(
    browser: Any, tmp_path: Path
) -> None:
    for name, accuracy, seed, method in (("a", 0.9, 0, "lora"), ("b", 0.7, 1, "lora"), ("c", 0.8, 1, "lotr")):
        made(tmp_path / "runs" / name, accuracy, 1000, seed=seed, method=method, lr=accuracy / 100)
    made(tmp_path / "runs" / "d", 0.5, 10, seed=0, method="head")
    path = tmp_path / "compare.html"
    assert cli.main(["compare", str(tmp_path / "runs"), "--out", str(path)]) == 0
    plain = browser.new_context(offline=True, java_script_enabled=False).new_page()
    plain.goto(path.as_uri())
    assert plain.locator("#runs tbody tr:visible").count() == 4 and plain.locator("button, input").count() == 0
    page = browser.new_context(offline=True).new_page()
    page.goto(path.as_uri())

    def shown() -> list[str]:
        return list(page.locator("#runs tbody tr:visible td:first-child").all_inner_texts())

    def titles(of: str) -> list[str]:
        return [name.strip() for name in page.locator(f"#{of} thead th:visible").all_inner_texts()]

    assert shown() == ["a", "b", "c", "d"]
    for words, left in (("LO seed=1", "bc"), ("seed=", ""), ("lotr", "c"), ("lr=0.009", "a"), ("", "abcd")):
        page.fill("input[type=search]", words)
        assert shown() == list(left)
        assert titles("differing")[1:] == list(left), "what differs is of the same runs"
    sort = page.locator("#runs th button")
    for name, order in (
        ("accuracy", "dbca"),
        ("accuracy", "acbd"),
        ("lr", "bcad"),
        ("method", "dbac"),
        ("run", "abcd"),
    ):
        sort.get_by_text(name, exact=True).click()
        assert shown() == list(order), "numbers as numbers, and what is missing last"
    page.locator("#runs summary", has_text="Columns").click()
    page.get_by_label("loss", exact=True).uncheck()
    assert "loss" not in titles("runs") and "model" in titles("runs")
    page.get_by_role("button", name="those that differ").click()
    assert {"run", "seed", "method", "lr", "bytes"} <= set(titles("runs")) and "model" not in titles("runs")
    page.get_by_role("button", name="all").click()
    assert {"loss", "model"} <= set(titles("runs"))


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_of_a_run_that_goes_on_follows_it_and_stays_when_nobody_answers(
    browser: Any, tmp_path: Path, view: str
) -> None:
    run = made(tmp_path / "run", 0.7, 1000)
    metrics, summary = run / "metrics.jsonl", run / "summary.json"
    rows, known = metrics.read_text(encoding="utf-8"), summary.read_text(encoding="utf-8")
    summary.unlink()
    metrics.write_text(rows[: rows.index("\n") + 1], encoding="utf-8")
    scheme, width = VIEWS[view]
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    with served(run) as address:
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.locator("#loss summary").click()
        assert page.locator("#loss tbody tr:visible").count() == 1
        metrics.write_text(rows, encoding="utf-8")
        summary.write_text(known, encoding="utf-8")
        page.get_by_text("Finished: 2 of 2 rounds.").wait_for()
        assert page.locator("#loss tbody tr:visible").count() == 2, "a table that was open is open"
        assert not said
    page.get_by_text("fedlotr watch does not answer").wait_for()
    assert page.locator("#loss tbody tr:visible").count() == 2
    context.close()
