"""A model on the meta device, where it costs nothing: whether it can be built, and what is wrong with it."""

from pathlib import Path
from typing import Any

from torch import nn

from fedlotr.errors import InputError
from fedlotr.models.loading import OUTPUT, ModelSpec, adaptable_layers, head_layers, load_base
from fedlotr.models.mixtures import EXPERTS, expert_tensors
from fedlotr.models.source import first_line
from fedlotr.models.supported import check_kind, read_architecture
from fedlotr.models.targets import ALL, matches, without


def meta_model(given: str, spec: ModelSpec, config: Any = None) -> nn.Module:
    """The model of a folder, or of a configuration alone; no weights are read.

    given: how the user named it. Raises InputError where it cannot be built for what it is to do.
    """
    try:
        if spec.code is None:
            check_kind(read_architecture(Path(spec.path)) if config is None else config, spec.kind)
        return load_base(spec, meta=True, config=config)
    except Exception as error:  # transformers fails in its own ways; a plain ValueError is one of ours
        reason = f"cannot be built for {spec.kind}: {first_line(error)}"
        raise InputError(f"--model {given}: {error if type(error) is ValueError else reason}") from error


def check_meta(given: str, model: nn.Module, *, headed: bool) -> None:
    """Raises InputError for a model that cannot be trained here. headed: whether it must have a head."""
    if headed and not head_layers(model):
        raise InputError(f"--model {given}: a {type(model).__name__} has no classification head that is known here")


def chosen_layers(model: nn.Module, targets: str) -> list[str]:
    """As `adaptable_layers`. Raises InputError where there is none, or experts are meant that are no layers."""
    experts = expert_tensors(model)
    try:
        if meant := [name for name in experts if matches(targets, name)]:
            layers = [name for name in adaptable_layers(model, ALL) if matches(targets, name)]
            more = f" and {len(meant) - 1} more" if len(meant) > 1 else ""
            way = f"the layers alone are --targets {without(layers, experts)}" if layers else "choose others"
            raise ValueError(f"of this mixture of experts it means {meant[0]}{more}: {EXPERTS}; {way}")
        return adaptable_layers(model, targets)
    except ValueError as error:
        said = any(reason in str(error) for reason in (EXPERTS, OUTPUT))
        beside = f"; {experts[0]} is no layer: {EXPERTS}" if experts and not said else ""
        raise InputError(f"--targets {targets}: {error}{beside}") from error
