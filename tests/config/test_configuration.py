"""The configuration, the command line and the exit codes."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fedlotr
from fedlotr import cli
from fedlotr.adapters.methods import METHODS
from fedlotr.commands import simulate
from fedlotr.config.command_line import flag_of
from fedlotr.config.configuration import (
    OF_OTHERS,
    ConfigurationError,
    SimulationConfig,
    dump_yaml,
    load,
    options,
    preflight_paths,
)
from fedlotr.config.rules import RULES, TESTS, Rule
from fedlotr.errors import FedlotrError, InputError
from fedlotr.flower.plugins import MINIMA
from fedlotr.flower.traits import StrategyTraits
from fedlotr.reporting.callbacks import RoundEvent, StartEvent
from fedlotr.run import unmet
from tests import forks

ROOT = Path(__file__).resolve().parents[2]


def problems(*argv: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        load([str(word) for word in argv])
    return caught.value.problems


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_nothing_given_is_a_valid_run() -> None:
    config = load([])
    assert (config.clients, config.clients_per_round, config.rounds) == (50, 10, 14)
    assert config == SimulationConfig()


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    found = problems(
        *("--method", "fedsb", "--clients", "0", "--cleints", "5", "--optimizer", "adm", "--lr", "fast"),
        *("--partition", "dirchlet:0.5", "--engine", "local", "--workers", "2", "--data", "pydocs"),
        *("--model", tmp_path / "gone", "--momentum"),
    )
    assert sorted(found) == sorted(
        [
            "--method fedsb: not a method, did you mean 'fed-sb'?",
            "--clients 0: expected at least 1",
            "--cleints 5: no such option, did you mean '--clients'?",
            "--optimizer adm: not a choice, did you mean 'adamw'?",
            "--lr fast: expected a number",
            "--partition dirchlet:0.5: not a partition, did you mean 'dirichlet:0.5'?",
            "--workers 2 with --engine local: the engine 'local' works in this process; workers belong to 'ray'",
            "--data pydocs: no such data set, folder or file (nor a hub id, org/name), did you mean 'pydoc'?",
            f"--model {tmp_path / 'gone'}: no such folder",
            "--momentum: expected a value",
        ]
    )


def test_a_call_from_python_reports_all_mistakes_in_its_own_words() -> None:
    with pytest.raises(InputError) as caught:
        SimulationConfig(cleints=1, clients=0, method="fedsb", momentum=0.5)  # type: ignore[call-arg]
    assert sorted(caught.value.problems) == [
        "cleints=1: no such option, did you mean 'clients'?",
        "clients=0: expected at least 1",
        "method='fedsb': not a method, did you mean 'fed-sb'?",
        "momentum=0.5 with optimizer='adamw': momentum belongs to the optimizer 'sgd'",
    ]


@pytest.mark.parametrize(
    ("sample", "clients", "per_round"),
    [("10", 50, 10), ("0.2", 50, 10), ("1", 50, 1), ("1.0", 50, 50), ("1.", 7, 7), (".5", 7, 4), ("0.001", 50, 1)],
)
def test_a_sample_is_a_number_of_clients_or_with_a_point_a_share(sample: str, clients: int, per_round: int) -> None:
    config = load(["--sample", sample, "--clients", str(clients)])
    assert config.clients_per_round == per_round
    assert SimulationConfig(sample=float(sample) if "." in sample else int(sample), clients=clients) == config


@pytest.mark.parametrize("sample", ["0", "-1", "0.0", "1.5", "20%", "ten", "1e-1", "nan", "51"])
def test_a_sample_that_is_neither_is_refused(sample: str) -> None:
    (problem,) = problems("--sample", sample)
    assert problem.startswith(f"--sample {sample}")


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3", "dirichlet:1", "shards:2", "natural", "natural:client"])
def test_every_form_of_partition_is_read(partition: str) -> None:
    assert load(["--partition", partition]).partition == partition


@pytest.mark.parametrize(
    "partition", ["iid:1", "dirichlet", "dirichlet:0", "dirichlet:x", "shards:1.5", "natural:", ""]
)
def test_a_partition_that_cannot_be_read_is_refused(partition: str) -> None:
    (problem,) = problems("--partition", partition)
    assert "expected" in problem or "iid" in problem


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("--local-steps 3 --local-epochs 1", "--local-epochs 1 with --local-steps 3"),
        ("--local-epochs none", "--local-epochs none with --local-steps none"),
        ("--momentum 0.9", "--momentum 0.9 with --optimizer adamw"),
        ("--workers 2 --engine local", "--workers 2 with --engine local"),
        ("--sample 5 --clients 4", "--sample 5 with --clients 4"),
        ("--resume", "--resume with --out none"),
        ("--resume-round 2", "--resume-round 2 with --resume false"),
        ("--baseline central --engine flower", "--baseline central with --engine flower"),
        ("--method head --alpha 2", "--alpha 2.0 with --method head"),
        ("--method head --basis svd", "--basis svd with --method head"),
        ("--method head --tie type", "--tie type with --method head"),
        ("--method head --targets query", "--targets query with --method head"),
        ("--method lora --tie type", "--tie type with --method lora"),
        ("--method fed-sb --public-examples 0", "--public-examples 0 with --method fed-sb"),
        ("--method lotr --basis update --public-examples 0", "--public-examples 0 with --basis update"),
        ("--method lotr --basis lora", "--basis lora with --method lotr"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: str, fields: str) -> None:
    (problem,) = problems(*words.split())
    assert problem.startswith(fields + ": ")


def test_steps_take_the_place_of_epochs() -> None:
    assert load([]).local_epochs == 2
    config = load(["--local-steps", "3"])
    assert (config.local_epochs, config.local_steps) == (None, 3)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("clients: 7\nmax-examples: 5\nlr: 1e-3\nlocal_epochs: 2\nstrategy_arg: {a: 1, b: [1, 2]}\n")
    config = load([str(file), "--clients", "8", "--local-steps", "4", "--strategy-arg", "a=0.5"])
    assert (config.clients, config.max_examples, config.lr, config.rounds) == (8, 5, 1e-3, 14)
    assert (config.local_epochs, config.local_steps) == (None, 4)
    assert config.strategy_arg == {"a": 0.5, "b": [1, 2]}


def test_mistakes_in_the_file_are_named_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("cleints: 7\nrounds: none\nmethod: LoTR\nmomentum: 0.9\n")
    assert sorted(problems(file, "--seed", "x")) == [
        "--seed x: expected a whole number",
        f"cleints: 7 in {file}: no such option, did you mean 'clients'?",
        f"method: LoTR in {file}: not a method; choose one of: {', '.join(sorted(METHODS))}",
        f"momentum: 0.9 in {file} with --optimizer adamw: momentum belongs to the optimizer 'sgd'",
        f"rounds: none in {file}: expected a whole number",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("rank: 3\nclients: 5\nrank: 4\n", "{}: rank is set in line 1 and again in line 3; keep one of them"),
        ("max-examples: 5\nmax_examples: 6\n", "{}: max_examples is set in line 1 and again in line 2"),
        ("rank: &rank [*rank]\n", "{}: more than 10,000 values, or one that holds itself"),
        (
            "a: &a [1, 1, 1, 1]\n"
            + "".join(f"{n}: &{n} [*{m}, *{m}, *{m}, *{m}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
            "{}: more than",
        ),
        ("rank: " + "[" * 3000, "{}: nested too deeply"),
        ("rank: !!int three\n", "{}: a value in it cannot be read"),
        ("rank: 3\n  clients: 5\n", "{}: not YAML (line 2, column 10: "),
        ("rank: 3\n".encode("utf-16"), "{}: not text in UTF-8 (at byte 1)"),
        ("x" * (2**20 + 1), "{}: 1,048,577 bytes are too many for a configuration; data are given by --data"),
        ("rank: true\n", "rank: true in {}: expected a whole number"),
        ("rank: 0x10\n", "rank: 0x10 in {}: expected a whole number"),
        ("rank: 1:30\n", "rank: 1:30 in {}: expected a whole number"),
        ("rank: 2020-01-01\n", "rank: 2020-01-01 in {}: expected a whole number"),
        ("rank: " + "9" * 30, "rank: " + "9" * 30 + " in {}: expected at most 2147483647"),
        ("out: [1]\n", "out: [1] in {}: expected the name of a folder"),
        ("json_output: true\n", "json-output: true in {}: no such option, did you mean 'json'?"),
        ('"ra\\nnk": 3\n', "ra\\nnk: 3 in {}: no such option, did you mean 'rank'?"),
        ("strategy_arg: {1: 2}\n", "strategy_arg: {{1: 2}} in {}: expected names of arguments, and 1 is none"),
        ("strategy_arg: {a: !!set {b}}\n", "strategy_arg: {{'a': {{'b'}}}} in {}: a is of the type set; expected"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_place(tmp_path: Path, content: str | bytes, problem: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    (found,) = problems(file)
    assert found.startswith(problem.format(file))
    assert len(found) < 400 + len(str(file))


def test_what_is_no_file_is_not_read_as_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert problems(tmp_path) == [
        f"{tmp_path}: a folder; expected a configuration file, did you mean '{tmp_path / 'config.yaml'}'?"
    ]
    assert "not a file" in problems("/dev/zero")[0]
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert problems(tmp_path / "train.jsonl")[0].endswith("; data are given by --data")
    assert "an empty word" in problems("")[0]
    assert "a switch takes no word after it" in problems("--quiet", "true")[0]
    assert "cannot be the name of a file" in problems("a\0b.yaml")[0]
    assert "File name too long" in problems("x" * 5000)[0]


def test_numbers_in_a_file_are_those_of_json_and_survive_being_written(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 010\nlr: 1e-3\nstrategy_arg: {beta: 1e-3, name: '1e-3', day: 2020-01-01}\n")
    config = load([str(file)])
    assert (config.seed, config.lr) == (10, 1e-3)
    assert config.strategy_arg == {"beta": 1e-3, "name": "1e-3", "day": "2020-01-01"}
    dump_yaml(config, file)
    assert load([str(file)]) == config
    assert yaml.safe_load(file.read_text())["strategy_arg"] == config.strategy_arg  # to any reader
    assert SimulationConfig(strategy_arg={"x": (1, (2, 3))}).strategy_arg == {"x": [1, [2, 3]]}


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", str(2**63)],
        ["--clients", str(2**31)],
        ["--rounds", "100000"],
        ["--workers", "1025"],
        ["--threads", "1025"],
        ["--cohort", str(2**31)],
        ["--sample", "9" * 30],
        ["--partition", "shards:" + "9" * 30],
        ["--max-examples", "9" * 5000],
        ["--model", "a\0b"],
        ["--data", "a\nb"],
        ["--targets", "\ud800"],
        ["--out", "~nobody-has-this-name/run"],
        ["--out", "x" * 300],
        ["--strategy", "..up:Mine"],
        ["--strategy", "json:"],
        ["--strategy-arg", "a=1j"],
        ["--strategy-arg", "a={1: 2}"],
        ["--json_output"],
    ],
)
def test_what_no_run_could_hold_is_refused_in_one_short_line(words: list[str]) -> None:
    (problem,) = problems(*words)
    assert problem.startswith(words[0].replace("_", "-"))
    assert "\n" not in problem
    assert len(problem) < 400


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00"])
def test_a_file_that_is_no_configuration_is_one_problem_among_others(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    found = problems(file, "--clients", "0")
    assert len(found) == 2
    assert found[0].startswith(f"{file}: ")


def test_a_missing_file_is_told_from_a_missing_dash(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    assert f"did you mean '{tmp_path / 'recipe.yaml'}'" in problems(tmp_path / "recpe.yaml")[0]
    assert "options begin with --" in problems("clients=5")[0]
    assert "one CONFIG.yaml is enough" in problems(tmp_path / "recipe.yaml", "other.yaml")[0]


def test_what_other_programs_have_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert problems("--lora-dropout", "0.1") == [f"--lora-dropout 0.1: {OF_OTHERS['dropout']}"]
    assert problems("--gradient-accumulation-steps=4")[0].endswith("is cut into passes that fit the memory")
    assert problems("--dpo-beta", "0.1")[0].endswith("preferences are not learnt in this version: no DPO or its kin")
    assert problems("--use-rslora") == ["--use-rslora: it is called --rslora here"]
    (tmp_path / "run.yaml").write_text("dropout: 0.1\n")
    assert problems(tmp_path / "run.yaml") == [f"dropout: 0.1 in {tmp_path / 'run.yaml'}: {OF_OTHERS['dropout']}"]
    with pytest.raises(InputError, match="there is no dropout: masks are drawn by place"):
        SimulationConfig(**{"lora_dropout": 0.1})


def test_the_value_of_a_misspelt_option_is_not_taken_for_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("clients: 7\n")
    assert problems("--cleints", "5", file) == ["--cleints 5: no such option, did you mean '--clients'?"]
    assert problems("--quite", file) == ["--quite: no such option, did you mean '--quiet'?"]
    assert problems("--client", "5") == ["--client 5: no such option, did you mean '--clients'?"]


def test_values_of_strategy_arguments_are_literals() -> None:
    words = ["a=0.5", "b=[1, 2]", "c=true", "d=x=y", "e='5'", "f=none", "g="]
    config = load([word for pair in words for word in ("--strategy-arg", pair)])
    assert config.strategy_arg == {"a": 0.5, "b": [1, 2], "c": True, "d": "x=y", "e": "5", "f": None, "g": ""}
    assert problems("--strategy-arg", "a", "--strategy-arg", "b=1", "--strategy-arg", "=2") == [
        "--strategy-arg a =2: expected a name and its value, KEY=VALUE on the command line"
    ]


def test_what_argparse_cannot_read_is_one_mistake_among_others(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("clients: 7\n")
    found = problems("--model", "--lr", "-1e-3", "--quiet=maybe", file, "--basis", "--out=", "-c", "5", "--rounds", "0")
    assert sorted(found) == [
        "--basis: expected a value",
        "--c 5: no such option; see --help",
        "--lr -1e-3: expected more than 0",
        "--model: expected a value",
        "--out: expected a value",
        "--quiet maybe: expected true or false",
        "--rounds 0: expected at least 1",
    ]
    assert load([str(file), "--quiet=true"]).quiet


def test_a_mistake_says_which_values_are_not_to_be_relied_on(tmp_path: Path) -> None:
    def wrong(*argv: str) -> frozenset[str]:
        with pytest.raises(ConfigurationError) as caught:
            load(argv)
        return caught.value.wrong

    assert wrong("--method", "fedsb", "--rank", "3") == {"method"}
    assert wrong("--cleints", "5") == {"cleints", "clients"}
    assert wrong("--momentum", "0.9", "--data", "gone") == {"momentum", "optimizer", "data"}
    assert wrong(str(tmp_path / "gone.yaml"), "--rank", "3") >= {"rank", "model", "data", "clients"}


def test_a_configuration_made_in_python_reads_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["python", "--clients", "3", "--help"])
    assert SimulationConfig(rounds=3).clients == 50


def test_switches_can_be_given_taken_back_and_repeated_options_count_last(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("quiet: true\njson: true\n")
    assert load([str(file)]).quiet
    config = load([str(file), "--no-quiet", "--rounds=3", "--rounds", "4", "--max-examples", "none"])
    assert (config.quiet, config.json_output, config.rounds, config.max_examples) == (False, True, 4, None)


def test_environment_variables_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIENTS", "3")
    monkeypatch.setenv("FEDLOTR_CLIENTS", "3")
    assert load([]) == SimulationConfig()


@given(
    clients=st.integers(1, 99),
    sample=st.one_of(st.just(1), st.floats(1e-9, 1.0)),
    lr=st.one_of(st.none(), st.floats(1e-9, 10)),
    steps=st.one_of(st.none(), st.integers(1, 9)),
    cohort=st.one_of(st.just("auto"), st.integers(1, 9)),
    argument=st.one_of(st.booleans(), st.floats(allow_nan=False), st.text("aé:#-'\" 1\n")),
)
def test_config_yaml_given_again_is_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    clients: int,
    sample: float,
    lr: float | None,
    steps: int | None,
    cohort: Any,
    argument: object,
) -> None:
    config = SimulationConfig(
        clients=clients, sample=sample, lr=lr, local_steps=steps, cohort=cohort, strategy_arg={"x": argument}
    )
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    dump_yaml(config.model_copy(update={"out": file.parent, "resume": True, "quiet": True}), file)
    assert load([str(file)]) == config


def test_a_used_output_folder_needs_resume_and_an_unused_one_cannot_resume(tmp_path: Path) -> None:
    used, new = tmp_path / "used", tmp_path / "new"
    used.mkdir()
    (used / "config.yaml").touch()
    assert "not empty" in problems("--out", used)[0]
    assert load(["--out", str(used), "--resume"]).resume
    assert load(["--out", str(new)]).out == new
    assert "no run there" in problems("--out", new, "--resume")[0]
    (used / "config.yaml").rename(used / "notes.txt")
    assert "no config.yaml" in problems("--out", used, "--resume")[0]
    new.symlink_to(tmp_path / "gone")
    assert "a link to" in problems("--out", new)[0]
    new.unlink()
    assert not new.exists()


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in problems("--out", tmp_path / "file" / "run")[0]
    if not os.access("/proc", os.R_OK):
        pytest.skip("no folder here that nobody can write in")
    assert "cannot write in /proc" in problems("--out", "/proc/run")[0]


def test_a_model_folder_must_hold_a_model(tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    assert "no config.json there" in problems("--model", tmp_path / "stories")[0]
    assert f"did you mean '{tmp_path / 'stories'}'" in problems("--model", tmp_path / "storys")[0]
    (tmp_path / "stories" / "config.json").touch()
    assert load(["--model", str(tmp_path / "stories")])
    assert load(["--model", "sentence-transformers/all-MiniLM-L6-v2"])  # an id on the hub, not a missing path


def test_a_strategy_of_the_users_own_must_exist(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    assert load(["--strategy", f"{tmp_path / 'mine.py'}:Mine"])
    assert load(["--strategy", "json.decoder:JSONDecoder"])
    assert f"did you mean '{tmp_path / 'mine.py'}'" in problems("--strategy", f"{tmp_path / 'main.py'}:Mine")[0]
    assert "no module 'nowhere.at.all'" in problems("--strategy", "nowhere.at.all:Mine")[0]
    assert "not a strategy" in problems("--strategy", "exact-averag")[0]


def test_preflight_of_a_python_call_names_its_keywords(tmp_path: Path) -> None:
    config = SimulationConfig(data=str(tmp_path / "gone"), out=tmp_path)
    (problem,) = preflight_paths(config)
    assert problem.startswith(f"data='{tmp_path / 'gone'}': no such data set")


def test_help_shows_every_option_once_with_its_default() -> None:
    text = options().format_help()
    for name, field in SimulationConfig.model_fields.items():
        assert len(re.findall(rf"^  {flag_of(field.alias or name)}[ ,\n]", text, re.MULTILINE)) == 1, name
        assert field.description
    assert "(default: 50)" in text
    assert "|".join(METHODS) in text


def test_help_is_quick_to_load_and_warns_of_nothing() -> None:
    done = python("-W", "error", "-m", "fedlotr.simulate", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--clients int" in done.stdout
    script = "import sys, fedlotr.simulate, fedlotr.cli; print(*sys.modules)"
    done = python("-W", "error", "-c", script)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()).isdisjoint({"torch", "flwr", "ray", "datasets", "transformers", "peft", "numpy"})


def test_bad_input_ends_with_two_and_one_line_a_problem() -> None:
    done = python("-m", "fedlotr.simulate", "gone.yaml", "--method", "fedsb", "--rank", "0", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    first, *others = done.stderr.splitlines()
    assert first.startswith("error: gone.yaml: cannot read this configuration file")
    assert sorted(others) == [
        "error: --method fedsb: not a method, did you mean 'fed-sb'?",
        "error: --rank 0: expected at least 1",
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a function in the place of the simulation, and give the exit code of running it."""

    def with_simulation(function: Any, *argv: str) -> int:
        module = ModuleType("fedlotr.run.simulation")
        module.run_simulation = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fedlotr.run.simulation", module)
        return simulate.main(argv)

    return with_simulation


def test_a_finished_run_ends_with_zero_and_json_is_alone_on_stdout(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(config: SimulationConfig, *, console: Any, head_start: Any) -> Any:
        console.stage("working")
        return SimpleNamespace(summary={"clients": config.clients})

    assert run(finish, "--clients", "3", "--json") == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {"clients": 3}
    assert "working" in output.err
    assert run(finish, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_run_ends_with_130_and_says_what_is_saved(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted_after(rounds: int, finished_before: int = 0) -> Any:
        def simulation(config: SimulationConfig, *, console: Any, head_start: Any) -> Any:
            console.begin(tmp_path, finished_before)
            console.on_start(StartEvent(0, config, {}))
            for number in range(finished_before + 1, rounds + 1):
                console.on_round(RoundEvent(number, {"round": number, "clients": 10}, tmp_path))
            raise KeyboardInterrupt

        return simulation

    assert run(interrupted_after(2), "--quiet") == 130
    assert capsys.readouterr().err == f"interrupted; rounds 1 to 2 are in {tmp_path}; --resume goes on\n"
    assert run(interrupted_after(5, finished_before=5), "--quiet") == 130
    assert capsys.readouterr().err == f"interrupted; rounds 1 to 5 are in {tmp_path}; --resume goes on\n"
    assert run(interrupted_after(0), "--quiet") == 130
    assert capsys.readouterr().err == "interrupted before the first round was finished\n"


def test_a_failed_run_ends_with_one_and_its_traceback_is_in_the_log(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(error: Exception, run_dir: Path | None) -> Any:
        def simulation(config: SimulationConfig, *, console: Any, head_start: Any) -> Any:
            if run_dir is not None:
                console.begin(run_dir)
            console.on_start(StartEvent(0, config, {}))
            raise error

        return simulation

    assert run(fail(FedlotrError("7 of 10 clients failed"), tmp_path), "--quiet") == 1
    assert capsys.readouterr().err.startswith("error: 7 of 10 clients failed (")
    assert run(fail(ZeroDivisionError("oops"), tmp_path), "--quiet") == 1
    assert capsys.readouterr().err.startswith("error: ZeroDivisionError: oops (")
    assert (tmp_path / "log.txt").read_text().count("Traceback") == 2
    assert run(fail(ZeroDivisionError("oops"), None), "--quiet") == 1
    assert "Traceback" in capsys.readouterr().err
    assert run(fail(InputError(["a", "b"]), None), "--quiet") == 2
    assert capsys.readouterr().err == "error: a\nerror: b\n"


def test_the_console_script_knows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulte"]) == 2
    assert "did you mean 'simulate'?" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedlotr {fedlotr.__version__}\n"
    assert cli.main(["simulate", "gone.yaml", "--rank", "0"]) == 2
    assert "--rank 0" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert "simulate" in capsys.readouterr().out


def test_the_package_hands_on_its_names_without_flower_or_ray(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules.update(flwr=None, ray=None)\n"
        "from fedlotr import CoreConfig, CoreModel, SimulationConfig, initialize_basis\n"
    )
    done = forks.server(*forks.PLAIN).run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="CoreConfg"):
        _ = fedlotr.CoreConfg


def test_every_folder_of_the_package_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("fedlotr/**/*.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"fedlotr.strategies"}


@pytest.mark.parametrize("rule", [*RULES, *unmet.RULES], ids=lambda rule: rule.at)
def test_every_rule_asks_for_what_there_is(rule: Rule) -> None:
    known = {*dir(SimulationConfig()), *dir(StrategyTraits()), *MINIMA}
    assert rule.fields and all(name in known for name, _, _ in rule.terms)
    assert all(wanted in TESTS for _, sign, wanted in rule.terms if sign == ":")
    assert not isinstance(rule.why, str) or rule.why.format(c=SimulationConfig())
