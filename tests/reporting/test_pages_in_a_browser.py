"""Report and comparison in headless Chromium, the network off: light, dark and as wide as a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlotr import cli
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
