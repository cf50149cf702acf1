"""Mixtures of experts: what routes tokens, and experts that are held in a way in which they cannot be adapted."""

from collections.abc import Collection

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters.experts import slots

EXPERTS = (
    "experts that are one tensor can be adapted where their class uses transformers' experts interface, with two "
    "parameters of three dimensions; these do not"
)
"""Why what is named is refused, for a message."""
SINGLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d)
"""Kinds of modules whose matrix is one layer's, also within an expert."""
ROUTERS = ("gate", "router", "shared_expert_gate")
"""What layers are called, beside a block's experts, that route tokens."""


def routes(model: nn.Module, name: str) -> bool:
    """Whether a layer says which experts a token goes to, or how much a shared one weighs."""
    block, _, last = name.rpartition(".")
    beside = last in ROUTERS and hasattr(model.get_submodule(block), "experts")
    return beside or "router" in name.split(".")


def in_mixtures(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Those of the layers that lie in a block of experts, or beside them in one: they see tokens without their rows."""
    names = [*slots(model), *expert_tensors(model)]
    blocks = {f"{name.partition('.experts.')[0]}." for name in names if ".experts." in name}
    return [name for name in layers if any(name.startswith(block) for block in blocks)]


def expert_tensors(model: nn.Module) -> list[str]:
    """The names of the parameters that each hold a matrix of all experts of a mixture, and are no layers."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not isinstance(module, SINGLE) and ("experts" in path.split(".") or "Experts" in type(module).__name__)
        for name, tensor in module.named_parameters(recurse=False)
        if tensor.dim() > 1 and not name.endswith("bias")
    ]
