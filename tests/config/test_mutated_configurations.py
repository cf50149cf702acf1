"""Two thousand broken configurations: each ends in clear errors and exit code 2, and leaves every file as it was."""

import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fedlotr.commands import simulate
from fedlotr.config.configuration import SimulationConfig, dump_yaml
from fedlotr.errors import InputError

FILES, COMMAND_LINES, THOROUGH = 1200, 800, 40
"""Mutants of a CONFIG.yaml, of a command line, and of both whose data and model are looked at too."""

VALUES = [
    *(
        "",
        "none",
        "null",
        "true",
        "no",
        "-1",
        "0",
        "1",
        "1.0",
        "0.0",
        "1e-3",
        "1e999",
        ".nan",
        ".inf",
        "nan",
        "010",
        "0x1F",
    ),
    *(
        "1_000",
        "1:30",
        "2020-01-01",
        "2020-99-99",
        "9" * 30,
        "9" * 5000,
        "1000000000",
        "18446744073709551616",
        "²",
        "５",
    ),
    *(
        "[1, 2]",
        "{a: 1}",
        "[]",
        "{}",
        "[[[",
        "}",
        "&a [*a]",
        "*a",
        "!!int x",
        "!!bool x",
        "!!timestamp x",
        "!!binary =",
    ),
    *("!!set {a}", "!!python/name:os.system", "|", "'", '"', "#", "? [a]", "%", "@", "`", "- a", "a: b", "---", "..."),
    *(
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "\ud800",
        "é" * 300,
        "x" * 5000,
        "~nobody/x",
        "/",
        ".",
        "..",
        "/dev/null",
        "/proc/run",
    ),
    *("iid:", "dirichlet:", "dirichlet:-1", "dirichlet:1e9", "shards:0", "natural:nobody", "shards:" + "9" * 5000),
    *("fedsb", "(", "(a+)+", "a:b", ":", "__main__:x", "json:", "..a:b", "gone.py:A", "os.path:join", "-h", "--help="),
    *(
        "gone/model",
        "a/b/c",
        "http://x/y",
        "float64",
        "auto",
        "ray",
        "local",
        "sgd",
        "lora",
        "head",
        "svd",
        "type",
        "=",
        "a=",
    ),
]
WORDS = [
    *(
        "--",
        "-",
        "-x",
        "---rank",
        "",
        " ",
        "-h5",
        "--=",
        "--resume",
        "--no-resume",
        "--quiet=maybe",
        "--json=1",
        "--json_output",
    ),
    *(
        "gone.yaml",
        "--strategy-arg",
        "--strategy-arg=",
        "--strategy-arg=a",
        "--strategy-arg=a=[" + "[" * 900,
        "—rank",
        "--ｒank",
    ),
    *("/", ".", "train.jsonl", "true", "--no-clients", "--rank=3=4", "@args", "--out", "--model"),
]


def misspelt(word: str, chance: random.Random) -> str:
    at = chance.randrange(len(word) + 1)
    kind = chance.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + chance.choice("aeqz-_ :#\t") + word[at:]
    if kind == 2:
        return word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    return word.upper()


def mutated_file(text: str, chance: random.Random) -> bytes:
    """The lines of a file, changed one to three times, and then perhaps its bytes."""
    lines = text.splitlines()
    for _ in range(chance.randint(1, 3)):
        at, other = (chance.randrange(len(lines)) for _ in range(2))
        key, _, value = lines[at].partition(": ")
        match chance.randrange(9):
            case 0:
                del lines[at]
            case 1:
                lines.insert(other, lines[at])
            case 2:
                lines[at] = f"{key}: {lines[other].partition(': ')[2]}"
            case 3 | 4 | 5:
                lines[at] = f"{key}: {chance.choice(VALUES)}"
            case 6:
                lines[at] = f"{misspelt(key, chance)}: {value}"
            case 7:
                lines[at] = " " * chance.randint(1, 3) + lines[at]
            case 8:
                lines.insert(at, chance.choice(VALUES))
        lines = lines or [""]
    content = bytearray(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
    match chance.randrange(10):
        case 0:
            del content[chance.randrange(len(content) + 1) :]
        case 1:
            for _ in range(chance.randint(1, 4)):
                if content:
                    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        case 2:
            content[:0] = chance.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\x1f\x8b", b"PAR1"])
    return bytes(content)


def mutated_words(words: list[str], chance: random.Random) -> list[str]:
    """A command line, changed one to three times."""
    words = list(words)
    for _ in range(chance.randint(1, 3)):
        at, other = (chance.randrange(len(words)) for _ in range(2)) if words else (0, 0)
        option, _, value = (words[at] if words else "").partition("=")
        match chance.randrange(9):
            case 0:
                del words[at : at + 1]
            case 1:
                words.insert(other, words[at] if words else "")
            case 2 if words:
                words[at], words[other] = words[other], words[at]
            case 3 | 4:
                words[at : at + 1] = [f"{option}={chance.choice(VALUES)}"]
            case 5:
                words[at : at + 1] = [option, chance.choice(VALUES)]
            case 6:
                words[at : at + 1] = [f"{misspelt(option, chance)}={value}"]
            case 7:
                words[at : at + 1] = [option]
            case _:
                words.insert(at, chance.choice(WORDS))
    return words


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def place(tmp_path: Path, animals: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with data and a run, that nothing may change."""
    (tmp_path / "train.jsonl").write_bytes((animals / "train.jsonl").read_bytes())
    (tmp_path / "quits.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("rank: 3\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the words were refused; whatever happens must be clear."""
    code = simulate.main(words)
    output = capsys.readouterr()
    if "-h" in words or "--help" in words:
        assert code == 0
        return False
    assert code in (0, 2), words
    # Where --quiet was turned into --quiet=no, the run also says what it does.
    lines = [line for line in output.err.splitlines() if line != "checking the configuration, reading the data"]
    assert all(line.startswith("error: ") and len(line) < 1000 for line in lines), (words, output.err)
    assert bool(lines) == (code == 2), words
    assert output.out == "" or code == 0
    return code == 2


def valid(place: Path) -> tuple[str, list[str]]:
    """A file and a command line that a run would start with."""
    config = SimulationConfig(
        data=".", clients=4, rank=3, public_examples=8, max_length=16, partition="natural:client", strategy_arg={}
    )
    dump_yaml(config, place / "whole.yaml")
    text = (place / "whole.yaml").read_text()
    (place / "whole.yaml").unlink()
    words = "--data=. --clients=4 --rank=3 --public-examples=8 --max-length=16 --partition=iid --sample=0.5 --rounds=2"
    return text, [*words.split(), "--method=lotr", "--out=new", "--lr=1e-3", "--local-steps=3", "--quiet"]


@pytest.mark.slow
def test_two_thousand_mutated_configurations_end_in_clear_errors_and_change_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    door = ModuleType("fedlotr.run.simulation")  # what lies behind it takes seconds, and is the next test's affair
    door.run_simulation = lambda config, **_: SimpleNamespace(summary={})  # type: ignore[attr-defined]
    door.check_all = lambda config, wrong: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedlotr.run.simulation", door)
    text, words = valid(place)
    chance = random.Random(0)
    count = 0
    file = place / "run.yaml"
    for number in range(FILES + COMMAND_LINES):
        content = mutated_file(text, chance) if number < FILES else b"clients: 5\n"
        file.write_bytes(content)
        before = snapshot(place)
        given = ["run.yaml"] if number < FILES else mutated_words(words, chance)
        if number % 3 == 0 and number >= FILES:
            given.insert(chance.randrange(len(given) + 1), "run.yaml")
        count += refused(given, capsys)
        assert snapshot(place) == before, given
    assert 0.5 < count / (FILES + COMMAND_LINES) < 0.95  # most are wrong, and those that are not are let in


@pytest.mark.slow
def test_mutated_configurations_that_reach_data_and_model_end_in_clear_errors(
    place: Path, stories: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedlotr.run import simulation

    def stop(*_: object) -> None:
        raise InputError("the run would start now")

    monkeypatch.setattr(simulation.RunDirectory, "create", stop)
    text, words = valid(place)
    text = text.replace("model: all-MiniLM-L6-v2", f"model: {stories}")
    chance = random.Random(1)
    for number in range(THOROUGH):
        (place / "run.yaml").write_bytes(mutated_file(text, chance) if number % 2 else b"")
        given = ["run.yaml", "--quiet"] if number % 2 else [f"--model={stories}", *mutated_words(words, chance)]
        before = snapshot(place)
        refused(given, capsys)
        assert snapshot(place) == before, given


@pytest.mark.parametrize(
    "words",
    [
        ["--clients=2147483647"],
        ["--rank=2147483647"],
        ["--max-length=2147483647"],
        ["--partition=shards:999999999"],
        ["--partition=dirichlet:0.00000000000000000001"],
        ["--partition=natural:nobody"],
        ["--method=lora", "--tie=type"],
        ["--strategy=json:nothing"],
        ["--strategy=quits.py:Mine"],
        ["--strategy-arg=beta=1"],
        ["--targets=nothing"],
        ["--eval-split=nothing"],
        ["--out=run", "--resume"],
    ],
)
def test_extremes_are_refused_at_once(
    words: list[str], place: Path, stories: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedlotr.run import simulation

    monkeypatch.setattr(simulation.Console, "on_start", lambda *_: pytest.fail("the run started"))
    base = valid(place)[1]
    before = snapshot(place)
    assert refused([f"--model={stories}", "--engine=local", *base, *words], capsys)
    if "--resume" not in words:
        assert snapshot(place) == before
