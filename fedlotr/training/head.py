"""Fitting the classification head on the public examples, so that every method starts from the same, sensible head."""

from typing import Any

import torch

from fedlotr.training.examples import Examples
from fedlotr.training.model import TrainableModel, example_losses
from fedlotr.training.packing import EVALUATION_TOKENS, Rows, pack
from fedlotr.training.varlen_pass import ragged_batches

RIDGE = 1e-2
"""Weight of half the squared norm of the head's weights beside the mean loss."""
ITERATIONS = 100


def fit_head(model: TrainableModel, examples: Examples, rows: Rows) -> None:
    """Fit the head in place by L-BFGS on the mean cross-entropy, the base frozen; its features are computed once.

    Where `classifier` or `score` is one linear layer this is ridge-regularised logistic regression: convex, so the
    result does not depend on where it starts. Does nothing without a head or without rows.
    """
    if not model.heads or not len(rows):
        return
    # Layers that stand apart before it (a pooler that was drawn) make the features, and stay as they are.
    root = model.module.get_submodule(model.heads[-1].split(".")[0])
    features: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    labels = []
    seen: dict[str, torch.Tensor] = {}
    hook = root.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
    try:
        with torch.no_grad():
            for _, ragged in ragged_batches(model, examples, rows, EVALUATION_TOKENS) if model.takes_ragged else ():
                with model.taking(ragged):
                    model.logits(ragged)
                once = torch.zeros(len(ragged.labels), dtype=torch.int64, device=model.device)
                features.append((seen["features"].float(), once, ragged.labels))  # which has one vector of each row
                labels.append(ragged.labels)
            for chosen in () if model.takes_ragged else pack(examples.lengths[rows], EVALUATION_TOKENS):
                batch = examples.batch(rows[chosen], model.spec.pad_id).to(model.device)
                model.logits(batch)
                features.append((seen["features"].float(), batch.attention_mask.sum(1) - 1, batch.labels))
                labels.append(batch.labels)
    finally:
        hook.remove()
    count = sum(len(part) for part in labels)
    parameters = list(root.parameters())
    weights = [p for p in parameters if p.dim() == 2]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = sum((0.5 * RIDGE * w.square().sum() for w in weights), torch.zeros(()))
        for hidden, last, target in features:
            logits = root(hidden)
            if logits.dim() == 3:  # one row of logits a token: decoders are read out at the last one
                logits = logits[torch.arange(len(last), device=last.device), last]
            loss = loss + example_losses(logits, target).sum() / count
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
