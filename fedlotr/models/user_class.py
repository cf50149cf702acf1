"""A model class of the caller's own: what it must be to be built again in another process, and building it there."""

import copy
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

MARKER = "__main__"
"""The module of a script, which is another one in every process."""


def is_transformers_own(kind: type) -> bool:
    """Whether a class is part of transformers, so that its configuration is enough to build it."""
    return kind.__module__.split(".")[0] == "transformers"


def name_of(kind: type) -> tuple[str, str]:
    """module:Class and the folder that the module is found in. Raises ValueError where no process could import it."""
    module, name = kind.__module__, kind.__qualname__
    if module == MARKER:
        raise ValueError(
            f"the class {name} is defined in the script itself, which workers cannot import; put it into a module "
            "of its own"
        )
    if "." in name or getattr(sys.modules.get(module), name, None) is not kind:
        raise ValueError(f"the class {module}.{name} cannot be imported by its name; define it at the top of a module")
    file = getattr(sys.modules[module], "__file__", None)
    if file is None or module.split(".")[0] == "transformers_modules":
        raise ValueError(f"the class {module}.{name} has no file that workers could import it from")
    path = Path(file).resolve()
    depth = module.count(".") + (1 if path.name == "__init__.py" else 0)
    return f"{module}:{name}", str(path.parents[depth])


def import_class(code: str, folder: str) -> type[PreTrainedModel]:
    """The class again. code, folder: of `name_of`. Raises ValueError where another module has that name here."""
    module, _, name = code.partition(":")
    if folder not in sys.path:
        sys.path.append(folder)
    found = importlib.import_module(module)
    if not Path(str(found.__file__)).resolve().is_relative_to(folder):
        raise ValueError(f"the module {module} is {found.__file__} in this process, expected one in {folder}")
    kind: type[PreTrainedModel] = getattr(found, name)
    return kind


def sources(kind: type) -> list[Path]:
    """The files of a class' own code: its own module's, and those of its parents outside torch and transformers."""
    modules = dict.fromkeys(parent.__module__ for parent in kind.__mro__)
    own = [name for name in modules if name.split(".")[0] not in ("torch", "transformers", "builtins", "typing", "abc")]
    files = (getattr(sys.modules.get(name), "__file__", None) for name in own)
    return [Path(file) for file in files if file is not None]


def changes_since_built(model: PreTrainedModel) -> str | None:
    """How a model differs from what its class makes of its configuration, in words, or None.

    Such a difference (another classifier put in, a hook, a forward of its own) is in no file that `save_pretrained`
    writes. Raises ValueError where the class cannot be built from the configuration alone.
    """
    kind = type(model)
    for name, module in model.named_modules():
        where = f"its {name}" if name else "it"
        if "forward" in vars(module):
            return f"{where} has a forward that was put in from outside"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{where} has a forward hook"
    try:
        with torch.device("meta"):
            built = kind(copy.deepcopy(model.config))
    except Exception as error:
        raise ValueError(
            f"a {kind.__name__} cannot be built from its configuration alone ({type(error).__name__}: {error})"
        ) from error
    expected, found = dict(_parts(built)), dict(_parts(model))
    for name in [*found, *(name for name in expected if name not in found)]:
        if expected.get(name) != found.get(name):
            return (
                f"its {name} is {found.get(name) or 'not there'}, where a {kind.__name__} of its configuration has "
                f"{expected.get(name) or 'none'}"
            )
    return None


def _parts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every module by name as its kind and its sizes, and the parameters that are no layer's of torch."""
    for name, module in model.named_modules():
        if name:
            about = "" if isinstance(module, nn.Sequential | nn.ModuleList) else module.extra_repr()
            yield name, f"a {type(module).__name__}({about})"
    for name, tensor in model.named_parameters():
        yield name, f"a tensor of {'×'.join(map(str, tensor.shape))}"


def forward_lacks(kind: type[nn.Module], *, causal: bool) -> list[str]:
    """The arguments that a model's forward is called with and does not take."""
    parameters = inspect.signature(kind.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    needed = ["input_ids", "attention_mask", *(["use_cache"] if causal else [])]
    return [name for name in needed if name not in parameters]


def takes_segments(kind: type[nn.Module]) -> bool:
    """Whether a model's forward tells the sentences of a pair apart."""
    parameters = inspect.signature(kind.forward).parameters
    return "token_type_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_logits(logits: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError for logits of another shape (None: any size), or that are not finite."""
    if logits.dim() != len(expected) or any(n not in (None, m) for n, m in zip(expected, logits.shape, strict=True)):
        sizes = "×".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"its logits have the shape {'×'.join(map(str, logits.shape))}; expected {sizes}")
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")


def check_head(model: nn.Module, heads: list[str], labels: int) -> None:
    """Raises ValueError where the head of a class of one's own cannot be trained and sent as heads are here."""
    kind = type(model).__name__
    if not heads:
        raise ValueError(
            f"a {kind} has no classification head that is known here; call its last layers 'classifier' or 'score'"
        )
    width = model.get_submodule(heads[-1]).out_features
    if width != labels:
        raise ValueError(
            f"the last layer of its head, {heads[-1]}, gives {width} numbers and the data has {labels} labels; "
            "let it take config.num_labels"
        )
    root = heads[-1].split(".")[0]
    linear = {f"{name}.{part}" for name in heads for part in ("weight", "bias")}
    others = [name for name, _ in model.named_parameters() if name.split(".")[0] == root and name not in linear]
    if others:
        raise ValueError(
            f"its head holds {others[0]}, which is no linear layer's and would not be trained; move it out of {root}"
        )
