"""A folder that stands for a model of which only the dimensions are here: what a run needs is reckoned with it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from fedlotr.cost.architectures import public_models
from fedlotr.errors import InputError
from fedlotr.models.source import CHAT_MODEL, PACKAGED, load_tokenizer, resolve_model


def hub_id_behind(model: str) -> str | None:
    """What a language model is called on the hub of which `--model` gives `cost`'s name; None for any other name."""
    row = public_models().get(model)
    if row is None or row["task"] != "causal-lm" or model in PACKAGED or Path(model).exists():
        return None
    return str(row["hub"])


@contextmanager
def stand_in(model: str) -> Iterator[Path]:
    """A folder with the configuration of a model that `hub_id_behind` knows, for as long as the context lasts.

    Its weights are a file of the right size in which no number is written, so it takes no room on the disk; they are
    not to be read. Its tokenizer is CHAT_MODEL's with the tokens that the model has an embedding for.
    Raises InputError where that one is not here.
    """
    try:
        own = resolve_model(CHAT_MODEL)
    except InputError as error:
        counted = f"tokens for {model} are counted by {CHAT_MODEL}'s"
        raise InputError([f"{counted}: {problem}" for problem in error.problems]) from error
    assert own is not None, "it was to be fetched"
    fields = dict(public_models()[model]["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with TemporaryDirectory(prefix="fedlotr-dimensions-") as name:
        folder = Path(name)
        config.save_pretrained(folder)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        _write_size(module, folder / "model.safetensors")
        write_tokenizer(load_tokenizer(own, CHAT_MODEL), int(config.vocab_size), folder)
        yield folder


def _write_size(module: nn.Module, path: Path) -> None:
    """The header of a safetensors file of a model's tensors in bfloat16, and as many bytes behind it, never written."""
    header, end = {}, 0
    for name, tensor in module.named_parameters():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> None:
    """A BPE's tokenizer less what has an id from `rows` on, and less the merges that make it or are made of it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    kept = {token: number for token, number in whole["model"]["vocab"].items() if number < rows}
    whole["model"]["vocab"] = kept
    merges = whole["model"]["merges"]
    whole["model"]["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= kept.keys()]
    path.write_text(json.dumps(whole), encoding="utf-8")
