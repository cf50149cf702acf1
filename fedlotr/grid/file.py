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
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedlotr.config.configuration import SimulationConfig, configuration_of
from fedlotr.config.values import MAX_SEED
from fedlotr.config.yaml_file import key_of, read_yaml
from fedlotr.data.splits import HELD_OUT
from fedlotr.errors import InputError, nearest, shorten, written

KEYS = ("base", "axes", "rows", "seeds", "tune")
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


@dataclass(frozen=True)
class _Tuning:
    """The part 'tune' of a file. axes: what is tried; on: the split it is tried on."""

    axes: Mapping[str, Sequence[object]]
    seeds: Sequence[int]
    on: str

    @property
    def split(self) -> Options:
        """The options of a trial that say so: a tenth of train is one of --data's, whatever else is tested on."""
        return {"eval_split": self.on, **({"eval_data": None} if self.on == HELD_OUT else {})}

    def points(self, row: Row) -> list[Options]:
        """What is tried for a row: none of what it says itself."""
        axes = {key: values for key, values in self.axes.items() if key not in row.options}
        return list(_points(axes)) if axes else []


def read_grid(path: Path, out: Path) -> Grid:
    """The grid of a file. out: the folder its runs will lie in.

    Raises InputError with every mistake: of the file, and of every configuration in it.
    """
    problems: list[str] = []
    found = read_yaml(path, problems)
    if problems:
        raise InputError(problems)
    problems = [
        f"{shorten(key)} in {shorten(path)}: no such part of a grid{nearest(key, KEYS)}"
        for key in found
        if key not in KEYS
    ]
    base = _options(found.get("base"), "base", problems)
    axes = _axes(found.get("axes"), problems)
    given = _rows(found.get("rows"), problems)
    seeds = _seeds(found.get("seeds", [0]), problems)
    tuning = _tuning(found.get("tune"), problems)
    count = len(given) * len(seeds)
    for values in axes.values():
        count *= len(values)
    if count > MOST_RUNS:
        problems.append(f"{shorten(path)}: {count:,} runs; expected at most {MOST_RUNS:,}")
    if problems:
        raise InputError(problems)
    rows = [
        Row(_name(name, point, own, base), {**own, **point})
        for name, own in given
        for point in _points({key: values for key, values in axes.items() if key not in own})
    ]
    problems += _repeated(rows)
    runs: list[Run] = []
    trials: list[Run] = []
    mistakes: list[tuple[str, str]] = []
    for row in rows:
        points = tuning.points(row)
        tried = [
            (seed, {**row.options, **point, **tuning.split}, f"tune_{_name('', point, {}, {})}", point)
            for point in points
            for seed in tuning.seeds
        ]
        try:
            for seed, options, trial, point in tried:
                trials.append(Run(row, seed, _configuration(base, options, seed, path, out / row.name), trial, point))
            for seed in seeds:
                config = _configuration(base, row.options, seed, path, out / row.name)
                runs.append(Run(row, seed, config, open=frozenset(*points[:1])))
        except InputError as error:
            mistakes += [(row.name, problem) for problem in error.problems]
    problems += together(mistakes, {row.name for row in rows})
    if problems:
        raise InputError(problems)
    return Grid(rows, runs, trials)


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


def _options(given: object, where: str, problems: list[str]) -> Options:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        problems.append(f"{where}: {written(given)}: expected options with their values, such as 'rank: 16'")
        return {}
    options = {key_of(str(key)): value for key, value in given.items()}
    problems += [f"{key} in {where}: {NOT_IN_A_GRID[key]}" for key in options if key in NOT_IN_A_GRID]
    return options


def _axes(given: object, problems: list[str], where: str = "axes") -> dict[str, list[object]]:
    axes: dict[str, list[object]] = {}
    for key, values in _options(given, where, problems).items():
        if not isinstance(values, list) or not values:
            problems.append(f"{shorten(key)} in {where}: {written(values)}: expected a list of values, such as [8, 16]")
        elif any(value in values[:at] for at, value in enumerate(values)):
            problems.append(f"{shorten(key)} in {where}: {written(values)}: a value stands there twice")
        else:
            axes[key] = values
    return axes


def _rows(given: object, problems: list[str]) -> list[tuple[str, Options]]:
    """(name, or nothing; options) of each row; one empty row where none is given."""
    if given is None:
        return [("", {})]
    if not isinstance(given, list) or not given:
        problems.append(f"rows: {written(given)}: expected a list of rows, such as '- {{method: lotr, rank: 8}}'")
        return []
    rows = []
    for number, row in enumerate(given, start=1):
        options = _options(row, f"row {number}", problems)
        name = options.pop("name", "")
        if not isinstance(name, str | int | float) or (name and not _safe(str(name))):
            problems.append(f"name in row {number}: {written(name)}: expected a word, which names a folder too")
            name = ""
        rows.append((_safe(str(name)), options))
    return rows


def _tuning(given: object, problems: list[str]) -> _Tuning:
    if given is None:
        return _Tuning({}, [], HELD_OUT)
    if not isinstance(given, Mapping):
        problems.append(f"tune: {written(given)}: expected what is tried, such as 'lr: [0.005, 0.01, 0.02]'")
        return _Tuning({}, [], HELD_OUT)
    parts = {str(key): value for key, value in given.items()}
    seeds = _seeds(parts.pop("seeds", [0]), problems, "seeds in tune")
    on = parts.pop("on", HELD_OUT)
    if not isinstance(on, str):
        problems.append(f"on in tune: {written(on)}: expected {HELD_OUT} (a tenth of train), or the name of a split")
    axes = _axes(parts, problems, "tune")
    if not parts:
        problems.append("tune: expected what is tried, such as 'lr: [0.005, 0.01, 0.02]'")
    return _Tuning(axes, seeds, str(on))


def _seeds(given: object, problems: list[str], where: str = "seeds") -> list[int]:
    seeds = given if isinstance(given, list) else []
    if not seeds or any(type(seed) is not int or not 0 <= seed <= MAX_SEED for seed in seeds):
        problems.append(f"{where}: {written(given)}: expected a list of whole numbers from 0, such as [0, 1, 2]")
        return []
    if len(set(seeds)) < len(seeds):
        problems.append(f"{where}: {written(given)}: a seed stands there twice")
    return seeds


def _points(axes: Mapping[str, Sequence[object]]) -> Iterator[Options]:
    """Each combination of the axes' values; one without options where there are no axes."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


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
