"""The loss of a language model from its last hidden states, a few tokens' logits at a time.

Logits over a large vocabulary are the largest thing in a pass: 2,048 tokens of 128,000 words are 1 GB in float32, their
gradient as much again. The output layer is frozen, so all that its loss has to hand down is the gradient of the hidden
states, and that is computed beside the loss, chunk by chunk.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn
from transformers import PreTrainedModel

from fedlotr.training.examples import IGNORED

CHUNK_LOGITS = 2**25
"""Numbers in the logits that exist at a time: 128 MB in float32."""


class TokenLosses(torch.autograd.Function):
    """(n,) float32: -log softmax(W h + b) at each token's target. Of `hidden` alone there is a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """hidden (n, d), targets (n,), the output layer's weight (vocabulary, d) and bias."""
        wanted = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else hidden
        for part in _chunks(len(hidden), len(weight)):
            target = targets[part].unsqueeze(1)
            # Less the largest logit first, as torch has it: a logarithm that is not small would cost digits.
            logs = F.linear(hidden[part], weight, bias).float().log_softmax(1)
            chosen = logs.gather(1, target)
            losses[part] = -chosen.squeeze(1)
            if wanted:  # softmax(logits) - one-hot(target)
                slopes = logs.exp_().scatter_add_(1, target, torch.full_like(chosen, -1))
                gradient[part] = slopes.to(weight.dtype) @ weight
        if wanted:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Any:
        """What `forward` has prepared, times the gradients of the losses."""
        (gradient,) = ctx.saved_tensors
        return (gradient * above[0].unsqueeze(1)).to(gradient.dtype), None, None, None


def target_losses(hidden: torch.Tensor, labels: torch.Tensor, output: nn.Linear) -> torch.Tensor:
    """(rows, length) the loss of each token that is a target, 0 of the others.

    hidden: (rows, length, d), what `output` makes logits of. labels: (rows, length), `IGNORED` where no loss.
    """
    wanted = labels != IGNORED
    tokens = cast(
        torch.Tensor,
        TokenLosses.apply(hidden[wanted], labels[wanted], output.weight, output.bias),  # type: ignore[no-untyped-call]
    )
    return torch.zeros(labels.shape, dtype=tokens.dtype, device=tokens.device).masked_scatter(wanted, tokens)


def predictions(hidden: torch.Tensor, labels: torch.Tensor, output: nn.Linear) -> torch.Tensor:
    """(rows, length) the likeliest token at each place with a target, `IGNORED` at the others."""
    wanted = labels != IGNORED
    asked = hidden[wanted]
    likeliest = torch.empty(len(asked), dtype=labels.dtype, device=labels.device)
    for part in _chunks(len(asked), output.out_features):
        likeliest[part] = F.linear(asked[part], output.weight, output.bias).argmax(1)
    return torch.full_like(labels, IGNORED).masked_scatter(wanted, likeliest)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return (slice(at, min(at + size, tokens)) for at in range(0, tokens, size))


def plain_output(model: nn.Module) -> nn.Linear | None:
    """The layer that makes a language model's logits of its last hidden states, if nothing else comes between.

    Found by trying: some architectures scale or squash their logits. On the meta device, which has no values, a
    layer of the right kind is taken at its word.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(model, PreTrainedModel) or type(output) is not nn.Linear or model.base_model is model:
        return None
    if output.weight.is_meta:
        return output
    ids = torch.arange(2, device=output.weight.device).unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with torch.no_grad():
            whole, own = model(**inputs, use_cache=False).logits, output(last_hidden(model, **inputs))
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a class of the caller's may give and take others
        return None
    return output if torch.equal(whole, own) else None


def last_hidden(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """(rows, length, d) of the model below its output layer."""
    found: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return found
