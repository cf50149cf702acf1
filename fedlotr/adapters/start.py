"""A plain PEFT LoRA folder read as what training starts from: pairs U V beside frozen layers, and a head's tensors."""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.experts import DOWN, UP, Slot
from fedlotr.adapters.export import PREFIX
from fedlotr.adapters.layer import low_rank
from fedlotr.adapters.stacked import WEIGHT, holders, slots_of, unstacked
from fedlotr.errors import InputError

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
LABELS = "labels.json"
"""The names of the head's labels, where a run of ours wrote the adapter."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva")
"""Values of `init_lora_weights` that leave the base weights as they are; PiSSA and its kin subtract from them."""
MORE_THAN_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Options of PEFT that make an adapter something else than `W + s·B A`."""


@dataclass(frozen=True)
class Lora:
    """An adapter as its folder holds it.

    layers: by the name of the layer within the base, V (k, d_in) as A and U (d_out, k) as B, float32, the scale folded
    into U; of PEFT's target_parameters a layer for each expert, as `adapters.experts` calls them, of which slots are.
    others: all further tensors by name. head: those of a mean-pooled adapter's head.safetensors.
    labels: the names of its head's rows, where they are known. sha256: of all its files but these.
    """

    layers: dict[str, Factors]
    others: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    labels: tuple[str, ...]
    sha256: str
    slots: dict[str, Slot] = field(default_factory=dict)


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter: the one given, or `adapter/` in a run directory."""
    inside = path / "adapter"
    return inside if not (path / CONFIG).is_file() and (inside / CONFIG).is_file() else path


def read_lora(path: Path) -> Lora:
    """Read an adapter. Raises InputError where it is not there, cannot be read, or is more than a plain LoRA."""
    folder = adapter_folder(path)
    config = _configuration(folder)
    if not (folder / WEIGHTS).is_file():
        if list(folder.glob("adapter_model.*")):
            raise InputError(f"no {WEIGHTS} there (pickled weights are not read); save it again with safetensors")
        raise InputError(f"no {WEIGHTS} there; expected a folder that PEFT's save_pretrained wrote")
    tensors = {_bare(name): tensor for name, tensor in _tensors(folder / WEIGHTS).items()}
    head = _tensors(folder / HEAD) if (folder / HEAD).is_file() else {}
    broken = [name for name, t in (tensors | head).items() if not (t.is_floating_point() and t.isfinite().all())]
    if broken:
        raise InputError(f"{broken[0]} holds values that are not finite numbers")
    layers: dict[str, Factors] = {}
    holders, counts = _holders(config, tensors), {}
    for name in sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")):
        a, b = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight", None)
        if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise InputError(f"{name}: its lora_A {tuple(a.shape)} has no lora_B that fits")
        parameter = holders.get(name, name)
        alone = parameter == name or parameter.endswith(WEIGHT)
        r, scale = _rank_and_scale(config, parameter, len(a) if alone else None)
        pair = Factors(a.float().contiguous(), (scale * b.double()).float().contiguous())
        if alone:
            layers[name] = pair
            continue
        try:
            each = unstacked(pair, r)
        except ValueError as error:
            raise InputError(f"{parameter}: {error}") from error
        counts[parameter] = len(each)
        layers |= dict(zip(slots_of({parameter: len(each)}), each, strict=True))
    digest = hashlib.sha256()
    for file in (CONFIG, WEIGHTS, HEAD):
        if (folder / file).is_file():
            digest.update(hashlib.sha256((folder / file).read_bytes()).digest())
    return Lora(layers, tensors, head, labels_of(folder), digest.hexdigest(), slots_of(counts))


def _holders(config: Mapping[str, Any], tensors: Collection[str]) -> dict[str, str]:
    """By the name of what holds a pair, the parameter that it adapts, of PEFT's target_parameters."""
    asked = [str(name) for name in config.get("target_parameters") or ()]
    parts = [part for part in (*UP, DOWN) if any(name.rpartition(".")[2] == part for name in asked)]
    if odd := [name for name in asked if name.rpartition(".")[2] not in (*parts, "weight")]:
        raise InputError(
            f"more than a plain LoRA (target_parameters {odd[0]}); merge it and give the result by --model"
        )
    names = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    found: dict[str, str] = {}
    for block in sorted({name.removesuffix(".base_layer") for name in names}):
        meant = [part for part in (*parts, "weight") if any(f".{block}.{part}".endswith(f".{name}") for name in asked)]
        held = {holder: parameter for parameter, holder in holders(block, meant).items()}
        if meant and held.keys() <= names:
            found |= held
    return found


def labels_of(folder: Path) -> tuple[str, ...]:
    """The names of the rows of an adapter's head, in their order; none where they are not known."""
    try:
        names = json.loads((folder / LABELS).read_text(encoding="utf-8"))["id2label"]
        return tuple(str(names[str(row)]) for row in range(len(names)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()


def _configuration(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"no {CONFIG} there; expected a folder that PEFT's save_pretrained wrote, or a run's")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"its {CONFIG} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(f"an adapter of the type {kind!r}; only LORA can be started from")
    found = [name for name in MORE_THAN_LORA if config.get(name)]
    if found:
        raise InputError(f"more than a plain LoRA ({', '.join(found)}); merge it and give the result by --model")
    if config.get("bias", "none") != "none":
        raise InputError(f"it trains biases too (bias={config['bias']!r}); train it with bias='none'")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise InputError(f"its start {start!r} changes the base weights; convert it to a plain LoRA with PEFT first")
    return config


def _rank_and_scale(config: Mapping[str, Any], name: str, rank: int | None) -> tuple[int, float]:
    """r, and alpha / r, of a layer or a parameter, as PEFT reckons them. rank: of its tensors, where they tell."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        r = ranks.get(get_pattern_key(list(ranks), name), config["r"])
        alpha = float(alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]))
    except (KeyError, ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"its {CONFIG} has no rank and alpha for {name} ({type(error).__name__}: {error})") from error
    if rank not in (None, r) or type(r) is not int or r < 1 or not math.isfinite(alpha):
        tensors = "" if rank is None else f"its tensors have rank {rank}, "
        raise InputError(f"{name}: {tensors}its {CONFIG} says r {r!r} and alpha {alpha!r}")
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"its {path.name} cannot be read ({' '.join(str(error).split())})") from error


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX)


@contextmanager
def carrying(model: nn.Module, layers: Mapping[str, Factors]) -> Iterator[None]:
    """Let the layers of a bare model, whose weights are not touched, compute `W x + U V x`."""

    def hook(pair: Factors) -> Any:
        def add(_: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            return y + low_rank(inputs[0], pair.A.to(y.device), pair.B.to(y.device)).to(y.dtype)

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(pair)) for name, pair in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
