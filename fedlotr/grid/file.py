"""A grid of runs as a YAML file: base options, axes, rows and seeds; read, multiplied out and checked as a whole.

base:               # options of every run, as in a CONFIG.yaml
  clients: 50
axes:               # each combination of these values
  rank: [8, 16]
rows:               # with each of these; what a row says wins over axes and base
  - {method: lotr}
  - {method: lora, lr: 0.002, name: fedit}
seeds: [0, 1, 2]
tune:               # for each row the best of these, by trials on rows of train that no client holds
  lr: [0.005, 0.01, 0.02]
  seeds: [0]        # of the trials
  on: held-out      # a tenth of train; or the name of a split
"""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from fedlotr.config.configuration import SimulationConfig, configuration_of
from fedlotr.config.values import MAX_SEED
from fedlotr.config.yaml_file import read_yaml
from fedlotr.config.yaml_text import key_of
from fedlotr.data.splits import HELD_OUT
from fedlotr.errors import InputError, nearest, shorten, written

NOT_IN_A_GRID = {
    "seed": "seeds are listed under 'seeds'",
    **dict.fromkeys(
        ("out", "resume", "resume_round", "quiet", "json", "json_output"), "the grid decides that for each run"
    ),
}
SAID_BY_THEIR_VALUE = ("method", "strategy", "baseline")
"""Options whose value alone names a row: 'lora', not 'method-lora'."""
LONGEST_NAME = 80
MOST_RUNS = 10_000
INSTEAD = {"local_steps": {"local_epochs"}, "local_epochs": {"local_steps"}, "baseline": {"strategy", "strategy_arg"}}
"""What a row that gives an option does not want of the base."""
NAMED = 3
"""Rows that a message names; of more only the number is told."""

Options = dict[str, object]


@dataclass(frozen=True)
class Row:
    """A line of the table: a name, which is its folder's too, and what it sets beside the base."""

    name: str
    options: Mapping[str, object]


@dataclass(frozen=True)
class Run:
    """One run of a row. config: without `out`, which is where the grid puts it.

    trial, point: what a trial is called, and the values it tries. open: options whose values trials have yet to choose.
    """

    row: Row
    seed: int
    config: SimulationConfig
    trial: str = ""
    point: Mapping[str, object] = field(default_factory=dict)
    open: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The run's folder within the grid's, and what messages call it."""
        return "/".join(filter(None, [self.row.name, self.trial, f"seed-{self.seed}"]))


@dataclass(frozen=True)
class Grid:
    """All rows, all of their runs, and the trials that come before them, row by row."""

    rows: Sequence[Row]
    runs: Sequence[Run]
    trials: Sequence[Run]


def _key(key: str) -> str:
    if key in NOT_IN_A_GRID:
        raise PydanticCustomError("not_in_a_grid", NOT_IN_A_GRID[key])
    return key


def _table(given: object) -> Options:
    if not isinstance(given, dict | None):
        raise ValueError("expected options with their values, such as 'rank: 16'")
    return {key_of(str(key)): value for key, value in (given or {}).items()}


def _tried(given: object) -> Options:
    expected = "expected what is tried, such as 'lr: [0.005, 0.01, 0.02]'"
    if not isinstance(given, dict):
        raise ValueError(expected)
    if not given.keys() - {"seeds", "on"}:
        raise PydanticCustomError("nothing_tried", expected)
    return _table(given)


def _list(expected: str, one: str = "", right: Callable[[object], bool] = lambda value: True) -> BeforeValidator:
    """A list that is not empty, of values that are right; one: what may not stand there twice."""

    def read(given: object) -> list[object]:
        if not isinstance(given, list) or not given or not all(map(right, given)):
            raise ValueError(f"expected a list of {expected}")
        if one and any(value in given[:at] for at, value in enumerate(given)):
            raise ValueError(f"a {one} stands there twice")
        return given

    return BeforeValidator(read)


def _word(given: object) -> str:
    if not isinstance(given, str | int | float) or (given and not _safe(str(given))):
        raise ValueError("expected a word, which names a folder too")
    return _safe(str(given))


_Key = Annotated[str, AfterValidator(_key)]
_Values = Annotated[list[object], _list("values, such as [8, 16]", "value")]
_Seeds = Annotated[
    list[int],
    _list("whole numbers from 0, such as [0, 1, 2]", "seed", lambda seed: type(seed) is int and 0 <= seed <= MAX_SEED),
]


class _Row(BaseModel, extra="allow"):
    __pydantic_extra__: dict[_Key, object] = Field(init=False)
    name: Annotated[str, BeforeValidator(_word)] = ""


class _Tuning(BaseModel, extra="allow"):
    __pydantic_extra__: dict[_Key, _Values] = Field(init=False)
    seeds: _Seeds = [0]
    on: str = Field(HELD_OUT, strict=True)


_Rows = Annotated[list[Annotated[_Row, BeforeValidator(_table)]], _list("rows, such as '- {method: lotr, rank: 8}'")]


class _File(BaseModel, extra="forbid"):
    base: Annotated[dict[_Key, object], BeforeValidator(_table)] = {}
    axes: Annotated[dict[_Key, _Values], BeforeValidator(_table)] = {}
    rows: _Rows | None = None
    seeds: _Seeds = [0]
    tune: Annotated[_Tuning, BeforeValidator(_tried)] | None = None


def read_grid(path: Path, out: Path) -> Grid:
    """The grid of a file. out: the folder its runs will lie in.

    Raises InputError with every mistake: of the file, and of every configuration in it.
    """
    problems: list[str] = []
    found = read_yaml(path, problems)
    if problems:
        raise InputError(problems)
    try:
        file = _File.model_validate(found)
    except ValidationError as error:
        raise InputError([_problem(detail, path) for detail in error.errors()]) from None
    given, tune = file.rows or [_Row()], file.tune or _Tuning.model_construct()
    count = len(given) * len(file.seeds) * math.prod(map(len, file.axes.values()))
    if count > MOST_RUNS:
        raise InputError(f"{shorten(path)}: {count:,} runs; expected at most {MOST_RUNS:,}")
    rows = [
        Row(_name(row.name, point, own, file.base), {**own, **point})
        for row in given
        for own in [row.__pydantic_extra__]
        for point in _points(file.axes, own)
    ]
    problems += _repeated(rows)
    runs: list[Run] = []
    trials: list[Run] = []
    mistakes: list[tuple[str, str]] = []
    # A tenth of train is one of --data's, whatever else is tested on.
    tried_on = {"eval_split": tune.on, **({"eval_data": None} if tune.on == HELD_OUT else {})}
    for row in rows:
        points = [point for point in _points(tune.__pydantic_extra__, row.options) if point]
        try:
            for point, seed in itertools.product(points, tune.seeds):
                config = _configuration(file.base, {**row.options, **point, **tried_on}, seed, path, out / row.name)
                trials.append(Run(row, seed, config, f"tune_{_name('', point, {}, {})}", point))
            for seed in file.seeds:
                config = _configuration(file.base, row.options, seed, path, out / row.name)
                runs.append(Run(row, seed, config, open=frozenset(*points[:1])))
        except InputError as error:
            mistakes += [(row.name, problem) for problem in error.problems]
    problems += together(mistakes, {row.name for row in rows})
    if problems:
        raise InputError(problems)
    return Grid(rows, runs, trials)


def _problem(error: ErrorDetails, path: Path) -> str:
    """A complaint of pydantic's in a user's words."""
    where = [part for part in error["loc"] if part != "[key]"]
    if len(where) > 1 and where[0] == "rows":
        where[:2] = [f"row {int(where[1]) + 1}"]
    name = " in ".join(shorten(part) for part in reversed(where))
    match error["type"]:
        case "extra_forbidden":
            return f"{name} in {shorten(path)}: no such part of a grid{nearest(name, _File.model_fields)}"
        case "value_error":
            return f"{name}: {written(error['input'])}: {error['ctx']['error']}"
        case "string_type":
            return f"{name}: {written(error['input'])}: expected {HELD_OUT} (a tenth of train), or the name of a split"
    return f"{name}: {error['msg']}"


def together(mistakes: Iterable[tuple[str, str]], everything: Iterable[str]) -> list[str]:
    """Problems told once each, with what they are of: mistakes are pairs of a name and a problem.

    A problem of everything there is is told without names.
    """
    names: dict[str, list[str]] = {}
    for name, problem in mistakes:
        of = names.setdefault(problem, [])
        if name not in of:
            of.append(name)
    count = len(set(everything))
    return [problem if len(of) == count else f"{problem} (in {_listed(of)})" for problem, of in names.items()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _points(axes: Mapping[str, Sequence[object]], own: Mapping[str, object]) -> list[Options]:
    """Each combination of the axes' values; of the axes that a row says itself, none."""
    axes = {key: values for key, values in axes.items() if key not in own}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _name(name: str, point: Options, own: Options, base: Options) -> str:
    """'lora_rank-8' for method lora and rank 8: it tells rows apart, and can be a folder's name on any system.

    name: the row's own, if it has one; point: where it is on the axes; own: what else it says.
    """
    said = point if name else {**own, **point} or {"method": base.get("method", "run")}
    parts = [shorten(value) if key in SAID_BY_THEIR_VALUE else f"{key}-{shorten(value)}" for key, value in said.items()]
    name = "_".join(filter(None, [name, *map(_safe, parts)]))
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+]+", "-", text).strip("-.")


def _repeated(rows: Sequence[Row]) -> list[str]:
    seen: dict[str, Row] = {}
    problems = []
    for row in rows:
        other = seen.setdefault(row.name.lower(), row)
        if other is not row:
            same = "say the same; remove one" if other.options == row.options else "have one name; give one a 'name'"
            problems.append(f"rows: two rows {row.name} {same}")
    return problems


def _configuration(base: Options, options: Mapping[str, object], seed: int, path: Path, out: Path) -> SimulationConfig:
    unwanted = set().union(*(INSTEAD.get(key, set()) for key in options))
    values = {key: value for key, value in base.items() if key not in unwanted}
    # Whether the place of the run can be written is looked at, by a name that is never there.
    place = out / f"seed-{seed}" / "new"
    config = configuration_of({**values, **options, "seed": seed}, path, place)
    return config.model_copy(update={"out": None})
