"""The `adapter/` folder of a run: a plain PEFT LoRA, and a README whose lines use it without anything of ours."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from peft import TaskType
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters.experts import slots
from fedlotr.adapters.export import export_lora
from fedlotr.adapters.layer import widths
from fedlotr.adapters.start import CONFIG, LABELS
from fedlotr.adapters.tuner import factored_layers
from fedlotr.errors import visible
from fedlotr.files import write_atomically
from fedlotr.models.gguf import Origin, is_gguf, origin_of
from fedlotr.models.loading import HEADS, adaptable_layers
from fedlotr.models.source import PACKAGED
from fedlotr.reporting.escaping import code_span, markdown
from fedlotr.training.model import TrainableModel

ENCODER = "encoder."
"""What `MeanPooledClassifier` calls the model inside it."""


DIFFERING_RANKS = (
    "Its layers have different ranks: `rank_pattern` and `alpha_pattern` in adapter_config.json say which. PEFT reads "
    "them. Converters and servers that know one rank and one alpha for all layers (llama.cpp's "
    "`convert_lora_to_gguf.py`, vLLM) do not: give them what `fedlotr export RUN --to peft --uniform-rank` makes: "
    "all layers are filled up with zeros to the largest rank, or `--to merged`."
)
"""What the README says of such an adapter."""


EXPERTS = (
    "It adapts experts as PEFT's `target_parameters` do, which needs transformers 5. Converters and servers that know "
    "adapters of layers alone do not read that: give them what `fedlotr export RUN --to merged` makes."
)
MISTAKEN = " PEFT 0.21 warns that it ignored the patterns of experts' ranks; it does not."
"""What the README says of such an adapter, and of one whose ranks differ."""


HAND_ON = (
    "For others, `fedlotr export RUN --to peft` makes a folder of it with a model card and without the place that the "
    "base has on this machine; `--to merged` plain weights, `--to hub` a repository."
)
"""What the README in a run's own folder says."""


@dataclass(frozen=True)
class OwnBase:
    """A base that the caller brought, which has no name that others know: its class, and the inputs it takes."""

    kind: str
    inputs: tuple[str, ...]


def write_adapter(
    folder: Path,
    model: TrainableModel,
    *,
    base: str,
    source: Path,
    method: str,
    max_length: int,
    labels: tuple[str, ...],
    pair: bool,
    tokenizer: PreTrainedTokenizerBase,
    own: OwnBase | None = None,
    quantize: str = "none",
    client: int | None = None,
) -> None:
    """Write the adapter with the model's trained tensors as they are assigned now.

    base: what the base model is called: a hub id, a folder or a GGUF file. source: the folder it was loaded from here,
    which adapter_config.json names in place of a GGUF file: PEFT loads a base from folders and the hub alone.
    pair: whether the texts are pairs. tokenizer: as the run used it. own: of a base that the caller brought.
    quantize: the form that the base's linear layers had in the run. client: whose adapter it is, where each has one.
    """
    spec = model.spec
    mean_pooled = spec.headed and spec.mean_pooled
    _export(folder, model, str(source) if is_gguf(base) else base, mean_pooled)
    if labels:
        named = {str(row): name for row, name in enumerate(labels)}
        both = {"id2label": named, "label2id": {name: row for row, name in enumerate(labels)}}
        write_atomically(folder / LABELS, json.dumps(both, indent=1, ensure_ascii=False))
    origin = origin_of(source)
    if origin is not None and is_gguf(base):
        origin = Origin(Path(base).name, origin.sha256)  # as the run's user calls it
    readme = render(
        "adapter.md",
        spec=spec,
        mean_pooled=mean_pooled,
        base=base,
        source=str(source) if own is None else "base",
        own=own,
        origin=origin,
        packaged=next((known for known in PACKAGED.values() if origin and known.sha256 == origin.sha256), None),
        pair=pair,
        inputs=_inputs(tokenizer),
        padded_otherwise=tokenizer.pad_token_id is not None and spec.pad_id != tokenizer.pad_token_id,
        max_length=max_length,
        labels=labels,
        method=method,
        shared_alone=bool(model.personal),
        quantize=quantize,
        client=client,
        hand_on=HAND_ON,
        ranks=DIFFERING_RANKS if _has(folder, "rank_pattern") else "",
        experts=EXPERTS + MISTAKEN * _has(folder, "rank_pattern") if _has(folder, "target_parameters") else "",
    )
    write_atomically(folder / "README.md", readme)


def elsewhere(readme: str, before: str, now: str, *, own: bool, uniform: bool) -> str:
    """An adapter's README, as `write_adapter` makes it, for a reader on another machine.

    before, now: what the base is called, here and there. own: whether the lines load the base from a folder `base` that
    the README tells how to make. uniform: whether all layers have one rank now.
    """
    place = "base" if own else now
    readme = re.sub(r"(?m)^base, adapter = .*$", lambda _: f'base, adapter = {place!r}, "."  # {visible(now)}', readme)
    readme = readme.replace(code_span(before), code_span(now)).replace(f"{HAND_ON}\n\n", "")
    return readme.replace(f"{DIFFERING_RANKS}\n\n", "") if uniform else readme


def line_of(readme: str, begins: str) -> str | None:
    """What stands behind the = of a README's line, in Python; None where there is no such line."""
    found = re.search(rf"(?m)^{re.escape(begins)} = (.*)$", readme)
    return None if found is None else found[1]


def _has(folder: Path, key: str) -> bool:
    return bool(json.loads((folder / CONFIG).read_text(encoding="utf-8"))[key])


def _export(folder: Path, model: TrainableModel, base: str, mean_pooled: bool) -> None:
    """The tensors, as PEFT reads them; of a head that is none of the base's a file of its own."""
    spec = model.spec
    layers = factored_layers(model.module)
    first = adaptable_layers(model.module, "all-linear")[0] if not layers else None
    # A head that is a module of its own is saved as one; a layer drawn before it (a pooler's) by itself.
    saved = {name.split(".")[0] if name.split(".")[0] in HEADS else name for name in model.heads}
    ours: dict[str, torch.Tensor] = {
        f"{name}.{part}": tensor
        for name in model.heads
        for part, tensor in model.module.get_submodule(name).named_parameters(recurse=False)
    }
    head = in_units(ours, model.heads[-1:], spec.shift, spec.step)
    placeholder = None
    if first is not None:
        bare = model.module.get_submodule(first)
        placeholder = (_inner(first, mean_pooled), *widths(bare), isinstance(bare, Conv1D))
    task: TaskType | None = TaskType.SEQ_CLS if spec.headed else TaskType.CAUSAL_LM
    if mean_pooled or spec.code:  # PEFT's models for a task call a base with arguments that others do not know
        task = None
    export_lora(
        folder,
        {_inner(name, mean_pooled): layer for name, layer in layers.items()},
        base=base,
        task=task,
        head=None if mean_pooled else head,
        modules_to_save=() if mean_pooled else sorted(saved),
        placeholder=placeholder,
        slots={
            _inner(name, mean_pooled): replace(slot, parameter=_inner(slot.parameter, mean_pooled))
            for name, slot in slots(model.module).items()
        },
    )
    if mean_pooled:
        tensors = {name.rpartition(".")[2]: tensor.detach().clone().contiguous() for name, tensor in head.items()}
        save_file(tensors, folder / "head.safetensors")


def in_units(
    head: Mapping[str, torch.Tensor], last: Collection[str], shift: float, step: float
) -> dict[str, torch.Tensor]:
    """A head's tensors by name, such that what its `last` layer makes is multiplied by `step`, and moved by `shift`."""
    found = dict(head)
    for name in last:
        found[f"{name}.weight"] = (found[f"{name}.weight"].double() * step).float()
        if f"{name}.bias" in found:
            found[f"{name}.bias"] = (found[f"{name}.bias"].double() * step + shift).float()
    return found if (shift, step) != (0.0, 1.0) else dict(head)


def _inputs(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer has to be told to give, where by itself it gives more than the model takes; else nothing."""
    names = list(tokenizer.model_input_names)
    by_itself = tokenizer.init_kwargs.get("model_input_names") or type(tokenizer).model_input_names
    return names if set(by_itself) - set(names) else []


def render(template: str, **facts: Any) -> str:
    """A README of one of the templates."""
    environment = Environment(
        loader=PackageLoader("fedlotr.reporting", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"repr": repr, "code": code_span, "markdown": markdown, "visible": visible}
    return environment.get_template(template).render(facts)


def _inner(name: str, mean_pooled: bool) -> str:
    return name.removeprefix(ENCODER) if mean_pooled else name
