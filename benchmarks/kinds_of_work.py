"""What shares of a computation's time go to wide products, attention, activations and so on, by torch's profiler.

An operator belongs to the module whose forward it is in; one of a backward to that of the operator it is the gradient
of, by the number that autograd gives both. A product is told by its sizes, whatever module it is in, but in attention.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules import module as modules
from torch.profiler import ProfilerActivity, profile, record_function

THIN = 100
"""A product one of whose matrices has a side below this is thin: that of a rank, not of a model."""

KINDS = "wide products", "thin products", "attention", "activations", "norms", "casts and copies", "rest"
MARK = "part of a model: "
PRODUCT = re.compile(r"(mm|baddbmm|addmv|mv|_linear_pointwise|mkldnn_linear|_mkldnn_linear)(_out)?$")
ATTENTION = re.compile(r"(?i)attention|softmax|flex")
ACTIVATION = re.compile(r"(?i)gelu|silu|relu|tanh(?!.*attention)")
NORM = re.compile(r"(?i)norm(?!al)")
COPY = re.compile(r"(copy_|_to_copy|clone|contiguous|cat|stack|index_select|index|gather|fill_|zero_|zeros|empty.*)$")
BACKWARD = "autograd::engine::evaluate_function"


def part(module: nn.Module) -> str | None:
    """What part of a model a module is, if that decides the kind of what it computes."""
    name = type(module).__name__
    if isinstance(module, BaseTunerLayer | nn.Linear) or name == "Conv1D":
        return "linear"
    if NORM.search(name):
        return "norms"
    if name.endswith("Attention"):
        return "attention"
    home = type(module).__module__
    return "activations" if home in ("transformers.activations", "torch.nn.modules.activation") else None


@contextmanager
def marked() -> Iterator[None]:
    """In the block the profiler is told which part of a model is at work."""
    open_marks: list[Any] = []

    def enter(module: nn.Module, _: Any) -> None:
        if (name := part(module)) is not None:
            mark: Any = record_function(MARK + name)
            mark.__enter__()
            open_marks.append(mark)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if part(module) is not None:
            open_marks.pop().__exit__(None, None, None)

    hooks = [modules.register_module_forward_pre_hook(enter), modules.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kinds_of_work(work: Callable[[], object]) -> dict[str, float]:
    """The share of its time that each kind of work takes, for `KINDS`; one thread, on a CPU."""
    spent = dict.fromkeys(KINDS, 0.0)
    for _, kind, taken in operators(work):
        spent[kind] += taken
    total = sum(spent.values())
    return {kind: taken / total for kind, taken in spent.items()}


def operators(work: Callable[[], object]) -> Iterator[tuple[str, str, float]]:
    """Each operator that it calls: its name, its kind, and the microseconds in it and in none that it calls."""
    with marked(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        work()
    events = sorted(seen.events(), key=lambda event: event.time_range.start)
    by_number: dict[int, str | None] = {}
    for event in events:  # the last of a number is the operator that the gradient is of
        if event.sequence_nr >= 0 and _gradient(event) is None:
            by_number[event.sequence_nr] = _marked_part(event)
    for event in events:
        if not event.name.startswith(MARK):
            backward = _gradient(event)
            where = _marked_part(event) if backward is None else by_number.get(backward.sequence_nr)
            yield event.name, _kind(event, where), event.self_cpu_time_total


def _above(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _marked_part(event: Any) -> str | None:
    return next((each.name.removeprefix(MARK) for each in _above(event) if each.name.startswith(MARK)), None)


def _gradient(event: Any) -> Any:
    """The gradient that an operator is a part of; None in a forward, and in one that is run again for a backward."""
    for each in _above(event):
        if each.name.startswith(MARK):
            return None
        if each.name.startswith(BACKWARD):
            return each
    return None


def _kind(event: Any, where: str | None) -> str:
    name = event.name.rpartition("::")[2]
    names = [each.name.removeprefix(BACKWARD) for each in _above(event)]
    if PRODUCT.search(name):
        batched = "bmm" in name
        if batched and where == "attention":
            return "attention"
        sides = [side for shape in event.input_shapes if len(shape) >= 2 for side in shape[-2:]]
        return "thin products" if batched or min(sides, default=0) < THIN else "wide products"
    if where == "attention" or any(map(ATTENTION.search, names)):
        return "attention"
    if where == "activations" or any(map(ACTIVATION.search, names)):
        return "activations"
    if where == "norms" or any(map(NORM.search, names)):
        return "norms"
    return "casts and copies" if COPY.match(name) else "rest"
