"""How a model reads packed sequences, found by trying: packed against one by one, on the frozen base itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from fedlotr.adapters.experts import silence
from fedlotr.adapters.layer import FactoredLayer
from fedlotr.adapters.packed import Spans, packed
from fedlotr.models.limits import first_positions
from fedlotr.models.loading import MeanPooledClassifier, head_layers
from fedlotr.training.examples import Examples
from fedlotr.training.own_attention import teach
from fedlotr.training.readout import head_logits, trunk_of, trunk_states
from fedlotr.training.varlen import Ragged, Reading, ReadOut
from fedlotr.training.varlen_attention import attending

LENGTHS = (9, 23, 1, 14, 9)
"""Tokens of the sequences that are tried: of several groups in attention, and some longer than `WINDOW`."""
BLANKS = (4, 31)
"""Which of their tokens are padding that stands in a text, as some tokenizers have it: in one, and the last of one."""
WINDOW = 5
"""What a longer window is while a model is tried; shorter than most sequences, so that it is seen to be kept."""
WINDOWS = ("window", "local_attention", "chunk_size")
"""In the name of what says how far a token sees, in tokens, in a configuration or in an attention layer."""
OTHERS = ("layers", "pattern")
"""In the name of what says which layers have a window."""
SHARED = 8
"""Tokens that two of them have in common, where such are tried: more than `WINDOW`."""
HARDEST = 1024
"""Token ids that are tried are below this: any vocabulary's beginning."""
ROWS = np.arange(len(LENGTHS))


def reading_of(model: nn.Module, pad_id: int, *, headed: bool, whole: bool) -> Reading | None:
    """How packed sequences are to be shown to a model, so that it does with each what it does with that one alone.

    None where it was not seen to, up to rounding, without its adapters: in the states of all tokens and, with a head
    (here of random numbers), in the logits. Below float32 without experts too, whom a rounding chooses.
    The same in every process: it depends on the frozen base alone. On the meta device, which has no values, a model
    whose attention is asked to keep sequences apart is taken at its word.

    headed: whether a head reads it out. whole: whether it is the logits of a language model that are compared.
    """
    trunk = trunk_of(model)
    examples = _sequences(trunk, pad_id)
    if examples is None:
        return None
    teach(model)
    states: Callable[..., torch.Tensor] = _logits(model) if whole else lambda **inputs: trunk_states(trunk, **inputs)
    quiet = nullcontext() if next(trunk.parameters()).dtype == torch.float32 else silence(trunk)
    with torch.no_grad(), _bare(model), _short_windows(trunk), _drawn_head(model), quiet:
        for first in first_positions(trunk):
            try:
                found = _tried(model, states, examples, Reading(first, pad_id=pad_id), headed=headed)
            except Exception:  # whatever a model of anyone's does not like about packed sequences, it is given others
                continue
            if found is not None:
                return found
    return None


def _tried(
    model: nn.Module, states: Callable[..., torch.Tensor], examples: Examples, reading: Reading, *, headed: bool
) -> Reading | None:
    """The reading with what is read out; None where anything differs."""
    device = next(model.parameters()).device
    kinds: tuple[ReadOut | None, ...] = (None,)
    if headed:
        kinds = ("mean",) if isinstance(model, MeanPooledClassifier) else get_args(ReadOut)
    batch = Ragged.of(examples, ROWS, replace(reading, read_out=kinds[0])).to(device)
    with packed(Spans([batch.tokens])), attending(model, batch.attendance):
        found = states(input_ids=batch.input_ids, position_ids=batch.position_ids)
    if not batch.attendance.asked or device.type == "meta":
        return replace(reading, read_out=kinds[0]) if batch.attendance.asked else None
    alone = [examples.batch([row]).to(device) for row in range(len(LENGTHS))]
    singles = [{"input_ids": one.input_ids, "attention_mask": one.attention_mask} for one in alone]
    each = torch.split(found[0], [*LENGTHS, batch.filler])
    eps = torch.finfo(found.dtype).eps
    if not all(_alike(part, states(**single)[0], eps) for part, single in zip(each, singles, strict=False)):
        return None
    if len(kinds) == 1:
        reading = replace(reading, read_out=kinds[0])
        return replace(reading, branches=not headed and not reading.first and _branch(model, states, examples, reading))
    wanted = torch.cat([getattr(output := model(**single), "logits", output) for single in singles])
    for kind in kinds:
        batch = Ragged.of(examples, ROWS, replace(reading, read_out=kind)).to(device)
        with packed(Spans([batch.tokens])):
            logits = head_logits(model, found, batch)
        if _alike(logits, wanted, eps):
            return replace(reading, read_out=kind)
    return None


def _branch(model: nn.Module, states: Callable[..., torch.Tensor], examples: Examples, reading: Reading) -> bool:
    """Whether two sequences with one beginning are what each is by itself, though the beginning is shown once."""
    device = next(model.parameters()).device
    one, other = (examples.tokens[examples.offsets[row] :][: LENGTHS[row]] for row in (1, 3))
    other = np.concatenate([one[:SHARED], other])
    firsts = np.full(2, SHARED + 1)  # the first target: the token before it is each one's own
    pair = Examples(np.concatenate([one, other]), np.cumsum([0, len(one), len(other)]), firsts, causal=True)
    batch = Ragged.of(pair, np.arange(2), reading, [2]).to(device)
    try:
        with packed(Spans([batch.tokens])), attending(model, batch.attendance):
            found = states(input_ids=batch.input_ids, position_ids=batch.position_ids)[0]
    except Exception:  # as in `reading_of`
        return False
    begin, own, others = torch.split(found, [SHARED, len(one) - SHARED, batch.tokens - len(one)])
    for row, part in ((0, own), (1, others[: len(other) - SHARED])):
        single = pair.batch([row]).to(device)
        wanted = states(input_ids=single.input_ids, attention_mask=single.attention_mask)[0]
        if not _alike(torch.cat([begin, part]), wanted, torch.finfo(found.dtype).eps):
            return False
    return True


def _alike(found: torch.Tensor, wanted: torch.Tensor, eps: float) -> bool:
    """Up to the root of a rounding: far above what roundings add up to, far below what another token changes."""
    return bool((found.float() - wanted.float()).norm() <= eps**0.5 * wanted.float().norm())


def _logits(model: nn.Module) -> Callable[..., torch.Tensor]:
    def logits(**inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(**inputs, use_cache=False).logits
        return found

    return logits


def _sequences(model: nn.Module, pad_id: int) -> Examples | None:
    """Some sequences of random tokens; None for a model that does not read tokens."""
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers does not find one in a class of the caller's own
        return None
    words = getattr(embedding, "num_embeddings", 0)
    if not words or not hasattr(model, "config"):
        return None
    offsets = np.cumsum([0, *LENGTHS])
    tokens = np.random.default_rng(0).integers(min(3, words - 1), min(words, HARDEST), offsets[-1])
    tokens[list(BLANKS)] = pad_id if 0 <= pad_id < words else 0
    return Examples(tokens.astype(np.int32), offsets, np.ones(len(LENGTHS), np.int64), causal=True)


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The base alone: adapters may not be filled yet, and are another's in every process."""
    layers = [layer for layer in model.modules() if isinstance(layer, FactoredLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@contextmanager
def _drawn_head(model: nn.Module) -> Iterator[None]:
    """The layer that makes a head's logits has random weights meanwhile: a new head's are zero, and show nothing."""
    chosen = [layer.weight for layer in list(head_layers(model).values())[-1:] if not layer.weight.is_meta]
    before = [weight.detach().clone() for weight in chosen]
    try:
        for weight in chosen:
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        yield
    finally:
        for weight, was in zip(chosen, before, strict=True):
            weight.copy_(was)


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Windows that no sequence here would fill are shorter meanwhile, in the configuration and in the layers.

    A layer's is what the model's class makes of the shorter configuration, since some add one, or halve it.
    """
    holders: list[dict[str, Any]] = [module.__dict__ for module in model.modules()]
    config: dict[str, Any] = model.config.__dict__
    before = [(holder, *window) for holder in (config, *holders) for window in _windows(holder)]
    try:
        for name, value in _windows(config):
            config[name] = min(value, WINDOW)
        if any(value > WINDOW for _, _, value in before):
            _as_made_of_it(model)
        yield
    finally:
        for holder, name, value in before:
            holder[name] = value


def _as_made_of_it(model: nn.Module) -> None:
    """Give the layers the windows that the model's class makes of its configuration; others are `WINDOW` at most."""
    try:
        with torch.device("meta"):
            made = dict(type(model)(deepcopy(model.config)).named_modules())
    except Exception:  # a class of anyone's may take what it likes
        made = {}
    for path, module in model.named_modules():
        for name, value in _windows(module.__dict__):
            found = getattr(made.get(path), name, value)
            module.__dict__[name] = min(value, WINDOW) if found == value else found


def _windows(holder: dict[str, Any]) -> list[tuple[str, int]]:
    """By name how long the windows are that it holds."""
    return [
        (name, value)
        for name, value in holder.items()
        if any(word in name for word in WINDOWS) and not any(word in name for word in OTHERS) and type(value) is int
    ]
