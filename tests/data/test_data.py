"""Folders are read as they are, mistakes in them are named to the line, and rows become the tokens promised."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedlotr.data import Source, Task, build_pydoc, built_in, encode, encode_rows, load_source, resolve_task
from fedlotr.errors import InputError
from fedlotr.training.examples import IGNORED, Examples

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not on this machine")

UNK, BOS, EOS, CLS, SEP, LINE, SPACE = range(7)
A, B, C, D, E = range(7, 12)
TEXT = Task("causal-lm", ("text",), ())
ANSWER = Task("causal-lm", ("prompt", "answer"), ())
CLASSES = Task("classification", ("text",), ("no", "yes"))
PAIRS = Task("classification", ("text_a", "text_b"), ("no", "yes"))


def letters(kind: str) -> PreTrainedTokenizerFast:
    """A token a character. "bert" and "llama" have the special tokens of these, "bare" has none."""
    special = ["[UNK]", "<s>", "</s>", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate([*special, "\n", " ", *"abcdefghij"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {"bert": {"cls_token": "[CLS]", "sep_token": "[SEP]"}, "llama": {"bos_token": "<s>", "eos_token": "</s>"}}
    if kind == "bert":
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token="[UNK]", model_input_names=inputs, **names.get(kind, {})
    )


def write(folder: Path, **splits: Sequence[dict[str, Any]] | str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


def source(train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None) -> Source:
    return Source(
        "mine", Dataset.from_list(train), Dataset.from_list(train if test is None else test), "test", None, ""
    )


def sequences(examples: Examples) -> list[list[int]]:
    return [part.tolist() for part in np.split(examples.tokens, examples.offsets[1:-1])]


def causal(task: Task, rows: dict[str, list[str]], kind: str, max_length: int) -> list[tuple[list[int], int]]:
    examples = encode(task, Dataset.from_dict(rows), letters(kind), max_length)
    assert examples.causal and examples.segments is None
    return list(zip(sequences(examples), examples.labels.tolist(), strict=True))


# --- sources ----------------------------------------------------------------------------------------------------------


def test_rows_stay_in_file_order_and_test_drops_what_train_lacks(tmp_path: Path) -> None:
    train = [{"text": "b", "label": 1}, {"text": "a", "label": 0}]
    loaded = load_source(write(tmp_path / "set", train=train, test=[{"text": "c", "label": 1, "title": "t"}]))
    assert (loaded.name, loaded.test_split, loaded.label_names) == ("set", "test", None)
    assert loaded.train.to_list() == train
    assert loaded.test.to_list() == [{"text": "c", "label": 1}]


def test_a_column_that_a_row_lacks_is_none_there(tmp_path: Path) -> None:
    data = write(tmp_path, train=[{"text": "a"}, {"text": "b", "client": "x"}], test=[{"text": "c"}])
    assert load_source(data).train["client"][:] == [None, "x"]


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        (["validation", "val", "dev", "eval", "test"], "test"),
        (["validation", "val", "dev", "eval_b", "eval_a"], "eval_a"),
        (["validation", "val", "dev"], "dev"),
        (["validation", "val"], "val"),
        (["validation", "other"], "validation"),
    ],
)
def test_the_test_split_is_the_first_of_the_known_names(tmp_path: Path, splits: list[str], chosen: str) -> None:
    data = write(tmp_path, train=[{"text": "t"}], **{split: [{"text": split}] for split in splits})
    loaded = load_source(data)
    assert (loaded.test_split, loaded.test["text"][:]) == (chosen, [chosen])


def test_a_split_asked_for_is_used(tmp_path: Path) -> None:
    data = write(tmp_path, train=[{"text": "t"}], test=[{"text": "test"}], odd=[{"text": "odd"}])
    loaded = load_source(data, eval_split="odd")
    assert (loaded.test_split, loaded.test["text"][:]) == ("odd", ["odd"])
    with pytest.raises(InputError, match="--eval-split tset: no such split, did you mean 'test'"):
        load_source(data, eval_split="tset")
    with pytest.raises(InputError, match="--eval-split train: no such split; choose one of: odd, test"):
        load_source(data, eval_split="train")


@pytest.mark.parametrize("hidden", [{}, {"label": None}, {"label": -1}])
def test_a_test_split_without_labels_is_passed_over_and_said(tmp_path: Path, hidden: dict[str, Any]) -> None:
    labelled = [{"text": "t", "label": 0}] * 20
    blind = [{"text": "x", **hidden}] * 2
    assert load_source(write(tmp_path / "a", train=labelled, test=blind, dev=labelled)).test_split == (
        "dev (test has no labels)"
    )
    assert load_source(write(tmp_path / "b", train=labelled, test=blind, dev=blind)).test_split == (
        "a seeded tenth of train (test and dev have no labels)"
    )
    with pytest.raises(InputError, match="--eval-split test: it has no labels; train has"):
        load_source(str(tmp_path / "a"), eval_split="test")


def test_without_a_test_split_a_seeded_tenth_of_train_is_held_out(tmp_path: Path) -> None:
    data = write(tmp_path, train=[{"text": str(row)} for row in range(30)])
    loaded = load_source(data, seed=1)
    train, test = loaded.train["text"][:], loaded.test["text"][:]
    assert loaded.test_split == "a seeded tenth of train"
    assert len(test) == 3 and sorted(map(int, train + test)) == list(range(30))
    assert train == sorted(train, key=int) and test == sorted(test, key=int)
    assert load_source(data, seed=1).test["text"][:] == test
    assert load_source(data, seed=2).test["text"][:] != test


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    rows = [{"text": "é", "label": 0}, {"text": "b", "label": 1}]
    plain = load_source(write(tmp_path / "plain", train=rows, test=rows))
    packed = tmp_path / "packed"
    packed.mkdir()
    for split in ("train", "test"):
        turned = [dict(reversed(row.items())) for row in rows]
        with gzip.open(packed / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in turned))
    assert load_source(str(packed)).sha256 == plain.sha256
    columns = rb'{"label": [0, 1], "text": ["\u00e9", "b"]}'
    assert plain.sha256 == hashlib.sha256(columns + columns).hexdigest()
    assert load_source(write(tmp_path / "other", train=rows, test=rows[::-1])).sha256 != plain.sha256
    assert load_source(write(tmp_path / "third", train=rows[::-1], test=rows)).sha256 != plain.sha256


def test_nothing_is_written_beside_the_data(tmp_path: Path) -> None:
    data = write(tmp_path, train=[{"text": "a"}], test=[{"text": "b"}])
    load_source(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n\n{"text": \n', r"train\.jsonl, line 3: not JSON \(.* at column \d+\)"),
        ('{"text": "a"}\n["b"]\n', r"line 2: expected an object .* found a list"),
        ("null\n", "line 1: expected an object .* found null"),
        ("", r"train\.jsonl is empty"),
        ("\n \n", r"train\.jsonl is empty"),
        ("{}\n{}\n", "no column of text or numbers"),
        ('{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        ('{"text": "a", "label": 0}\n{"text": "b", "label": "0"}\n', "line 2: 'label' is text, but a number in line 1"),
        ('{"text": "a", "\\u0000": 1}\n', "the name of column '.x00' has characters that cannot be printed"),
        ('{"text": "a", "label": [0, 1]}\n', "'label' is a list; expected a class index or name"),
        ('{"text": "a", "label": true}\n{"text": "b", "label": 1}\n', "line 2: 'label' is a number, but true or false"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^--data: .*{message}"):
        load_source(write(tmp_path, train=text, test=[{"text": "a"}]))


def test_every_broken_line_counts_but_only_the_first_are_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_source(write(tmp_path, train="no JSON\n" * 10))
    assert [problem.split(": ", 2)[1].split(", ")[-1] for problem in caught.value.problems[:3]] == [
        "line 1",
        "line 2",
        "line 3",
    ]
    assert caught.value.problems[3].endswith("7 more problems")


def test_bytes_that_are_no_text_and_no_archive_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"line 1: not UTF-8 \(.* at byte 14\)"):
        load_source(str(tmp_path))
    (tmp_path / "train.jsonl").unlink()
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for broken in (whole[:-20], b"plain", whole[:30] + b"\xff" * 9 + whole[39:]):
        (tmp_path / "train.jsonl.gz").write_bytes(broken)
        with pytest.raises(InputError, match=r"train\.jsonl\.gz cannot be read"):
            load_source(str(tmp_path))


def test_columns_that_no_task_reads_do_no_harm(tmp_path: Path) -> None:
    rows = [{"text": "a", "meta": {"x": 1}, "tags": [1, "b"], "id": 2**70, "score": 1}, {"text": "b", "score": 0.5}]
    loaded = load_source(write(tmp_path, train=rows, test=rows))
    assert loaded.train.to_list() == [{"text": "a", "score": 1.0}, {"text": "b", "score": 0.5}]


def test_a_missing_folder_is_answered_with_its_nearest_sibling(tmp_path: Path) -> None:
    write(tmp_path / "banking77", train=[{"text": "a"}])
    with pytest.raises(InputError, match=r"--data .*bankin77: no such folder or file, did you mean '.*banking77'\?"):
        load_source(str(tmp_path / "bankin77"))
    with pytest.raises(InputError, match="no such folder or file; give a folder, a file or 'pydoc'"):
        load_source(str(tmp_path / "zzzz"))
    with pytest.raises(InputError, match=r"no such folder or file, nor is there .*; give a folder, a file or 'pydoc'"):
        load_source(str(tmp_path / "no" / "where"))
    with pytest.raises(InputError, match="did you mean 'pydoc'"):
        load_source("pydocs")
    (tmp_path / "notes.docx").touch()
    with pytest.raises(InputError, match=r"not a form that is read; expected a folder, or a file that ends in \.jsonl"):
        load_source(str(tmp_path / "notes.docx"))


def test_a_folder_without_train_says_what_it_found_and_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected train with one of the endings \.jsonl, .*, found an empty folder"):
        load_source(str(tmp_path))
    (tmp_path / "train.xlsx").touch()
    with pytest.raises(InputError, match=r"expected train with .*, found train\.xlsx"):
        load_source(str(tmp_path))


def test_two_files_of_one_split_are_not_guessed_between(tmp_path: Path) -> None:
    data = write(tmp_path, train=[{"text": "a"}])
    (tmp_path / "train.jsonl.gz").touch()
    with pytest.raises(InputError, match=r"both train\.jsonl and train\.jsonl\.gz; keep one"):
        load_source(data)


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one row cannot be split"):
        load_source(write(tmp_path, train=[{"text": "a"}]))


def test_pydoc_is_split_alike_for_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_pydoc()
    monkeypatch.setattr(built_in, "build_pydoc", lambda: built)
    one, other = load_source("pydoc", seed=1), load_source("pydoc", seed=2, eval_split="test")
    assert one.sha256 == other.sha256
    assert one.name == "pydoc" and one.test_split == "a fixed tenth of the paragraphs"
    assert len(one.test) == (len(one.train) + len(one.test)) // 10
    task = resolve_task("auto", one)
    assert task.kind == "classification" and len(task.label_names) == 8
    assert task.label_names == one.label_names
    assert np.bincount(task.labels(one.test)).min() > 0
    with pytest.raises(InputError, match="--eval-split dev: pydoc has no such split"):
        load_source("pydoc", eval_split="dev")


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_label_column_makes_a_classification_and_none_a_language_model() -> None:
    assert resolve_task("auto", source([{"text": "a", "label": 0}, {"text": "b", "label": 1}])) == Task(
        "classification", ("text",), ("0", "1"), by_name=True
    )
    assert resolve_task(
        "auto", source([{"text_a": "a", "text_b": "b", "label": "x"}, {"text_a": "a", "text_b": "b", "label": "k"}])
    ) == Task("classification", ("text_a", "text_b"), ("k", "x"))
    assert resolve_task("auto", source([{"text": "a"}])) == TEXT
    assert resolve_task("auto", source([{"prompt": "a", "answer": "b", "text": "c"}])) == ANSWER
    assert resolve_task("causal-lm", source([{"text": "a", "label": 0}])) == TEXT


def test_classes_are_those_of_train_and_test_and_named_where_names_are_known() -> None:
    train = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    test = [{"text": "c", "label": 3}]
    assert resolve_task("auto", source(train, test)).label_names == ("0", "1", "3")
    named = Source("mine", Dataset.from_list(train), Dataset.from_list(train), "test", ("no", "yes"), "")
    assert resolve_task("auto", named).label_names == ("no", "yes")


def test_labels_are_class_indices() -> None:
    names = Dataset.from_dict({"text": ["a", "b", "c"], "label": ["yes", "no", "yes"]})
    assert CLASSES.labels(names).tolist() == [1, 0, 1]
    numbers = Dataset.from_dict({"text": ["a", "b"], "label": [1.0, 0.0]})
    assert CLASSES.labels(numbers).tolist() == [1, 0]
    assert TEXT.labels(names).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="row 2: 'label' is 'maybe'; expected one of the classes no to yes"):
        CLASSES.labels(Dataset.from_dict({"text": ["a", "b"], "label": ["yes", "maybe"]}))


@pytest.mark.parametrize("wrong", [None, -1])
def test_a_row_without_a_class_is_named_by_number(wrong: float | None) -> None:
    fine = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    bad = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, wrong]})
    for train, test, where in ((bad, Dataset.from_list(fine), "train"), (Dataset.from_list(fine), bad, "test")):
        with pytest.raises(InputError, match=f"--data mine, {where}, row 3: 'label' is {wrong}; expected one of"):
            resolve_task("auto", Source("mine", train, test, "test", None, ""))


def test_all_that_is_wrong_with_the_rows_is_told_at_once() -> None:
    train: list[dict[str, Any]] = [{"text": None, "label": 0}, {"text": "b", "label": 0}]
    with pytest.raises(InputError) as caught:
        resolve_task("auto", source(train, [{"text": None}]))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("classify", [{"text": "a"}], "--task classify: no such task, did you mean 'classification'"),
        (
            "classification",
            [{"text": "a"}],
            "needs the columns text . label or text_a . text_b . label; train has text",
        ),
        (
            "auto",
            [{"sentence": "a", "label": 1}],
            "--data mine: --task classification needs .*; train has sentence, label",
        ),
        (
            "causal-lm",
            [{"prompt": "a"}],
            "--task causal-lm needs the columns prompt . answer or text; train has prompt",
        ),
        ("auto", [{"text": 5}], "train, row 1: 'text' is 5; expected text"),
        ("auto", [{"text": "a", "label": n} for n in range(10_001)], "'label' has 10,001 different values, as an iden"),
        ("auto", [{"text": "a", "label": 0}], "every label is 0; --task classification needs two"),
        ("auto", [{"text": "a", "label": None}], "row 1: 'label' is None; expected a class index from 0, or a name"),
    ],
)
def test_a_task_that_the_data_is_not_fit_for_says_what_it_needs(
    kind: str, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolve_task(kind, source(rows))


def test_a_test_split_of_other_columns_or_labels_is_refused() -> None:
    train = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    with pytest.raises(
        InputError, match="--data mine, test: no column text, unlike train; choose another --eval-split"
    ):
        resolve_task("auto", source(train, [{"label": 1}]))
    with pytest.raises(InputError, match="labels are names in one split and numbers in the other"):
        resolve_task("auto", source(train, [{"text": "c", "label": "x"}]))


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_text_to_classify_is_in_the_tokenizers_own_form_and_cut() -> None:
    rows = Dataset.from_dict({"text": ["ab", "", "abcde"], "label": [1, 0, 1]})
    examples = encode(CLASSES, rows, letters("bert"), 5)
    assert sequences(examples) == [[CLS, A, B, SEP], [CLS, SEP], [CLS, A, B, C, SEP]]
    assert examples.labels.tolist() == [1, 0, 1]
    assert examples.segments is None and not examples.causal
    assert (examples.tokens.dtype.name, examples.offsets.dtype.name) == ("int32", "int64")


def test_a_text_of_no_tokens_becomes_one() -> None:
    rows = Dataset.from_dict({"text": ["", "a"], "label": [1, 0]})
    assert sequences(encode(CLASSES, rows, letters("llama"), 5)) == [[EOS], [A]]
    assert sequences(encode(CLASSES, rows, letters("bare"), 5)) == [[UNK], [A]]


def test_a_pair_has_segments_where_the_tokenizer_tells_them_apart() -> None:
    rows = Dataset.from_dict({"text_a": ["ab", "abcde"], "text_b": ["c", "abcd"], "label": [0, 1]})
    examples = encode(PAIRS, rows, letters("bert"), 7)
    assert sequences(examples) == [[CLS, A, B, SEP, C, SEP], [CLS, A, B, SEP, A, B, SEP]]
    assert examples.segments is not None
    assert examples.segments.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert encode(PAIRS, rows, letters("bare"), 7).segments is None


def test_plain_text_is_bos_and_text_and_all_but_the_first_are_targets() -> None:
    rows = {"text": ["ab", "abcde", "", "a"]}
    assert causal(TEXT, rows, "llama", 4) == [([BOS, A, B], 1), ([BOS, A, B, C], 1), ([BOS, A], 1)]
    assert causal(TEXT, rows, "bare", 4) == [([A, B], 1), ([A, B, C, D], 1)]


def test_answer_and_eos_are_the_targets_after_a_prompt() -> None:
    rows = {"prompt": ["ab", "a ", ""], "answer": ["c", "cd", "c"]}
    assert causal(ANSWER, rows, "llama", 9) == [
        ([BOS, A, B, LINE, C, EOS], 3),
        ([BOS, A, SPACE, C, D, EOS], 2),
        ([BOS, C, EOS], 1),
    ]
    assert causal(ANSWER, rows, "bare", 9) == [([A, B, LINE, C], 2), ([A, SPACE, C, D], 1)]


def test_a_long_prompt_loses_its_middle_and_a_long_answer_its_end() -> None:
    rows = {"prompt": ["abcde", "ab", "a", "ab"], "answer": ["d", "abc", "abcde", ""]}
    assert causal(ANSWER, rows, "llama", 7) == [
        ([BOS, A, B, E, LINE, D, EOS], 4),
        ([BOS, A, LINE, A, B, C, EOS], 2),
        ([BOS, A, LINE, A, B, C, D], 2),
        ([BOS, A, B, LINE, EOS], 3),
    ]
    assert causal(ANSWER, rows, "bare", 3) == [
        ([A, LINE, D], 1),
        ([A, LINE, A], 1),
        ([A, LINE, A], 1),
        ([A, B, LINE], 2),
    ]


def test_a_batch_learns_the_answer_alone() -> None:
    examples = encode(ANSWER, Dataset.from_dict({"prompt": ["ab"], "answer": ["c"]}), letters("llama"), 9)
    assert examples.batch([0]).labels.tolist() == [[IGNORED, IGNORED, LINE, C, EOS, IGNORED]]


@settings(max_examples=50, deadline=None)
@given(
    first=st.lists(st.text("abcxyz\n ", max_size=12), min_size=1, max_size=4),
    second=st.text("abcxyz\n ", max_size=12),
    kind=st.sampled_from(["bert", "llama", "bare"]),
    task=st.sampled_from([TEXT, ANSWER, CLASSES, PAIRS]),
    max_length=st.integers(5, 14),
)
def test_every_example_has_a_token_a_target_and_no_more_than_max_length(
    first: list[str], second: str, kind: str, task: Task, max_length: int
) -> None:
    columns = {column: [second] * len(first) for column in task.columns} | {task.columns[0]: first}
    rows = Dataset.from_dict({**columns, "label": [1] * len(first)})
    examples, _, owner, count = encode_rows(task, rows, letters(kind), max_length)
    assert len(examples) == len(owner) == len(examples.lengths) and count == len(first)
    none = [row for row in range(len(first)) if row not in owner]
    assert all(task.kind == "causal-lm" and len("".join(c[row] for c in columns.values())) < 2 for row in none)
    assert np.all(np.diff(owner) > 0), "an example each"
    assert examples.lengths.min(initial=1) >= 1 and examples.lengths.max(initial=1) <= max_length
    assert examples.segments is None or len(examples.segments) == len(examples.tokens)
    if task.kind == "causal-lm" and len(examples):
        targets = examples.batch(range(len(examples))).labels
        assert bool((targets != IGNORED).any(dim=1).all())
        assert examples.labels.min() >= 1


def test_no_rows_make_no_examples() -> None:
    for task in (TEXT, ANSWER, CLASSES, PAIRS):
        rows = Dataset.from_dict({column: [] for column in (*task.columns, "label")})
        examples = encode(task, rows, letters("llama"), 9)
        assert len(examples) == 0 and examples.offsets.tolist() == [0]


@pytest.mark.parametrize(("task", "least"), [(TEXT, 2), (ANSWER, 2), (CLASSES, 3), (PAIRS, 5)])
def test_a_max_length_without_room_for_text_is_refused(task: Task, least: int) -> None:
    rows = Dataset.from_dict({**{column: ["abc"] for column in task.columns}, "label": [1]})
    assert len(encode(task, rows, letters("bert"), least)) == 1
    with pytest.raises(InputError, match=f"--max-length {least - 1}: .* need {least} or more"):
        encode(task, rows, letters("bert"), least - 1)


# --- real sets --------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "train", "test", "classes", "columns"),
    [
        ("agnews", 9_977, 7_600, 4, ("text",)),
        ("banking77", 10_003, 3_080, 77, ("text",)),
        ("snli", 11_633, 9_824, 3, ("text_a", "text_b")),
        ("sst2", 67_349, 1_821, 2, ("text",)),
        ("gsm8k", 7_473, 1_319, 0, ("prompt", "answer")),
        ("commonsense", 17_754, 12_377, 0, ("prompt", "answer")),
        ("shakespeare", 5_479, 1_374, 0, ("text",)),
        ("tinystories", 2_085, 231, 0, ("text",)),
    ],
)
def test_real_sets_load_whole(name: str, train: int, test: int, classes: int, columns: tuple[str, ...]) -> None:
    loaded = load_source(str(SHARED / "data" / name))
    task = resolve_task("auto", loaded)
    assert (len(loaded.train), len(loaded.test), loaded.test_split) == (train, test, "test")
    assert (task.columns, len(task.label_names)) == (columns, classes)
    assert set(loaded.test.column_names) <= set(loaded.train.column_names)


@needs_shared
def test_a_real_tokenizer_gives_back_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k")
    loaded = load_source(str(SHARED / "data" / "tinystories"))
    rows = loaded.test.select(range(8))
    examples = encode(resolve_task("auto", loaded), rows, tokenizer, 4096)
    for text, tokens in zip(rows["text"][:], sequences(examples), strict=True):
        assert tokens[0] == tokenizer.bos_token_id and tokens[-1] != tokenizer.eos_token_id
        assert str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() == text.strip()
    short = encode(resolve_task("auto", loaded), rows, tokenizer, 16)
    assert [tokens[:16] for tokens in sequences(examples)] == sequences(short)


def test_what_is_held_out_is_a_tenth_of_train_and_test_is_not_even_read(tmp_path: Path) -> None:
    rows = [{"text": f"text {k}", "label": k % 2} for k in range(50)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("no JSON at all\n", encoding="utf-8")
    source = load_source(str(tmp_path), eval_split="held-out", seed=1)
    train, held_out = set(source.train["text"][:]), set(source.test["text"][:])
    assert len(held_out) == 5 and not train & held_out and train | held_out == {row["text"] for row in rows}
    assert set(load_source(str(tmp_path), eval_split="held-out", seed=2).test["text"][:]) != held_out


def test_of_pydoc_no_row_of_its_test_split_is_held_out() -> None:
    whole, source = load_source("pydoc"), load_source("pydoc", eval_split="held-out")
    assert len(source.train) + len(source.test) == len(whole.train)
    assert not set(source.test["text"][:]) & set(whole.test["text"][:])
