"""What is learnt of texts and conversations, token by token; and what is left of those that are too long."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlotr.data.cutting import Example, cut
from fedlotr.data.language import Borders, Encoded, encode_language
from fedlotr.data.templates import Style
from fedlotr.errors import InputError
from tests.data.chat_templates import byte_level, sentence_piece, template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AS_IT_IS = Style(template="none")


def asked(*pairs: tuple[str, str]) -> dict[str, list[str]]:
    return {"prompt": [prompt for prompt, _ in pairs], "answer": [answer for _, answer in pairs]}


def told(*conversations: list[str]) -> dict[str, list[str]]:
    """Conversations of a user's and an assistant's turns, as the column holds them."""
    rows = [
        [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(said)]
        for said in conversations
    ]
    return {"messages": [json.dumps(row) for row in rows]}


def shown(tokenizer: Any, encoded: Encoded, index: int = 0) -> str:
    """Its tokens, those that are learnt between brackets."""
    pieces = tokenizer.convert_ids_to_tokens(encoded.tokens[index])
    return " ".join(f"[{p}]" if on else p for p, on in zip(pieces, encoded.targets[index], strict=True))


def test_a_prompt_and_its_answer_are_tokenised_together(stories: Path) -> None:
    tokenizer = sentence_piece(stories, "")
    encoded = encode_language(asked(("2+2?", "four"), ("", "x"), ("two ", "")), tokenizer, Style(), None)
    assert shown(tokenizer, encoded) == "<s> ▁ 2 + 2 ? [<0x0A>] [f] [ou] [r] [</s>]"
    assert shown(tokenizer, encoded, 1) == "<s> [▁] [x] [</s>]"
    assert shown(tokenizer, encoded, 2) == "<s> ▁t w o [▁] [</s>]"
    assert encoded.owner == [0, 1, 2] and encoded.whole == [11, 4, 6]


def test_what_is_formatted_already_gets_no_token_twice(stories: Path) -> None:
    tokenizer = sentence_piece(stories, "")
    rows = asked(("<s>[INST] 2+2? [/INST]", " 4"), ("[INST] 2+2? [/INST]", " 4</s>"))
    encoded = encode_language(rows, tokenizer, AS_IT_IS, None)
    assert encoded.tokens[0] == tokenizer("<s>[INST] 2+2? [/INST] 4</s>", add_special_tokens=False)["input_ids"]
    for tokens, learnt in zip(encoded.tokens, encoded.targets, strict=True):
        assert tokens.count(1) == tokens.count(2) == 1 and tokens[0] == 1 and tokens[-1] == 2
        assert tokenizer.decode([t for t, on in zip(tokens, learnt, strict=True) if on]).strip() == "4</s>"


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_borders_are_those_of_lm_evaluation_harness(name: str, stories: Path) -> None:
    """`TemplateLM._encode_pair`: white space at a context's end is the continuation's, which is what follows as many
    tokens as the context alone has."""
    tokenizer = byte_level("") if name == "bytes" else sentence_piece(stories, "")
    rng = random.Random(name)
    pieces = ["Lily", " ", "\n", "é", "日本", "play", "ed", ".", "1", "  ", "A"]
    for _ in range(300):
        prompt, answer = ("".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(2))
        encoded = encode_language(asked((prompt, answer)), tokenizer, AS_IT_IS, None)
        context = prompt.rstrip()
        whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        before = tokenizer(context, add_special_tokens=False)["input_ids"] if context else []
        expected = [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
        assert encoded.tokens == [expected], (prompt, answer)
        first = encoded.targets[0].index(True)
        if whole[: len(before)] == before:
            assert first == 1 + len(before), (prompt, answer)
        else:  # a token straddles the border
            assert first == 1 + min(len(before), len(whole)), (prompt, answer)
        assert all(encoded.targets[0][first:])


def test_places_of_tokens_and_encoded_beginnings_give_the_same_borders(stories: Path) -> None:
    for tokenizer in (byte_level(CHATML), sentence_piece(stories, CHATML)):
        rng = random.Random(0)
        for _ in range(200):
            text = "".join(rng.choices(["Lily", " played", "<|im_end|>", "\n", " é", "日", ".", "ab"], k=8))
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            fast, slow = Borders(text, ids, offsets, tokenizer), Borders(text, ids, None, tokenizer)
            for place in range(len(text) + 1):
                if tokenizer(text[:place], add_special_tokens=False)["input_ids"] == ids[: fast.first(place)]:
                    assert slow.first(place) == fast.first(place), (text, place)


def test_a_tokenizer_without_places_does_too() -> None:
    tokenizer: Any = hf.ByT5Tokenizer()  # written in Python; a token is a byte, and there is no BOS
    encoded = encode_language(asked(("Who?", "Zoë")), tokenizer, Style(), None)
    learnt = [t for t, on in zip(encoded.tokens[0], encoded.targets[0], strict=True) if on]
    assert tokenizer.decode(encoded.tokens[0]) == "Who?\nZoë</s>" and tokenizer.decode(learnt) == "\nZoë</s>"
    cut_off = encode_language(asked(("Who was it?", "Zoë")), tokenizer, Style(), 12)
    assert tokenizer.decode(cut_off.tokens[0]) == "Whoit?\nZoë</s>" and cut_off.prompt_cut == [5]


def test_a_word_keeps_the_space_that_a_template_writes_before_it() -> None:
    spaced = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = byte_level(spaced)
    encoded = encode_language(asked(("Who?", "import it")), tokenizer, Style(), None)
    learnt = [t for t, on in zip(encoded.tokens[0], encoded.targets[0], strict=True) if on]
    assert tokenizer.decode(learnt) == " import it<|eos|>"


def test_plain_text_is_learnt_from_its_beginning_and_ends_in_eos_where_that_is_asked(stories: Path) -> None:
    tokenizer = sentence_piece(stories, "")
    rows = {"text": ["Once upon", "", "Once</s>"]}
    encoded = encode_language(rows, tokenizer, Style(), None)
    assert (
        shown(tokenizer, encoded) == "<s> [▁Once] [▁upon]" and encoded.owner == [0, 2] and encoded.dropped == [0, 1, 0]
    )
    ended = encode_language(rows, tokenizer, Style(eos=True), 3)
    assert shown(tokenizer, ended) == "<s> [▁Once] [▁upon]" and ended.answer_cut == [1, 0, 0]
    assert shown(tokenizer, ended, 1) == "<s> [</s>]" and shown(tokenizer, ended, 2) == "<s> [▁Once] [</s>]"
    without = byte_level("", bos_token=None)
    encoded = encode_language({"text": ["Once upon"]}, without, Style(), None)
    assert encoded.targets[0][0] is False and all(encoded.targets[0][1:])


def test_an_answer_without_a_prompt_follows_something() -> None:
    tokenizer = byte_level("", bos_token=None)
    encoded = encode_language(asked(("", "Zoe")), tokenizer, Style(), None)
    assert encoded.tokens[0][0] == tokenizer.eos_token_id and all(encoded.targets[0][1:])


def test_a_conversations_answers_are_learnt_with_their_end_and_nothing_else() -> None:
    tokenizer = byte_level(CHATML)
    encoded = encode_language(told(["Hi", "Hello", "Bye", "So long"], ["Hi", "Hello", "Bye"]), tokenizer, Style(), None)
    for tokens, learnt, answers in zip(encoded.tokens, encoded.targets, (["Hello", "So long"], ["Hello"]), strict=True):
        text = tokenizer.decode([t if on else tokenizer.eos_token_id for t, on in zip(tokens, learnt, strict=True)])
        assert [part for part in text.split("<|eos|>") if part] == [f"{answer}<|im_end|>" for answer in answers]
        assert tokenizer.decode(tokens).endswith("<|im_end|>") and tokenizer.decode(tokens).startswith(
            "<|im_start|>user"
        )


def test_a_row_may_give_several_examples_and_lengths_are_those_before_cutting() -> None:
    tokenizer = byte_level(template("qwen3"))
    rows = told(["Hi", "Hello", "Bye", "So long " * 30], ["Hi", "Yes"])
    encoded, whole = (encode_language(rows, tokenizer, Style(), limit) for limit in (40, None))
    assert encoded.owner == [0, 0, 1] and encoded.whole == [len(ids) for ids in whole.tokens]
    assert max(encoded.whole) > 40 >= max(map(len, encoded.tokens)) and encoded.dropped == [0, 0]
    assert encoded.answer_cut[0] == encoded.whole[1] - 40 and encoded.answer_cut[1] == 0


def test_the_rows_that_give_nothing_are_named() -> None:
    rows = {
        "messages": [json.dumps([{"role": role, "content": "x"}]) for role in ("user", "bot", "user", "user", "user")]
    }
    with pytest.raises(InputError) as caught:
        encode_language(rows, byte_level(CHATML), Style(), None, place=lambda row: f"a.jsonl, line {row + 1}")
    assert caught.value.problems[0].startswith("a.jsonl, line 1: no message is an assistant's")
    assert caught.value.problems[1].startswith("a.jsonl, line 2: message 1 has the role 'bot'")
    assert caught.value.problems[-1] == "2 more rows like these"


def test_a_prompt_loses_its_middle_the_framing_and_the_answer_nothing() -> None:
    tokenizer = byte_level(CHATML)
    words = " ".join(f"w{n}" for n in range(100))
    whole = encode_language(told([words, "Zoe did."]), tokenizer, Style(), None)
    encoded = encode_language(told([words, "Zoe did."]), tokenizer, Style(), 60)
    text = tokenizer.decode(encoded.tokens[0])
    assert (
        text.startswith("<|im_start|>user\nw0 w1")
        and "w99<|im_end|>\n<|im_start|>assistant\nZoe did.<|im_end|>" in text
    )
    assert len(encoded.tokens[0]) == 60 and encoded.prompt_cut == [encoded.whole[0] - 60] and encoded.answer_cut == [0]
    assert encoded.tokens[0][-5:] == whole.tokens[0][-5:] and encoded.targets[0][-5:] == whole.targets[0][-5:]


def test_the_longest_contents_lose_first_and_later_turns_before_them() -> None:
    tokenizer = byte_level(CHATML)
    system = [{"role": "system", "content": "Be kind."}]
    said = json.loads(told(["w " * 60, "Yes.", "And then?", "No."])["messages"][0])
    rows = {"messages": [json.dumps(system + said)]}
    first = len(encode_language({"messages": [json.dumps(system + said[:2])]}, tokenizer, Style(), None).tokens[0])
    later = encode_language(rows, tokenizer, Style(), first)
    assert len(later.tokens[0]) == first and tokenizer.decode(later.tokens[0]).endswith("Yes.<|im_end|>")
    assert later.answer_cut[0] > 0, "the second answer"
    shorter = encode_language(rows, tokenizer, Style(), first - 30)
    text = tokenizer.decode(shorter.tokens[0])
    assert len(shorter.tokens[0]) == first - 30 and "Be kind.<|im_end|>" in text and text.endswith("Yes.<|im_end|>")


def test_an_example_without_anything_of_its_prompt_or_of_its_answer_is_dropped() -> None:
    tokenizer = byte_level(CHATML)
    rows = told(["Who played in the garden?", "Zoe did."])
    framing = encode_language(told(["", "Zoe did."]), tokenizer, Style(), None)
    around = framing.targets[0].index(True)
    assert encode_language(rows, tokenizer, Style(), around + 1).dropped == [1]
    kept = encode_language(rows, tokenizer, Style(), around + 2)
    assert kept.dropped == [0] and sum(kept.targets[0]) == 1 and len(kept.tokens[0]) == around + 2
    assert encode_language(told(["", "Zoe did."]), tokenizer, Style(), around + 1).dropped == [0], (
        "it had nothing to lose"
    )


@st.composite
def examples(draw: st.DrawFn) -> tuple[Example, int]:
    """Framing, contents and answers in turns, the tokens counted from 0 so that each is known again."""
    targets: list[bool] = []
    contents: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(0, 2))):
            targets += [False] * draw(st.integers(0, 3))
            size = draw(st.integers(0, 12))
            if size:
                contents.append((len(targets), len(targets) + size))
            targets += [False] * size
        targets += [False] * draw(st.integers(1, 3)) + [True] * draw(st.integers(1, 8))
    return Example(list(range(len(targets))), targets, tuple(contents)), draw(st.integers(1, 40))


@settings(max_examples=500, deadline=None)
@given(examples())
def test_what_is_cut_keeps_its_promises(drawn: tuple[Example, int]) -> None:
    example, most = drawn
    kept = cut(example, most)
    ends = [i + 1 for i, (on, after) in enumerate(pairwise([*example.targets, False])) if on and not after]
    end = max((end for end in ends if end <= most), default=ends[0])
    inside = {token for start, stop in example.contents for token in range(start, stop) if stop <= end}
    framing = [i for i in range(end) if not example.targets[i] and i not in inside]
    learnt = [i for i in range(end) if example.targets[i]]
    if kept is None:
        assert len(framing) + 1 + bool(inside) > most, "there was no room for a target and a part of the prompt"
        return
    assert len(kept.tokens) <= most and kept.targets[-1] and all(a < b for a, b in pairwise(kept.tokens))
    assert kept.targets == [example.targets[token] for token in kept.tokens]
    assert set(framing) <= set(kept.tokens), "the framing is whole"
    if end <= most:
        assert kept.tokens == list(range(end)), "turns that fit are whole, later ones left out"
        return
    answer = [token for token in kept.tokens if example.targets[token]]
    assert answer == learnt[: len(answer)], "an answer loses its end alone"
    left = [token for token in kept.tokens if token in inside]
    assert len(kept.tokens) == most and bool(left) == bool(inside)
    if answer != learnt:
        assert len(left) <= max(1, most // 4, most - len(framing) - len(learnt)), "contents first gave what they have"
    sizes = []
    for start, stop in (span for span in example.contents if span[1] <= end):
        here = [token for token in left if start <= token < stop]
        beginning = [token for token in here if token - start < (len(here) + 1) // 2]
        assert here == [*beginning, *range(stop - (len(here) - len(beginning)), stop)], "the middle goes"
        sizes.append((len(here), stop - start))
    largest = max((size for size, _ in sizes), default=0)
    assert all(size >= min(whole, largest - 1) for size, whole in sizes), "the longest lose first"
