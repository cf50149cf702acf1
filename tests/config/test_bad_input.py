"""Every mistake in what a run is given, also in data and model, ends it at the door, in one report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlotr.commands.simulate import main
from fedlotr.config.configuration import SimulationConfig
from fedlotr.errors import InputError
from tests.support import Simulate

WIDTH = 32
"""Of the narrowest layers of stories260k, the keys and values."""


def folder(path: Path, rows: list[Any], broken_line: int | None = None) -> Path:
    lines = [json.dumps(row) for row in rows]
    if broken_line is not None:
        lines[broken_line - 1] = '{"text": "no end'
    path.mkdir()
    (path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def given(tmp_path: Path, stories: Path) -> Callable[..., list[str]]:
    """Words of a run that could start, with some of them changed."""
    rows = [{"text": f"once upon {number} times", "label": number % 2} for number in range(40)]
    good = folder(tmp_path / "good", rows)
    folder(tmp_path / "broken", rows, broken_line=7)
    folder(tmp_path / "untitled", [{"body": row["text"], "label": row["label"]} for row in rows])
    (tmp_path / "file").touch()

    def words(**changed: object) -> list[str]:
        options = {"model": stories, "data": good, "clients": 4, "public_examples": 8, "max_length": 16}
        options |= {"partition": "iid", "engine": "local", "out": tmp_path / "run"}
        return [f"--{key.replace('_', '-')}={value}" for key, value in (options | changed).items()]

    return words


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"model": "{}/stories260"}, ["--model {}/stories260: no such folder"]),
        ({"method": "fedsb"}, ["--method fedsb: not a method, did you mean 'fed-sb'?"]),
        ({"data": "{}/untitled"}, ["--data untitled: ", "needs the columns text + label", "train has body, label"]),
        ({"rank": 33}, [f"--rank 33: above the width {WIDTH} of ", f"at most {WIDTH}"]),
        ({"data": "{}/broken"}, ["--data: {}/broken/train.jsonl, line 7: not JSON"]),
        ({"out": "{}/file/run"}, ["--out {}/file/run: {}/file is a file; expected a folder"]),
        ({"strategy_arg": "beta=1"}, ["--strategy-arg beta: "]),
        ({"targets": "nothing"}, ["--targets nothing: ", "names are like"]),
        # The defaults, 50 clients and 256 public examples, would be too many for these data: not the user's mistake.
        ({"clients": "", "cleints": 4}, ["--clients: expected a value", "--cleints 4: no such option"]),
        ({"public_examples": "few"}, ["--public-examples few: expected a whole number"]),
    ],
)
def test_each_mistake_alone_is_one_clear_error(
    changed: dict[str, Any],
    parts: list[str],
    given: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    filled = {
        key: value.replace("{}", str(tmp_path)) if isinstance(value, str) else value for key, value in changed.items()
    }
    assert main([*given(**filled), "--quiet"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == len(changed)
    for part in parts:
        assert part.replace("{}", str(tmp_path)) in output.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changed", "starts"),
    [
        (
            {"method": "fedsb", "rank": 33, "data": "broken", "out": "file/run"},
            ["--data: broken/train.jsonl, line 7: ", "--method fedsb: ", "--out file/run: ", "--rank 33: above"],
        ),
        (
            {"method": "lotr", "model": "./stories260", "data": "untitled", "strategy_arg": "beta=1"},
            ["--data untitled: --task classification needs", "--model ./stories260: no such", "--strategy-arg beta: "],
        ),
    ],
)
def test_mistakes_of_all_kinds_are_in_one_report(
    changed: dict[str, Any], starts: list[str], given: Callable[..., list[str]], simulate: Simulate, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = simulate(*given(**changed))
    assert (done.returncode, done.stdout) == (2, "")
    for line, start in zip(sorted(done.stderr.splitlines()), starts, strict=True):
        assert line.startswith(f"error: {start}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_from_python_reports_data_model_and_strategy_together(
    given: Callable[..., list[str]], tmp_path: Path, stories: Path
) -> None:
    from fedlotr.run.simulation import run_simulation

    config = SimulationConfig(
        model=str(stories), data=str(tmp_path / "broken"), rank=33, strategy_arg={"beta": 1}, out=tmp_path / "run"
    )
    with pytest.raises(InputError) as caught:
        run_simulation(config)
    assert [problem.split(":")[0] for problem in sorted(caught.value.problems)] == [
        "--data",
        "--rank 33",
        "--strategy-arg beta",
    ]
    assert not (tmp_path / "run").exists()
