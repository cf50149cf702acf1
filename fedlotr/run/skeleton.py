"""A run's model on the meta device, where it costs nothing: whether it can be built, and trained for its task."""

import numpy as np
import torch
from torch import nn

from fedlotr.config.configuration import SimulationConfig
from fedlotr.errors import InputError
from fedlotr.models.loading import ModelSpec, head_layers
from fedlotr.models.meta import check_meta, meta_model
from fedlotr.models.source import first_line
from fedlotr.models.user_class import check_head, check_logits, forward_lacks
from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel


def build_skeleton(config: SimulationConfig, spec: ModelSpec, *, sure: bool) -> nn.Module | None:
    """The model on the meta device, where no weights are read.

    sure: `spec` says what the model is for; where that is a guess and cannot be built, None.
    """
    try:
        skeleton = meta_model(config.model, spec)
    except InputError:
        if sure:
            raise
        return None
    if sure and spec.code is not None:
        _check_own(skeleton, spec)
    headed = sure and spec.code is None and spec.headed
    check_meta(config.model, skeleton, headed=headed)
    return skeleton


def _check_own(skeleton: nn.Module, spec: ModelSpec) -> None:
    """Raises InputError for a class of the caller's own that cannot be trained here."""
    try:
        if lacking := forward_lacks(type(skeleton), causal=not spec.headed):
            raise ValueError(
                f"the forward of its class {spec.code} takes no {', '.join(lacking)}, which it is called with"
            )
        if spec.headed:
            check_head(skeleton, list(head_layers(skeleton)), spec.labels)
    except ValueError as error:
        raise InputError(f"model: {error}") from error


def try_longest(model: TrainableModel, examples: Examples, name: str, max_length: int) -> None:
    """Raises InputError where a model cannot take the longest of the texts: an index that is beyond one of its tables.

    name: what the configuration calls the model.
    """
    rows = np.argsort(examples.lengths, kind="stable")[-1:]
    try:
        with torch.inference_mode():
            model.logits(examples.batch(rows, model.spec.pad_id).to(model.device))
    except IndexError as error:
        longest = int(examples.lengths[rows[0]])
        raise InputError(
            f"--model {name}: cannot take a text of {longest} tokens ({first_line(error)}): it has no room for so many "
            f"positions, or none for one of the tokens; give less than --max-length {max_length}, or the tokenizer "
            "that belongs to the model"
        ) from error


def try_out(model: TrainableModel, examples: Examples) -> None:
    """Raises InputError where a class of the caller's own does not give the logits that a loss can be made of."""
    rows = np.argsort(examples.lengths, kind="stable")[[0, -1]]
    batch = examples.batch(rows, model.spec.pad_id).to(model.device)
    shape = (2, model.spec.labels) if model.spec.headed else (*batch.input_ids.shape, None)
    try:
        with torch.inference_mode():
            check_logits(model.logits(batch), shape)
    except Exception as error:
        raise InputError(f"model: a {model.spec.code} cannot be used: {first_line(error)}") from error
