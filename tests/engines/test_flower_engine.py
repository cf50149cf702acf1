"""The same apps under Flower's own engine, by `flwr run .`, offline: the same bits as in one process of ours."""

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from flwr.app import Context, RecordDict

from fedlotr.engines.flower import FlowerGrid
from fedlotr.errors import InputError
from fedlotr.server_app import configuration
from tests.support import Simulate, read_run

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"train_seconds", "evaluate_seconds"}


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Flower installation of this test's own; what it starts ends with the test."""
    flwr = Path(sys.executable).with_name("flwr")
    if not flwr.is_file():
        pytest.skip(f"Flower's command line is not beside {sys.executable}")
    with socket.socket() as http, socket.socket() as control:
        for free in (http, control):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (http, control)]
    home = str(tmp_path / "flower-home")
    yield {
        **os.environ,
        "PATH": f"{flwr.parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": home,
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    mine = [process for process in psutil.process_iter() if _home(process) == home]
    for process in mine:
        process.terminate()
    for process in psutil.wait_procs(mine, timeout=10)[1]:
        process.kill()


def _home(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("FLWR_HOME")
    except psutil.Error:
        return None


@pytest.mark.slow
@pytest.mark.serial
def test_flwr_run_gives_the_tensors_of_the_local_engine(
    tiny_bert: Path, animals: Path, simulate: Simulate, flower: dict[str, str], tmp_path: Path
) -> None:
    options = {
        "model": str(tiny_bert),
        "data": str(animals),
        "clients": 10,
        "sample": 1.0,
        "rounds": 2,
        "rank": 4,
        "public_examples": 16,
        "dtype": "float32",
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    alike = ["--threads", 1, "--cohort", 1, "--codec", "float32"]
    local = simulate("job.yaml", "--engine", "local", *alike, "--out", "local")
    assert local.returncode == 0, local.stderr
    bundle = tmp_path / "app"
    bundle.mkdir()
    for name in ("pyproject.toml", "README.md"):  # all of the project that Flower looks at
        shutil.copy(ROOT / name, bundle)
    done = subprocess.run(
        [
            *("flwr", "run", str(bundle), "--stream"),
            *("--run-config", f"config='{tmp_path / 'job.yaml'}' out='{tmp_path / 'flower'}'"),
            *("--federation-config", "num-supernodes=10 client-resources-num-cpus=1 init-args-num-cpus=2"),
        ],
        env=flower,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (tmp_path / "flower" / "summary.json").is_file(), done.stdout + done.stderr
    ours, rows = read_run(tmp_path / "local")
    flowers, flower_rows = read_run(tmp_path / "flower")
    assert flowers["trained_sha256"] == ours["trained_sha256"]
    for row, flower_row in zip(rows, flower_rows, strict=True):
        assert {k: v for k, v in flower_row.items() if k not in TIMES} == {
            k: v for k, v in row.items() if k not in TIMES
        }
    assert flowers["communication"] == ours["communication"]
    unpacked = list((Path(flower["FLWR_HOME"]) / "apps").rglob("*"))
    assert unpacked and not [path for path in unpacked if path.suffix == ".py"], "the bundle must hold no second copy"


@pytest.mark.parametrize("component", ["serverapp", "clientapp"])
def test_looking_for_an_app_imports_nothing_heavy(component: str) -> None:
    """Flower looks for both in two threads, one without its lock: two imports of peft at once can break each other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module = project["tool"]["flwr"]["app"]["components"][component].partition(":")[0]
    look = f"import importlib.util, sys; assert importlib.util.find_spec({module!r}); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert not {"torch", "peft", "transformers", "flwr"} & set(found.stdout.split())


def nodes(*registered: int) -> Any:
    """A grid that lists its nodes, numbered at random, with these times of registration."""
    infos = [SimpleNamespace(node_id=900 - at * 7, registered_at=f"2026-01-01T00:00:0{at}") for at in registered]
    return SimpleNamespace(get_nodes=lambda: infos)


def test_flowers_nodes_are_taken_in_the_order_of_partitions() -> None:
    assert FlowerGrid(nodes(2, 0, 1), 3).get_node_ids() == [900, 893, 886]


@pytest.mark.parametrize("there", [2, 4])
def test_a_federation_of_another_size_is_refused(there: int) -> None:
    with pytest.raises(InputError, match=rf"clients: 3.*{there} nodes.*num-supernodes=3"):
        FlowerGrid(nodes(*range(there)), 3, patience=0)


def test_a_run_configuration_without_absolute_paths_is_refused() -> None:
    with pytest.raises(InputError, match=r"config: 'job.yaml' is not an absolute path(.|\n)*out: ''"):
        configuration({"config": "job.yaml", "out": ""})


def test_flowers_engine_is_not_started_by_the_command_line(simulate: Simulate, tmp_path: Path) -> None:
    refused = simulate("--engine", "flower", "--out", "run")
    assert refused.returncode == 2 and "flwr run ." in refused.stderr, refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_client_finds_its_data_by_flowers_run_id() -> None:
    from fedlotr.flower.client_app import workplace_folder

    context = Context(7, 1, {}, RecordDict(), {"config": "", "out": "/somewhere/run"})
    assert workplace_folder(context) == str(Path("/somewhere/run/.work/7"))
