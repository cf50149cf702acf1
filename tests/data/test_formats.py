"""Rows in the forms in which people have them are read as what they are, said so, and nothing of them is lost."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlotr.config.configuration import SimulationConfig
from fedlotr.data import Names, Source, Task, load_source, resolve_task
from fedlotr.data.formats import FORMATS
from fedlotr.errors import InputError
from fedlotr.run.checking import columns_of, read_source

Row = dict[str, Any]
N = 20
TURNS = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
ONE = [{"role": "user", "content": "2+2?\n\nin base 10"}, {"role": "assistant", "content": "4"}]
SHARE = [
    {"from": who, "value": CHAT[at]["content"]} for at, who in enumerate(("system", "human", "gpt", "user", "chatgpt"))
]
PARTS = [{"role": role, "content": [{"type": "text", "text": "hi"}]} for role in ("user", "assistant")]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLED = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "content": "No."},
]
SHARE_CALLED = [
    {"from": "human", "value": "Rain?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "dry"},
    {"from": "gpt", "value": "No."},
]
PICK = "Which is a metal?\nA. tin\nB. oak\nC. fog\nAnswer:"
METALS = ["tin", "oak", "fog"]

SHAPES: dict[str, tuple[Row, str, Any]] = {
    "alpaca": ({"instruction": "2+2?", "input": "in base 10", "output": "4"}, "alpaca", ("2+2?\n\nin base 10", "4")),
    "alpaca without input": ({"instruction": "2+2?", "input": "", "output": "4"}, "alpaca", ("2+2?", "4")),
    "alpaca of the hub": (
        {"instruction": "2+2?", "input": "in base 10", "output": "4", "text": "Below is an instruction"},
        "alpaca",
        ("2+2?\n\nin base 10", "4"),
    ),
    "alpaca with turns before": (
        {"instruction": "3+3?", "input": "", "output": "6", "system": "Be brief.", "history": [["2+2?", "4"]]},
        "alpaca",
        CHAT,
    ),
    "dolly": (
        {"instruction": "2+2?", "context": "in base 10", "response": "4", "category": "closed_qa"},
        "dolly",
        ("2+2?\n\nin base 10", "4"),
    ),
    "a question with a context": (
        {"context": "in base 10", "question": "2+2?", "answer": "4"},
        "dolly",
        ("2+2?\n\nin base 10", "4"),
    ),
    "messages": ({"messages": CHAT}, "messages", CHAT),
    "ultrachat": ({"prompt": "2+2?", "prompt_id": "7f", "messages": CHAT}, "messages", CHAT),
    "messages with parts": (
        {"messages": PARTS},
        "messages",
        PARTS,
    ),
    "messages and a system prompt": ({"messages": CHAT[1:], "system": "Be brief."}, "messages", CHAT),
    "messages as JSON": ({"messages": json.dumps(CHAT)}, "messages", CHAT),
    "messages that call": ({"messages": CALLED, "tools": [WEATHER]}, "messages", CALLED),
    "sharegpt": ({"id": "x1", "conversations": SHARE}, "sharegpt", CHAT),
    "sharegpt of other words": (
        {"conversation": [{"role": "human", "content": "2+2?"}, {"role": "bot", "content": "4"}]},
        "sharegpt",
        CHAT[1:3],
    ),
    "sharegpt that calls": ({"conversations": SHARE_CALLED, "tools": json.dumps([WEATHER])}, "sharegpt", CALLED),
    "trl's texts": ({"prompt": "2+2?", "completion": "4"}, "trl", ("2+2?", "4")),
    "trl's lists": (
        {"prompt": CHAT[:4], "completion": CHAT[4:]},
        "trl",
        [*CHAT[:2], CHAT[2] | {"weight": 0}, *CHAT[3:]],
    ),
    "gsm8k of the hub": (
        {"question": "2+2?", "answer": "It is 4\n#### 4"},
        "prompt+answer",
        ("2+2?", "It is 4\n#### 4"),
    ),
    "openorca": (
        {"id": "n1", "system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        "prompt+answer",
        CHAT[:3],
    ),
    "prompt and answer": ({"prompt": "2+2?", "answer": "4", "final": "4"}, "prompt+answer", ("2+2?", "4")),
    "instruction and response": ({"Instruction": "2+2?", "Response": "4"}, "prompt+answer", ("2+2?", "4")),
    "mmlu": ({"question": "Which is a metal?", "subject": "x", "choices": METALS, "answer": 0}, "choice", (PICK, "A")),
    "arc": (
        {
            "id": "q",
            "question": "Which is a metal?",
            "choices": {"text": METALS, "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "choice",
        (PICK, "B"),
    ),
    "openbookqa": (
        {"question_stem": "Which is a metal?", "choices": {"text": METALS, "label": ["A", "B", "C"]}, "answerKey": "C"},
        "choice",
        (PICK, "C"),
    ),
    "medqa": (
        {"question": "Which is a metal?", "options": dict(zip("ABC", METALS, strict=True)), "answer_idx": "A"},
        "choice",
        (PICK, "A"),
    ),
    "choices as objects": (
        {
            "question": "Which is a metal?",
            "choices": [{"label": x, "text": t} for x, t in zip("abc", METALS, strict=True)],
            "answer": "b",
        },
        "choice",
        (PICK, "B"),
    ),
    "choices by their text": (
        {"question": "Which is a metal?", "choices": METALS, "answer": "fog"},
        "choice",
        (PICK, "C"),
    ),
    "text": ({"text": "Once upon a time."}, "text", "Once upon a time."),
}
"""A row of each, its format, and what is learnt from it."""


def learnt(source: Source, row: int = 0) -> Any:
    """What the task that is chosen learns from a row."""
    task = resolve_task("auto", source)
    assert task.kind == "causal-lm"
    first = source.train[row]
    if task.columns[0] == "messages":
        return json.loads(first["messages"])
    return first["text"] if task.columns == ("text",) else tuple(first[column] for column in task.columns)


def lines(folder: Path, rows: list[Row]) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def array(folder: Path, rows: list[Row]) -> str:
    (folder / "rows.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return str(folder / "rows.json")


def parquet(folder: Path, rows: list[Row]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return str(folder)


def csv_of(folder: Path, rows: list[Row]) -> str:
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        nested = (list, dict)
        writer.writerows([{k: json.dumps(v) if isinstance(v, nested) else v for k, v in r.items()} for r in rows])
    return str(folder)


FORMS: dict[str, Callable[[Path, list[Row]], Any]] = {
    "lines": lines,
    "array": array,
    "parquet": parquet,
    "csv": csv_of,
    "rows": lambda _, rows: {"train": rows},
    "Dataset": lambda _, rows: {"train": datasets.Dataset.from_list(rows)},
    "stream": lambda _, rows: {"train": datasets.Dataset.from_list(rows).to_iterable_dataset()},
    "frame": lambda _, rows: {"train": pd.DataFrame(rows)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_are_read_in_every_form(shape: str, form: str, tmp_path: Path) -> None:
    row, name, wanted = SHAPES[shape]
    source = load_source(FORMS[form](tmp_path, [row] * N))
    assert source.format == name and learnt(source) == wanted
    assert (len(source.train), len(source.test)) == (18, 2)
    if "tools" in row:
        assert resolve_task("auto", source).columns == ("messages", "tools")
        assert json.loads(source.train[0]["tools"]) == [WEATHER]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_column_is_read_or_named_or_a_number(shape: str) -> None:
    row, name, _ = SHAPES[shape]
    source = load_source({"train": [row] * N})
    read = FORMATS[name].columns(dict.fromkeys(row, "none"))
    assert read is not None
    named = source.read_by(resolve_task("auto", source).columns).left_out
    numbers = {
        name for name, value in row.items() if isinstance(value, int) or (isinstance(value, str) and value == "4")
    }
    assert {*row} - numbers <= {*read.values()} | {*named} <= {*row}, "a column is lost without a word"
    assert not {*read.values()} & {*named}


SAID = {
    "alpaca": "read as alpaca: instruction + input -> prompt, output -> answer",
    "dolly": "read as dolly: instruction + context -> prompt, response -> answer",
    "openorca": "read as prompt+answer: system_prompt + question -> prompt, response -> answer",
    "sharegpt that calls": "read as sharegpt: conversations -> messages",
    "messages": "read as messages",
    "arc": "read as choice: question + choices -> prompt, answerKey -> answer",
}


@pytest.mark.parametrize("shape", [*SAID, "text", "prompt and answer"])
def test_how_rows_are_read_is_said_in_a_line_where_it_is_not_plain(shape: str) -> None:
    source = load_source({"train": [SHAPES[shape][0]] * N})
    assert source.read_as == SAID.get(shape, "") and source.notes == ()
    assert source.splits.startswith(
        f"trained on train ({SAID[shape]}), scored" if shape in SAID else "trained on train, s"
    )
    private = load_source({"train": [SHAPES[shape][0]] * N}, names=Names(hidden=True))
    assert private.read_as == (SAID[shape].partition(":")[0] if shape in SAID else "")


def test_columns_that_are_not_read_stay_for_partitions() -> None:
    rows = [{**SHAPES["dolly"][0], "category": ("qa", "chat")[at % 2], "n": at} for at in range(N)]
    source = load_source({"train": rows})
    assert source.train.column_names == ["category", "n", "prompt", "answer"]
    assert source.read_by(("prompt", "answer")).splits.endswith("; columns not read: 'category'")
    own = load_source({"train": rows}, names=Names(client="context"))
    assert "context" in own.train.column_names and set(own.train["context"]) == {"in base 10"}


def test_two_columns_that_are_named_do_not_lose_a_third_without_a_word() -> None:
    for shape, texts, lost in (
        ("alpaca", "instruction,output", "'input'"),
        ("dolly", "instruction,response", "'context'"),
    ):
        source = named([SHAPES[shape][0]] * N, text_column=texts)
        assert source.notes == (
            f"data: --text-column leaves {lost} out, which the format {shape} reads; without it all are read",
        )
        assert lost in source.read_by(()).splits and learnt(source) == ("2+2?", "4")
        prompt, answer = texts.split(",")
        source = named([SHAPES[shape][0]] * N, columns={"prompt": prompt, "answer": answer})
        assert source.notes[0].startswith(f"data: --columns leaves {lost} out, which the format {shape} reads")
        assert source.read_as == f"read as prompt+answer: {prompt} -> prompt, {answer} -> answer"
    assert named([SHAPES["gsm8k of the hub"][0]] * N, text_column="question,answer").notes == ()


def test_a_set_whose_prompts_offer_their_answers_is_said_to_be_one(shared: Path) -> None:
    source = load_source(str(shared / "data" / "commonsense"))
    assert source.read_as == (
        "read as prompt+answer, a multiple choice: each answer is one of those that its prompt offers after "
        "'Answer format:'"
    )
    assert resolve_task("auto", source) == Task("causal-lm", ("prompt", "answer"), ())
    assert source.read_by(("prompt", "answer")).left_out == {"task": "text"}
    gsm = load_source(str(shared / "data" / "gsm8k"))
    assert gsm.format == "prompt+answer" and gsm.read_as == ""


LABELLED: dict[str, tuple[Row, str, tuple[str, ...]]] = {
    "text": ({"text": "a", "label": "x"}, "text+label", ("text",)),
    "labels": ({"text": "a", "labels": 1}, "text+label", ("text",)),
    "pair": ({"text_a": "a", "text_b": "b", "text": "id", "label": "x"}, "pair", ("text_a", "text_b")),
    "chat beside": ({"text": "a", "label": "x", "messages": CHAT}, "text+label", ("text",)),
}


@pytest.mark.parametrize("shape", LABELLED)
def test_rows_with_labels_are_classes(shape: str) -> None:
    row, name, texts = LABELLED[shape]
    other = {key: {"x": "y", 1: 0}.get(value, value) if key != "messages" else value for key, value in row.items()}
    source = load_source({"train": [row, other] * N})
    task = resolve_task("auto", source)
    assert (source.format, task.kind, task.columns) == (name, "classification", texts) and len(task.label_names) == 2
    learns = resolve_task("causal-lm", load_source({"train": [row] * N}, names=Names(causal=True)))
    assert learns.kind == "causal-lm" and "label" not in learns.columns


def test_labels_without_texts_are_refused_with_what_can_be_learnt() -> None:
    rows = [{"messages": CHAT, "label": at % 2} for at in range(N)]
    with pytest.raises(InputError, match="needs the columns text . label or .*; --task causal-lm reads it as messages"):
        resolve_task("auto", load_source({"train": rows}))
    source = load_source({"train": rows}, names=Names(causal=True))
    assert resolve_task("causal-lm", source).columns == ("messages",) and "label" in source.train.column_names


def named(data: Any, **fields: Any) -> Source:
    """As a run reads it."""
    return read_source(SimulationConfig(model="none/such", **fields), {"train": data})


def test_a_format_and_columns_are_named() -> None:
    rows = [{"q": "2+2?", "a": "4", "text": "t", "prompt": "p"}] * N
    source = named(rows, columns="answer=a,prompt=q")
    assert learnt(source) == ("2+2?", "4") and source.format == "prompt+answer"
    assert source.read_by(("prompt", "answer")).splits.endswith("columns not read: 'text', 'prompt (of the files)'")
    assert learnt(named(rows, format="text")) == "t"
    assert learnt(named(rows, columns={"instruction": "q", "output": "a", "input": "prompt"})) == ("2+2?\n\np", "4")
    chat = named([{"dialogue": SHARE}] * N, columns="messages=dialogue")
    assert learnt(chat) == CHAT and chat.format == "messages"
    marked = named(
        [{"headline": "h", "topic": ("x", "y")[at % 2]} for at in range(N)], columns="text=headline,label=topic"
    )
    assert resolve_task("auto", marked).label_names == ("x", "y")
    assert resolve_task("auto", named(rows, format="alpaca", columns="instruction=q,output=a")).kind == "causal-lm"
    told = [{"text_a": "x", "text_b": "y", "text": "z", "label": at % 2} for at in range(N)]
    assert resolve_task("auto", named(told, format="text+label")).columns == ("text",)
    assert resolve_task("auto", named(told, format="text")) == Task("causal-lm", ("text",), ())
    held = named(
        [{"q": "2+2?", "a": f"{at % 3}"} for at in range(N)], columns="prompt=q,answer=a", partition="natural:a"
    )
    assert set(held.train["answer"]) == {"0", "1", "2"}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such format": ({"format": "alpca"}, "--format alpca: no such format, did you mean 'alpaca'.*module:function"),
    "not these columns": (
        {"format": "dolly"},
        "--format dolly: no column context, response or answer among instruction, input, output; say which is which by "
        "--columns context=NAME",
    ),
    "no list": (
        {"format": "messages", "columns": "messages=input"},
        r"--format messages: no column messages .messages: a list or an object a row, or JSON of one. among",
    ),
    "no such column": (
        {"columns": "answer=outptu"},
        "--columns answer=outptu: train has no such column, did you mean 'output'",
    ),
    "no such name": (
        {"columns": "anser=output"},
        "--columns anser=output: no format reads a column anser, did you mean 'answer'",
    ),
    "no form": ({"columns": "answer"}, "columns='answer': expected names of columns, such as answer=output,prompt="),
    "twice": ({"columns": "answer=output,prompt=output"}, "the column output stands there twice"),
    "two ways": ({"columns": "answer=output", "text_column": "instruction"}, "both say which columns are the texts"),
    "two ways more": ({"format": "alpaca", "text_column": "instruction"}, "both say which columns are the texts"),
    "two labels": ({"columns": "label=output", "label_column": "input"}, "both say which column has the labels"),
    "classes": (
        {"format": "alpaca", "task": "classification"},
        "--format alpaca with --task classification: its rows have",
    ),
    "no classes": (
        {"format": "pair", "task": "causal-lm", "columns": "text_a=input,text_b=output,label=instruction"},
        "its rows have labels",
    ),
    "no file": ({"format": "none.py:read"}, "--format: there is no file none.py"),
    "no module": ({"format": "no_such_module:read"}, "--format no_such_module:read: cannot be loaded: ModuleNotFound"),
    "no function": ({"format": "json:lods"}, "--format json:lods: json has no lods, did you mean 'loads'"),
    "no function but a class": ({"format": "json:JSONDecoder"}, "expected a function of a row; it is a type"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_named_wrong_is_refused_with_what_was_found(what: str) -> None:
    fields, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        named([SHAPES["alpaca"][0]] * N, **fields)


BAD: dict[str, tuple[Row, str]] = {
    "role": (
        {"messages": [{"role": "narrator", "content": "secret"}]},
        "'messages', message 1 is by 'narrator', which is no role that is known",
    ),
    "speaker": (
        {"conversations": [{"from": "gpr", "value": "secret"}]},
        "message 1 is by 'gpr', .*, did you mean 'gpt'",
    ),
    "no role": ({"messages": [{"content": "secret"}]}, "message 1 says not whose it is"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 has no content"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "secret_image", "url": "x"}]}]},
        "message 1: a part of its content is 'secret_image'; expected",
    ),
    "a text": ({"messages": ["secret"]}, "message 1 is text; expected an object with role and content"),
    "an object": ({"messages": {"role": "user", "content": "secret"}}, "'messages' is an object; expected a list"),
    "a call": (
        {"conversations": [{"from": "function_call", "value": "secret()"}]},
        "message 1 is a function_call and no JSON",
    ),
    "tools": (
        {"messages": CHAT, "tools": {"secret": 1}},
        "'tools' is an object; expected a list of what may be called",
    ),
    "choice": (
        {"question": "q", "choices": METALS, "answer": "secret"},
        "'answer' is 'secret'; expected the label, the ind",
    ),
    "index": ({"question": "q", "choices": METALS, "answer": 3}, "'answer' is 3; expected the label, the index from 0"),
    "one choice": (
        {"question": "q", "choices": ["secret"], "answer": 0},
        "'choices' is a list with 1 texts; expected from 2",
    ),
    "number": ({"instruction": None, "input": "secret", "output": "4"}, "'instruction' is nothing; expected text"),
    "history": (
        {"instruction": "a", "output": "b", "history": ["secret"]},
        "'history' is a list; expected a list of pairs",
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_row_that_is_not_of_the_format_is_named_and_private_ones_are_not(
    what: str, hidden: bool, tmp_path: Path
) -> None:
    row, message = BAD[what]
    alike = SHAPES["choices by their text"][0] if what == "choice" else {}
    good = next(shape for shape in (alike, *(shape for shape, _, _ in SHAPES.values())) if set(shape) >= set(row))
    good = {name: good[name] for name in row}
    path = lines(tmp_path, [good] * 6 + [row] + [good] * 6)
    with pytest.raises(InputError) as refused:
        load_source(path, names=Names(hidden=hidden))
    (problem,) = refused.value.problems
    if hidden:
        assert "secret" not in problem and "line 7" not in problem and "narrator" not in problem, problem
        assert problem.startswith(f"--data {path}, train: not of the format ") and problem.endswith(
            "in some row (which, is private)"
        )
    else:
        assert problem.startswith(f"--data: {path}, line 7: "), problem
        with pytest.raises(InputError, match=message):
            load_source(path)


def test_a_prompt_and_its_completion_are_two_of_a_kind() -> None:
    rows = [{"prompt": CHAT[:2], "completion": "4"}] * N
    with pytest.raises(InputError, match="row 1: 'prompt' is chat and 'completion' text; expected two of a kind"):
        load_source({"train": rows})


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    empty = {"messages": [{"role": "user", "content": "hi"}]}
    rows = (
        [{"messages": CHAT}] * 5
        + [empty, {"messages": [*empty["messages"], {"role": "assistant", "content": " \n"}]}, {"messages": CHAT[:2]}]
        + [{"messages": CHAT}] * 5
    )
    path = lines(tmp_path, rows)
    source = load_source(path)
    assert len(source.train) + len(source.test) == 10
    assert source.notes == (
        f"--data {path}, train: 3 rows without any answer to learn left out, the first of them --data: {path}, line 6",
    )
    places = {source.place("train", at) for at in range(len(source.train))}
    assert all(f"line {number}" not in " ".join(places).split(", ") for number in (6, 7, 8))
    hidden = load_source(path, names=Names(hidden=True)).notes
    assert hidden == (f"--data {path}, train: some rows without any answer to learn left out",)
    with pytest.raises(InputError, match="no row of train has an answer to learn .read as messages.$"):
        load_source(lines(tmp_path, [empty] * 5))


def test_a_split_whose_answers_are_secret_is_passed_over(tmp_path: Path) -> None:
    row = SHAPES["arc"][0]
    for split, answer in (("train", "1"), ("test", ""), ("validation", "2")):
        parquet_rows = pa.Table.from_pylist([row | {"answerKey": answer}] * 9)
        pq.write_table(parquet_rows, tmp_path / f"{split}.parquet")
    source = load_source(str(tmp_path))
    assert source.test_split == "validation (test has no answers)" and set(source.test["answer"]) == {"B"}
    with pytest.raises(InputError, match="--eval-split test: none of its rows has an answer"):
        load_source(str(tmp_path), eval_split="test")


def test_splits_of_two_formats_are_made_alike(tmp_path: Path) -> None:
    alpaca, chat = [SHAPES["alpaca"][0]] * N, [{"messages": ONE}] * N
    one, two = load_source({"train": chat, "test": alpaca}), load_source({"train": alpaca, "test": chat})
    for source in (one, two):
        assert resolve_task("auto", source).columns == ("messages",)
        assert json.loads(source.train[0]["messages"]) == ONE == json.loads(source.test[0]["messages"])
    path = array(tmp_path, chat)
    other = load_source({"train": alpaca}, eval_data=path)
    assert learnt(other) == ONE and other.train["messages"][0] == other.test["messages"][0]
    pairs = load_source({"train": alpaca}).as_conversations()
    assert learnt(pairs) == ONE and pairs.as_conversations() is pairs
    called = load_source({"train": [SHAPES["messages that call"][0]] * N, "test": chat[:3]})
    assert resolve_task("auto", called).columns == ("messages", "tools") and called.test["tools"][:] == [None] * 3
    for source in (load_source({"train": alpaca}), one):
        both = source.as_conversations(("messages", "tools"))
        assert resolve_task("auto", both).columns == ("messages", "tools") and set(both.train["tools"]) == {None}
        assert json.loads(both.train[0]["messages"]) == ONE
    with pytest.raises(InputError, match="test: no column prompt or answer, unlike train"):
        resolve_task("auto", load_source({"train": alpaca, "test": [{"text": "a"}] * 3}))


OWN = """
def pairs(row):
    return row["q"].upper(), row["about"]["answer"]

def turns(row):
    return [{"from": "human", "value": row["q"]}, {"from": "gpt", "value": row["about"]["answer"]}]

def texts(row):
    return f"{row['q']} {row['about']['answer']}" if row["n"] != 3 else None

def bad(row):
    return 1 / 0 if row["n"] == 2 else ("a", 5)

def ends(row):
    raise SystemExit(0)
"""


def test_a_function_of_ones_own_reads_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_formats.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"q": "2+2?", "about": {"answer": "4"}, "n": at, "prompt": "p"} for at in range(N)]
    assert learnt(named(rows, format="mine_of_formats:pairs")) == ("2+2?", "4")
    assert learnt(named(rows, format=f"{tmp_path / 'mine_of_formats.py'}:turns")) == CHAT[1:3]
    source = named(rows, format="mine_of_formats:texts")
    assert learnt(source) == "2+2? 4" and len(source.train) + len(source.test) == N - 1
    assert source.read_as == "read by mine_of_formats:texts" and source.beside == {}
    with pytest.raises(InputError) as refused:
        named(rows, format="mine_of_formats:bad")
    assert refused.value.problems[0].startswith(
        "data['train'], row 1: it gave ('a', 5); expected a text, a pair (prompt, answer), a list of messages or None"
    )
    assert "row 3: ZeroDivisionError: division by zero" in refused.value.problems[2]
    with pytest.raises(InputError, match="row 1: SystemExit"):  # no function of a row ends the program
        named(rows, format="mine_of_formats:ends")


def test_what_pandas_has_for_nothing_is_nothing() -> None:
    """A column of a CSV file that is empty in some rows, or in all, is NaN there."""
    nan = float("nan")
    rows = {"instruction": ["2+2?"] * N, "input": [nan] * N, "output": ["4"] * (N - 1) + [nan]}
    source = load_source(pd.DataFrame(rows))
    assert learnt(source) == ("2+2?", "4") and len(source.train) + len(source.test) == N - 1
    some = load_source(pd.DataFrame(rows | {"input": [nan, "in base 10"] * (N // 2)}))
    assert {prompt for prompt in some.train["prompt"]} == {"2+2?", "2+2?\n\nin base 10"}


def test_lists_are_read_however_a_library_holds_them(tmp_path: Path) -> None:
    """pandas makes arrays of the lists in a Parquet file, `datasets` an object of lists of a Sequence of objects."""
    rows = [{"messages": PARTS, "topic": "a"}] * N
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    assert learnt(load_source(pd.read_parquet(tmp_path / "rows.parquet"))) == rows[0]["messages"]
    asked = pd.DataFrame({"question": "2+2?", "choices": [np.array(["3", "4"])] * N, "answer": 1})
    assert learnt(load_source(asked)) == ("2+2?\nA. 3\nB. 4\nAnswer:", "B")
    lists = {key: [turn[key] for turn in CHAT] for key in ("role", "content")}
    assert learnt(load_source({"train": [{"messages": lists}] * N})) == CHAT
    sequence = datasets.Features({"messages": datasets.Sequence({key: datasets.Value("string") for key in lists})})
    assert learnt(load_source({"train": datasets.Dataset.from_list([{"messages": lists}] * N, sequence)})) == CHAT
    with pytest.raises(InputError, match="'messages' is an object; expected a list of messages"):
        load_source({"train": [{"messages": {**lists, "content": ["x"]}}] * N})


def test_numbers_where_a_format_reads_text_are_named() -> None:
    """A question with a number for its answer is refused, and not by a list of columns that it seems to have."""
    source = load_source({"train": [{"question": "2+2?", "answer": 4}] * N})
    with pytest.raises(InputError, match="the format prompt.answer would read it, were 'answer' text and not numbers"):
        resolve_task("auto", source)


def test_columns_of_a_configuration_are_kept_as_text_and_read_back(tmp_path: Path) -> None:
    for given in ("answer=output, prompt=a b", {"answer": "output", "prompt": "a b"}):
        config = SimulationConfig.model_validate({"columns": given})
        assert config.columns == "answer=output,prompt=a b"
        assert columns_of(config).columns == (("answer", "output"), ("prompt", "a b"))
    odd = SimulationConfig.model_validate({"columns": {"answer": "a,b=c"}})
    again = SimulationConfig.model_validate({"columns": odd.columns})
    assert odd.renamed == (("answer", "a,b=c"),) == again.renamed
