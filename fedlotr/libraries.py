"""How a process of our own loads libraries: the collector rests, and what no run of ours uses is left out.

transformers and PEFT import by themselves what object detection, training over many machines, compiling and
quantisation by PEFT would need: half of the time that a process would take to start, and each worker is a process.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar, cast

LEFT_OUT = ("bitsandbytes", "scipy")
"""What libraries do without where it is not installed: PEFT's own quantised layers (ours import it where they are
used, and transformers looks for it then), transformers' losses of object detection. They can be imported afterwards.
"""
UNREAD = "torch._dynamo"
"""torch's compiler. It is read once something of it is used."""
READ = "torch._dynamo._trace_wrapped_higher_order_op"
"""What transformers imports of it, and what needs nothing else of it."""

_F = TypeVar("_F", bound=Callable[..., Any])


@contextmanager
def not_collecting() -> Iterator[None]:
    """The collector rests in the block."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def loading_for_good(*, whole: bool = False) -> Iterator[None]:
    """In the block torch and libraries above it load without what no run uses (`LEFT_OUT`, `UNREAD`, distribution).

    The collector rests, and leaves out for ever what was there at the end of the first block: libraries. For a process
    of our own. Half a million objects are made as torch, transformers and Flower load.
    whole: nothing is left out, since it is not a run of ours that loads.
    """
    with not_collecting(), ExitStack() as stack:
        if not whole:
            _compiler_unread()
            stack.enter_context(_left_out())
            stack.enter_context(_on_one_machine())
        yield
        if not gc.get_freeze_count():
            gc.freeze()


@contextmanager
def _left_out() -> Iterator[None]:
    """Libraries that have not been imported cannot be found."""
    hidden = [name for name in LEFT_OUT if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden, cast(ModuleType, None)))  # as Python has it: an ImportError, and no spec
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules[name] is None:
                del sys.modules[name]


@contextmanager
def _on_one_machine() -> Iterator[None]:
    """torch says that it was built without its part for many machines, as some builds are: then none of it is read.

    transformers asks once.
    """
    import torch

    before = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = before


def _compiler_unread() -> None:
    if UNREAD not in sys.modules and not any(isinstance(finder, _Unreading) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Unreading())


class _Unreading(MetaPathFinder, Loader):
    """Finds the package `UNREAD` and does not read it, until something of it but `READ` is imported or used."""

    package: ModuleType | None = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == UNREAD and (spec := PathFinder.find_spec(name, path, target)) is not None:
            self.within, spec.loader = cast(Loader, spec.loader), self
            return spec
        if name.startswith(f"{UNREAD}.") and name != READ and self.package is not None:
            self.read()
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.package = module
        module.__class__ = _Unread

    def read(self) -> None:
        """In its place, so that whoever holds it has all of it."""
        sys.meta_path.remove(self)
        package, self.package = cast(ModuleType, self.package), None
        package.__class__ = ModuleType
        self.within.exec_module(package)


class _Unread(ModuleType):
    """A package that is read when something of it is used.

    But what marks a function for a compiler: as long as it is not read, nothing is compiled.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("allow_in_graph", "assume_constant_result", "disable"):
            return _unmarked
        if name.startswith("__"):  # whoever looks through all modules asks for these
            raise AttributeError(name)
        cast(_Unreading, cast(ModuleSpec, self.__spec__).loader).read()
        return getattr(self, name)


def _unmarked(function: _F | None = None, *_: object, **__: object) -> Any:
    """The function itself; or, called without one, a decorator that gives it back."""
    return _unmarked if function is None else function
