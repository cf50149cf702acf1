"""The page of all options: of each what it says, takes and is by default, its key in YAML, and an example."""

import shlex
from collections.abc import Iterator

from docs_text import GENERATED, code, markdown, sentence
from option_examples import EXAMPLES
from pydantic.fields import FieldInfo

from fedlotr.config.command_line import flag_of, read_words
from fedlotr.config.configuration import SECTIONS, SimulationConfig, options
from fedlotr.config.yaml_file import to_yaml

_OPENING = """# Options

`python -m fedlotr.simulate [CONFIG.yaml] [options]` takes each of these. `fedlotr simulate` is the same command. A name
is spelt with hyphens on the command line, and with underscores as a key of CONFIG.yaml and as a field of
`SimulationConfig`. Options win over the file. The word `none` stands for "left open" wherever a default is described as
such. A switch is taken back by `--no-`, such as `--no-quiet`.

All mistakes of a configuration are reported together, before anything is loaded; [Refusals](refusals.md) lists what
does not go together, and why.
"""
_BOUNDS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}


def options_page() -> str:
    """As Markdown."""
    shown = {action.dest: action.metavar for action in options()._actions}
    parts = [GENERATED, _OPENING]
    for name, field in SimulationConfig.model_fields.items():
        key = field.alias or name
        if key in SECTIONS:
            title = SECTIONS[key]
            parts.append(f"## {title[0].upper()}{title[1:]}\n")
        parts.append("\n".join(_option(key, name, field, str(shown[key]) if shown[key] else None)) + "\n")
    return "\n".join(parts)


def _option(key: str, name: str, field: FieldInfo, metavar: str | None) -> Iterator[str]:
    flag = flag_of(key)
    yield f"### `{flag}` {{ #{flag.removeprefix('--')} }}\n"
    yield f"{markdown(sentence(field.description or ''), '')}\n"
    yield f"- **Takes** {_takes(metavar, field)}"
    yield f"- **Default** {_default(field)}"
    if key != name:
        yield f"- **In Python** {code(name)}"
    if words := EXAMPLES.get(key):
        yield f"- **Example** {code(words)}; in CONFIG.yaml {', '.join(map(code, in_yaml(words)))}"


def in_yaml(words: str) -> list[str]:
    """The lines of a CONFIG.yaml that say the same."""
    values, _ = read_words(shlex.split(words), options())
    return [_in_yaml(key, _number(value)) for key, value in values.items()]


def _in_yaml(key: str, value: object) -> str:
    """On one line."""
    if not isinstance(value, dict):
        return to_yaml(key, value)
    return f"{key}: {{{', '.join(to_yaml(name, one) for name, one in value.items())}}}"


def _number(value: object) -> object:
    """What argparse has left as text."""
    if isinstance(value, dict):
        return {key: _number(one) for key, one in value.items()}
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return value


def _takes(metavar: str | None, field: FieldInfo) -> str:
    if metavar is None:
        return "nothing: it is a switch"
    words = metavar.strip("{}")
    kinds = {"int": "a whole number", "float": "a number", "str": "text"}
    if metavar.startswith("{"):
        shown = ", ".join(kinds.get(word, code(word)) for word in words.split(","))
    else:
        shown = kinds.get(words, code(words))
    limits = [
        text.format(f"{getattr(part, bound):,}".replace(",", " ") if bound in ("ge", "le") else getattr(part, bound))
        for part in field.metadata
        for bound, text in _BOUNDS.items()
        if getattr(part, bound, None) is not None
    ]
    return ", ".join([shown, *limits])


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is None:
        return "left open"
    if value is False:
        return "off"
    return "none" if value == {} else code(value)
