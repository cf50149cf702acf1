"""A format of the caller's own: a function from a row to what is learnt from it, found by its name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedlotr.data.formats import FORMATS
from fedlotr.errors import InputError, nearest

GROUP = "fedlotr.formats"
"""Entry point group in which packages announce theirs."""


def find_function(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """The function that an installed package announces, or that module:function or file.py:function names.

    Raises InputError where there is none.
    """
    where, colon, attribute = name.rpartition(":")
    announced = {point.name: point for point in entry_points(group=GROUP)}
    if not colon and name not in announced:
        raise InputError(
            f"--format {name}: no such format{nearest(name, [*FORMATS, *announced])} (or give a function of your own: "
            "module:function or file.py:function)"
        )
    try:
        if not colon:
            found = announced[name].load()
        else:
            module = _module_from(Path(where)) if where.endswith(".py") else import_module(where)
            names = [key for key, value in vars(module).items() if callable(value)]
            if not hasattr(module, attribute):
                raise InputError(f"--format {name}: {where} has no {attribute}{nearest(attribute, names)}")
            found = getattr(module, attribute)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a module may also end the program
        said = " ".join(str(error).split())[:200]
        raise InputError(f"--format {name}: cannot be loaded: {type(error).__name__}: {said}") from error
    if not callable(found) or isinstance(found, type):
        raise InputError(f"--format {name}: expected a function of a row; it is a {type(found).__name__}")
    function: Callable[[Mapping[str, Any]], Any] = found
    return function


def _module_from(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"--format: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"fedlotr_user_format_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
