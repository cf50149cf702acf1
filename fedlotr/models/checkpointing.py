"""Gradient checkpointing: a block keeps only its input for the backward pass, and runs forward again there."""

from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost layers that transformers would checkpoint, in the order of the model."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def run_again(model: nn.Module) -> None:
    """Let the blocks of a model run again in backward. Raises ValueError where it has none.

    Transformers' own switch works in training mode alone, which would bring dropout with it. The cache for
    generation is turned off: a block that ran again would add its keys and values once more.
    """
    if not (chosen := blocks(model)):
        raise ValueError(f"a {type(model).__name__} has no blocks that could be run again: leave out checkpointing")
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]
    for block in chosen:
        _run_again(block)


def _run_again(block: nn.Module) -> None:
    plain = block.forward

    @wraps(plain)
    def forward(*args: Any, **inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **inputs)
        # Nothing here draws at random: there is no dropout.
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **inputs)

    block.forward = forward
