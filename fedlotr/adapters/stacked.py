"""Layers' pairs as PEFT's files hold them, those of experts in the layout of its `target_parameters`, and back.

PEFT keeps one pair for a parameter of E experts, all of one rank r: lora_A (r·E, d_in) has the rows of one expert next
to each other, lora_B (d_out, r·E) the columns of one place in the rank (`peft.tuners.lora.layer.ParamWrapper`). It
adapts both parameters of a block by a wrapper inside another, so the first one's tensors lie below `base_layer`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from fedlotr.adapters.bases import Factors
from fedlotr.adapters.experts import DOWN, UP, Slot

MOVED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Ends of layers' names that PEFT 0.21 takes for those of experts in its `target_modules`, whatever block they are of,
in most families that have experts (`_convert_peft_config_moe`): a shared expert's, or those of a block without experts.
As parameters, `NAME.weight`, it takes them at their word."""
WEIGHT = ".weight"


@dataclass
class Stacked:
    """tensors: by PEFT's names without a prefix. ranks: of each layer, or parameter, by name.

    modules, parameters: what PEFT is told to adapt.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def stacked(pairs: Mapping[str, Factors], slots: Mapping[str, Slot]) -> Stacked:
    """What an adapter's files hold of these layers' pairs, whose scale is 1.

    slots: of all expert layers of the model. An expert without a pair, or of a lower rank, is filled up with zeros.
    """
    found = Stacked()
    blocks: dict[str, dict[str, dict[int, Factors]]] = {}
    for name, pair in pairs.items():
        if (slot := slots.get(name)) is not None:
            block, _, part = slot.parameter.rpartition(".")
            blocks.setdefault(block, {}).setdefault(part, {})[slot.place] = pair
            continue
        moved = bool(slots) and name.rpartition(".")[2] in MOVED
        (found.parameters if moved else found.modules).append(name + WEIGHT * moved)
        found.ranks[name + WEIGHT * moved] = len(pair.A)
        _put(found, name, pair)
    experts = {slot.parameter: slot.experts for slot in slots.values()}
    for block, parts in blocks.items():
        for part, held in parts.items():
            parameter = f"{block}.{part}"
            found.ranks[parameter] = max(len(pair.A) for pair in held.values())
            found.parameters.append(parameter)
            _put(found, _holder(block, part, parts), _join(held, experts[parameter], found.ranks[parameter]))
    return found


def unstacked(pair: Factors, r: int) -> list[Factors]:
    """The pairs of all experts of a parameter, of rank r. Raises ValueError for tensors of another layout."""
    rows, d_in = pair.A.shape
    d_out, columns = pair.B.shape
    if r < 1 or rows != columns or rows % r:
        raise ValueError(f"lora_A {(rows, d_in)} and lora_B {(d_out, columns)} are not those of experts of rank {r}")
    a, b = pair.A.view(-1, r, d_in), pair.B.view(d_out, r, -1).permute(2, 0, 1)
    return [Factors(a[place].contiguous(), b[place].contiguous()) for place in range(len(a))]


def holders(block: str, parts: Collection[str]) -> dict[str, str]:
    """Where PEFT keeps the pairs of a block's parameters: by parameter the name of the module."""
    return {f"{block}.{part}": _holder(block, part, parts) for part in parts}


def _holder(block: str, part: str, parts: Collection[str]) -> str:
    return f"{block}.base_layer" if part in UP and DOWN in parts else block


def _join(held: Mapping[int, Factors], experts: int, r: int) -> Factors:
    """One pair of all experts."""
    some = next(iter(held.values()))
    nothing = Factors(torch.zeros(0, some.A.shape[1]), torch.zeros(some.B.shape[0], 0))
    pairs = [filled(held.get(place, nothing), r) for place in range(experts)]
    return Factors(torch.cat([pair.A for pair in pairs]), torch.stack([pair.B for pair in pairs], dim=2).flatten(1))


def filled(pair: Factors, rank: int) -> Factors:
    """The same product, with as many rows of zeros in A and columns in B as the rank lacks."""
    more = rank - len(pair.A)
    a, b = (torch.zeros(more, pair.A.shape[1]), torch.zeros(pair.B.shape[0], more))
    return Factors(torch.cat([pair.A, a]), torch.cat([pair.B, b], dim=1))


def _put(found: Stacked, holder: str, pair: Factors) -> None:
    found.tensors[f"{holder}.lora_A.weight"] = pair.A.clone().contiguous()
    found.tensors[f"{holder}.lora_B.weight"] = pair.B.clone().contiguous()


def slots_of(parameters: Mapping[str, int]) -> dict[str, Slot]:
    """Of all layers of these parameters, each of so many experts."""
    found: dict[str, Slot] = {}
    for parameter, experts in parameters.items():
        block, _, part = parameter.rpartition(".")
        found |= {f"{block}.{place}.{part}": Slot(parameter, place, experts) for place in range(experts)}
    return found
