"""What the tests share: where the public data lies, tiny models of several kinds, and a command line to drive."""

import ast
import functools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlotr.run import unmet
from tests import forks
from tests.support import Simulate

os.environ.setdefault("HF_HUB_OFFLINE", "1")

torch.set_num_threads(1)
"""More make small products no quicker, and beside another process of tests they wait for each other."""

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


SEED = int(os.environ.get("FEDLOTR_TEST_SEED", "0"))
"""Of what a test draws without a generator of its own; a test that fails says it."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Every test draws alike, whichever ran before it."""
    random.seed(SEED)
    for module, seeding in (("numpy", lambda np: np.random.seed(SEED)), ("torch", lambda t: t.manual_seed(SEED))):
        if module in sys.modules:
            seeding(sys.modules[module])
    item.add_report_section("call", "seed", f"FEDLOTR_TEST_SEED={SEED}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those marked `serial` come first, for one process of tests; then file by file, those that take longest first."""
    cost: Counter[Path] = Counter()
    for item in items:
        cost[item.path] += 10 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: (item.get_closest_marker("serial") is None, -cost[item.path], item.path))


@functools.cache
def serial_tests(path: Path) -> set[str]:
    """The tests of a file that are marked so, from its text: who shares them out has not loaded it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    marks = {ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    if any("pytest.mark.serial" in mark for mark in marks):  # `pytestmark`
        return {function.name for function in functions}
    return {f.name for f in functions if "pytest.mark.serial" in map(ast.unparse, f.decorator_list)}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: a file's tests share one process, and so its fixtures, but for those marked `serial`.

    Not by xdist's own groups: it marks them in a test's id, which pytest 9.2 does not let it change.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, name = nodeid.partition("::")
            return "serial" if name.partition("[")[0] in serial_tests(config.rootpath / path) else path

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def numbers_travel_as_they_are() -> Iterator[None]:
    """Tests in this process see to exactness, unless they ask for codecs; processes of their own have the default."""
    with pytest.MonkeyPatch.context() as patch:
        for name in unmet.USUAL:
            patch.setitem(unmet.USUAL, name, "float32")
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Public data sets and a tiny pretrained Llama, beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with public data and models is missing")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260k"


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """A random GPT-2 (its linear layers are Conv1D), square and rectangular layers, with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """A random BERT with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that takes no time: two classes told apart by their words, and a client column."""
    folder = tmp_path_factory.mktemp("animals")
    cats, dogs = (
        ["the cat sat", "a cat ran", "my cat ate and slept"],
        ["dogs bark", "one dog barked", "big dog"],
    )
    # No text is in both, and those of the test split are of the same kind.
    numbers = {"train": lambda i: i % 7, "test": lambda i: 7 + i // 6 % 3}
    for split, count in (("train", 120), ("test", 24)):
        rows = [
            {"text": f"{(cats, dogs)[i % 2][i % 3]} {numbers[split](i)}", "label": i % 2, "client": f"farm {i % 5}"}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ray_session(request: pytest.FixtureRequest) -> None:
    """One Ray for all tests: grids and runs made while it lives neither start nor stop one."""
    from fedlotr.engines.own_ray import start_ray

    own = start_ray(4)
    if own is not None:
        request.config.add_cleanup(own.stop)


@pytest.fixture
def simulate(tmp_path: Path) -> Simulate:
    """Run `python -m fedlotr.simulate` in an empty folder, as a user would, but for the seconds that imports take."""

    def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
        return forks.server(*forks.RUN).run(forks.SIMULATE, *words, cwd=tmp_path, **env)

    return run


@pytest.fixture
def command(tmp_path: Path) -> Simulate:
    """As `simulate`, from the first import on: for what happens while libraries load."""

    def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "fedlotr.simulate", *map(str, words)]
        return subprocess.run(
            line, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
        )

    return run
