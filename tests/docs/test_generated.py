"""The pages that are made of the code's tables: complete, valid, and nothing on them that a reader could not find."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from fedlotr.adapters.methods import METHODS
from fedlotr.config.command_line import flag_of
from fedlotr.config.configuration import SimulationConfig, load
from fedlotr.config.rules import RULES, TESTS
from fedlotr.run.unmet import RULES as OF_STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs" / "_hooks"))

from methods_page import methods_page, papers  # noqa: E402
from option_examples import EXAMPLES  # noqa: E402
from options_page import in_yaml, options_page  # noqa: E402
from refusals_page import in_words, refusals_page, slug  # noqa: E402
from strategies_page import strategies_page  # noqa: E402

KEYS = {field.alias or name for name, field in SimulationConfig.model_fields.items()}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that examples name."""
    monkeypatch.chdir(tmp_path)
    for name in ("reviews.csv", "test.csv", "public.jsonl", "mine.py"):
        (tmp_path / name).touch()
    adapter = tmp_path / "runs" / "first" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "runs" / "first" / "config.yaml").touch()
    return tmp_path


def test_every_option_has_an_example() -> None:
    assert EXAMPLES.keys() == KEYS


@pytest.mark.parametrize("key", sorted(EXAMPLES))
def test_an_example_is_of_its_option_and_the_configuration_takes_it(key: str, reader: Path) -> None:
    words = shlex.split(EXAMPLES[key])
    assert {flag_of(key), flag_of(f"no_{key}")} & set(words)
    field = next(name for name, field in SimulationConfig.model_fields.items() if key in (name, field.alias))
    config = load(words)
    assert getattr(config, field) != SimulationConfig.model_fields[field].default
    file = reader / "job.yaml"
    file.write_text("\n".join(in_yaml(EXAMPLES[key])))
    assert load([str(file)]) == config, "what the page says of CONFIG.yaml is another configuration"


def test_the_page_of_options_has_each_with_its_example() -> None:
    page = options_page()
    for key in KEYS:
        assert f"{{ #{flag_of(key).removeprefix('--')} }}" in page
    assert page.count("**Example**") == len(KEYS)


def test_every_rule_has_an_anchor_of_its_own_and_words() -> None:
    rules = [*RULES, *OF_STRATEGIES]
    anchors = [slug(rule) for rule in rules]
    assert len(set(anchors)) == len(rules)
    page = refusals_page()
    for rule, anchor in zip(rules, anchors, strict=True):
        assert f"{{ #{anchor} }}" in page
        for term in rule.terms:
            unknown = f"--strategy-arg {term[0]}" in in_words(*term)
            assert not unknown or term[0].startswith("min_"), f"{rule.at}: nothing says what {term} means"
    assert "{c." not in page
    assert {test for rule in rules for _, sign, test in rule.terms if sign == ":"} <= TESTS.keys()


def test_methods_and_strategies_stand_on_their_pages_with_what_differs_from_the_papers() -> None:
    methods, strategies = methods_page(), strategies_page()
    assert all(f"{{ #{name} }}" in methods for name in METHODS)
    assert "Singhal et al. 2025, Fed-SB ([arXiv:2502.15436](https://arxiv.org/abs/2502.15436))" in methods
    named = {name for names, *_ in papers() for name in names}
    assert {"lora-xs", "fed-sb", "flora", "multi-krum", "fedadam"} <= named
    for name in named:
        assert re.search(rf"\{{ #{name} \}}", methods + strategies), f"PAPERS.md tells of {name}"
