"""The one typed configuration of a run, from YAML, the command line or Python; every mistake is reported at once."""

import functools
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails

from fedlotr.config.command_line import flag_of, option_parser, read_words
from fedlotr.config.preflight import path_problems
from fedlotr.config.rules import RULES, broken
from fedlotr.config.schema import Fields
from fedlotr.config.yaml_file import read_yaml, to_yaml
from fedlotr.errors import InputError, closest, nearest, shorten, written
from fedlotr.files import write_atomically


class SimulationConfig(Fields):
    """Everything a run depends on. Frozen; `InputError` names all mistakes at once.

    Field names are the options' names with underscores (`max_examples` is `--max-examples`); the same names are the
    keys of a CONFIG.yaml. `json_output` is the exception: option and key are called `json`.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _report_together(cls, given: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Turn pydantic's complaints, conflicts between fields and missing files into one InputError."""
        if isinstance(given, cls):
            return given
        origins: _Origins = info.context or _Origins()
        values = dict(given)
        if _is_given(values, "local_steps"):
            values.setdefault("local_epochs", None)
        problems = list(origins.problems)
        wrong: set[str] = set()
        try:
            config = handler(values)
        except ValidationError as error:
            for detail in error.errors():
                key = str(detail["loc"][0])
                if key not in wrong:
                    value = values.get(key, detail["input"])  # json_output may be given as json
                    problems.append(f"{origins.name(key, value)}: {_expectation(key, detail, origins)}")
                wrong.add(key)
            # Once more, with defaults in place of what is wrong, so that the other checks have something to check.
            config = handler({key: value for key, value in values.items() if key not in wrong})
            # A default also stands in for what a misspelt key was meant to be.
            wrong |= {near for key in wrong - {*_KEYS} if (near := closest(key, _KEYS))}
        found = [(fields, problem) for fields, problem in broken(RULES, config) if wrong.isdisjoint(fields)]
        if origins.command_line:
            found += [((field,), problem) for field, problem in _path_problems(config) if field not in wrong]
        for fields, problem in found:
            names = " with ".join(origins.name(field, getattr(config, field)) for field in fields)
            problems.append(f"{names}: {problem}")
            wrong.update(fields)
        if problems:
            # Without the file that could not be read, every value may be another one than was meant.
            raise ConfigurationError(problems, config, frozenset(_KEYS if origins.problems else wrong))
        return config


class ConfigurationError(InputError):
    """A configuration with mistakes, which can still be checked for more.

    config: with defaults in place of what is wrong. wrong: the fields whose values are not to be relied on.
    """

    def __init__(self, problems: Sequence[str], config: SimulationConfig, wrong: frozenset[str]) -> None:
        super().__init__(problems)
        self.config, self.wrong = config, wrong


_KEYS = tuple(field.alias or name for name, field in SimulationConfig.model_fields.items())
"""What fields are called on the command line and in YAML."""


@dataclass(frozen=True)
class _Origins:
    """Where values were given, so that a message repeats what the user wrote; in Python unless said otherwise.

    command_line: names are options, and the files that are named are looked at too. flags, in_file: the fields
    given as options and in the file. problems: found before validation.
    """

    command_line: bool = False
    flags: Collection[str] = ()
    file: Path | None = None
    in_file: Collection[str] = ()
    problems: Sequence[str] = ()

    def spelling(self, key: str) -> Callable[[str], str]:
        """How keys are spelt in the place where this one was, or would have been, given."""
        return flag_of if key in self.flags or (self.command_line and key not in self.in_file) else str

    def name(self, key: str, value: object) -> str:
        """A key with its value, as the user wrote it."""
        spelling, shown, key = self.spelling(key), shorten(value), shorten(key)
        if spelling is flag_of:
            return flag_of(key) if value is True or shown == "" else f"{flag_of(key)} {shown}"
        if self.command_line:
            return f"{key}: {shown} in {shorten(self.file)}"
        return f"{key}={shown!r}" if isinstance(value, Path) else f"{key}={written(value)}"


def _is_given(values: Mapping[str, object], field: str) -> bool:
    return str(values.get(field, None)).lower() != "none"


def _expectation(field: str, error: ErrorDetails, origins: _Origins) -> str:
    """What pydantic expected, in a user's words."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            if field in OF_OTHERS:
                return OF_OTHERS[field]
            near = closest(field, _KEYS)
            return "no such option" + (f", did you mean '{origins.spelling(field)(near)}'?" if near else "; see --help")
        case "literal_error":
            kinds = get_args(SimulationConfig.model_fields[field].annotation)
            choices = [
                choice for kind in kinds for choice in get_args(kind) or [kind]
            ]  # a Literal may stand in a union
            return f"not a choice{nearest(error['input'], [name for name in choices if isinstance(name, str)])}"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return "expected a whole number"
        case "float_parsing" | "float_type" | "finite_number":
            return "expected a number"
        case "bool_parsing" | "bool_type":
            return "expected true or false"
        case "string_type":
            return "expected text"
        case "dict_type":
            return "expected a name and its value, KEY=VALUE on the command line"
        case "path_type":
            return "expected the name of a folder"
        case "greater_than":
            return f"expected more than {_number(limits['gt'])}"
        case "greater_than_equal":
            return f"expected at least {_number(limits['ge'])}"
        case "less_than":
            return f"expected less than {_number(limits['lt'])}"
        case "less_than_equal":
            return f"expected at most {_number(limits['le'])}"
        case "value_error":
            return str(limits["error"])
        case _:
            return error["msg"]


def _number(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def preflight_paths(config: SimulationConfig, brought: Collection[str] = ()) -> list[str]:
    """Problems with the files and folders a configuration names, each one line; cheap, nothing is loaded.

    brought: fields for which the caller has something of their own, whatever they name.
    """
    return [
        f"{_Origins().name(field, getattr(config, field))}: {text}"
        for field, text in _path_problems(config)
        if field not in brought
    ]


def _path_problems(config: SimulationConfig) -> Iterator[tuple[str, str]]:
    return path_problems(
        config.model,
        config.data,
        config.strategy,
        config.out,
        config.resume,
        config.init_adapter,
        config.task,
        config.public_data,
        config.eval_data,
    )


DEPENDENT = {
    "method": {"basis", "tie", "core", "alpha", "rebase", "strategy", "lr", "head_lr", "error_feedback"},
    "engine": {"workers", "workers_per_gpu", "threads", "ray_address", "error_feedback"},
    "device": {"workers", "workers_per_gpu"},
    "baseline": {"strategy", "strategy_arg"},
    "strategy": {"error_feedback"},
    "codec": {"error_feedback"},
}
"""What a file says of another method or engine than the command line asks for is not meant for that one: a run's own
config.yaml, given again with --method, names the first method's basis and rates."""


_NO_DROPOUT = (
    "there is no dropout: masks are drawn by place, and a client packed with others would not be the client alone; "
    "a lower --rank, fewer --local-epochs and --weight-decay hold back too"
)
_NO_ACCUMULATION = (
    "none is needed: --batch-size is all examples of an optimizer step, which is cut into passes that fit the memory"
)
_NO_PREFERENCES = "preferences are not learnt in this version: no DPO or its kin"
OF_OTHERS = {
    **dict.fromkeys(("dropout", "lora_dropout"), _NO_DROPOUT),
    **dict.fromkeys(("gradient_accumulation", "gradient_accumulation_steps", "grad_accum"), _NO_ACCUMULATION),
    **dict.fromkeys(("dpo", "dpo_beta", "preference"), _NO_PREFERENCES),
    "target_modules": "--targets takes them",
    "target_parameters": "--targets takes them: mlp.experts.gate_up_proj means a layer for each expert's matrix",
    "use_rslora": "it is called --rslora here",
    "lora_alpha": "it is called --alpha here",
    "lora_r": "it is called --rank here",
}
"""What other programs call an option, or have and this one has not -> what is said of it."""


SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off")
"""What people write after a switch; a CONFIG.yaml has another name."""


def _why_no_file(word: str) -> str:
    if not word.strip():
        return "an empty word; expected a CONFIG.yaml or an option (is a variable of your shell not set?)"
    if word.lower() in SWITCH_WORDS:
        return "a switch takes no word after it; --quiet sets it, --no-quiet takes it back"
    return "one CONFIG.yaml is enough, and options begin with --"


def load(argv: Sequence[str]) -> SimulationConfig:
    """The configuration given by the words after the program's name: `[CONFIG.yaml] [options]`, where options win.

    Raises:
        ConfigurationError: with every mistake found, in words, keys, values, combinations and files.
    """
    flags, files = read_words(argv, options())
    file = Path(files[0]) if files and files[0].strip() and files[0].lower() not in SWITCH_WORDS else None
    problems = [f"{shorten(word) or repr(word)}: {_why_no_file(word)}" for word in files[file is not None :]]
    in_file = read_yaml(file, problems) if file else {}
    for values in (flags, in_file):
        if "json_output" in values:  # its name in Python alone
            values["json-output"] = values.pop("json_output")
    for given, instead in (("local_steps", "local_epochs"), ("local_epochs", "local_steps")):
        if _is_given(flags, given) and instead not in flags:
            in_file.pop(instead, None)
    for decisive, dependent in DEPENDENT.items():
        if flags.get(decisive, in_file.get(decisive)) != in_file.get(decisive):
            in_file = {key: value for key, value in in_file.items() if key not in dependent}
    values = {**in_file, **flags}
    arguments = in_file.get("strategy_arg"), flags.get("strategy_arg")
    if isinstance(arguments[0], dict) and isinstance(arguments[1], dict):
        values["strategy_arg"] = {**arguments[0], **arguments[1]}
    origins = _Origins(True, flags, file, in_file, problems)
    return SimulationConfig.model_validate(values, context=origins)


def configuration_of(values: Mapping[str, object], file: Path, out: Path) -> SimulationConfig:
    """The configuration that some part of a file says, such as a row of a grid; `out` was given as an option.

    Raises ConfigurationError as `load` does.
    """
    origins = _Origins(True, ("out",), file, values)
    return SimulationConfig.model_validate({**values, "out": out}, context=origins)


SECTIONS = {
    "clients": "clients and rounds",
    "mode": "virtual time",
    "model": "model and data",
    "method": "method",
    "strategy": "strategy",
    "local_epochs": "training on a client",
    "codec": "communication",
    "privacy": "privacy",
    "eval_every": "evaluation",
    "engine": "engine",
    "out": "output",
}
"""The field each section of the help and of config.yaml begins with."""


@functools.cache
def options() -> ArgumentParser:
    """The options of the command line, and their help."""
    return option_parser(SimulationConfig, SECTIONS)


def dump_yaml(config: SimulationConfig, path: Path) -> None:
    """Write a configuration so that it can be read, and given again as CONFIG.yaml.

    Left out is what says where and how one run reports (`REPORTING`), not what it computes.
    """
    values = config.reported()
    lines = ["# Run this again: python -m fedlotr.simulate config.yaml"]
    for name, value in values.items():
        if name in SECTIONS:
            lines.append(f"\n# {SECTIONS[name]}")
        lines.append(to_yaml(name, value))
    write_atomically(path, "\n".join(lines) + "\n")
