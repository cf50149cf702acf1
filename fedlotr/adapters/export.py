"""A plain PEFT LoRA adapter out of trained factors: it needs nothing of ours to be used.

`s·B C A` becomes `lora_B · lora_A` with lora_A = A, lora_B = s·B·C (multiplied in float64) and alpha = r. What a layer
carries is stacked onto them: lora_A = [V; A], lora_B = [U, s·B·C], which is exact at the rank k + r. Where that rank
passes min(d_in, d_out), or the carried term or what was trained is a matrix, the sum of both is one matrix D, and the
narrower of the two factors the identity: lora_B · lora_A = D · I or I · D, exact too. Layers of experts are written as
the parameters that they are views of (`stacked`).
"""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.experts import Slot
from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.stacked import stacked

PREFIX = "base_model.model."


def export_lora(
    folder: Path,
    layers: Mapping[str, FactoredLayer],
    *,
    base: str,
    task: TaskType | None = None,
    head: Mapping[str, torch.Tensor] | None = None,
    modules_to_save: Sequence[str] = (),
    placeholder: tuple[str, int, int, bool] | None = None,
    slots: Mapping[str, Slot] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    layers: by name within the base model. base: what the base model is called, for PEFT's records. head: tensors of a
    classification head inside the model by name; modules_to_save: the modules that hold them, saved whole.
    placeholder: name, d_in, d_out and whether it is a Conv1D of a layer to adapt by zero where no layer is adapted,
    since PEFT has no adapter without a target. slots: of the model's expert layers.
    """
    pairs = {name: _pair(layer) for name, layer in layers.items()}
    conv = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    if not layers and placeholder is not None:
        name, d_in, d_out, conv = placeholder
        pairs[name] = Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1))
    made = stacked(pairs, slots or {})
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in made.tensors.items()}
    tensors |= {f"{PREFIX}{name}": tensor.detach().clone().contiguous() for name, tensor in (head or {}).items()}
    with warnings.catch_warnings():
        # PEFT warns that it sets fan_in_fan_out by itself for a base that it has not seen.
        warnings.simplefilter("ignore")
        config = LoraConfig(
            task_type=task,
            base_model_name_or_path=base,
            **rank_fields(made.ranks, made.parameters),
            lora_dropout=0.0,
            fan_in_fan_out=conv,
            target_modules=sorted(made.modules),
            target_parameters=sorted(made.parameters) or None,
            modules_to_save=sorted(modules_to_save) or None,
            inference_mode=True,
        )
    config.target_modules = sorted(made.modules)  # a set is written in hash order
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def rank_fields(ranks: Mapping[str, int], parameters: Collection[str] = ()) -> dict[str, Any]:
    """What adapter_config.json says of layers of these ranks, such that the scale alpha / r is 1 everywhere.

    Patterns are regular expressions that PEFT looks for at the end of a layer's name, hence the ^. parameters: those of
    the names that are parameters. PEFT warns, wrongly, that it ignores patterns of such, so they need as few as can be.
    """
    r = Counter(ranks[name] for name in parameters or ranks).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != r}
    return {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": dict(others)}


def _pair(layer: FactoredLayer) -> Factors:
    """lora_A and lora_B of all that a layer adds to its base."""
    a, b, c = (layer.factor(factor, "default") for factor in "ABC")
    if a is None or b is None:
        return whole(layer.get_delta_weight("default").detach())
    left = b.double() if c is None else b.double() @ c.double()
    lora_a, lora_b = a.detach().float(), (layer.scaling["default"] * left).detach().float()
    if (carry := layer.carry("default")) is None:
        return Factors(lora_a, lora_b)
    if carry.dense or len(carry.A) + len(lora_a) > min(layer.in_features, layer.out_features):
        return whole(layer.get_delta_weight("default").detach())
    return Factors(torch.cat([carry.A, lora_a]), torch.cat([carry.B, lora_b], dim=1))


def whole(delta: torch.Tensor) -> Factors:
    """lora_A and lora_B of rank min(d_out, d_in) whose product is the matrix (d_out, d_in), to the bit."""
    d_out, d_in = delta.shape
    identity = torch.eye(min(d_out, d_in), dtype=delta.dtype)
    return Factors(delta, identity) if d_out <= d_in else Factors(identity, delta)
