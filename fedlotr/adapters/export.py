"""A plain PEFT LoRA adapter out of trained factors: it needs nothing of ours to be used.

`s·B C A` becomes `lora_B · lora_A` with lora_A = A, lora_B = s·B·C (multiplied in float64) and alpha = r. What a layer
carries is stacked onto them: lora_A = [V; A], lora_B = [U, s·B·C], which is exact at the rank k + r. Where that rank
passes min(d_in, d_out), or the carried term or what was trained is a matrix, the sum of both is one matrix D, and the
narrower of the two factors the identity: lora_B · lora_A = D · I or I · D, exact too.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters.layer import FactoredLayer

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
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    layers: by name within the base model. base: what the base model is called, for PEFT's records. head: tensors of a
    classification head inside the model by name; modules_to_save: the modules that hold them, saved whole.
    placeholder: name, d_in, d_out and whether it is a Conv1D of a layer to adapt by zero where no layer is adapted,
    since PEFT has no adapter without a target.
    """
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    conv = False
    for name, layer in layers.items():
        lora_a, lora_b = _pair(layer)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_a.clone().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_b.contiguous()
        ranks[name] = lora_a.shape[0]
        conv = conv or isinstance(layer.get_base_layer(), Conv1D)
    if not layers and placeholder is not None:
        name, d_in, d_out, conv = placeholder
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.zeros(1, d_in)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(d_out, 1)
        ranks[name] = 1
    tensors |= {f"{PREFIX}{name}": tensor.detach().clone().contiguous() for name, tensor in (head or {}).items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    # Regular expressions that PEFT looks for at the end of a layer's name, hence the ^. The scale is 1 everywhere.
    others = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != r}
    with warnings.catch_warnings():
        # PEFT warns that it sets fan_in_fan_out by itself for a base that it has not seen.
        warnings.simplefilter("ignore")
        config = LoraConfig(
            task_type=task,
            base_model_name_or_path=base,
            r=r,
            lora_alpha=r,
            rank_pattern=others,
            alpha_pattern=dict(others),
            lora_dropout=0.0,
            fan_in_fan_out=conv,
            target_modules=sorted(ranks),
            modules_to_save=sorted(modules_to_save) or None,
            inference_mode=True,
        )
    config.target_modules = sorted(ranks)  # a set is written in hash order
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _pair(layer: FactoredLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B of all that a layer adds to its base."""
    a, b, c = (layer.factor(factor, "default") for factor in "ABC")
    if a is None or b is None:
        return whole(layer.get_delta_weight("default").detach())
    left = b.double() if c is None else b.double() @ c.double()
    lora_a, lora_b = a.detach().float(), (layer.scaling["default"] * left).detach().float()
    if (carry := layer.carry("default")) is None:
        return lora_a, lora_b
    if carry.dense or len(carry.A) + len(lora_a) > min(layer.in_features, layer.out_features):
        return whole(layer.get_delta_weight("default").detach())
    return torch.cat([carry.A, lora_a]), torch.cat([carry.B, lora_b], dim=1)


def whole(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B of rank min(d_out, d_in) whose product is the matrix (d_out, d_in), to the bit."""
    d_out, d_in = delta.shape
    identity = torch.eye(min(d_out, d_in), dtype=delta.dtype)
    return (delta, identity) if d_out <= d_in else (identity, delta)
