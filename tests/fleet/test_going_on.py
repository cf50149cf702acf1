"""A run goes on with the fleet that it began with: a file by its content and by that of the files that it names."""

import shutil
from pathlib import Path

import pytest

from fedlotr.commands import simulate
from fedlotr.fleet.file import files_of

FLEET = "devices: flops=1M\n"
TRACE = "client,from,until\n" + "".join(f"{client},0,1e6\n" for client in range(5))
CLIENTS = "client,flops\n0,2M\n"


def written(folder: Path, trace: str = "trace: trace.csv") -> Path:
    folder.mkdir()
    (folder / "fleet.yaml").write_text(f"{FLEET}{trace}\nclients: clients.csv\n", encoding="utf-8")
    (folder / "trace.csv").write_text(TRACE, encoding="utf-8")
    (folder / "clients.csv").write_text(CLIENTS, encoding="utf-8")
    return folder / "fleet.yaml"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, animals: Path) -> Path:
    """A folder with a run of one round, and its fleet."""
    folder = tmp_path_factory.mktemp("going-on")
    fleet = written(folder / "fleet")
    words = "--engine local --threads 1 --dtype float32 --clients 5 --sample 2 --rounds 1 --rank 2 --partition iid"
    words += " --local-epochs 1 --max-examples 4 --public-examples 16 --max-length 16 --quiet"
    where = ["--model", str(tiny_bert), "--data", str(animals), "--fleet", str(fleet), "--out", str(folder / "run")]
    assert simulate.main([*words.split(), *where]) == 0
    return folder


def resumed(folder: Path, *words: str) -> int:
    out = folder / "run"
    return simulate.main([str(out / "config.yaml"), "--out", str(out), "--resume", "--rounds", "2", *words])


def copy(begun: Path, tmp_path: Path) -> Path:
    """Where nothing has happened to it yet; config.yaml still names the first place."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_files_of_a_fleet(tmp_path: Path) -> None:
    named = {"file": "fleet.yaml", "trace": "trace.csv", "clients": "clients.csv"}
    for at, trace in enumerate(("trace: trace.csv", "availability: trace:trace.csv")):
        path = written(tmp_path / str(at), trace)
        assert files_of(str(path)) == {part: path.parent / name for part, name in named.items()}
    assert files_of("phones") == {}


@pytest.mark.parametrize(("name", "part"), [("fleet.yaml", "file"), ("trace.csv", "trace"), ("clients.csv", "clients")])
def test_a_changed_file_is_refused(
    name: str, part: str, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(begun, tmp_path)
    other = folder / "fleet" / name
    end = {"fleet.yaml": "dropout: 0.1\n", "trace.csv": "0,2e6,3e6\n", "clients.csv": "1,2M\n"}[name]
    other.write_text(other.read_text(encoding="utf-8") + end, encoding="utf-8")
    assert resumed(folder, "--fleet", str(folder / "fleet" / "fleet.yaml")) == 2
    said = capsys.readouterr().err
    assert f"its {part} differ" in said and "--resume takes that content under any path" in said


def test_a_file_that_changed_where_it_was_is_refused_too(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, trace = copy(begun, tmp_path), begun / "fleet" / "trace.csv"
    trace.write_text(f"{TRACE}0,2e6,3e6\n", encoding="utf-8")
    try:
        assert resumed(folder) == 2
    finally:
        trace.write_text(TRACE, encoding="utf-8")
    assert (
        "its content has changed since the run" in (said := capsys.readouterr().err) and "(its trace differs)" in said
    )


def test_a_fleet_that_has_moved_goes_on(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is named by the home folder."""
    folder = copy(begun, tmp_path)
    (folder / "fleet").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "fleet.yaml").rename(tmp_path / "elsewhere" / "phones.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resumed(folder, "--fleet", "~/elsewhere/phones.yaml") == 0
    assert "the content is the same" in capsys.readouterr().err
    assert len((folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_preset_is_known_by_its_name(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(begun, tmp_path)
    assert resumed(folder, "--fleet", "phones") == 2
    assert "--fleet phones: the run in" in capsys.readouterr().err
    other, words = tmp_path / "other", ["--fleet", "even", "--rounds", "1"]
    assert simulate.main([str(begun / "run" / "config.yaml"), "--out", str(other / "run"), *words]) == 0
    for fleet in ("institutions", str(begun / "fleet" / "fleet.yaml")):
        capsys.readouterr()
        assert resumed(other, "--fleet", fleet) == 2
        assert "was begun with even; --resume needs the same" in capsys.readouterr().err
    assert resumed(other) == 0
