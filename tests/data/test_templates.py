"""A template is the tokenizer's: what it renders is learnt from, and what it would be asked for is what is learnt."""

import datetime
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlotr.data.templates import TEMPLATES, Rendered, Style, asks_for_date, prompt_of, render
from tests.data.chat_templates import FAMILIES, byte_level, chat_models, names, sentence_piece, template

Messages = list[dict[str, Any]]
TODAY = Style(date=datetime.date.today())
"""So that templates that ask for the date render what they would for anybody else."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["Lily", "played", "é", "日本語", "🙂", "a\nb", "def f():\n    pass", "  ", "\n\n", "1+1=2"]
WORDS += ["user", "assistant", '"', "User: "]
HOSTILE = ["<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|eos|>", "<|bos|>", "[INST]", "<end_of_turn>\n"]
HOSTILE += ["</s>", "<|assistant|>", "<|end|>\n", "<｜User｜>"]
MARKED = [name for name in names() if name.endswith("_training")]


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def alternating(said: list[str], system: str | None) -> Messages:
    first = [] if system is None else [turn("system", system)]
    return first + [turn(("user", "assistant")[number % 2], content) for number, content in enumerate(said)]


def conversations(pieces: list[str]) -> st.SearchStrategy[Messages]:
    content = st.lists(st.sampled_from(pieces), min_size=1, max_size=4).map(" ".join)
    turns = st.integers(1, 4).flatmap(lambda n: st.lists(content, min_size=2 * n, max_size=2 * n))
    return st.builds(alternating, turns, st.none() | content)


def oracle(tokenizer: Any, messages: Messages, prompt: bool = False) -> str:
    """What transformers renders; of a template that takes no system's words, with these before the user's."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, date_string=f"{TODAY.date:%d %b %Y}"
        )
        return text
    except Exception:
        if messages[0]["role"] != "system":
            raise
        merged = turn("user", messages[0]["content"] + "\n\n" + messages[1]["content"])
        return oracle(tokenizer, [merged, *messages[2:]], prompt)


def learnt(tokenizer: Any, rendered: Rendered) -> list[tuple[int, list[int]]]:
    """Where each run of targets begins, and its tokens."""
    from fedlotr.data.language import Borders, _example

    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    borders = Borders(rendered.text, encoded["input_ids"], encoded["offset_mapping"], tokenizer)
    example = _example(rendered, borders, tokenizer, plain=False, eos=True)
    starts = [i for i, on in enumerate(example.targets) if on and not example.targets[i - 1]]
    runs = [(i, next((j for j in range(i, len(example.targets)) if not example.targets[j]), None)) for i in starts]
    assert example.tokens == encoded["input_ids"][: len(example.tokens)], "tokens are the rendering's own, none twice"
    return [(i, example.tokens[i:j]) for i, j in runs]


def check(tokenizer: Any, messages: Messages) -> None:
    """The properties, for a template without marks of its own."""
    found = render(messages, tokenizer, TODAY)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(found) in (1, len(answers))
    endings = (tokenizer.eos_token, "")
    if len(found) == 1:
        whole = oracle(tokenizer, messages)
        assert found[0].text.removesuffix(tokenizer.eos_token) == whole.removesuffix(tokenizer.eos_token)
        runs = learnt(tokenizer, found[0])
    else:
        texts = [oracle(tokenizer, messages[: index + 1]) for index in answers]
        assert [rendered.text for rendered in found] == texts
        parts = [learnt(tokenizer, rendered) for rendered in found]
        assert all(len(part) == 1 for part in parts), "each answer is an example of its own"
        runs = [part[0] for part in parts]
        ends = [text[: rendered.targets[-1][1]] for text, rendered in zip(texts, found, strict=True)]
        assert not all(texts[-1].startswith(end) for end in ends), "one text would have done"
    assert len(runs) == len(answers)
    for index, (start, tokens) in zip(answers, runs, strict=True):
        text = oracle(tokenizer, messages[: index + 1])
        prompted = prompt_of(messages[: index + 1], tokenizer, TODAY)
        assert prompted == prompt_of(messages[:index], tokenizer, TODAY)
        head = oracle(tokenizer, messages[:index], prompt=True)
        ids, opened = (tokenizer(said, add_special_tokens=False)["input_ids"] for said in (text, head))
        assert ids[: len(prompted)] != prompted or start == len(prompted)
        if text.startswith(head):
            assert prompted == opened and tokens[: len(ids) - start] == ids[start:][: len(tokens)]
            left = tokenizer.decode(ids[start + len(tokens) :])
            assert left.strip() in endings, "all that follows the generation prompt, up to the end of the turn"
        said = tokenizer.decode(tokens)
        assert said == said.rstrip() and messages[index]["content"].strip() in said, "parsing back gives the message"
    for rendered in found:
        told = "\n\n".join(message["content"] for message in messages)
        spans = [rendered.text[start:end] for start, end in rendered.contents]
        assert all(a[1] <= b[0] for a, b in pairwise(rendered.contents))
        assert all(span in told for span in spans), "contents are what was said, or the system's words with the user's"
        assert not any(a < end and start < b for a, b in rendered.targets for start, end in rendered.contents)


def hold(tokenizer: Any, pieces: list[str], examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations(pieces))
    def properties(messages: Messages) -> None:
        check(tokenizer, messages)

    properties()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_is_the_tokenizers(family: str) -> None:
    hold(byte_level(template(FAMILIES[family])), WORDS, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_contents_that_look_like_a_templates_own_marks_move_no_border(family: str) -> None:
    hold(byte_level(template(FAMILIES[family])), [*HOSTILE, "Lily"], 5)


@pytest.mark.parametrize("family", ["Llama 3", "Phi 3", "Qwen 3 (thinking)", "DeepSeek R1"])
def test_a_template_is_the_tokenizers_of_sentence_pieces_too(family: str, stories: Path) -> None:
    hold(sentence_piece(stories, template(FAMILIES[family])), WORDS, 5)


@pytest.mark.slow
def test_a_template_is_a_real_chat_models() -> None:
    hold(chat_models(), WORDS + HOSTILE, 30)


@pytest.mark.parametrize("name", [name for name in names() if name not in MARKED])
def test_every_template_of_trl_shows_where_answers_are(name: str) -> None:
    tokenizer = byte_level(template(name))
    messages = alternating(["Who played?", "Zoe did.", "And then?", "Tim."], "Say it shortly.")
    found = render(messages, tokenizer, TODAY)
    said = [rendered.text[start:end] for rendered in found for start, end in rendered.targets]
    assert len(said) == 2 and "Zoe did." in said[0] and "Tim." in said[1]
    for rendered in found:
        asked = [rendered.text[start:end] for start, end in rendered.contents]
        assert any("Say it shortly." in content for content in asked) and any("Who played?" in each for each in asked)
        outside = [start for start, _ in rendered.targets] + [end for _, end in rendered.targets]
        assert not any(start < border < end for start, end in rendered.contents for border in outside)


@pytest.mark.parametrize("name", MARKED)
def test_a_templates_own_marks_are_used(name: str) -> None:
    """trl's marks begin at the latest where the generation prompt ends, and hold the end of the turn."""
    tokenizer = byte_level(template(name))
    messages = alternating(["Who played?", "Zoe did.", "And then?", "Tim."], None)
    if "message['content'] is string" not in template(name) and any(
        kind in name for kind in ("vlm", "llava", "idefics")
    ):
        messages = [turn(each["role"], [{"type": "text", "text": each["content"]}]) for each in messages]
    (found,) = render(messages, tokenizer, TODAY)
    assert found.text == oracle(tokenizer, messages)
    kept = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        date_string=f"{TODAY.date:%d %b %Y}",
    )
    marked = tokenizer.decode([i for i, on in zip(kept["input_ids"], kept["assistant_masks"], strict=True) if on])
    ours = "".join(found.text[start:end] for start, end in found.targets)
    assert "".join(ours.split()) == "".join(marked.split()) and not any(
        found.text[start:end][-1].isspace() for start, end in found.targets
    )


ASKED = [turn("user", "Who played?"), turn("assistant", "Zoe.")]


def only(messages: Messages, tokenizer: Any, style: Style = TODAY, tools: Any = None) -> Rendered:
    (found,) = render(messages, tokenizer, style, tools)
    return found


def targets(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.targets]


def test_today_is_the_configurations_day() -> None:
    day = Style(date=datetime.date(2001, 2, 3))
    for name, written in (
        ("llama3_2", "Today Date: 03 Feb 2001"),
        ("gptoss", "2001-02-03"),
        ("llama3_1", "03 Feb 2001"),
    ):
        tokenizer = byte_level(template(name))
        assert asks_for_date(tokenizer) and written in only(ASKED, tokenizer, day).text
        assert str(datetime.date.today().year) not in only(ASKED, tokenizer, day).text
        assert written in tokenizer.decode(prompt_of(ASKED, tokenizer, day))
    assert not asks_for_date(byte_level(CHATML)) and not asks_for_date(byte_level(template("gemma")))
    every = "{{ strftime_now('%-d %B %y, %A %j') }}\n" + CHATML
    assert only(ASKED, byte_level(every), day).text.startswith("3 February 01, Saturday 034\n<|im_start|>user")


def test_where_no_day_is_said_it_is_the_templates_own() -> None:
    tokenizer = byte_level(template("llama3_1"))
    assert only(ASKED, tokenizer, Style()).text == tokenizer.apply_chat_template(ASKED, tokenize=False)


def test_a_template_that_drops_earlier_reasoning_gives_each_answer_an_example() -> None:
    tokenizer = byte_level(template("qwen3"))
    messages = [
        turn("user", "1+1?"),
        {**turn("assistant", "2"), "reasoning_content": "One and one."},
        turn("user", "2+2?"),
        turn("assistant", "<think>\nTwice two.\n</think>\n\n4"),
    ]
    first, second = render(messages, tokenizer, TODAY)
    assert targets(first) == ["<think>\nOne and one.\n</think>\n\n2<|im_end|>"]
    assert targets(second) == ["<think>\nTwice two.\n</think>\n\n4<|im_end|>"]
    assert "One and one." not in second.text and "2" in [second.text[a:b] for a, b in second.contents]


def test_a_generation_prompt_that_opens_a_reasoning_is_no_part_of_answers_without() -> None:
    reasoner = byte_level(template("deepseek_r1_distill"))
    assert targets(only(ASKED, reasoner)) == ["Zoe.<｜end▁of▁sentence｜>"]
    assert reasoner.decode(prompt_of(ASKED, reasoner, TODAY)).endswith("<｜Assistant｜>")
    closable = byte_level(template("nemotron_3_nano"))
    assert targets(only(ASKED, closable)) == ["Zoe.<|im_end|>"]
    quiet = closable.apply_chat_template(ASKED[:1], add_generation_prompt=True, enable_thinking=False, tokenize=False)
    assert closable.decode(prompt_of(ASKED, closable, TODAY)) == quiet


def test_a_template_that_shows_no_beginning_of_answers_is_refused() -> None:
    upside_down = (
        "{% for message in messages | reverse %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="does not show which part is the assistant's"):
        render(ASKED, byte_level(upside_down), TODAY)


def test_an_answer_that_a_template_ends_by_nothing_ends_in_eos() -> None:
    assert targets(only(ASKED, byte_level(template("glm4moe")))) == ["\n<think></think>\nZoe.<|eos|>"]


def test_everything_may_be_learnt_also_what_follows_the_last_answer() -> None:
    tokenizer = byte_level(CHATML)
    rest = [*ASKED, turn("user", "And?")]
    rendered = only(rest, tokenizer, Style(train_on="all"))
    assert rendered.text == tokenizer.apply_chat_template(rest, tokenize=False)
    assert targets(rendered) == [rendered.text.removesuffix("\n")]
    assert only(rest, tokenizer) == only(ASKED, tokenizer)


def test_lists_of_parts_are_rendered_where_a_template_can_and_else_as_one_text() -> None:
    parts = [turn("user", [{"type": "text", "text": "Who "}, {"type": "text", "text": "played?"}]), ASKED[1]]
    written_out = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    )
    for name in (CHATML, written_out, template("qwen3")):  # that fails, writes a list as Python does, and drops it
        tokenizer = byte_level(name)
        assert only(parts, tokenizer) == only(ASKED, tokenizer)
    tokenizer = byte_level(template("gemma3"))
    assert only(parts, tokenizer).text == tokenizer.apply_chat_template(parts, tokenize=False)
    tokenizer = byte_level(template("smolvlm"))  # which takes nothing but parts
    assert "Who played?" in only(ASKED, tokenizer).text
    seen = [turn("user", [{"type": "image", "url": "x.png"}, {"type": "text", "text": "Who?"}]), ASKED[1]]
    with pytest.raises(ValueError, match=r"message 1 \(user\) has a part of the kind 'image'; only text is learnt"):
        render(seen, tokenizer, TODAY)


TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a town", "parameters": {"type": "object"}},
}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
CALLED = [
    turn("user", "Is it cold in Oslo?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "minus 3", "tool_call_id": "a", "name": "weather"},
    turn("assistant", "It is."),
]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "deepseekv3", "gptoss"])
def test_tools_are_rendered_where_a_template_knows_them(name: str) -> None:
    tools = None if name == "deepseekv3" else [TOOL]
    found = render(CALLED, byte_level(template(name)), TODAY, tools)
    learnt_texts = [text for rendered in found for text in targets(rendered)]
    call, answer = learnt_texts
    assert "weather" in call and '"town": "Oslo"' in call and "It is." in answer and "minus 3" not in call + answer
    assert "minus 3" in found[-1].text and (tools is None or "of a town" in found[-1].text)


def test_tools_that_a_template_leaves_out_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves out the tool 'weather'"):
        render(ASKED, byte_level(CHATML), TODAY, [TOOL])
    silent = "{% for message in messages %}{{ message.role + (message.content or '') }}{% endfor %}"
    with pytest.raises(ValueError, match=r"leaves out the tool calls of message 2 \(assistant\)"):
        render(CALLED, byte_level(silent), TODAY)
    with pytest.raises(ValueError, match="only rendered by a tokenizer's chat template"):
        render(CALLED, byte_level(CHATML), Style(template="plain"))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([turn("human", "Hi"), ASKED[1]], "message 1 has the role 'human'; expected one of system, developer, user"),
        (ASKED[:1], "no message is an assistant's"),
        ([turn("user", None), ASKED[1]], r"message 1 \(user\) has no content"),
        ([turn("user", 7), ASKED[1]], "has int as its content; expected text"),
        ([turn("user", ["Hi"]), ASKED[1]], "has a part of the kind 'str'"),
        ([ASKED[0], *ASKED], "the chat template refuses: Conversation roles must alternate"),
    ],
)
def test_what_no_template_can_render_is_refused_in_words(messages: Messages, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render(messages, byte_level(template("gemma")), TODAY)


def test_a_template_cannot_leave_its_sandbox() -> None:
    for attack in ("{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__ }}", "{% include '/etc/passwd' %}"):
        with pytest.raises(ValueError, match="the chat template"):
            render(ASKED, byte_level(CHATML + attack), TODAY)


def test_names_choose_the_template(stories: Path) -> None:
    without, having = sentence_piece(stories, ""), byte_level(CHATML)
    assert only(ASKED, without) == only(ASKED, without, Style(template="plain"))
    assert only(ASKED, having) == only(ASKED, having, Style(template="chat"))
    assert only(ASKED, having, Style(template="plain")).text == "Who played?\nZoe."
    with pytest.raises(ValueError, match="the tokenizer has no chat template; choose another"):
        render(ASKED, without, Style(template="chat"))
    with pytest.raises(ValueError, match="no such template: plan, did you mean 'plain'"):
        render(ASKED, without, Style(template="plan"))
    assert all(entry.text for entry in TEMPLATES.values())


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_any() -> None:
    tokenizer = byte_level(template("qwen2_5"))
    tokenizer.chat_template = {"default": CHATML, "tool_use": template("qwen2_5")}
    assert only(ASKED, tokenizer).text.startswith("<|im_start|>user")
    assert "of a town" in only(ASKED, tokenizer, TODAY, [TOOL]).text
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(ValueError, match="the tokenizer has no chat template to use"):
        render(ASKED, tokenizer, TODAY)


def test_the_plain_template_of_several_turns_says_whose_they_are(stories: Path) -> None:
    messages = alternating(["Hi", "Hello", "Bye", "So long"], "Be kind.")
    rendered = only(messages, sentence_piece(stories, ""))
    assert rendered.text == "Be kind.\n\nUser: Hi\nAssistant: Hello</s>\nUser: Bye\nAssistant: So long"
    assert targets(rendered) == [" Hello</s>", " So long"]
    assert [rendered.text[start:end] for start, end in rendered.contents] == ["Be kind.", "Hi", "Bye"]


@pytest.mark.parametrize("name", ["", "chatml", "qwen3", "marks", "none"])
def test_an_answer_of_weight_0_is_shown_and_not_learnt(name: str, stories: Path) -> None:
    messages = alternating(["Hi", "Hello", "Bye", "So long"], None)
    messages[1]["weight"] = 0
    text = {"chatml": CHATML, "marks": template(MARKED[0]) if MARKED else None, "qwen3": template("qwen3")}.get(name)
    tokenizer = byte_level(text) if text else sentence_piece(stories, "")
    rendered = only(messages, tokenizer, Style(template="none") if name == "none" else TODAY)
    (learnt,) = targets(rendered)
    assert "So long" in learnt and "Hello" not in learnt and "Hello" in rendered.text
    messages[3]["weight"], messages[1]["weight"] = 0, 1
    (learnt,) = targets(only(messages, tokenizer))
    assert "Hello" in learnt and "So long" not in only(messages, tokenizer).text
    messages[1]["weight"] = 0
    with pytest.raises(ValueError, match="have the weight 0; there is nothing to learn"):
        render(messages, tokenizer, TODAY)


def test_a_function_of_ones_own_is_a_template(tmp_path: Path, stories: Path) -> None:
    tokenizer = sentence_piece(stories, "")
    file = tmp_path / "own.py"
    file.write_text(
        "def form(messages):\n"
        "    return [(f\"{m['role']}={m['content']};\", m['role'] == 'assistant') for m in messages]\n"
        "def bad(messages):\n    return 'text'\n"
        "def none(messages):\n    return [('x', False)]\n"
        "def odd(messages):\n    return [('a', 1), 5]\n"
        "def nothing(messages):\n    return None\n"
        "def ends(messages):\n    raise SystemExit(0)\n"
    )
    rendered = only(ASKED, tokenizer, Style(template=f"{file}:form"))
    assert rendered.text == "user=Who played?;assistant=Zoe.;" and targets(rendered) == ["assistant=Zoe.;"]
    prompt = tokenizer.decode(prompt_of(ASKED, tokenizer, Style(template=f"{file}:form")), skip_special_tokens=True)
    assert prompt == "user=Who played?;assistant="
    for name, words in (
        ("bad", "gave no list of"),
        ("odd", "failed: TypeError"),
        ("nothing", "gave no list of"),
        ("ends", "failed: SystemExit"),
        ("none", "gave nothing that is learnt"),
        ("no", "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=words):
            render(ASKED, tokenizer, Style(template=f"{file}:{name}"))
    with pytest.raises(ValueError, match="there is no file"):
        render(ASKED, tokenizer, Style(template="missing.py:form"))


def test_a_function_that_is_edited_between_two_runs_is_the_edited_one(tmp_path: Path, stories: Path) -> None:
    """In a notebook: the run's directory says which code it was."""
    tokenizer, file = sentence_piece(stories, ""), tmp_path / "own.py"
    style = Style(template=f"{file}:form")
    for time, mark in enumerate("=:"):
        file.write_text(f"def form(messages):\n    return [('{mark}', False), ('x', True)]\n")
        os.utime(file, (time, time))
        assert only(ASKED, tokenizer, style).text == f"{mark}x"
