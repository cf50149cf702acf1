"""The one typed configuration of a run, from YAML, the command line or Python; every mistake is reported at once."""

import functools
import math
import re
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedlotr.adapters.methods import BASES, CORES, METHODS, TIES
from fedlotr.command_line import flag_of, option_parser, read_words
from fedlotr.errors import InputError, closest, nearest, shorten, written
from fedlotr.files import write_atomically
from fedlotr.own import is_own
from fedlotr.preflight import path_problems
from fedlotr.yaml_file import read_yaml, to_yaml

PARTITIONS = ("iid", "dirichlet:0.5", "shards:2", "natural")
"""One example of each form of `partition`."""


TASKS = ("auto", "classification", "causal-lm")

LARGEST = 2**31 - 1
"""What any whole number may be at most: what counts clients, rows and tokens has to fit the ledger's 32 bits."""
MAX_SEED = 2**63 - 1
"""A seed travels to the clients in a message, as a number of 64 bits."""
MAX_ROUNDS = 99_999
"""The files of a round are in order by their names, which have five digits."""
MAX_PROCESSES = 1024
"""Workers, or threads of one: more is a slip of the finger, and would take the machine down."""


def _one_of(what: str, choices: Collection[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in choices:
            raise ValueError(f"not a {what}{nearest(name, choices)}")
        return name

    return AfterValidator(check)


def _read_sample(given: object) -> object:
    """Text to a number that keeps the point: '1' is one client, '1.0' all of them."""
    if isinstance(given, str):
        with_point = re.fullmatch(r"\d*\.\d+|\d+\.\d*", given.strip())
        given = float(given) if with_point else int(given) if re.fullmatch(r"\d{1,10}", given.strip()) else given
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise ValueError("expected a number of clients (10) or a share of them with a decimal point (0.2)")
    if isinstance(given, float) and not 0 < given <= 1:
        raise ValueError("a number with a decimal point is a share of the clients: expected more than 0.0, at most 1.0")
    if isinstance(given, int) and given < 1:
        raise ValueError("expected at least 1 client")
    if isinstance(given, int) and given > LARGEST:
        raise ValueError(f"expected at most {LARGEST} clients")
    return given


def _read_cohort(given: object) -> object:
    if given == "auto":
        return given
    count = int(given) if isinstance(given, str) and re.fullmatch(r"\d{1,10}", given) else given
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= LARGEST:
        raise ValueError("expected 'auto' or a number of clients, at least 1")
    return count


def _check_partition(given: str) -> str:
    kind, colon, argument = given.partition(":")
    if kind == "iid":
        valid, expected = not colon, "'iid' takes no argument"
    elif kind == "dirichlet":
        valid = re.fullmatch(r"\d*\.?\d+", argument) is not None and float(argument) > 0
        expected = "expected dirichlet:ALPHA with ALPHA above 0, such as 'dirichlet:0.5'"
    elif kind == "shards":
        valid = re.fullmatch(r"\d{1,9}", argument) is not None and int(argument) > 0
        expected = "expected shards:K with K shards a client, such as 'shards:2'"
    elif kind == "natural":
        valid, expected = bool(argument) or not colon, "expected natural or natural:COLUMN"
    else:
        valid, expected = False, f"not a partition{nearest(given, PARTITIONS)}"
    if not valid:
        raise ValueError(expected)
    return given


def _check_text_columns(given: str) -> str:
    columns = given.split(",")
    if not all(columns) or len(columns) > 2 or len(set(columns)) < len(columns):
        raise ValueError("expected the name of a column, or two different ones with a comma: NAME or FIRST,SECOND")
    return given


def _check_task(given: str) -> str:
    if given not in TASKS and not is_own(given):
        raise ValueError(f"not a task{nearest(given, TASKS)}")
    return given


def _read_client_rank(given: object) -> object:
    text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given) if type(given) is int else given
    if not isinstance(text, str):
        return text
    text = text.replace(" ", "")
    turns, shares = r"[1-9]\d{0,8}", r"[1-9]\d{0,8}:(?=[\d.]*[1-9])(\d+\.?\d*|\.\d+)"
    if not any(re.fullmatch(f"{one}(,{one})*", text) for one in (turns, shares)):
        raise ValueError("expected ranks with commas, such as '4,8,16', or with shares, such as '4:0.5,8:0.3,16:0.2'")
    return text


def _check_targets(given: str) -> str:
    try:
        re.compile(given)
    except re.error as error:
        raise ValueError(f"expected 'all-linear' or a regular expression of module names ({error})") from None
    return given


def _plain(value: object, name: str) -> object:
    """An argument of a strategy as YAML and JSON can hold it, so that config.yaml can. Raises ValueError otherwise."""
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {_plain_name(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} is not a number (nan)")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ValueError(
            f"{name} is of the type {type(value).__name__}; expected numbers, text, true, false, none, or lists of them"
        )
    return value


def _plain_name(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"expected names of arguments, and {written(key)} is none; a name is text")
    return key


def _read_arguments(given: object) -> object:
    if not isinstance(given, Mapping):
        return given
    return {_plain_name(key): _plain(value, str(key)) for key, value in given.items()}


def _check_text(given: str, *, lines: bool = True) -> None:
    """Raises ValueError for text that no file of ours can hold, or (lines=False) that no name is made of."""
    if not given.isprintable() and any("\ud800" <= character <= "\udfff" for character in given):
        raise ValueError("expected text in UTF-8, which this is not")
    if not lines and (odd := next((character for character in given if ord(character) < 32), None)) is not None:
        raise ValueError(f"expected text without control characters, such as {odd!r}")


def _expand(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"there is no user whose home folder {path.parts[0]} is") from None


REPORTING = {"out", "resume", "quiet", "json_output", "tensorboard", "mlflow", "wandb"}
"""Options that say where and how one run reports."""


class SimulationConfig(BaseModel):
    """Everything a run depends on. Frozen; `InputError` names all mistakes at once.

    Field names are the options' names with underscores (`max_examples` is `--max-examples`); the same names are the
    keys of a CONFIG.yaml. `json_output` is the exception: option and key are called `json`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )

    clients: int = Field(default=50, ge=1, le=LARGEST, description="clients in the federation")
    # A share by default, so that any number of clients goes without --sample.
    sample: Annotated[int | float, BeforeValidator(_read_sample)] = Field(
        default=0.2, description="clients that train in a round: a number (10) or, with a decimal point, a share (0.2)"
    )
    rounds: int = Field(default=14, ge=1, le=MAX_ROUNDS, description="rounds of training and averaging")
    max_examples: int | None = Field(
        default=64, ge=1, le=LARGEST, description="examples a client holds at most; none: all that it gets"
    )
    weights: Literal["examples", "uniform"] | None = Field(
        default=None,
        description="weight of a client in the mean: its number of examples, or the same for all (default: examples; "
        "with --privacy client uniform)",
    )
    max_failed: float = Field(
        default=0.5, ge=0, le=1, description="share of a round's clients that may fail before the run stops"
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="same seed, same bytes: partition, sampling, bases, order of examples"
    )

    model: str = Field(default="all-MiniLM-L6-v2", description="a model folder, or an id on the Hugging Face hub")
    data: str = Field(
        default="pydoc",
        description="pydoc (paragraphs of Python's own documentation, built in), a folder or a file of JSON lines, CSV "
        "or Parquet, or an id on the Hugging Face hub",
    )
    text_column: Annotated[str, AfterValidator(_check_text_columns)] | None = Field(
        default=None,
        description="column of the texts, or two with a comma: a pair, or prompt,answer (default: text; text_a,text_b; "
        "prompt,answer)",
    )
    label_column: str | None = Field(default=None, description="column of the labels (default: label)")
    task: Annotated[str, AfterValidator(_check_task)] = Field(
        default="auto",
        description="what is learnt: classification, causal-lm, or auto: classification where the data has labels",
    )
    partition: Annotated[str, AfterValidator(_check_partition)] = Field(
        default="dirichlet:0.5", description="how the examples are dealt to the clients; a smaller ALPHA is more uneven"
    )
    max_length: int = Field(default=128, ge=2, le=LARGEST, description="tokens of an example; longer ones are cut")
    public_examples: int = Field(
        default=256,
        ge=0,
        le=LARGEST,
        description="rows of train withheld from every client: the head is fitted on them before the first round, "
        "and the basis 'update' takes its gradient there",
    )

    method: Annotated[str, _one_of("method", METHODS)] = Field(
        default="fed-sb", description="what the clients train and what they leave frozen"
    )
    rank: int = Field(default=16, ge=1, le=LARGEST, description="width r of the factors; a core has r*r numbers")
    client_rank: Annotated[str, BeforeValidator(_read_client_rank)] | None = Field(
        default=None,
        description="ranks that clients have in turn (4,8,16), or are drawn for them by shares (4:0.5,8:0.3,16:0.2); "
        "each trains the leading block of the factors (default: --rank)",
    )
    alpha: float | None = Field(
        default=None, gt=0, description="the adapted term is scaled by alpha / rank (default: the method's own scale)"
    )
    basis: Annotated[str, _one_of("basis", BASES)] | None = Field(
        default=None, description="where the factors B and A come from (default: the method's)"
    )
    tie: Annotated[str, _one_of("tie", TIES)] | None = Field(
        default=None,
        description="who shares a pair B and A: each layer its own, or all of a type, or all (default: the method's)",
    )
    core: Annotated[str, _one_of("core", CORES)] | None = Field(
        default=None, description="what C between B and A is (default: the method's)"
    )
    targets: Annotated[str, AfterValidator(_check_targets)] = Field(
        default="all-linear", description="layers to adapt: all, or those whose name matches in full"
    )
    init_adapter: str | None = Field(
        default=None,
        description="a PEFT LoRA of this model, or a run's folder, to start from; what is exported contains it",
    )

    strategy: str | None = Field(
        default=None, description="how the server combines the updates (default: the method's)"
    )
    strategy_arg: Annotated[dict[str, object], BeforeValidator(_read_arguments)] = Field(
        default={},
        description="an argument of the strategy; may be repeated; numbers, lists and true/false are read as such",
    )

    baseline: Literal["central", "local"] | None = Field(
        default=None,
        description="instead of the federation what it is held against: central, one model on the pooled examples of "
        "all clients, with as many steps and examples a round; local, each client alone, every client in every round",
    )

    local_epochs: int | None = Field(
        default=2, ge=1, le=LARGEST, description="passes of a client over its examples in a round"
    )
    local_steps: int | None = Field(
        default=None, ge=1, le=LARGEST, description="steps of a client in a round, instead of --local-epochs"
    )
    batch_size: int = Field(default=8, ge=1, le=LARGEST, description="examples in a step of a client")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="the clients' optimizer")
    optimizer_state: Literal["reset", "keep", "mean-v"] = Field(
        default="reset",
        description="what a client's optimizer starts a round with: nothing, what it had at the end of the client's "
        "last one, or of adamw one mean of the second moments of each tensor, which travels",
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of the optimizer sgd")
    lr: float | None = Field(
        default=None, gt=0, description="learning rate of the adapted layers (default: the method's)"
    )
    head_lr: float | None = Field(default=None, gt=0, description="learning rate of the head (default: the method's)")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="course of both rates over the rounds of the run; falling to nothing, the last rounds average out "
        "what clients pull apart",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled for adamw, added to the gradient for sgd")
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        description="largest norm of a client's gradient in a step; none: any. With --privacy: of the gradient of one "
        "example (default: 0.1), or of what one client's training changes",
    )

    privacy: Literal["none", "example", "client"] = Field(
        default="none",
        description="differential privacy: example, each client hides its single examples from everybody (DP-SGD); "
        "client, a trusted server hides whole clients from those who see what it publishes",
    )
    epsilon: float | None = Field(
        default=None, gt=0, le=1000, description="what the whole run may spend; the noise is reckoned from it"
    )
    noise_multiplier: float | None = Field(
        default=None, ge=0.1, le=1e4, description="the noise itself, over --clip-norm, instead of --epsilon"
    )
    delta: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="chance that the promise fails, below 1/n of the examples of the largest client, or of the clients "
        "(default: a tenth of that)",
    )
    public_data: str | None = Field(
        default=None,
        description="data that is nobody's secret, like --data: its train split takes the place of the rows that are "
        "otherwise withheld from the clients (--public-examples)",
    )
    clip_quantile: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="with --privacy client: share of the updates that --clip-norm is to let through whole; it then "
        "moves from round to round (adaptive clipping)",
    )
    noise_cohort: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="with --privacy client: clients in a round of the larger federation whose noise is put in; a "
        "simulation of that one, and no privacy for these clients",
    )
    privacy_engine: Literal["cohort", "opacus"] = Field(
        default="cohort",
        description="with --privacy example: what clips and adds noise; opacus: its own hooks and optimizer, one "
        "client at a time, with noise from torch's generator",
    )
    reproducible_noise: bool = Field(
        default=False, description="noise from the seed, for studies of what it costs: then no epsilon is claimed"
    )

    eval_every: int = Field(
        default=1, ge=1, le=LARGEST, description="rounds between two evaluations; the last round is always evaluated"
    )
    eval_examples: int = Field(
        default=1024, ge=0, le=LARGEST, description="seeded rows of the test split to evaluate on; 0: all of them"
    )
    client_eval: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of each client's rows that is held back from it, for a score of each client by itself "
        "(default: 0.2 where factors stay with the clients, else 0)",
    )
    eval_split: str | None = Field(
        default=None,
        description="split to evaluate on; held-out: a seeded tenth of train, to choose rates by (default: test, else "
        "a validation split, else a tenth of train)",
    )

    engine: Literal["ray", "local", "flower"] = Field(
        default="ray",
        description="worker processes on this machine, or everything in this process; flower: its own, by 'flwr run .'",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="worker processes of the engine ray (default: one a core; more than that share the cores)",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="threads of a worker; results repeat to the bit for the same number (default: 1 on ray)",
    )
    cohort: Annotated[Literal["auto"] | int, BeforeValidator(_read_cohort)] = Field(
        default="auto", description="clients trained together in one forward pass; auto: by a budget of tokens"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen model (what is trained is float32); auto: bfloat16 where it is much faster"
    )

    out: Annotated[Path, AfterValidator(_expand)] | None = Field(
        default=None, description="folder of the run, new or empty (default: a new one in runs)"
    )
    client_adapters: bool = Field(
        default=False, description="write an adapter for each client too, where factors stay with the clients"
    )
    tensorboard: bool = Field(default=False, description="also write TensorBoard's event files, into the run's folder")
    mlflow: bool = Field(default=False, description="also log to MLflow, where MLFLOW_TRACKING_URI says")
    wandb: bool = Field(default=False, description="also log to Weights & Biases; WANDB_MODE=offline keeps it here")
    resume: bool = Field(default=False, description="go on with the run in --out after its last finished round")
    quiet: bool = Field(default=False, description="print nothing but errors")
    json_output: bool = Field(
        default=False, alias="json", description="print summary.json on standard output at the end"
    )

    @property
    def loggers(self) -> list[str]:
        """The tools that are told of every round."""
        return [name for name in ("tensorboard", "mlflow", "wandb") if getattr(self, name)]

    def reported(self) -> dict[str, Any]:
        """What config.yaml says: all but where and how one run reports, which computes nothing."""
        return self.model_dump(exclude=REPORTING)

    @property
    def clients_per_round(self) -> int:
        """Clients that train in a round: the sample; all of them, or the one that holds all examples, of a baseline."""
        return {None: self.sampled_clients, "local": self.clients, "central": 1}[self.baseline]

    @property
    def sampled_clients(self) -> int:
        """`sample` itself, or that share of the clients, rounded, at least one."""
        return self.sample if isinstance(self.sample, int) else max(1, round(self.sample * self.clients))

    @field_validator("*", mode="before")
    @classmethod
    def _read_none(cls, given: object, info: ValidationInfo) -> object:
        """The word none, on the command line and in YAML (where it is text), for options that may be left open.

        Nothing at all is not none: an option without its value is a mistake.
        """
        if given == "":
            raise ValueError("expected a value")
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = get_args(annotation) or (annotation,)
        if isinstance(given, bool) and {int, float}.intersection(kinds):
            return str(given)  # not the numbers 0 and 1
        if isinstance(given, str):
            _check_text(given, lines=False)
        nullable = type(None) in kinds
        return None if nullable and isinstance(given, str) and given.lower() == "none" else given

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
        found = [(fields, problem) for fields, problem in _conflicts(config) if wrong.isdisjoint(fields)]
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


def _conflicts(config: SimulationConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Options that are each fine but do not go together: the fields, and why."""
    method = METHODS[config.method]
    if isinstance(config.sample, int) and config.sample > config.clients:
        yield ("sample", "clients"), "more clients a round than there are"
    if config.local_epochs is not None and config.local_steps is not None:
        yield ("local_epochs", "local_steps"), "a client's work is given in epochs or in steps, not both"
    if config.local_epochs is None and config.local_steps is None:
        yield ("local_epochs", "local_steps"), "one of them must be a number"
    if config.momentum and config.optimizer != "sgd":
        yield ("momentum", "optimizer"), "momentum belongs to the optimizer 'sgd'"
    if config.optimizer_state == "mean-v" and config.optimizer != "adamw":
        yield ("optimizer_state", "optimizer"), "second moments belong to the optimizer 'adamw'; choose reset or keep"
    if config.optimizer_state == "keep" and config.optimizer == "sgd" and not config.momentum:
        yield ("optimizer_state", "momentum"), "sgd without momentum has nothing to keep; give it some, or reset"
    if config.optimizer_state == "keep" and config.engine == "flower":
        yield (
            ("optimizer_state", "engine"),
            "Flower does not show what its clients keep between rounds, so no checkpoint could hold it",
        )
    if config.workers is not None and config.engine == "local":
        yield ("workers", "engine"), "the engine 'local' works in this process; workers belong to 'ray'"
    if config.baseline is not None:
        for field in ("strategy", "strategy_arg"):
            if getattr(config, field):
                yield (field, "baseline"), "a baseline averages nothing, so it has no strategy"
        if config.engine == "flower":
            yield ("baseline", "engine"), "a baseline runs on the engines ray and local"
    yield from _privacy_conflicts(config)
    if config.resume and config.out is None:
        yield ("resume", "out"), "name the folder of the run to go on with"
    if method.personal and config.client_eval == 0:
        yield ("client_eval", "method"), "clients with factors of their own can only be scored on rows of their own"
    if method.personal and config.engine == "flower":
        yield (
            ("method", "engine"),
            "Flower does not show what its clients keep between rounds, so no checkpoint could hold it",
        )
    if config.baseline is not None and (method.personal or config.client_eval):
        decisive = "method" if method.personal else "client_eval"
        yield ("baseline", decisive), "a baseline's clients keep no factors and are tested on the test split alone"
    if method.personal and config.client_rank is not None:
        yield ("client_rank", "method"), "factors that stay with the clients have the run's rank"
    if config.client_adapters and not method.personal:
        yield ("client_adapters", "method"), "no factors stay with the clients: all have the one in adapter/"
    if not method.adapts:
        for field in ("alpha", "basis", "tie", "core", "client_rank"):
            if getattr(config, field) is not None:
                yield (field, "method"), "this method adapts no layer"
        if config.targets != "all-linear":
            yield ("targets", "method"), "this method adapts no layer"
        return
    if not method.factored:
        for field in ("alpha", "basis", "tie", "core", "client_rank"):
            if getattr(config, field) is not None:
                yield (field, "method"), "this method trains whole matrices, without factors"
        return
    if config.client_rank is not None:
        largest = max(int(part.partition(":")[0]) for part in config.client_rank.split(","))
        if largest != config.rank:
            yield ("client_rank", "rank"), f"the largest must be --rank; give --rank {largest}, or one of {config.rank}"
        if (core := config.core or method.core) in ("heads", "mix"):
            decisive = "core" if config.core else "method"
            yield ("client_rank", decisive), f"the core {core!r} has no leading block; choose 'full' or 'diag'"
    if config.tie not in (None, "layer") and not (method.has_core and method.freezes):
        yield ("tie", "method"), "this method trains B and A in every layer, so no layers can share them"
    update = (config.basis or method.basis) == "update"
    if update and config.privacy != "none" and config.public_data is None:
        if config.basis is not None:  # else it gives way to one from W
            yield (
                ("basis", "privacy"),
                "it is made of a gradient, and rows withheld from private data are private: give --public-data, or a "
                "basis from a seed (random) or from W (svd)",
            )
    elif update and config.public_examples == 0:
        decisive = "basis" if config.basis else "method"
        yield ("public_examples", decisive), "the basis 'update' takes its gradient from public examples; give some"
    if config.core == "mix" and not method.freezes:
        yield (
            ("core", "method"),
            "the matrices of 'mix' belong to frozen factors, and this method trains B and A",
        )
    if (config.basis or method.basis) == "lora" and method.has_core and "B" in method.train:
        yield ("basis", "method"), "this basis starts with B at zero, as does the method's core: nothing would learn"
    if (config.basis or method.basis) == "lora" and "B" not in method.train:
        yield ("basis", "method"), "this basis starts with B at zero and the method never moves B: nothing would learn"


def _privacy_conflicts(config: SimulationConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if config.privacy_engine == "opacus":
        if config.privacy != "example":
            yield ("privacy_engine", "privacy"), "it belongs to --privacy example"
        core = "full" if METHODS[config.method].core is None else config.core or METHODS[config.method].core
        if not METHODS[config.method].factored or core not in ("full", "identity"):
            yield (
                ("privacy_engine", "method"),
                "Opacus' hooks are for plain matrices: a method with the core full or identity, such as fed-sb or lora",
            )
        if config.optimizer_state != "reset":
            yield ("privacy_engine", "optimizer_state"), "its optimizer begins anew in every round"
        if config.client_rank is not None:
            yield ("privacy_engine", "client_rank"), "it knows one rank"
    if config.privacy == "none":
        for field in ("epsilon", "noise_multiplier", "delta", "clip_quantile", "noise_cohort", "reproducible_noise"):
            if getattr(config, field):
                yield (field, "privacy"), "there is no noise without --privacy example or --privacy client"
        return
    method = METHODS[config.method]
    if config.epsilon is None and config.noise_multiplier is None:
        yield ("privacy",), "how private is to be said: give --epsilon (8, or 1), or --noise-multiplier"
    if config.epsilon is not None and config.noise_multiplier is not None:
        yield ("epsilon", "noise_multiplier"), "each follows from the other; give one of them"
    if method.personal:
        yield (
            ("method", "privacy"),
            "clients with factors of their own are scored on rows of their own, which no noise would cover; choose a "
            "method without such factors",
        )
    elif config.client_eval:
        yield ("client_eval", "privacy"), "a score on a client's own rows tells of them, and no noise would cover it"
    if config.privacy == "example":
        for field in ("clip_quantile", "noise_cohort"):
            if getattr(config, field) is not None:
                yield (field, "privacy"), "it belongs to --privacy client"
        return
    if config.clip_norm is None:
        yield (
            ("privacy",),
            "it needs --clip-norm, the largest norm of what one client's training changes; with --clip-quantile 0.5 "
            "that finds its size by itself, from wherever it starts",
        )
    if config.weights == "examples":
        yield ("weights", "privacy"), "clients that weigh differently are not hidden equally; leave it out, or uniform"
    if config.optimizer_state == "mean-v":
        yield ("optimizer_state", "privacy"), "the means of second moments would travel without noise; choose reset"
    if config.client_rank is not None:
        yield ("client_rank", "privacy"), "which ranks take part would be seen; leave it out"
    if config.baseline is not None:
        yield ("baseline", "privacy"), "a baseline has no server that could hide clients; choose --privacy example"


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
    )


DEPENDENT = {
    "method": {"basis", "tie", "core", "alpha", "strategy", "lr", "head_lr"},
    "engine": {"workers", "threads"},
    "baseline": {"strategy", "strategy_arg"},
}
"""What a file says of another method or engine than the command line asks for is not meant for that one: a run's own
config.yaml, given again with --method, names the first method's basis and rates."""


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
    "model": "model and data",
    "method": "method",
    "strategy": "strategy",
    "local_epochs": "training on a client",
    "privacy": "privacy",
    "eval_every": "evaluation",
    "engine": "engine",
    "out": "output",
}
"""The field each section of the help and of config.yaml begins with."""


class _Settings(SimulationConfig, BaseSettings):
    """The configuration as pydantic-settings wants it, to make options of its fields; it is never filled itself."""

    model_config = SettingsConfigDict(
        validate_by_name=False,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_parse_none_str="none",
    )


@functools.cache
def options() -> ArgumentParser:
    """The options of the command line, and their help."""
    return option_parser(_Settings, SECTIONS)


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
