"""What a language model says: generation in batches, with a cache of keys and values, by transformers' own loop.

The likeliest token at each place (greedy), whatever sampling or penalties the model's generation configuration asks
for: what a model says before and after training differs by the training alone, and is the same each time. Or, with a
temperature, tokens drawn by a seed, from all of the vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from fedlotr.models.limits import most_positions
from fedlotr.training.model import TrainableModel

BATCH_TOKENS = 8192
"""Of a batch, prompts, padding and answers together: the cache of a model of 7 B in bfloat16 is then 4 GB."""
BATCH_ROWS = 64


def generate(
    model: TrainableModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    stops: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
    over: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The token ids with which the model goes on, for each prompt in its order, without the stop token that ended it.

    model: with its trained tensors as assigned. tokens: at most so many, and no more than the model has `positions` for
    behind the prompt. stops: as `stop_ids` finds them; without any, all rows are of the full length. temperature: what
    logits are divided by before a token is drawn, by the seed; 0: none is drawn. The same prompts together give the
    same draws.

    Prompts of similar length go together, padded on the left, where a model that is told of the padding sees none of
    it. Raises ValueError for a prompt without tokens, or with more than the model has positions for, and for a model
    that cannot generate.
    """
    if not can_generate(model.module):
        raise ValueError(f"a {type(model.module).__name__} cannot generate")
    limits = [room(model.module, prompt, tokens) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for rows in _batches([len(prompt) for prompt in prompts], limits):
            # One limit for all rows of a batch: a shorter prompt's answer must not be cut by a longer one beside it.
            answers = _batch(model, [prompts[row] for row in rows], limits[rows[0]], stops, temperature, over)
            for row, answer in zip(rows, answers, strict=True):
                found[row] = answer
    return found


def can_generate(module: nn.Module) -> bool:
    """Whether transformers knows how to go on from a prompt with it; a class of the caller's own may not tell."""
    return bool(getattr(module, "can_generate", bool)())


def positions(module: nn.Module) -> int | None:
    """How many tokens a model takes, by its configuration and its table of positions; None where neither says."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
    said = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]
    table = most_positions(module)
    return min([*said, *([] if table is None else [table])], default=None)


def room(module: nn.Module, prompt: Sequence[int], tokens: int) -> int:
    """How many tokens an answer may have, of so many that are wanted.

    Raises ValueError for a prompt that leaves none, or has none itself.
    """
    if not prompt:
        raise ValueError("a prompt has no tokens; a model goes on from one at least")
    most = positions(module)
    left = tokens if most is None else min(tokens, most - len(prompt))
    if left < 1:
        raise ValueError(f"a prompt has {len(prompt)} tokens, and the model {most} positions, its answer's among them")
    return left


def stop_ids(module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end what a model says, in order.

    All of its generation configuration, the tokenizer's end of a sequence and, of a tokenizer with a chat template, the
    one by which that ends what an assistant says.
    """
    config: Any = getattr(module, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    ends = [*(given if isinstance(given, list | tuple) else [given]), tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return tuple(sorted({int(token) for token in ends if isinstance(token, int)}))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token behind an assistant's words in the tokenizer's chat template; None where there is none.

    Plain text never ends a turn here: it would end any text that holds it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = "fedlotr"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program of others: some take no conversation of this form
        return None
    _, _, after = text.rpartition(answer)
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return next((int(token) for token in ids if token in special), None)


def _batches(lengths: Sequence[int], limits: Sequence[int]) -> Iterator[list[int]]:
    """The rows, each once: of equal limits, by length, and no batch larger than `BATCH_TOKENS`, but of a single row."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (limits[row], lengths[row])):
        full = (len(batch) + 1) * (lengths[row] + limits[row]) > BATCH_TOKENS or len(batch) == BATCH_ROWS
        if batch and (full or limits[row] != limits[batch[0]]):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _batch(
    model: TrainableModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    stops: Collection[int],
    temperature: float,
    over: Callable[[list[int]], bool] | None,
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), model.spec.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=model.spec.pad_id,
        disable_compile=True,
    )
    device, ended = model.device, None if over is None else _Over(over, stops, ids)
    with _configured(cast(Any, model.module), config), _frugal(model.module), torch.no_grad():
        whole = cast(Any, model.module).generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=[] if ended is None else [ended],
        )
    ends = [None] * len(prompts) if ended is None else ended.ends
    return [_until(answer[:end], stops) for answer, end in zip(whole[:, width:].tolist(), ends, strict=True)]


class _Over(StoppingCriteria):
    """Ends the rows of a batch whose answers are over. ends: how many tokens of each count; None: all."""

    def __init__(self, over: Callable[[list[int]], bool], stops: Collection[int], prompts: torch.Tensor) -> None:
        self.ends: list[int | None] = [None] * len(prompts)
        self._over, self._stops, self._width = over, stops, prompts.shape[1]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, answer in enumerate(input_ids[:, self._width :].tolist()):
            if self.ends[row] is None and (answer[-1] in self._stops or self._over(answer)):
                self.ends[row] = len(answer)
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


def _until(answer: list[int], stops: Collection[int]) -> list[int]:
    """What stands before the first stop token."""
    return answer[: next((at for at, token in enumerate(answer) if token in stops), len(answer))]


@contextmanager
def _frugal(module: Any) -> Iterator[None]:
    """In the block the model keeps no more at once than transformers' own would.

    It attends as transformers has it by default (training does by whole matrices, which is quicker in bfloat16), and
    the last states come to the output layer in one piece: of a slice a product would lay out the vocabulary's matrix
    for every row.
    """
    output, before = module.get_output_embeddings(), module.config._attn_implementation
    if getattr(module, "_supports_sdpa", False):
        module.config._attn_implementation = "sdpa"
    with ExitStack() as stack:
        stack.callback(setattr, module.config, "_attn_implementation", before)
        if output is not None:
            whole = output.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))
            stack.callback(whole.remove)
        yield


@contextmanager
def _configured(module: Any, config: GenerationConfig) -> Iterator[None]:
    """In the block the model has this generation configuration: of its own, `generate` would take what is left open."""
    before = module.generation_config
    module.generation_config = config
    try:
        yield
    finally:
        module.generation_config = before
