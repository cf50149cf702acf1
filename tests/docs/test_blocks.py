"""Every fenced block of README and of the documentation's pages runs as a reader would run it: in order, in one folder.

A page says what is what: ```python is run, all of a page in one process and namespace, so that later blocks see what
earlier ones made; a block of any language with title="x.py" is first of all written to that file; ```console holds
lines `$ command`, which must end with 0 or with what stands in front of the block, <!-- exit: 2 -->; ```text and
```mermaid are not code. A block that cannot be run says why: <!-- not run: REASON -->.
"""

import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests import forks

pytestmark = [pytest.mark.slow, pytest.mark.serial]

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FEW = 5
"""Blocks that may go without being run, of all pages together."""
DRIVER = "import sys; from tests.docs.run_blocks import main; main()"
FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,})[ \t]*(?P<info>[^`\n]*)$")
COMMENT = re.compile(r"<!-- *(?P<key>not run|exit): *(?P<value>.+?) *-->")
TEXT = {"text", "mermaid"}
DATA = {"yaml", "json", "csv", "toml"}
SECONDS = 600


@dataclass(frozen=True)
class Block:
    """language, title: of its fence. line: of its first line in the page. exit: that its commands end with."""

    language: str
    title: str | None
    line: int
    text: str
    exit: int = 0
    not_run: str | None = None


def blocks(page: Path) -> list[Block]:
    """Those of a page, in their order."""
    found: list[Block] = []
    said: dict[str, str] = {}
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if comment := COMMENT.search(line):
            said[comment["key"]] = comment["value"]
        elif (fence := FENCE.match(line)) is None:
            said = said if not line.strip() else {}
        else:
            body: list[str] = []
            for _, inside in lines:
                if inside.strip() == fence["fence"]:
                    break
                body.append(inside)
            else:
                raise AssertionError(f"{page.name}:{number}: this block has no end")
            language, _, rest = fence["info"].strip().partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            text = textwrap.dedent("\n".join(body)) + "\n"
            found.append(
                Block(language, title and title[1], number + 1, text, int(said.get("exit", "0")), said.get("not run"))
            )
            said = {}
    return found


def steps(page: Path) -> list[dict[str, object]]:
    """What is to be done for a page; what nothing can be done with is a mistake of the page."""
    found: list[dict[str, object]] = []
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.not_run is not None:
            continue
        if block.title is not None:
            found.append({"do": "write", "file": block.title, "text": block.text, "where": where})
        elif block.language == "python":
            found.append({"do": "python", "text": block.text, "page": str(page), "line": block.line, "where": where})
        elif block.language == "console":
            commands = _commands(block, where)
            found += [{"do": "console", "command": one, "exit": block.exit, "where": where} for one in commands]
        elif block.language in DATA:
            _reads(block, where)
        else:
            assert block.language in TEXT, f"{where}: nothing is known of a block in {block.language!r}"
    return found


def _commands(block: Block, where: str) -> list[str]:
    """Those behind `$ `, with what a backslash continues; other lines show what is said."""
    found: list[str] = []
    open_ended = False
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
        elif open_ended:
            found[-1] += "\n" + line
        open_ended = bool(found) and found[-1].endswith("\\") and (line.startswith("$ ") or open_ended)
    assert found, f"{where}: a console block without a line that begins with '$ '"
    return found


def _reads(block: Block, where: str) -> None:
    try:
        {"yaml": yaml.safe_load, "json": json.loads}.get(block.language, str)(block.text)
    except (yaml.YAMLError, ValueError) as error:
        raise AssertionError(f"{where}: not {block.language}: {error}") from None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    todo = steps(page)
    if not todo:
        return
    place = tmp_path / "reader"
    place.mkdir()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(todo), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = forks.server(*forks.RUN).start(DRIVER, plan, cwd=place, PATH=path, HF_HUB_OFFLINE="1")
    code = run.wait(SECONDS)
    said, wrong = run.said()
    print(said)
    assert code == 0, f"{said[-3000:]}\n{wrong[-6000:]}"


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left_out = [
        f"{page.relative_to(ROOT)}:{block.line}: {block.not_run}"
        for page in PAGES
        for block in blocks(page)
        if block.not_run
    ]
    print("\n".join(left_out))
    assert len(left_out) <= FEW, "\n".join(left_out)


def test_the_links_of_readme_lead_somewhere_and_it_is_short() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    places = re.findall(r"\]\(([^)#:\s]+)[^)]*\)", text)
    assert places and not [place for place in places if not (ROOT / place).exists()]
    assert len(text.splitlines()) <= 150
