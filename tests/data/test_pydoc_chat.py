"""The built-in conversations are good text about public things; nothing of the test split can be learnt in train."""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from fedlotr.config.values import BUILT_IN_DATA
from fedlotr.data import build_pydoc_chat, built_in, load_source, resolve_task
from fedlotr.data.columns import Columns
from fedlotr.data.families import ALIKE, families, runs
from fedlotr.data.prose import LONGEST, SHORTEST, prose
from fedlotr.data.pydoc import PARTS
from fedlotr.data.pydoc_chat import Thing
from fedlotr.data.sources import Source
from fedlotr.errors import InputError

Built = tuple[Columns, list[int]]


@pytest.fixture(scope="module")
def built() -> Built:
    return build_pydoc_chat()


@pytest.fixture
def sources(built: Built, monkeypatch: pytest.MonkeyPatch) -> dict[str | None, Source]:
    monkeypatch.setattr(built_in, "build_pydoc_chat", lambda: built)
    return {split: load_source("pydoc-chat", eval_split=split) for split in (None, "held-out")}


def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))


def test_there_are_thousands_of_conversations_of_more_than_a_hundred_modules(built: Built) -> None:
    columns, _ = built
    assert list(columns) == ["prompt", "answer", "client", "part", "kind"]
    assert 2_500 < len(columns["prompt"]) < 6_000  # a distribution may leave out tkinter and turtle
    assert len(set(columns["prompt"])) == len(set(columns["answer"])) == len(columns["prompt"])
    sizes = Counter(columns["client"]).most_common()
    assert len(sizes) > 110 and sizes[49][1] >= 10, "fifty clients have something to learn"
    assert set(columns["part"]) == PARTS.keys()
    assert set(columns["kind"]) == {"function", "class", "method", "property", "module"}


def test_answers_are_whole_sentences_without_listings(built: Built) -> None:
    for answer in built[0]["answer"]:
        assert SHORTEST <= len(answer) <= LONGEST and answer == " ".join(answer.split())
        assert re.search(r"""[.!?][`"')]*$""", answer), answer
        assert answer[0].isupper() or answer[0] in "`'\"", answer
        assert not re.search(r">>>|``|:param|:class:|@param|\be\.g\.$", answer), answer


def test_it_is_the_same_every_time_and_knows_what_everybody_knows(built: Built) -> None:
    assert build_pydoc_chat() == built
    columns, _ = built
    rows = {prompt.split("`")[1].partition("(")[0]: at for at, prompt in enumerate(columns["prompt"])}
    at = rows["json.dumps"]
    assert columns["answer"][at].startswith("Serialize `obj` to a JSON formatted `str`.")
    assert [columns[name][at] for name in ("client", "part", "kind")] == ["json", "internet and email", "function"]
    assert {"asyncio.gather", "os.path.join"} <= rows.keys(), "as their users call them"
    assert not [prompt for prompt in columns["prompt"] if re.search(r"`[^`(]*\b_\w", prompt)], "nothing private"


@pytest.mark.parametrize("split", [None, "held-out"])
def test_nothing_of_the_test_split_stands_in_train(
    sources: dict[str | None, Source], built: Built, split: str | None
) -> None:
    source, whole = sources[split], sources[None]
    if split:
        assert not set(source.test["prompt"][:]) & set(whole.test["prompt"][:])
        assert len(source.train) + len(source.test) == len(whole.train)
    assert len(source.test) >= (len(source.train) + len(source.test)) // 10
    having: dict[str, list[int]] = {}
    trained = [runs(answer) for answer in source.train["answer"][:]]
    for row, own in enumerate(trained):
        for run in own:
            having.setdefault(run, []).append(row)
    shares = []
    for answer in source.test["answer"][:]:
        own = runs(answer)
        found = Counter(row for run in own for row in having.get(run, ()))
        shares.append(max((count / min(len(own), len(trained[row])) for row, count in found.items()), default=0.0))
    assert max(shares) < ALIKE and sum(share == 0 for share in shares) > len(shares) / 3
    family = dict(zip(built[0]["prompt"], built[1], strict=True))
    kept, held = ({family[prompt] for prompt in rows["prompt"][:]} for rows in (source.train, source.test))
    assert not kept & held


def test_what_is_alike_or_of_one_name_is_one_family() -> None:
    same = "Return the number of bytes that were written."
    answers = [
        "Open a file in binary or text mode.",
        same,
        "Return the number of bytes that were read.",
        "Wait for the lock without a limit.",
        "Decompress what was written to the archive.",
    ]
    assert families(answers, ["open", "write", "read", "wait", "open"]) == [0, 1, 1, 3, 0]


def test_a_question_is_of_the_kind_of_the_thing() -> None:
    things = [
        Thing("function", "json", "dumps", "(obj)"),
        Thing("class", "json", "Decoder"),
        Thing("method", "json", "Decoder.decode", "(s)"),
        Thing("property", "json", "Decoder.strict"),
        Thing("module", "json", ""),
    ]
    for thing in things:
        assert thing.question == thing.question and re.search(r"`.*`.*[?.]$", thing.question)
        assert "{" not in thing.question and "json" in thing.question


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Serialize ``obj`` to one :class:`~json.Text`.\n\n:param obj: what", "Serialize `obj` to one `json.Text`."),
        ("Return the largest of all numbers", "Return the largest of all numbers."),
        ("frob(x, y) -> number\n\nMake one single number of these two.", "Make one single number of these two."),
        (
            "Make one single number of these two.\n\nIt adds them, e.g.\n\n>>> frob(1)",
            "Make one single number of these two.",
        ),
        ("Make one single number of two. The ways are:\n\n  - adding\n  - taking", "Make one single number of two."),
        ("Make one single number of these two.\n\na   b\nc   d\n\nMore of it.", "Make one single number of these two."),
        ("Too short.", None),
        (">>> print('this is an example of it')\nthis is an example of it", None),
        (f"The first sentence says it all. {'It goes on and on ' * 30}.", "The first sentence says it all."),
    ],
)
def test_an_answer_ends_where_prose_does(docstring: str, answer: str | None) -> None:
    assert prose(docstring) == answer


def test_nothing_is_run_and_only_public_things_are_asked_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '"""Words about {} that fill this answer up."""'
    method = (
        f"    def open(self, path, _x=1):\n        {text.format('a method')}\n"
        f"    def _x(self):\n        {text.format('no public one')}"
    )
    library(
        tmp_path,
        monkeypatch,
        {
            "zipfile/__init__.py": f"{text.format('a package')}\nfrom zipfile._path import Path\nraise SystemExit",
            "zipfile/_path.py": f"class Path:\n    {text.format('a class')}\n{method}\n"
            f"def hidden():\n    {text.format('nobody')}",
            "zipfile/broken.py": f"{text.format('a mistake')}\ndef (:",
            "site-packages/json/__init__.py": text.format("somebody else"),
        },
    )
    columns, _ = build_pydoc_chat()
    assert columns["answer"] == [
        f"Words about {what} that fill this answer up." for what in ("a package", "a class", "a method")
    ]
    assert columns["client"] == ["zipfile"] * 3 and columns["kind"] == ["module", "class", "method"]
    assert Thing("class", "zipfile", "Path").question == columns["prompt"][1], "as the package hands it on"


def test_an_interpreter_without_sources_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, monkeypatch, {"heapq.pyc": ""})
    with pytest.raises(InputError, match=r"--data pydoc-chat: no sources .* give a folder"):
        build_pydoc_chat()


def test_it_is_a_language_models_data_set_and_another_may_be_scored_on_it(
    tmp_path: Path, sources: dict[str | None, Source]
) -> None:
    source = sources[None]
    assert resolve_task("auto", source).columns == ("prompt", "answer")
    assert source.test_split == "a fixed tenth of the conversations"
    assert source.read_by(("prompt", "answer")).splits.endswith("columns not read: 'client', 'part', 'kind'")
    (tmp_path / "train.jsonl").write_text('{"prompt": "Who?", "answer": "You."}\n' * 3)
    other = load_source(str(tmp_path), eval_data="pydoc-chat")
    assert other.test["answer"][:] == source.test["answer"][:] and len(other.train) == 3
    with pytest.raises(InputError, match="--eval-split dev: pydoc-chat has no such split"):
        load_source("pydoc-chat", eval_split="dev")


def test_the_configuration_knows_the_built_in_sets() -> None:
    assert tuple(built_in.BUILT_IN) == BUILT_IN_DATA
