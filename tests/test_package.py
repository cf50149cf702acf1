"""What wheel and sdist hold, and that every command runs where the wheel alone is installed.

The fresh environment sees the packages of the present one behind its own, so nothing is fetched.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
RUN = ["--clients", "6", "--rounds", "2", "--sample", "3", "--max-examples", "2", "--eval-examples", "4"]
RUN += ["--public-examples", "8", "--max-length", "8", "--rank", "2", "--workers", "1", "--out", "run"]
ASIDE = ("__pycache__", "*.egg-info", "build", "dist", "runs", ".*_cache", ".hypothesis", ".venv", ".git", "site")
"""Of a clone that was worked in, what is not under version control."""


def run(*words: object, cwd: Path) -> str:
    """A command's stdout, where no variable leads back to the clone."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cwd / "cache")}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone, its sdist unpacked, and their wheels: in `wheel` the copy's, in `again` the sdist's."""
    place = tmp_path_factory.mktemp("built")
    clone = shutil.copytree(ROOT, place / "clone", ignore=shutil.ignore_patterns(*ASIDE))
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--sdist", "--wheel", "--outdir", place / "wheel", clone, cwd=place)
    sdist = next((place / "wheel").glob("*.tar.gz"))
    sdist.rename(place / sdist.name)
    with tarfile.open(place / sdist.name) as file:
        file.extractall(place / "sdist", filter="data")
    run(*build, "--wheel", "--outdir", place / "again", place / "sdist" / f"fedlotr-{VERSION}", cwd=place)
    return place


def held(wheel: Path) -> dict[str, bytes]:
    """Name -> content."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def only(folder: Path) -> Path:
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_what_is_imported_and_read_and_nothing_else(built: Path) -> None:
    wheel = held(only(built / "wheel"))
    about = f"fedlotr-{VERSION}.dist-info/"
    installed = {name for name in wheel if not name.startswith(about)}
    clone = built / "clone"
    files = {path.relative_to(clone).as_posix() for path in (clone / "fedlotr").rglob("*") if path.is_file()}
    files |= {f"fedlotr/strategies/{path.name}" for path in (clone / "strategies").glob("*.py")}
    assert installed == files
    assert {"fedlotr/py.typed", "fedlotr/cost/architectures.json", "fedlotr/reporting/templates/page.html"} < files
    assert f"{about}licenses/LICENSE" in wheel
    metadata = wheel[f"{about}METADATA"].decode()
    assert f"\nVersion: {VERSION}\n" in metadata
    points = wheel[f"{about}entry_points.txt"].decode()
    for name, target in PROJECT["project"]["entry-points"]["fedlotr.strategies"].items():
        assert f"{name} = {target}" in points
    assert "fedlotr = fedlotr.cli:main" in points


@pytest.mark.slow
def test_the_sdist_is_the_clone_and_builds_to_the_same_wheel(built: Path) -> None:
    clone = {path.relative_to(built / "clone").as_posix() for path in (built / "clone").rglob("*") if path.is_file()}
    with tarfile.open(next(built.glob("*.tar.gz"))) as file:
        sdist = {name.partition("/")[2] for name in file.getnames() if file.getmember(name).isfile()}
    made = re.compile(r"build/|fedlotr\.egg-info/|PKG-INFO|setup\.cfg")
    assert {name for name in sdist if not made.match(name)} == {name for name in clone if not made.match(name)}
    assert held(only(built / "wheel")) == held(only(built / "again"))


@pytest.mark.slow
@pytest.mark.serial
def test_every_command_runs_from_the_wheel_away_from_the_clone(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "fresh", symlinks=True)
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    behind = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "behind.pth").write_text("".join(f"{path}\n" for path in behind), encoding="utf-8")
    scripts = tmp_path / "fresh" / "bin"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", scripts / "python", *install, only(built / "wheel"), cwd=tmp_path)
    place = tmp_path / "elsewhere"
    place.mkdir()
    assert run(scripts / "fedlotr", "--version", cwd=place) == f"fedlotr {VERSION}\n"
    run(scripts / "python", "-m", "fedlotr.simulate", *RUN, cwd=place)
    assert (place / "run" / "report.html").exists()
    run(scripts / "python", "-P", ROOT / "tests" / "every_command.py", VERSION, cwd=place)


def test_the_version_stands_in_one_place() -> None:
    """And what changed in it in the other; what is installed says it by its metadata."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if line.startswith("## ")) == f"## {VERSION}"
    for path in [*(ROOT / "fedlotr").rglob("*.py"), ROOT / "CITATION.cff"]:
        assert not re.search(r"(?m)^(__version__|version)\b.*[=:].*\d\.\d", path.read_text(encoding="utf-8")), path
