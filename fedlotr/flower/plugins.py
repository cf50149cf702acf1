"""Finding a server strategy: by its entry point, by `module:Class`, or by `path/to/file.py:Class`.

The core never imports a strategy by name, so a built-in one has no privilege over a user's.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlotr.errors import InputError, nearest

GROUP = "fedlotr.strategies"
"""Entry point group in which packages announce their strategies."""
OURS = "fedlotr.strategies."
"""What the modules of those that come along begin with."""
MINIMA = ("min_train_nodes", "min_available_nodes")
"""Of clients: what Flower's strategies wait for until their grid shows as many."""


def installed() -> dict[str, EntryPoint]:
    """The strategies that installed packages announce, by name; none is loaded.

    A name announced twice is that of those that come along, or of the package that is found first: no other package can
    put itself in the place of a default. The other one is had as module:Class.
    """
    return dict(_installed(tuple(sys.path)))


@cache
def _installed(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Once for each search path, since it reads the metadata of all packages there."""
    points = list(reversed(entry_points(group=GROUP)))
    return {point.name: point for point in sorted(points, key=lambda point: point.value.startswith(OURS))}


def built_in() -> list[str]:
    """The names of those that come along."""
    return [name for name, point in installed().items() if point.value.startswith(OURS)]


def load_strategy(
    name: str, arguments: Mapping[str, Any], clients_per_round: int, seed: int = 0, *, clients: int | None = None
) -> FlowerStrategy:
    """Make the strategy. seed: the run's, for one that draws and so has an argument `seed`.

    One whose constructor takes `clients` is told how many there are in the federation (default: those of a round).

    Flower's own strategies get what lets the loop sample and weigh for them: they train every client that their grid
    shows, however few, weigh by the record `weight`, and evaluate nothing. `arguments` win over that.
    Raises InputError for a strategy that cannot be found or made, or that would wait for more clients than a round has.
    """
    kind = _find(name)
    ours = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        **dict.fromkeys(MINIMA, 1),
        "weighted_by_key": "weight",
        "seed": seed,
        "clients": clients if clients is not None else clients_per_round,
    }
    parameters = _parameters(kind)
    unknown = [key for key in arguments if parameters is not None and key not in parameters]
    if unknown:
        raise InputError(
            [
                f"--strategy-arg {key}: {kind.__name__} has no such argument{nearest(key, parameters or ())}"
                for key in unknown
            ]
        )
    for key in MINIMA:
        least = arguments.get(key, 1)
        if key in ours.keys() & (parameters or ()) and isinstance(least, int) and least > clients_per_round:
            raise InputError(
                f"--strategy-arg {key}={least}: a round has {clients_per_round} clients (--sample), and {kind.__name__}"
                f" would wait for more; give at most {clients_per_round}, or leave it out"
            )
    accepted = {key: value for key, value in ours.items() if parameters is None or key in parameters}
    try:
        return kind(**{**accepted, **arguments})
    except (Exception, SystemExit) as error:  # a module or a class may also end the program
        raise InputError(
            f"--strategy {name}: {kind.__name__} cannot be made: {_in_a_line(error)}; "
            "its arguments are given by --strategy-arg KEY=VALUE"
        ) from error


@contextmanager
def whoever_is_there(strategy: FlowerStrategy, clients: int) -> Iterator[None]:
    """Let Flower's strategies, and those around or above one, ask for no more clients than a round has.

    A round has fewer than the configuration says where some have spent their privacy, or where a cohort is drawn.
    """
    found: Any = strategy
    changed: list[tuple[Any, str, int]] = []
    while isinstance(found, FlowerStrategy) and not any(found is owner for owner, _, _ in changed):
        for name in MINIMA:
            least = vars(found).get(name)
            if isinstance(least, int) and least > clients:
                changed.append((found, name, least))
                setattr(found, name, clients)
        found = vars(found).get("strategy")  # as Flower's wrappers call what they wrap
    try:
        yield
    finally:
        for owner, name, least in changed:
            setattr(owner, name, least)


def _parameters(kind: type) -> set[str] | None:
    """The names a class takes, also those its **kwargs hand on to the class above; None where that is not known."""
    names: set[str] = set()
    for owner in kind.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        found = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        names |= {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in found):
            return names
    return names if "__init__" not in vars(kind) else None


def _find(name: str) -> type[FlowerStrategy]:
    wanted = "fedlotr.flower.Strategy or Flower's Strategy"
    kind: type[FlowerStrategy] = load_class(name, "--strategy", "strategy", installed(), FlowerStrategy, wanted)
    return kind


def load_class(name: str, option: str, what: str, announced: Mapping[str, EntryPoint], base: Any, wanted: str) -> Any:
    """The class of an announced name, of module:Class or of path/to/file.py:Class.

    option, what, wanted: how messages call it. Raises InputError where there is none that is derived from `base`.
    """

    def fits(value: object) -> bool:
        return isinstance(value, type) and issubclass(value, base)

    return _load(name, option, what, announced, fits, f"a class derived from {wanted}", "Class")


def load_function(name: str, option: str, what: str) -> Any:
    """The function of module:function or of path/to/file.py:function. Raises InputError where there is none."""

    def fits(value: object) -> bool:
        return callable(value) and not isinstance(value, type)

    return _load(name, option, what, {}, fits, "a function", "function")


def _load(
    name: str,
    option: str,
    what: str,
    announced: Mapping[str, EntryPoint],
    fits: Callable[[object], bool],
    wanted: str,
    kind: str,
) -> Any:
    where, colon, attribute = name.rpartition(":")
    try:
        if not colon:
            if name not in announced:
                raise InputError(
                    f"{option} {name}: no such {what}{nearest(name, announced)} "
                    f"(or give your own as module:{kind} or path/to/file.py:{kind})"
                )
            found = announced[name].load()
        else:
            module = _module_from_file(Path(where), option, what) if where.endswith(".py") else import_module(where)
            found = getattr(module, attribute, None)
            if found is None:
                names = [key for key, value in vars(module).items() if fits(value)]
                raise InputError(f"{option} {name}: {where} has no {attribute}{nearest(attribute, names)}")
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a module or a class may also end the program
        raise InputError(f"{option} {name}: cannot be loaded: {_in_a_line(error)}") from error
    if not fits(found):
        raise InputError(f"{option} {name}: expected {wanted}")
    return found


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _module_from_file(path: Path, option: str, what: str) -> Any:
    if not path.is_file():
        raise InputError(f"{option}: there is no file {path}")
    name = f"fedlotr_user_{what}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
