"""What a language model says in a run: the same prompts before training, at the best round and at the end."""

import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlotr import SimulationConfig, cli, run_simulation
from fedlotr.config.configuration import load
from fedlotr.errors import InputError
from fedlotr.files import finite
from fedlotr.reporting.samples import as_markdown, samples_in
from fedlotr.run.directory import RunDirectory
from fedlotr.run.prompts import LOOKED_AT, PLAIN_TOKENS
from fedlotr.run.rounds import Rounds
from fedlotr.simulate import main
from tests.evaluation.test_generation import CHAT, plainly
from tests.run.test_simulation import assert_same_results, flags, tree
from tests.support import Simulate, read_run

SPOILT = """
import os, signal
from pathlib import Path

import numpy as np

from fedlotr.flower import Combined, Product, Strategy, by_layer, weighted_mean


class Spoilt(Strategy):
    '''A mean that is worthless from round 3 on, so that round 2 is the best; it may merge something too.'''

    def __init__(self, merge=False, dies=0):
        self.merge, self.dies = merge, dies

    def combine(self, updates, server_round):
        flag = Path(__file__).with_name("flag")
        if server_round == self.dies and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        new, size = weighted_mean(updates), 1.0 if server_round < 3 else 40.0
        new = {name: value * size for name, value in new.items()}
        carry, draw = {}, np.random.default_rng(server_round)
        for layer, factors in by_layer(new).items() if self.merge else ():
            left, right = new[factors["B"]].shape[0], new[factors["A"]].shape[1]
            carry[layer] = Product(draw.normal(size=(left, 1)) * size / 20, draw.normal(size=(1, right)) / 20)
        return Combined(new, carry) if carry else new
"""
HOSTILE = "Who?\x1b[31m ```\n```\n````\n# No heading\n<script>alert(1)</script> | [x](y) \u202e `` ````\r\n"


def write(folder: Path, made: Any) -> Path:
    """made: from a number to a row; more for test than are asked."""
    folder.mkdir()
    for split, numbers in (("train", range(64)), ("test", range(100, 112))):
        rows = [json.dumps(made(number)) + "\n" for number in numbers]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def asked(number: int) -> dict[str, str]:
    return {"prompt": f"Who has the {('cat', 'dog', 'ball')[number % 3]} {number}?", "answer": "Lily has it. " * 3}


@pytest.fixture
def options(stories: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of seconds."""
    return {
        "model": str(stories),
        "data": str(write(tmp_path / "data", asked)),
        **{"clients": 2, "sample": 2, "rounds": 4, "max_examples": 16, "rank": 4, "method": "lora"},
        **{
            "engine": "local",
            "threads": 1,
            "dtype": "float32",
            "lr_schedule": "constant",
            "sample_tokens": 10,
            "lr": 0.02,
        },
        **{"eval_examples": 6, "public_examples": 8},
    }


@pytest.fixture
def spoilt(tmp_path: Path) -> str:
    (tmp_path / "spoilt.py").write_text(SPOILT, encoding="utf-8")
    return f"{tmp_path}/spoilt.py:Spoilt"


def said(folder: Path) -> dict[int, list[str]]:
    """By round."""
    samples = samples_in(folder)
    assert samples is not None
    return {one["round"]: [answer["text"] for answer in one["said"]] for one in samples["answers"]}


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8")


def files_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("samples.json", "samples.md")]


@pytest.mark.parametrize("merge", [False, True])
def test_the_base_the_best_round_and_the_exported_adapter_answer_the_same_prompts(
    merge: bool, options: dict[str, Any], spoilt: str, simulate: Simulate, stories: Path, tmp_path: Path
) -> None:
    own = ["--strategy", spoilt, "--strategy-arg", f"merge={str(merge).lower()}"]
    done = simulate(*flags(options), *own, "--out", "run")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    summary, _ = read_run(run)
    assert summary["best"]["round"] == 2 and summary["checkpoints"] == [2, 3, 4]
    found, samples = said(run), samples_in(run)
    assert samples is not None and list(found) == [0, 2, 4] and len(samples["prompts"]) == 3
    assert (samples["best"], samples["last"], samples["tokens"]) == (2, 4, 10)

    tokenizer: Any = AutoTokenizer.from_pretrained(stories)
    rows = [json.loads(line) for line in (tmp_path / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    base = AutoModelForCausalLM.from_pretrained(stories)
    there = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), run / "adapter").eval()
    for at, prompt in enumerate(samples["prompts"]):
        row = rows[prompt["row"] - 1]
        assert (prompt["asked"], prompt["reference"], prompt["left_out"]) == (row["prompt"], row["answer"], 0)
        ids = [1, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]  # the line break is learnt
        assert prompt["prompt"] == tokenizer.decode(ids)
        assert found[0][at] == tokenizer.decode(plainly(base, ids, 10, [2]))
        assert found[4][at] == tokenizer.decode(plainly(there, ids, 10, [2]))
    # What the best round's model says is what a run says that ends there.
    short = simulate(*flags({**options, "rounds": 2}), *own, "--out", "short")
    assert short.returncode == 0, short.stderr
    assert said(tmp_path / "short") == {0: found[0], 2: found[2]} and found[2] not in (found[0], found[4])
    assert "At the end (round 2, the best)" in (tmp_path / "short" / "samples.md").read_text(encoding="utf-8")

    text, page = ((run / name).read_text(encoding="utf-8") for name in ("samples.md", "report.html"))
    for title in ("Before training", "At the best round (2)", "At the end (round 4)", "In the data"):
        assert text.count(title) == 3 and page.count(title) == 3
    assert "samples 3 prompts of test, answered before training" in " ".join(done.stderr.split())
    assert re.search(r"samples  run/samples.md\n\s+asked  Who has .*\n\s+before .*\n\s+after  ", done.stderr)
    quiet = simulate(*flags({**options, "rounds": 1}), "--quiet", "--out", "quiet")
    assert quiet.stderr == "" and (tmp_path / "quiet" / "samples.md").exists()


@pytest.mark.parametrize("dies", [1, 4])
def test_a_run_that_is_killed_says_the_same_and_does_not_ask_again(
    dies: int, options: dict[str, Any], spoilt: str, simulate: Simulate, tmp_path: Path
) -> None:
    own = {**options, "strategy": spoilt, "strategy_arg": f"dies={dies}"}
    died = simulate(*flags(own), "--out", "killed")
    assert died.returncode == -signal.SIGKILL, died.stderr
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert list(said(killed)) == [0] and "Before training" in (killed / "samples.md").read_text(encoding="utf-8")
    assert cli.main(["report", str(killed)]) == 0
    assert "Before training" in (killed / "report.html").read_text(encoding="utf-8")
    for words in (["--out", "killed", "--resume"], ["--out", "whole"]):  # the flag is there: nobody dies
        assert simulate(*flags(own), *words).returncode == 0
    assert_same_results(killed, whole)
    assert list(said(whole)) == [0, 2, 4] and files_of(killed) == files_of(whole)
    assert log_of(killed).count("samples after round 0") == 1


def test_a_finished_run_says_the_same_again_and_more_where_more_is_asked(
    options: dict[str, Any], spoilt: str, tmp_path: Path
) -> None:
    config = SimulationConfig(**options, strategy=spoilt, out=tmp_path / "run", quiet=True)
    run_simulation(config)
    before, again = files_of(config.out), config.model_copy(update={"resume": True})  # type: ignore[arg-type]
    run_simulation(again)
    assert files_of(tmp_path / "run") == before
    run_simulation(again.model_copy(update={"samples": 4, "sample_tokens": 3}))
    assert [answers[:3] != [] and len(answers) for answers in said(tmp_path / "run").values()] == [4, 4, 4]
    assert log_of(tmp_path / "run").count("samples after round 0: 4 prompts") == 1
    for path in (tmp_path / "run" / "checkpoints").glob("round-00002.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    run_simulation(again)
    assert list(said(tmp_path / "run")) == [0, 4]
    assert "The best round (2) is left out" in (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")


def test_the_checkpoint_of_the_best_round_stays_and_of_the_one_that_was_best_a_round_ago(tmp_path: Path) -> None:
    """Which is the best again where the newest checkpoint is damaged, and a private round comes out otherwise."""
    losses = [3.0, 2.0, None, 2.5, 1.0, float("nan"), 4.0]
    sheet = SimpleNamespace(metrics={}, triggered=None)
    checked = SimpleNamespace(own_task=None, task=SimpleNamespace(kind="causal-lm"), sheet=sheet)
    prepared, directory = SimpleNamespace(checked=checked), RunDirectory(tmp_path)
    directory.open_round_folders()
    kept = []
    for number in range(1, len(losses) + 1):
        history = [
            {"round": at, "perplexity": loss, "evaluate_seconds": None if loss is None else 1.0}
            for at, loss in enumerate(map(finite, losses[:number]), 1)
        ]
        run: Any = SimpleNamespace(history=history, prepared=prepared, sampling=SimpleNamespace(wanted=True))
        run.config = SimpleNamespace(keep="last")
        directory.write_checkpoint(number, {}, history, [], {}, Rounds._best_rounds(run))  # type: ignore[arg-type]
        kept.append(directory.rounds())
        run.sampling.wanted = False
        assert Rounds._best_rounds(run) == set()
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [5, 6, 7]]


def test_plain_text_goes_on_from_its_first_half_and_too_short_a_one_is_not_asked(
    options: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    long = "Lily saw a cat in the park. " * 12

    def text(number: int) -> dict[str, str]:
        return {"text": ("a", "b", f"Tim {number} is big", long + str(number))[number % 4]}

    own = {**options, "data": str(write(tmp_path / "texts", text)), "rounds": 1, "partition": "iid", "samples": 12}
    run_simulation(SimulationConfig(**own, out=tmp_path / "run", quiet=True))
    samples = samples_in(tmp_path / "run")
    tokenizer: Any = AutoTokenizer.from_pretrained(stories)
    assert samples is not None and len(samples["prompts"]) == 6 < 12
    for prompt in samples["prompts"]:
        whole = tokenizer(text(99 + prompt["row"])["text"], add_special_tokens=False)["input_ids"]
        half = min(len(whole) // 2, PLAIN_TOKENS)
        assert prompt["prompt"] == tokenizer.decode([1, *whole[:half]])
        assert prompt["asked"] == tokenizer.decode(whole[:half])
        assert prompt["reference"] == tokenizer.decode(whole[half:])


def test_a_conversation_goes_on_from_where_its_template_lets_the_assistant_answer_last(
    options: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    model: Any = shutil.copytree(stories, tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)

    def turns(number: int) -> list[dict[str, str]]:
        words = ("Be kind.", f"Who is {number}?", "Tim.", "And then?", f"Lily {number}.")
        roles = ("system", "user", "assistant", "user", "assistant")
        return [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]

    data = write(tmp_path / "chat", lambda number: {"messages": turns(number)})
    own = {**options, "model": str(model), "data": str(data), "rounds": 1, "max_length": 256, "partition": "iid"}
    run_simulation(SimulationConfig(**own, out=tmp_path / "run", quiet=True))
    samples = samples_in(tmp_path / "run")
    assert samples is not None and len(samples["prompts"]) == 3
    for prompt in samples["prompts"]:
        row = turns(99 + prompt["row"])
        ids = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, tokenize=True)["input_ids"]
        assert prompt["prompt"] == tokenizer.decode(ids)
        assert (prompt["asked"], prompt["reference"]) == ("And then?", row[-1]["content"])


def test_too_long_a_prompt_loses_its_middle_where_no_other_row_has_a_shorter_one(
    options: dict[str, Any], tiny_gpt2: Path, tmp_path: Path
) -> None:
    def row(number: int) -> dict[str, str]:
        words = f"{number} begins. " + "Lily saw a cat. " * (80 if number % 4 else 1) + "Who is it?"
        return {"prompt": words, "answer": "Tim"}

    own = {**options, "model": str(tiny_gpt2), "data": str(write(tmp_path / "long", row)), "rounds": 1}
    own |= {"sample_tokens": 90, "max_length": 128, "samples": 4}
    run_simulation(SimulationConfig(**own, out=tmp_path / "run", quiet=True))
    samples = samples_in(tmp_path / "run")
    assert samples is not None and samples["tokens"] == 64, "half of the positions are the prompt's"
    rows = {prompt["row"]: prompt["left_out"] for prompt in samples["prompts"]}
    assert LOOKED_AT * 4 > 12 and [at % 4 for at in rows][:3] == [1, 1, 1] and not any(list(rows.values())[:3])
    (cut,) = [prompt for prompt in samples["prompts"] if prompt["left_out"]]
    assert "begins." in cut["prompt"] and cut["prompt"].endswith("Who is it?") and cut["prompt"].count("saw") < 10
    assert f"({cut['left_out']} tokens of its middle left out)" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_hostile_text_stays_text(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "bad", lambda number: {"prompt": f"{HOSTILE}{number}", "answer": HOSTILE[::-1]})
    assert main([*flags({**options, "data": data, "rounds": 1}), "--out", str(tmp_path / "run")]) == 0
    console = capsys.readouterr().err
    text, page = ((tmp_path / "run" / name).read_text(encoding="utf-8") for name in ("samples.md", "report.html"))
    assert "asked  Who?\\x1b[31m" in console
    for shown in (console, text, page):
        assert "\x1b" not in shown and "\u202e" not in shown
    assert "<script" not in page and "\\x1b[31m" in page and "&lt;script&gt;" in page
    # Outside of fences, nothing of it; a fence ends where its own text ends.
    outside, fence = [], None
    for line in text.split("\n"):
        if fence is None and (opened := re.fullmatch(r"(`{3,})text", line)):
            fence = opened[1]
        elif line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None and not [line for line in outside if "No heading" in line or "script" in line]
    samples: Any = samples_in(tmp_path / "run")
    samples["rows_of"] = "# <b>test</b>\n\n- x"
    samples["prompts"][0]["reference"] = "\ud800 \x00"
    shown = as_markdown(samples, "<i>run</i>\n# me")
    assert "<b>" not in shown and "<i>" not in shown and "\n# me" not in shown and "\\ud800 \\x00" in shown
    assert shown.encode()


def test_a_damaged_file_of_samples_is_a_gap_in_the_report_and_made_anew(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SimulationConfig(**{**options, "rounds": 1, "samples": 1}, out=tmp_path / "run", quiet=True)
    run_simulation(config)
    path, before = tmp_path / "run" / "samples.json", files_of(tmp_path / "run")
    whole = json.loads(path.read_text(encoding="utf-8"))
    cut, empty = path.read_text(encoding="utf-8")[:-20], json.dumps({**whole, "answers": [{"round": 0}]})
    for damage in ("", "[]", "{}", '{"prompts": 3}', cut, empty):
        path.write_text(damage, encoding="utf-8")
        assert cli.main(["report", str(tmp_path / "run")]) == 0
        assert "samples.json makes no sense and is left out" in capsys.readouterr().err
    run_simulation(config.model_copy(update={"resume": True}))
    assert files_of(tmp_path / "run") == before


PRIVATE = {"privacy": "example", "noise_multiplier": 1.0, "method": "lora-xs", "rounds": 1, "partition": "iid"}


def test_of_hidden_data_no_row_is_shown_that_is_not_said_to_be_public(
    options: dict[str, Any], stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = write(tmp_path / "public", lambda number: {"prompt": f"In public, {number}?", "answer": "Yes."})
    private = {**options, **PRIVATE}
    for name, more in {
        "none": [],
        "rows": ["--public-eval"],
        "others": ["--public-data", str(public)],
        "both": ["--public-data", str(public), "--public-eval"],
    }.items():
        assert main([*flags(private), *more, "--out", str(tmp_path / name)]) == 0
        header, samples = " ".join(capsys.readouterr().err.split()), samples_in(tmp_path / name)
        if name == "none":
            assert samples is None and not (tmp_path / name / "samples.md").exists()
            assert "samples none: the data are hidden, and no row is said to be nobody's secret" in header
            kept = b"".join(content for path, content in tree(tmp_path / name).items() if "/adapter/" not in path)
            assert b"Who has" not in kept
            continue
        assert samples is not None and list(said(tmp_path / name)) == [0, 1]
        begins = {"rows": "Who has", "others": "In public", "both": "Who has"}[name]
        assert all(prompt["asked"].startswith(begins) for prompt in samples["prompts"])
        assert samples["rows_of"] == {"others": "the public data (--public-data)"}.get(name, "test")


def test_what_has_no_common_language_model_is_not_asked(
    options: dict[str, Any], tiny_bert: Path, animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(InputError) as error:
            load(["--samples", "2", *words])
        return str(error.value)

    assert "no common one to ask" in refused("--baseline", "local")
    assert "no common one to ask" in refused("--method", "fedsa-lora")
    private = ("--privacy", "example", "--epsilon", "8")
    assert "no row is said to be nobody's secret" in refused(*private)
    assert load(["--samples", "0", "--baseline", "local", *private]).samples == 0
    classifier = {**options, "model": str(tiny_bert), "data": str(animals), "method": "lotr", "rounds": 1}
    assert main([*flags({**classifier, "samples": 10}), "--out", str(tmp_path / "no")]) == 2
    assert "--samples 10: a classifier says nothing" in capsys.readouterr().err and not (tmp_path / "no").exists()
    for name, given in {
        "classifier": classifier,
        "off": {**options, "samples": 0, "rounds": 1},
        "local": {**options, "baseline": "local", "rounds": 1},
        "personal": {**options, "method": "fedsa-lora", "rounds": 1},
    }.items():
        assert main([*flags(given), "--out", str(tmp_path / name)]) == 0
        said_there = " ".join(capsys.readouterr().err.split())
        assert not list((tmp_path / name).glob("samples*"))
        told = "samples none: each client has a model of its own" in said_there
        assert told == (name in ("local", "personal")) and (" samples " in said_there) == told


def test_a_model_that_fails_to_answer_fails_no_run(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("it has no cache\nat all")

    monkeypatch.setattr(LlamaForCausalLM, "generate", broken)
    result = run_simulation(SimulationConfig(**{**options, "rounds": 1}, out=tmp_path / "run", quiet=True))
    warning = "there are no samples of what the model says after round 0: RuntimeError: it has no cache"
    told = [line for line in result.summary["warnings"] if "the machine is busy" not in line]
    assert told == [warning] and not list((tmp_path / "run").glob("samples*"))
    shutil.rmtree(tmp_path / "run")
