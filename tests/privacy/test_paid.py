"""A ledger knows what it paid for: a private run goes on with the plan, settings and examples it began with, or not."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlotr.data import Names, load_source
from fedlotr.errors import InputError
from fedlotr.privacy import ledger as module
from fedlotr.privacy.ledger import Ledger, Promise
from fedlotr.simulate import main
from tests.support import read_run

OPTIONS = {"clients": 6, "sample": 6, "rounds": 3, "rank": 4, "method": "fed-sb", "engine": "local", "threads": 1}
OPTIONS |= {"dtype": "float32", "partition": "iid", "batch-size": 10, "privacy": "example", "epsilon": 6}
COMMON = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value)]
STOPS = """
import pathlib
from fedlotr.strategies.exact_average import ExactAverage

class Stops(ExactAverage):
    def __init__(self, flag: str, at: str) -> None:
        super().__init__()
        self.flag, self.at = flag, at
    def configure_train(self, server_round, arrays, config, grid):
        if self.at == "before" and pathlib.Path(self.flag).exists():
            raise KeyboardInterrupt
        return super().configure_train(server_round, arrays, config, grid)
    def combine(self, updates, server_round):
        if self.at == f"in {server_round}" and pathlib.Path(self.flag).exists():
            raise KeyboardInterrupt
        return super().combine(updates, server_round)
"""
Start = Callable[..., int]


@pytest.fixture
def start(tiny_bert: Path, animals: Path, tmp_path: Path) -> Start:
    """Run, ended where `at` says: before the first message, or when the replies of a round are there."""
    data, flag = tmp_path / "animals", tmp_path / "flag"
    shutil.copytree(animals, data)
    (tmp_path / "stops.py").write_text(STOPS, encoding="utf-8")

    def go(*more: object, at: str = "never", resume: bool = False) -> int:
        flag.touch() if not resume else flag.unlink(missing_ok=True)
        words = [
            *COMMON,
            "--quiet",
            "--reproducible-noise",
            "--model",
            tiny_bert,
            "--data",
            data,
            "--out",
            tmp_path / "run",
        ]
        words += ["--strategy", f"{tmp_path / 'stops.py'}:Stops", "--strategy-arg", f"flag={flag}"]
        words += ["--strategy-arg", f"at={at}", *more, *(["--resume"] if resume else [])]
        return main([str(word) for word in words])

    return go


def lines_of(folder: Path) -> list[str]:
    return (folder / "privacy.jsonl").read_text(encoding="utf-8").splitlines()


def fewer_rows(data: Path) -> None:
    path = data / "train.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")


def another_text(data: Path) -> None:
    path = data / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("big dog", "old dog", 1), encoding="utf-8")


def test_a_run_killed_in_its_first_round_goes_on_with_the_same_examples_alone(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(at="in 1") == 130 and len(lines_of(tmp_path / "run")) == 2
    before = (tmp_path / "animals" / "train.jsonl").read_text(encoding="utf-8")
    for change, told in ((another_text, "the examples that the clients hold"), (fewer_rows, "rates: [0.5")):
        change(tmp_path / "animals")
        assert start(at="in 1", resume=True) == 2
        assert told in capsys.readouterr().err and len(lines_of(tmp_path / "run")) == 2
        (tmp_path / "animals" / "train.jsonl").write_text(before, encoding="utf-8")
    # config.yaml changed by hand, and the option with it.
    config = tmp_path / "run" / "config.yaml"
    asked = config.read_text(encoding="utf-8")
    config.write_text(asked.replace("epsilon: 6", "epsilon: 60").replace("seed: 0", "seed: 1"), encoding="utf-8")
    assert start("--epsilon", 60, "--seed", 1, at="in 1", resume=True) == 2
    said = capsys.readouterr().err
    assert "target: 6.0, now 60.0" in said and "seed: 0, now 1" in said
    config.write_text(asked, encoding="utf-8")
    # As it was begun, it goes on; the round that was lost is paid for twice, so the last of the plan is refused.
    assert start(at="in 1", resume=True) == 0
    charges = [json.loads(line)["round"] for line in lines_of(tmp_path / "run")[1:]]
    assert charges == [1, 1, 2] and len(read_run(tmp_path / "run")[1]) == 2


def test_nothing_went_out_before_the_first_message_so_a_run_may_begin_anew(start: Start, tmp_path: Path) -> None:
    assert start(at="before") == 130 and len(lines_of(tmp_path / "run")) == 1
    first = json.loads(lines_of(tmp_path / "run")[0])
    fewer_rows(tmp_path / "animals")
    assert start(at="before", resume=True) == 0
    head, *charges = map(json.loads, lines_of(tmp_path / "run"))
    assert len(charges) == 3 and head["rates"] == [1.0] * 6 != first["rates"] and head["data"] != first["data"]
    assert head["sigma"] > first["sigma"]


def test_examples_and_test_rows_may_lie_elsewhere(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"text": f"a cat and {at} dogs", "label": at % 2}) for at in range(8)]
    (tmp_path / "public.jsonl").write_text("\n".join(rows), encoding="utf-8")
    public = ("--public-eval", "--eval-data")
    assert start(*public, tmp_path / "public.jsonl", at="in 2") == 130
    (tmp_path / "new").mkdir()
    (tmp_path / "animals").rename(tmp_path / "new" / "animals")
    (tmp_path / "public.jsonl").rename(tmp_path / "new" / "rows.jsonl")
    elsewhere = ("--data", tmp_path / "new" / "animals", *public, tmp_path / "new" / "rows.jsonl")
    (tmp_path / "new" / "other.jsonl").write_text("\n".join(rows[:6]), encoding="utf-8")
    assert start(*elsewhere[:-1], tmp_path / "new" / "other.jsonl", at="in 2", resume=True) == 2
    assert "its rows differ" in capsys.readouterr().err
    assert start(*elsewhere, at="in 2", resume=True) == 0
    told = read_run(tmp_path / "run")[0]["warnings"]
    assert [line.split()[0] for line in told if line.endswith("the content is the same")] == ["--data", "--eval-data"]


def test_the_key_is_the_owners_and_the_hash_is_nothing_without_it(start: Start, tmp_path: Path) -> None:
    assert start() == 0
    key = tmp_path / "run" / "privacy.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and json.loads(key.read_text())["charges"] == 3
    first = json.loads(lines_of(tmp_path / "run")[0])
    guess = load_source(str(tmp_path / "animals"), seed=0, names=Names()).sha256.encode()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path.name for path in files if guess in path.read_bytes()]
    shutil.rmtree(tmp_path / "run")
    assert start() == 0
    again = json.loads(lines_of(tmp_path / "run")[0])
    # The same examples and the same promise; another key.
    assert again["data"] != first["data"] and again["sigma"] == first["sigma"] and again["rates"] == first["rates"]


def dropped(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def doubled(path: Path) -> None:
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")


def swapped(path: Path) -> None:
    first, one, two = path.read_text().splitlines()
    path.write_text("\n".join([first, two, one]) + "\n")


def cheaper(path: Path) -> None:
    path.write_text(path.read_text().replace('"accounts": [0, 1, ', '"accounts": [1, ', 1))


def more_noise(path: Path) -> None:
    line = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text().replace(f'"sigma": {line["sigma"]}', f'"sigma": {line["sigma"] + 1}', 1))


def of_another(path: Path) -> None:
    other = path.with_name("other.jsonl")
    kept = path.with_name("privacy.key").read_bytes()
    ledger = Ledger.open(path)
    assert ledger is not None
    Ledger.begin(other, ledger.promise, ledger.settings)
    path.with_name("privacy.key").write_bytes(kept)
    other.replace(path)


def gone(path: Path) -> None:
    path.unlink()


def without_key(path: Path) -> None:
    path.with_name("privacy.key").unlink()


def both_gone(path: Path) -> None:
    gone(path)
    without_key(path)


def of_the_version_before(path: Path) -> None:
    first = json.loads(path.read_text().splitlines()[0])
    old = {name: value for name, value in first.items() if name not in ("format", "settings", "data", "code")}
    path.write_text("\n".join([json.dumps(old), *path.read_text().splitlines()[1:]]) + "\n")


@pytest.mark.parametrize("spoil", [dropped, doubled, swapped, cheaper, more_noise, of_another])
def test_a_line_that_is_not_as_it_was_written_is_noticed(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    ledger = Ledger.begin(path, Promise("example", None, 1e-3, 1.0, [0.5] * 3, [2] * 3), {"rounds": 3}, b"data")
    for server_round, accounts in ((1, [0, 1, 2]), (2, [0, 2])):
        ledger.charge(server_round, accounts)
    assert Ledger.open(path) is not None
    spoil(path)
    with pytest.raises(InputError, match="lost or changed lines, or is another run's"):
        Ledger.open(path)


def test_a_ledger_that_has_vanished_is_refused_also_where_no_checkpoint_knows_of_it(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(at="in 1") == 130 and len(lines_of(tmp_path / "run")) == 2
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    wrong = {gone: "is missing, so nobody knows", without_key: "privacy.key is missing", both_gone: "has vanished"}
    for spoil, told in {**wrong, of_the_version_before: "written by fedlotr 0.1"}.items():
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
        spoil(tmp_path / "run" / "privacy.jsonl")
        held = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert start(at="in 1", resume=True) == 2, spoil.__name__
        assert told in capsys.readouterr().err, spoil.__name__
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == held


def test_a_kill_at_any_moment_of_a_charge_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL: nothing after it happens."""

    def killed(*_: object, **__: object) -> None:
        raise Killed

    path = tmp_path / "privacy.jsonl"
    promise = Promise("example", None, 1e-3, 1.0, [0.5, 0.5], [2, 2])
    for broken in ("_write_key", "write_atomically"):  # before the key is there, and between it and the first line
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, broken, killed)
            Ledger.begin(path, promise, {"rounds": 3}, b"data")
        assert Ledger.open(path) is None
    ledger = Ledger.begin(path, promise, {"rounds": 3}, b"data")
    assert not ledger.paid and ledger.is_about(b"data") and not ledger.is_about(b"date")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "_write_key", killed)
        ledger.charge(1, [0])
    for _ in range(2):  # the line is there, its count is not; then a line of which a part is there
        again = Ledger.open(path)
        assert again is not None and again.spent == [2, 0] and again.paid
        with path.open("a", encoding="utf-8") as file:
            file.write('{"round": 2, "acc')
    again = Ledger.open(path)
    assert again is not None
    again.charge(2, [0, 1])
    found = Ledger.open(path)
    assert found is not None and found.spent == [4, 2]
