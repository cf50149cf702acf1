"""A run's model as plain weights: the base, with its adapter merged into it, by PEFT, as transformers saves models."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedlotr.adapters.layer import widths
from fedlotr.adapters.quantised import dequantised, is_quantised, quantise
from fedlotr.adapters.start import CONFIG, HEAD, labels_of
from fedlotr.errors import InputError
from fedlotr.models.loading import head_names, linear_layers
from fedlotr.models.source import load_tokenizer, pad_id, read_architecture, supported_folder, vocabulary


@dataclass(frozen=True)
class Merged:
    """model: as a class of transformers. tokenizer: as the run used it. head: what reads a mean-pooled encoder out."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    head: Mapping[str, torch.Tensor] | None = None

    def save(self, folder: Path, dtype: str) -> None:
        """Write a folder that `from_pretrained` reads, its weights in a format such as float32."""
        with _quietly():
            self.model.to(getattr(torch, dtype)).save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        if self.head is not None:
            save_file({name: tensor.contiguous() for name, tensor in self.head.items()}, folder / HEAD)


def merge(adapter: Path | None, model: str, task: str, quantize: str = "none") -> Merged:
    """The merged model in float32, in eval mode, on the CPU.

    adapter: a folder that a run wrote; None: the base of a language model as it is. model: the base, as `--model` takes
    it. task: what the run trained it for. quantize: the form in which the run had its linear layers: what the adapter
    is then merged into is what these stood for.
    Raises InputError for a base that is not there, or not transformers' own.
    """
    base = supported_folder(model, "none", fetch=True)
    assert base is not None
    tokenizer = load_tokenizer(base, model)
    architecture = read_architecture(base, model)
    pad = pad_id(tokenizer, vocabulary(architecture))
    pooled = adapter is not None and (adapter / HEAD).is_file()
    options: dict[str, Any] = {}
    loader: Any = AutoModel if pooled else AutoModelForCausalLM
    if task != "causal-lm":
        if not pooled and adapter is not None:
            _check_class(adapter)
            names = labels_of(adapter)
            named = {"id2label": dict(enumerate(names)), "label2id": {name: row for row, name in enumerate(names)}}
            options = {**(named if names else {"num_labels": 1}), "pad_token_id": pad, "ignore_mismatched_sizes": True}
            loader = AutoModelForSequenceClassification
        tokenizer.pad_token_id, tokenizer.padding_side = pad, "right"
    with _quietly():
        dtype: Any = "auto" if quantize != "none" else torch.float32
        found: Any = loader.from_pretrained(base, dtype=dtype, local_files_only=True, use_safetensors=True, **options)
        _as_quantised(found, quantize)
        found = found.float()
        if adapter is not None:
            found = PeftModel.from_pretrained(found, str(adapter)).merge_and_unload()
    return Merged(found.eval(), tokenizer, load_file(adapter / HEAD) if pooled and adapter is not None else None)


def _check_class(adapter: Path) -> None:
    """Raises InputError where a classifier is no class of transformers', so that its base is the caller's own."""
    if '"task_type": "SEQ_CLS"' not in (adapter / CONFIG).read_text(encoding="utf-8"):
        raise InputError(
            "the base is a model class of the caller's own, which is not loaded here: adapter/README.md has the lines "
            "that load it, and merge_and_unload() of what they make is the merged model"
        )


def _as_quantised(model: nn.Module, form: str) -> None:
    """Put in the place of each linear layer's weight what it stands for in few bits, as the run had it, in place.

    Layers that were saved so become plain ones. The head and the output embedding are as they were.
    """
    heads = head_names(model)
    for name in linear_layers(model):
        layer = model.get_submodule(name)
        if is_quantised(layer):
            model.set_submodule(name, _plain(cast(nn.Linear, layer)))
        elif form != "none" and name not in heads:
            weight = cast(torch.Tensor, layer.weight)
            stood_for = dequantised(quantise(layer, form, torch.float32))
            weight.data = (stood_for.T if isinstance(layer, Conv1D) else stood_for).to(weight.dtype).contiguous()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        vars(model).pop("hf_quantizer", None)
        vars(model).pop("quantization_method", None)
        vars(model)["is_quantized"] = False


def _plain(layer: nn.Linear) -> nn.Linear:
    d_in, d_out = widths(layer)
    made = nn.Linear(d_in, d_out, bias=layer.bias is not None)
    made.weight = nn.Parameter(dequantised(layer).float(), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return made


@contextmanager
def _quietly() -> Iterator[None]:
    """Without bars, and transformers' warnings: of a head that is drawn, which the adapter's takes the place of, and of
    a property that PEFT asks for and transformers is about to rename."""
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
