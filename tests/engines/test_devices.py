"""Where a run computes. Without a GPU to test on: what is asked for, who gets what, and what would be left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlotr import SimulationConfig
from fedlotr.commands import doctor, simulate
from fedlotr.config.configuration import load
from fedlotr.errors import InputError
from fedlotr.models import precision
from fedlotr.run import processes
from fedlotr.run.simulation import problems_at_the_door, resolve
from tests import forks
from tests.support import read_run

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    like = SimpleNamespace(name="a GPU", total_memory=10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: like)
    monkeypatch.setattr(precision, "_seconds", lambda dtype, *_: 2 if dtype is torch.float32 else 1)
    precision.measured_dtype.cache_clear()
    yield
    precision.measured_dtype.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("tiny_bert", method) for method in ("fed-sb", "lora", "ravan", "full")),
        *(("stories", method) for method in ("fed-sb", "personal-core")),
        ("tiny_gpt2", "tiny-lora"),
    ],
)
def test_preparing_training_and_scoring_leave_nothing_on_another_device(
    name: str, method: str, request: pytest.FixtureRequest
) -> None:
    kind = "classification" if name == "tiny_bert" else "causal-lm"
    words = [str(request.getfixturevalue(name)), kind, method]
    program = "import sys; from tests.elsewhere import main; main(*sys.argv[1:])"
    done = forks.server(*forks.RUN, "tests.elsewhere").run(program, *words, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-3000:]


FAKE_GPUS = """
import sys
sys.path[:0] = sys.argv[1:]
import ray
from fedlotr.engines import RayGrid
from fedlotr.errors import FedlotrError
from tests.engines.test_engines import broadcast, metric
ray.init(address="local", num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
with RayGrid("devices_app:app", 24, run_config={}, workers=6, workers_per_gpu=3) as grid:
    grid.warm_up()
    replies = grid.send_and_receive(broadcast(range(24)))
    seen = {(metric(reply, "pid"), metric(reply, "gpu")) for reply in replies}
    print(sorted(gpu for _, gpu in seen), "%.3f" % ray.available_resources().get("GPU", 0))
try:
    RayGrid("devices_app:app", 2, run_config={}, workers=5, workers_per_gpu=2)
except FedlotrError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.serial
def test_workers_share_gpus_evenly_and_each_sees_its_own(tmp_path: Path) -> None:
    words = [sys.executable, "-c", FAKE_GPUS, str(TESTS), str(TESTS.parent)]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    shares, refused = done.stdout.splitlines()
    assert shares == "[0, 0, 0, 1, 1, 1] 0.000"
    assert refused == ("Ray runs with 2 GPUs and 5 workers share one by 2: lower --workers, or raise --workers-per-gpu")


def test_a_run_takes_the_gpus_that_are_there(two_gpus: None) -> None:
    assert resolve(SimulationConfig()).device == "cpu", "as long as no run has met a GPU"
    taken = resolve(SimulationConfig(device="auto"))
    assert (taken.device, taken.workers, taken.dtype, taken.threads) == ("cuda", 2, "bfloat16", 1)
    assert resolve(SimulationConfig(device="auto", workers_per_gpu=3)).workers == 6
    assert resolve(SimulationConfig(device="cuda", workers_per_gpu=3, workers=4)).workers == 4
    cpu = resolve(SimulationConfig(device="cpu"))
    assert (cpu.device, cpu.workers) == ("cpu", processes.workers_of(SimulationConfig()))
    private = {"privacy": "example", "epsilon": 8.0, "privacy_engine": "opacus"}
    for of_the_cpu in ({"engine": "flower"}, private):
        assert resolve(SimulationConfig.model_validate({"device": "auto", **of_the_cpu})).device == "cpu"


def test_more_workers_than_gpus_have_room_for_are_refused(two_gpus: None) -> None:
    (problem,) = problems_at_the_door(
        SimulationConfig(device="cuda", workers=7, workers_per_gpu=3), brought=["data", "model"]
    )
    assert problem == ("--workers 7: 2 GPUs with 3 workers each have room for 6; lower it, or raise --workers-per-gpu")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--device cuda --engine flower", "Flower hands out the GPUs of its own engine"),
        (
            "--device cuda --privacy example --epsilon 8 --privacy-engine opacus",
            "its noise is drawn on the CPU; choose cohort, or --device cpu",
        ),
        ("--workers-per-gpu 2 --engine local", "the engine 'local' starts no workers"),
        ("--workers-per-gpu 2", "the run computes on the CPU; give --device cuda"),
        ("--device gpu", "--device gpu: not a choice, did you mean 'cpu'?"),
    ],
)
def test_what_does_not_go_with_a_device_is_refused(words: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        load(words.split())
    assert text in str(error.value)


def test_without_a_gpu_asking_for_one_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, text in (
        ("--device cuda", f"error: --device cuda: torch {torch.__version__} sees no GPU here; give --device cpu"),
        ("--device auto --workers-per-gpu 2", "error: --workers-per-gpu 2: this run computes on the CPU; leave it out"),
    ):
        assert simulate.main(words.split()) == 2
        assert text in capsys.readouterr().err
        assert doctor.main(words.split()) == 2
        assert text in capsys.readouterr().err


def test_a_run_says_where_it_computed_and_goes_on_there_alone(
    stories: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = f"--model {stories} --data {animals} --clients 2 --rounds 1 --local-steps 1 --method lora-xs --rank 4"
    words += f" --engine local --threads 1 --dtype float32 --public-examples 0 --quiet --out {tmp_path / 'run'}"
    assert simulate.main(words.split()) == 0
    assert read_run(tmp_path / "run")[0]["timing"]["device"] == "cpu"
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text(encoding="utf-8")
    assert "device: cpu\n" in text
    again = [*words.split(), "--rounds", "2", "--resume"]
    assert simulate.main([*again, "--device", "auto"]) == 0
    config.write_text(text.replace("device: cpu\n", "device: cuda\n"), encoding="utf-8")
    capsys.readouterr()
    assert simulate.main([*again, "--device", "auto"]) == 2
    assert "was begun on a GPU, and torch sees none here; go on where there is one" in capsys.readouterr().err


def test_doctor_says_what_the_gpus_are_for_and_whether_they_have_room(
    stories: Path, animals: Path, two_gpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *f"--model {stories} --data {animals} --clients 4 --method lora-xs --rank 4 --public-examples 0 --json".split()
    ]

    def found(*further: str) -> dict[str, Any]:
        doctor.main([*words, *further])
        return {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}

    on_gpus = found("--device", "auto")
    assert on_gpus["GPU"]["text"] == "2 of a GPU, 1 GB: the run computes there"
    assert on_gpus["GPU memory"]["status"] == "ok"
    assert "for 4 models on the first one" in found("--device", "cuda", "--workers-per-gpu", "3")["GPU memory"]["text"]
    assert found("--device", "cuda", "--workers-per-gpu", "40")["GPU memory"]["status"] == "warning"
    on_cpu = found()
    assert on_cpu["GPU"]["text"] == "2 of a GPU, 1 GB: not used, the run computes on the CPU (--device cuda)"
    assert "GPU memory" not in on_cpu
