"""The built-in data set keeps what its description promises, on whatever interpreter runs this."""

import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedlotr.data.pydoc import PARTS, build_pydoc
from fedlotr.errors import InputError

Built = tuple[list[dict[str, Any]], tuple[str, ...]]


@pytest.fixture(scope="module")
def built() -> Built:
    return build_pydoc()


def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))


def test_there_are_some_ten_thousand_paragraphs_of_eight_parts(built: Built) -> None:
    rows, names = built
    counts = Counter(row["label"] for row in rows)
    assert names == tuple(PARTS)
    assert sorted(counts) == list(range(8))
    assert min(counts.values()) > 50
    if sys.version_info < (3, 15):  # a distribution may leave out tkinter, idlelib and turtle
        assert 8_000 < len(rows) < 13_000
        assert 120 < len({row["client"] for row in rows}) < 180


def test_every_paragraph_is_distinct_text_of_six_to_eighty_words(built: Built) -> None:
    texts = [str(row["text"]) for row in built[0]]
    assert len(set(texts)) == len(texts)
    assert all(6 <= len(text.split()) <= 80 for text in texts)
    assert not [text for text in texts if ">>>" in text.split() or text != " ".join(text.split())]


def test_it_is_the_same_every_time(built: Built) -> None:
    assert build_pydoc() == built


def test_rows_are_in_the_order_of_modules(built: Built) -> None:
    clients = [str(row["client"]) for row in built[0]]
    assert clients == sorted(clients)


def test_no_module_is_in_two_parts() -> None:
    modules = [module for part in PARTS.values() for module in part.split()]
    assert len(modules) == len(set(modules))


def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(tmp_path, monkeypatch, {"heapq.py": '"""A module that cannot be imported at all."""\nraise SystemExit'})
    assert len(build_pydoc()[0]) == 1


def test_docstrings_are_found_wherever_they_stand_in_source_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = '''
"""The module speaks before all of the others."""
if True:
    class Deep:
        """The class is the second one to speak."""
        def method(self):
            """Too short."""
            try:
                pass
            except ValueError:
                def handler():
                    """The handler speaks within a method of it.

                    >>> print("code is no text", "and so it is left out")

                    The module speaks before   all of
                    the others.
                    """
text = """A mere string is no docstring of anything."""
'''
    library(tmp_path, monkeypatch, {"heapq.py": source})
    rows, names = build_pydoc()
    assert [row["text"] for row in rows] == [
        "The module speaks before all of the others.",
        "The class is the second one to speak.",
        "The handler speaks within a method of it.",
    ]
    assert {row["client"] for row in rows} == {"heapq"}
    assert {names[int(row["label"])] for row in rows} == {"data types"}


def test_tests_broken_files_and_modules_without_a_part_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = '"""Words of {} to fill this paragraph up."""'
    library(
        tmp_path,
        monkeypatch,
        {
            "email/__init__.py": words.format("the package"),
            "email/mime/text.py": words.format("its submodule"),
            "email/test/test_it.py": words.format("its tests"),
            "email/broken.py": "def (:",
            "_pydecimal.py": words.format("the private twin"),
            "site-packages/json/__init__.py": words.format("somebody else"),
            "unheard_of.py": words.format("no part"),
        },
    )
    rows, _ = build_pydoc()
    assert [(row["client"], str(row["text"])[9:-27]) for row in rows] == [
        ("decimal", "the private twin"),
        ("email", "the package"),
        ("email", "its submodule"),
    ]


def test_an_interpreter_without_sources_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, monkeypatch, {"heapq.pyc": ""})
    with pytest.raises(InputError, match=r"--data pydoc: no sources .* give a folder"):
        build_pydoc()
