"""`--ray-address`: the run's workers live in a cluster that was there before, and that stays when the run ends."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlotr.config.configuration import load
from fedlotr.engines import ray as engine
from fedlotr.errors import InputError

CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.readline()
print(ray.cluster_resources()["CPU"], ray.available_resources()["CPU"], flush=True)
"""

JOINING = """
import sys
address, *sys.path[:0] = sys.argv[1:]
from fedlotr.engines import RayGrid
from tests.engines.test_engines import broadcast, contents
with RayGrid("echo_app:app", 4, run_config={}, workers=1, address=address) as grid:
    print(len(contents(grid.send_and_receive(broadcast(range(4))))), "replies")
"""


def start(program: str, *words: str, folder: Path) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", program, *words], cwd=folder, text=True, env={**os.environ}, **pipes)


@pytest.mark.slow
@pytest.mark.serial
def test_a_grid_joins_a_cluster_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    with start(CLUSTER, folder=tmp_path) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        with start(JOINING, address, str(tests), str(tests.parent), folder=tmp_path) as joined:
            said, errors = joined.communicate(timeout=180)
        assert joined.returncode == 0 and said == "4 replies\n", errors
        after, _ = cluster.communicate("\n", timeout=60)
    assert after == "1.0 1.0\n", "the worker has given its CPU back, and the cluster goes on"


def test_what_ray_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(engine.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(engine.ray, "init", lambda **words: asked.append(words))
    assert engine.start_ray(3) and engine.start_ray(3, "somewhere:6379")
    here, there = asked
    assert (here["address"], here["num_cpus"]) == ("local", 3)
    assert there["address"] == "somewhere:6379"
    assert not {"num_cpus", "object_store_memory", "include_dashboard"} & there.keys(), "it is not ours to size"


def test_where_no_cluster_is_the_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nAnd more")

    monkeypatch.setattr(engine.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(engine.ray, "shutdown", lambda: None)
    monkeypatch.setattr(engine.ray, "init", fails)
    with pytest.raises(InputError) as error:
        engine.start_ray(1, "auto")
    assert str(error.value).endswith(
        "--ray-address auto: no Ray cluster can be joined there (Could not find any running Ray instance.)"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--engine", "local", "--ray-address", "auto"], "the engine 'local' is not Ray's"),
        (["--ray-address", "ray://head:10001"], "give HOST:PORT"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_at_once(words: list[str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        load(words)


def test_hooks_of_opacus_and_blocks_that_run_again_are_refused() -> None:
    words = "--privacy example --epsilon 8 --privacy-engine opacus --method fed-sb --gradient-checkpointing"
    with pytest.raises(InputError, match="its hooks would see every block run twice"):
        load(words.split())
